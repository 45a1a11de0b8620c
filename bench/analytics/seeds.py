"""The same work for many seeds on a few processes, each told as it ends.

What must stay true: what is found depends on the seed alone, not on which process did it nor on what ended first.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, TypeVar

from bench.peers import BenchError

FIRST_SEED: Final = 20_000
"""Of the simulated fleets of this bench: nothing was tuned on them."""

Size = TypeVar("Size")


def each_seed(
    seeds: int,
    processes: int,
    work: Callable[[int, Size], dict[str, Any]],
    size: Size,
    *,
    said: Callable[[int, dict[str, Any]], str],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """What `work` returns for each of so many seeds, in their order.

    Args:
        processes: 1 is this one.
        work: a function of a module, so that other processes find it.
        said: the line that tells what came of a seed.

    Raises:
        BenchError: one of the other processes was killed.
    """
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    found: dict[int, dict[str, Any]] = {}

    def took(seed: int, one: dict[str, Any]) -> None:
        found[seed] = one
        say(f"{said(seed, one)} ({len(found)} of {seeds})")

    if processes == 1:
        for seed in numbers:
            took(seed, work(seed, size))
    else:
        # spawned, not forked: the caller may have threads
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            running = {pool.submit(work, seed, size): seed for seed in numbers}
            for done in as_completed(running):
                try:
                    took(running[done], done.result())
                except BrokenProcessPool as error:
                    raise BenchError(f"a process ended before its time, {len(found)} of {seeds} seeds done") from error
    return [found[seed] for seed in numbers]
