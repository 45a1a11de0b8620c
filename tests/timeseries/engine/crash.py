"""`make crash`: kills a writing process again and again, and checks each time that every acknowledged point is there.

A store lives through `ROUNDS_OF_A_STORE` deaths of the process of crash_writer.py; after each an engine is opened on
what it left, its points and roll-ups are compared with the oracle (history.py, rolled.py), and every byte is verified.
`kill -9` does not lose what the page cache holds: for that there is test_power_loss.py.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings
from tests.timeseries.engine import crash_writer
from tests.timeseries.engine.history import DAY_MS, Eviction, History
from tests.timeseries.engine.lives import some_aggregations, unshipped
from tests.timeseries.engine.model import Answer, everything
from tests.timeseries.engine.rolled import rolled_faults
from tests.timeseries.stores import verify

ROOT: Final = Path(__file__).parents[3]
FIRST_DAY_MS: Final = 19_700 * DAY_MS
QUIET: Final = EngineSettings(maintenance_interval_s=1e9)
ROUNDS_OF_A_STORE: Final = 20
LIVES_AT_MOST_S: Final = 1.2
MADE_SHARE: Final = 0.1
"""After so many rounds all that is due is done, and roll-ups are looked at once more."""
STARTS_WITHIN_S: Final = 60.0


@dataclass(slots=True)
class Tally:
    """What happened in all rounds; `died_in` counts the phases that the process was in when it died."""

    rounds: int = 0
    points: int = 0
    batches: int = 0
    evictions: int = 0
    ends: int = 0
    excused: int = 0
    died_in: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class Store:
    """A store, everything that was noted about it, and the rounds that it lives through."""

    folder: Path
    kind: str
    rng: random.Random
    bug: str = ""
    lives_at_most_s: float = LIVES_AT_MOST_S
    history: History = field(default_factory=History)
    remote: set[tuple[str, str, int]] | None = None
    number: int = 1
    now_ms: int = FIRST_DAY_MS
    _noted: int = 0

    async def round(self, tally: Tally) -> list[str]:
        """Lets the process live and die; returns what is wrong then."""
        await asyncio.to_thread(self._live_and_die)
        inside, misnumbered = self._read_notes(tally)
        tally.rounds += 1
        tally.died_in.update(inside or ["nothing"])
        moment = self.history.moment()
        data, clock = self.folder / "data", ManualClock(self.now_ms)
        made = self.rng.random() < MADE_SHARE
        async with Engine.open(data, clock=clock, settings=QUIET) as engine:
            found, status = await everything(engine), await engine.status()
            faults = misnumbered + self.history.faults(found, status, moment)
            faults += await unshipped(engine, status, self.remote, self.history)
            faults += await rolled_faults(engine, self.history, moment, some_aggregations(self.rng))
            if made and not faults:
                await engine.maintain(everything=True)
                faults += await rolled_faults(engine, self.history, moment)
        faults += verify(data)[1]
        if not faults:
            self.history.settle(found, status, moment)
        tally.points += _count(found)
        return faults

    def _live_and_die(self) -> None:
        words = (self.folder, self.number, self.now_ms, self.rng.randrange(1 << 30), self.kind, self.bug)
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", crash_writer.__name__, *map(str, words)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_for_opening(process)
            with suppress(subprocess.TimeoutExpired):  # how long it may live is the random input, nothing is waited for
                process.wait(self.rng.random() * self.lives_at_most_s)
        finally:
            process.kill()
            process.wait()
        assert process.returncode < 0, f"it ended by itself: {(self.folder / 'log').read_text()[-3_000:]}"

    def _wait_for_opening(self, process: "subprocess.Popen[bytes]") -> None:
        ends = time.monotonic() + STARTS_WITHIN_S
        notes = self.folder / "notes"
        while not notes.exists() or notes.stat().st_size <= self._noted:
            assert process.poll() is None and time.monotonic() < ends, (self.folder / "log").read_text()[-3_000:]
            time.sleep(0.002)

    def _read_notes(self, tally: Tally) -> tuple[list[str], list[str]]:
        """Takes the notes of a round into the history; returns the phases that the process died in, and what was
        acknowledged under another sequence than it has."""
        with (self.folder / "notes").open("rb") as notes:
            notes.seek(self._noted)
            lines = notes.read().decode().splitlines()
            self._noted = notes.tell()
        inside: Counter[str] = Counter()
        history, noted, acknowledged = self.history, dict[int, int](), dict[int, int]()
        for line in lines:
            letter, _, rest = line.partition(" ")
            match letter:
                case "O":
                    assert int(rest) == len(history.sent), "it begins where the last round ended"
                case "s":
                    words = rest.split()
                    number, self.now_ms = int(words[0]), int(words[1])
                    of_set, rows = crash_writer.batch(number, self.now_ms)
                    history.sent.append((of_set, rows.select(np.array([kept == "1" for kept in words[2]]))))
                    noted[number] = len(history.sent)
                    self.number = max(self.number, number + 1)
                case "a":
                    number, sequence = map(int, rest.split())
                    acknowledged[number] = sequence
                    history.acknowledged = max(history.acknowledged, sequence)
                    tally.batches += 1
                case "e":
                    tier, day, days, through = map(int, rest.split())
                    history.evictions.append(Eviction(range(day, day + days), through, tier))
                case "E":
                    tier, day, days, through = map(int, rest.split())
                    gone = Eviction(range(day, day + days), through, tier)
                    history.evictions[history.evictions.index(gone)].done = True
                    tally.evictions += tier == 0
                    tally.ends += tier > 0
                case "x":
                    day, days = map(int, rest.split())
                    history.excused.update(range(day, day + days))
                    tally.excused += 1
                case "F":
                    self.remote = self.remote or set()
                case "r":
                    assert self.remote is not None
                    self.remote.update(map(tuple, json.loads(rest)))
                case ">":
                    inside[rest] += 1
                case "<":
                    inside[rest] -= 1
        misnumbered = [
            f"batch {noted[number]} was acknowledged as {sequence}"
            for number, sequence in acknowledged.items()
            if noted.get(number, sequence) != sequence
        ]
        return [phase for phase, depth in inside.items() if depth], misnumbered


def _count(found: Answer) -> int:
    return sum(map(len, found.values()))


async def crash(
    folder: Path,
    rounds: int,
    seed: int,
    progress: Callable[[Tally], None],
    *,
    per_store: int = ROUNDS_OF_A_STORE,
    kinds: Sequence[str] = tuple(crash_writer.KINDS),
    bug: str = "",
    lives_at_most_s: float = LIVES_AT_MOST_S,
) -> tuple[Tally, list[str]]:
    """Runs the rounds, with a new store of another kind every `per_store`, up to the first fault, whose store stays."""
    tally, rng = Tally(), random.Random(seed)
    while tally.rounds < rounds:
        number = tally.rounds // per_store
        store = Store(
            folder=folder / f"store-{number}",
            kind=kinds[number % len(kinds)],
            rng=rng,
            bug=bug,
            lives_at_most_s=lives_at_most_s,
        )
        store.folder.mkdir()
        for _ in range(min(per_store, rounds - tally.rounds)):
            if faults := await store.round(tally):
                return tally, [f"seed {seed}, round {tally.rounds}, {store.folder}: {fault}" for fault in faults]
            progress(tally)
        shutil.rmtree(store.folder)
    return tally, []


def main() -> int:
    parser = argparse.ArgumentParser(prog="make crash", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    started, shown = time.monotonic(), [0.0]

    def progress(tally: Tally) -> None:
        took = time.monotonic() - started
        every = 0.0 if sys.stdout.isatty() else 10.0
        if took - shown[0] >= every or tally.rounds == options.rounds:
            shown[0] = took
            left_s = took / tally.rounds * (options.rounds - tally.rounds)
            line = (
                f"{tally.rounds} of {options.rounds} rounds, {tally.points:,} points checked,"
                f" {tally.evictions} days and {tally.ends} files of roll-ups evicted,"
                f" {tally.rounds / took:.1f} rounds/s, {left_s / 60:.1f} min left"
            )
            print(
                f"\r{line}\033[K" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True
            )

    folder = Path(tempfile.mkdtemp(prefix="openmanager-crash-"))
    print(f"seed {options.seed}, in {folder}", flush=True)
    tally, faults = asyncio.run(crash(folder, options.rounds, options.seed, progress))
    died = ", ".join(f"{phase} {count}" for phase, count in tally.died_in.most_common())
    print(f"\n{tally.batches:,} batches acknowledged, {tally.excused} days without their roll-ups; it died in: {died}")
    for fault in faults:
        print(fault)
    if not faults:
        print("every acknowledged point was there once, after each of them")
        shutil.rmtree(folder)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
