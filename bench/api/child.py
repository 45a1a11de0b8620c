"""Processes beside the bench that load and watch: so that none waits for another's interpreter.

    with child(work, argument) as it:     # def work(parent: Connection, argument) -> None
        it.hear(10.0)

What must stay true: a child that fails tells why where it is next heard, and is gone when its block is left.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from bench.peers import BenchError

JOIN_BOUND_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Failed:
    why: str


class Child:
    """The other end."""

    def __init__(self, connection: "Connection[Any, Any]", name: str) -> None:
        self._connection = connection
        self._name = name

    def tell(self, value: object) -> None:
        """Sends it something; what it has ended with is found out by `hear`."""
        with suppress(BrokenPipeError):
            self._connection.send(value)

    def hear(self, bound_s: float) -> Any:
        """What it says next.

        Raises:
            BenchError: it failed, or says nothing within the bound.
        """
        try:
            if not self._connection.poll(bound_s):
                raise BenchError(f"{self._name} says nothing within {bound_s:g} s")
            found = self._connection.recv()
        except EOFError:
            raise BenchError(f"{self._name} ended without a word") from None
        if isinstance(found, _Failed):
            raise BenchError(f"{self._name}: {found.why}")
        return found


@contextmanager
def child(work: Callable[..., None], *arguments: Any) -> Iterator[Child]:
    """Runs `work(parent, *arguments)` in a process of its own until it returns or the block is left."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    name = work.__name__
    process = context.Process(target=_main, args=(work, there, arguments), name=name, daemon=True)
    process.start()
    there.close()
    try:
        yield Child(here, name)
    finally:
        here.close()
        process.join(JOIN_BOUND_S)
        if process.is_alive():
            process.kill()
            process.join()


def _main(work: Callable[..., None], parent: "Connection[Any, Any]", arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        work(parent, *arguments)
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[0]
        with suppress(OSError):
            parent.send(_Failed(f"{type(cause).__name__}: {cause}"))
