"""What `python -m services.timeseries COMMAND` does: all that an operator does with a store beside serving it.

What must stay true: backup, verify, export and backfill change nothing in the store and may run while the service does;
restore runs only without it and only into an empty folder; import sends to the service, and writes itself only without
it; the exit status is 0 when all is well, 1 when something failed, is damaged or was not taken, 2 for a command that
makes no sense; and every refusal says what to do.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from runtime import folder
from runtime.clock import SystemClock
from runtime.errors import OpenManagerError
from runtime.settings import SettingsError
from services.timeseries.archive.backup import back_up, restore
from services.timeseries.archive.excerpt import READING
from services.timeseries.archive.manifest import BackupError
from services.timeseries.archive.verify import Damage, Verifier
from services.timeseries.arguments import parse
from services.timeseries.backfill import Backfill, BackfillError
from services.timeseries.backfill_state import State
from services.timeseries.engine.tiers import RAW, TIERS
from services.timeseries.external import TARGETS, backends, describe_target, histories
from services.timeseries.parquet.layout import ParquetError
from services.timeseries.progress import Reporter, count_text, size_text
from services.timeseries.settings import TimeSeriesSettings

NAME: Final = "timeseries"
_EXIT_OK, _EXIT_FAILED, _EXIT_USAGE = 0, 1, 2

_NO_PYARROW: Final = """\
export and import need pyarrow, which is not installed: run `make parquet` in the checkout, or
  .venv/bin/python -m pip install --require-hashes -r requirements-parquet.txt"""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    options = parse(arguments)
    try:
        settings = TimeSeriesSettings.load()
    except SettingsError as error:
        _complain("settings that make no sense: " + "; ".join(error.problems))
        return _EXIT_USAGE
    store = settings.data_dir / NAME
    try:
        return _run(settings, store, options)
    except (BackupError, ParquetError, BackfillError, folder.CannotStartError, OpenManagerError) as error:
        _complain(str(error))
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        _complain(_NO_PYARROW)
    except OSError as error:
        _complain(f"{error.filename or store}: {error.strerror or error}")
    except KeyboardInterrupt:
        _complain("interrupted")
    return _EXIT_FAILED


def _run(settings: TimeSeriesSettings, store: Path, options: argparse.Namespace) -> int:
    match options.command:
        case "backup":
            return _back_up(store, options.path)
        case "restore":
            return _restore(settings, options.path)
        case "verify":
            return _verify(options.path or store)
        case "export":
            return _export(store, options)
        case "backfill":
            return _backfill(settings, store, options)
        case _:
            return _import(settings, options.path)


def _back_up(store: Path, target: Path) -> int:
    started = time.monotonic()
    with Reporter(sys.stderr) as reporter:
        manifest = back_up(store, target, now_ms=SystemClock().now_ms(), progress=reporter.progress)
    _say(
        f"backup {target}: {len(manifest.files)} files, {size_text(manifest.bytes)}, through sequence"
        f" {manifest.last_sequence}, {time.monotonic() - started:.1f} s"
    )
    if not manifest.left_out:
        return _EXIT_OK
    _complain(
        f"left out, because they cannot be read or are gone: {', '.join(manifest.left_out)}. The rest can be restored;"
        " keep an older backup for these, and see `verify`"
    )
    return _EXIT_FAILED


def _restore(settings: TimeSeriesSettings, source: Path) -> int:
    started = time.monotonic()
    with folder.locked(settings.data_dir, NAME) as store, Reporter(sys.stderr) as reporter:
        restored = restore(source, store, settings=settings.engine(), clock=SystemClock(), progress=reporter.progress)
    manifest = restored.manifest
    _say(
        f"restored {store} from the backup of {manifest.created_time}: {len(manifest.files)} files,"
        f" {size_text(manifest.bytes)}, {restored.points:,} points, through sequence {manifest.last_sequence},"
        f" {time.monotonic() - started:.1f} s"
    )
    if manifest.left_out or restored.damaged:
        left_out = f"the backup was made without {', '.join(manifest.left_out)}. " if manifest.left_out else ""
        _complain(f"{left_out}{restored.damaged} damaged batches were left out; the rest can be served")
        return _EXIT_FAILED
    return _EXIT_OK


def _verify(path: Path) -> int:
    started = time.monotonic()
    with Reporter(sys.stderr) as reporter:

        def tell(damage: Damage) -> None:
            reporter.clear()
            _say(f"damaged: {damage}")

        verified = Verifier(path, tell, reporter.progress).run()
    for folder_name, totals in verified.tiers.items():
        things = "points" if folder_name == TIERS[RAW].folder else "buckets"
        _say(
            f"{path / folder_name}: {totals.partitions} partitions, {totals.blocks:,} blocks,"
            f" {totals.points:,} {things} in them"
        )
    _say(
        f"{path}: {verified.batches:,} batches in the journal, {size_text(verified.bytes)} in all,"
        f" {time.monotonic() - started:.1f} s: {'nothing' if not verified.damages else verified.damages} damaged"
    )
    if verified.damages:
        _complain(
            "reads leave out what is damaged and answer the rest; to have it back, restore a backup that verifies"
        )
        return _EXIT_FAILED
    return _EXIT_OK


def _export(store: Path, options: argparse.Namespace) -> int:
    from services.timeseries.parquet.exporting import Wanted, export  # noqa: PLC0415  pyarrow is an extra

    wanted = Wanted(
        servers=options.servers or None,
        metrics=options.metrics or None,
        start_ms=options.start,
        end_ms=options.end,
    )
    started = time.monotonic()
    with Reporter(sys.stderr) as reporter:
        manifest = export(
            store,
            options.path,
            wanted,
            clock=SystemClock(),
            copying=reporter.progress,
            progress=reporter.points,
        )
    _say(
        f"export {options.path}: {len(manifest.files)} files, {manifest.points:,} points, {size_text(manifest.bytes)},"
        f" {manifest.first_time} to {manifest.last_time}, {time.monotonic() - started:.1f} s"
    )
    if not manifest.left_out and not manifest.damaged:
        return _EXIT_OK
    names = ", ".join(manifest.left_out) or "no day"
    _complain(
        f"left out, because they cannot be read or are gone: {names}, and {manifest.damaged} blocks of other days."
        " `verify` names them; to have them, restore a backup and export that"
    )
    return _EXIT_FAILED


def _import(settings: TimeSeriesSettings, path: Path) -> int:
    from services.timeseries.parquet.importing import Importer, target_of  # noqa: PLC0415  pyarrow is an extra

    started, clock = time.monotonic(), SystemClock()
    with Reporter(sys.stderr) as reporter:
        importer = Importer(path, clock, reporter.points)
        book = importer.book

        async def run() -> str:
            async with target_of(settings, clock) as (target, name):
                await importer.run(target)
                return name

        try:
            name = asyncio.run(run())
        except (OpenManagerError, KeyboardInterrupt) as error:
            reporter.clear()
            _complain(
                f"{str(error) or 'interrupted'}. {book.taken:,} points were taken and stay; import again to go on:"
                " what is there already is not doubled"
            )
            return _EXIT_FAILED
    seconds = time.monotonic() - started
    more = f", {book.without_value:,} without a value" if book.without_value else ""
    more += f", {book.repeated:,} repeated" if book.repeated else ""
    _say(
        f"import {path}: {book.taken:,} points of {book.rows:,} rows{more}, into {name}, {seconds:.1f} s,"
        f" {count_text(book.taken / seconds)} points/s"
    )
    for line in (*book.lines(), *book.damaged):
        _say(line)
    if not book.not_taken and not book.damaged:
        return _EXIT_OK
    _complain(f"{book.not_taken:,} rows were not taken, for the reasons above; everything else is stored")
    return _EXIT_FAILED


def _backfill(settings: TimeSeriesSettings, store: Path, options: argparse.Namespace) -> int:
    name, clock, started = options.to, SystemClock(), time.monotonic()
    backend = next((one for one in backends(settings, clock) if one.name == name), None)
    if backend is None:
        raise BackfillError(f"{TARGETS[name]} is not set: set up {name} here as the service has it")
    target = describe_target(settings, name)
    with folder.locked(settings.data_dir, f"backfill-{name}") as own, Reporter(sys.stderr) as reporter:
        state = None if options.restart else State.load(own)
        if state is None or not state.goes_on(target, options.words):
            end_ms = clock.now_ms() if options.until is None else options.until
            state = State(target=target, options=options.words, start_ms=options.start, end_ms=end_ms)
        else:
            _say(f"goes on with what was interrupted, after {state.points:,} points")

        def tell(text: str) -> None:
            reporter.clear()
            _complain(text)

        async def run(state: State) -> None:
            readers = histories(settings, clock, READING)
            backfill = Backfill(
                store,
                own,
                backend,
                state,
                rate=options.rate,
                servers=tuple(options.servers) if options.servers else None,
                clock=clock,
                progress=reporter.points,
                tell=tell,
                reader=next((one for one in readers if one.name == name), None) if options.verify else None,
            )
            try:
                await backfill.run()
            finally:
                await backend.close()
                for reader in readers:
                    await reader.close()

        try:
            asyncio.run(run(state))
        except (OpenManagerError, KeyboardInterrupt) as error:
            reporter.clear()
            _complain(
                f"{str(error) or 'interrupted'}. {state.points:,} points are copied; call it again, without --restart,"
                " to go on"
            )
            return _EXIT_FAILED
    return _report(state, time.monotonic() - started, verified=options.verify)


def _report(state: State, seconds: float, *, verified: bool) -> int:
    again = f", {state.again:,} of them written anew meanwhile" if state.again else ""
    _say(f"backfill {state.target}: {state.points:,} points{again}, {seconds:.1f} s")
    for reason, points in sorted(state.refused.items()):
        _say(f"refused: {points:,} points, {reason}")
    if state.likely:
        _say(
            f"likely: {state.likely:,} points got the oldest environment and role that are known of their servers; what"
            " was valid when they were written is forgotten"
        )
    for date, server_id, here, there in state.short:
        _say(f"short: {date} {server_id}: {here:,} points here, {there:,} there")
    if verified and not state.short:
        _say("verified: each server has as many points there, or more, on every day")
    if state.unseen:
        _complain(
            f"{state.unseen} batches left the journal before they were looked at: values that they wrote anew for these"
            " days may be old ones there. Call it with --restart when less is written, or with a higher --rate"
        )
    if state.left_out or state.damaged:
        names = ", ".join(state.left_out) or "no day"
        _complain(
            f"left out, because they cannot be read or are gone: {names}{', and blocks of other days' * state.damaged}."
            " `verify` names them; to have them, restore a backup and copy from that"
        )
        return _EXIT_FAILED
    if not state.refused and not state.short and not state.unseen:
        return _EXIT_OK
    if state.refused or state.short:
        _complain("not everything is there, for the reasons above; everything else is")
    return _EXIT_FAILED


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    sys.stderr.write(f"{NAME}: {text}\n")
    sys.stderr.flush()
