"""Small stores for the tests of backup and verify, and the two called in short."""

import random
import shutil
from contextlib import closing
from pathlib import Path

import apsw

from runtime.clock import ManualClock
from services.timeseries.archive import backup
from services.timeseries.archive.verify import Damage, Verified, Verifier
from services.timeseries.engine import Engine, EngineSettings
from tests.timeseries.engine.model import Model, assert_same, everything, metric_set, rows

ROOT = Path(__file__).parents[2]
DAY_MS = 86_400_000
NOON = 19_700 * DAY_MS + DAY_MS // 2
SET = metric_set("cpu_usage", "requests_total", "memory_usage")
OTHER_SET = metric_set("load_1m")
QUIET = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, journal_keep_s=0.0)


def ignore(*_: object) -> None:
    """No progress is wanted."""


def back_up(store: Path, target: Path) -> backup.Manifest:
    return backup.back_up(store, target, now_ms=NOON, progress=ignore)


def restore(source: Path, target: Path) -> backup.Restored:
    target.mkdir(exist_ok=True)
    return backup.restore(source, target, settings=QUIET, clock=ManualClock(NOON), progress=ignore)


def verify(path: Path) -> tuple[Verified, list[str]]:
    found: list[Damage] = []
    verified = Verifier(path, found.append, ignore).run()
    assert verified.damages == len(found)
    return verified, [str(damage) for damage in found]


async def goes_on(store: Path, model: Model) -> None:
    """A restored engine gives no sequence and no number twice: what it acknowledges survives its next start."""
    async with Engine.open(store, clock=ManualClock(NOON), settings=QUIET) as engine:
        for of_set, server in ((SET, "a"), (OTHER_SET, "new-1"), (SET, "new-2")):
            batch = rows(of_set, [(server, NOON + 60_000, [7.0] * len(of_set))])
            await engine.append(batch, metric_sets=(of_set,))
            model.append(of_set, batch)
    async with Engine.open(store, clock=ManualClock(NOON), settings=QUIET) as engine:
        assert_same(await everything(engine), {name: sorted(points.items()) for name, points in model.series.items()})
        assert (await engine.status()).damaged == 0


async def fill(store: Path) -> Model:
    """Three servers, two days in blocks of columns, and one batch in the journal alone; roll-ups are frames."""
    model, rng, clock = Model(), random.Random(1), ManualClock(NOON)
    async with Engine.open(store, clock=clock, settings=QUIET) as engine:
        for day in range(2):
            for server in "abc":
                times = (NOON + day * DAY_MS + n * 1_000 for n in range(150))
                batch = rows(SET, [(server, at, [rng.random(), at % 977, rng.gauss(5, 1)]) for at in times])
                await engine.append(batch, metric_sets=(SET,))
                model.append(SET, batch)
        clock.advance(1)
        await engine.maintain(everything=True)
        batch = rows(SET, [("a", NOON + 200_000, [1.25, 2.5, 3.75])])
        await engine.append(batch)
        model.append(SET, batch)
    return model


def flip(path: Path, table: str, where: str, offset: int) -> None:
    """Changes one byte of a payload, which SQLite notices as little as if the disk had done it."""
    with closing(apsw.Connection(str(path))) as database:
        ((number, payload),) = database.execute(f"SELECT rowid, payload FROM {table} WHERE {where}").fetchall()
        at = offset % len(payload)
        with database.blob_open("main", table, "payload", number, True) as blob:
            blob.seek(at)
            blob.write(bytes([payload[at] ^ 0x10]))
        database.pragma("wal_checkpoint", "TRUNCATE")


def hide_blocks(partition: Path) -> int:
    """Exchanges the outer children of the page over the blocks, as a torn write may leave it: listed in turn the blocks
    are there, looked for by number those of these two pages are not. Returns how many blocks that are."""
    with closing(apsw.Connection(str(partition))) as database:
        ((root,),) = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'blocks'")
        page_bytes = database.pragma("page_size")
        numbers = [number for (number,) in database.execute("SELECT id FROM blocks")]
    data = bytearray(partition.read_bytes())
    page = (root - 1) * page_bytes
    assert data[page] == 0x05, "the table has an interior page"
    first = page + int.from_bytes(data[page + 12 : page + 14], "big")
    last = page + 8
    data[first : first + 4], data[last : last + 4] = data[last : last + 4], data[first : first + 4]
    partition.write_bytes(data)
    with closing(apsw.Connection(str(partition))) as database:
        found = [database.execute("SELECT 1 FROM blocks WHERE id = ?", (number,)).fetchall() for number in numbers]
    assert found.count([]) > 0
    return found.count([])


def as_before_roll_ups(folder: Path) -> None:
    """Makes of a store what the program that had points alone would have written."""
    for tier in ("rollup-5m", "rollup-1h"):
        shutil.rmtree(folder / tier)
    change = "DROP TABLE dirty; UPDATE meta SET value = 1 WHERE key = 'format_version'"
    changes = dict.fromkeys(folder.glob("*/*.db"), change)
    changes[folder / "journal.db"] = "DROP TABLE ended; DROP TABLE partitions"
    for path, change in changes.items():
        with closing(apsw.Connection(str(path))) as database:
            database.execute(change)
            database.pragma("wal_checkpoint", "TRUNCATE")
