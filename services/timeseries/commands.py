"""`python -m services.timeseries backup|restore|verify`: what an operator does with a store beside serving it.

What must stay true: backup and verify change nothing in the store and may run while the service does; restore runs
only without it and only into an empty folder; the exit status is 0 when all is well, 1 when something failed or is
damaged, 2 for a command that makes no sense; and every refusal says what to do.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TextIO

from runtime import folder
from runtime.clock import SystemClock
from runtime.errors import OpenManagerError
from runtime.settings import SettingsError
from services.timeseries.engine.backup import back_up, restore
from services.timeseries.engine.manifest import BackupError
from services.timeseries.engine.tiers import RAW, TIERS
from services.timeseries.engine.verify import Damage, Verifier
from services.timeseries.settings import TimeSeriesSettings

NAME: Final = "timeseries"
_EXIT_OK, _EXIT_FAILED, _EXIT_USAGE = 0, 1, 2
_BAR_CELLS: Final = 30
_BAR_INTERVAL_S: Final = 0.1

_EXAMPLES: Final = """\
examples:
  python -m services.timeseries                              serve, as `make run` does
  python -m services.timeseries backup /backups/2026-11-23   while the service runs
  python -m services.timeseries verify /backups/2026-11-23
  python -m services.timeseries verify                       the store in DATA_DIR, running or not
  DATA_DIR=/srv/new python -m services.timeseries restore /backups/2026-11-23

The store is DATA_DIR/timeseries (DATA_DIR is ./data when unset). Exit status: 0 all is well, 1 failed or
damage found, 2 a command or settings that make no sense. docs/operations.md says more.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings = TimeSeriesSettings.load()
    except SettingsError as error:
        _complain("settings that make no sense: " + "; ".join(error.problems))
        return _EXIT_USAGE
    store = settings.data_dir / NAME
    try:
        match options.command:
            case "backup":
                return _back_up(store, options.path)
            case "restore":
                return _restore(settings, options.path)
            case _:
                return _verify(options.path or store)
    except (BackupError, folder.CannotStartError, OpenManagerError) as error:
        _complain(str(error))
    except OSError as error:
        _complain(f"{error.filename or store}: {error.strerror or error}")
    except KeyboardInterrupt:
        _complain("interrupted")
    return _EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.timeseries",
        description="The history of the fleet. Without a command: serves it. With one: keeps it safe.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, more: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    backup = add(
        "backup",
        "copy the store, which may be in use, to a new folder",
        "It holds every point acknowledged before\nit began. PATH appears only when"
        " it is whole; until then it is PATH.partial.",
    )
    backup.add_argument("path", metavar="PATH", type=Path, help="a folder that does not exist yet, or is empty")
    restoring = add(
        "restore",
        "put a backup into an empty DATA_DIR/timeseries",
        "The service must be stopped. The\nbackup is checked against its manifest before anything is written.",
    )
    restoring.add_argument("path", metavar="PATH", type=Path, help="a backup")
    verifying = add(
        "verify",
        "read every block and batch of a store or backup and name what is damaged",
        "\nIt changes nothing and may run beside the service.",
    )
    verifying.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        nargs="?",
        help="a backup, or a store's folder (default: DATA_DIR/timeseries)",
    )
    return parser


def _back_up(store: Path, target: Path) -> int:
    started = time.monotonic()
    with _Reporter(sys.stderr) as reporter:
        manifest = back_up(store, target, now_ms=SystemClock().now_ms(), progress=reporter.progress)
    _say(
        f"backup {target}: {len(manifest.files)} files, {_size(manifest.bytes)}, through sequence"
        f" {manifest.last_sequence}, {time.monotonic() - started:.1f} s"
    )
    if not manifest.left_out:
        return _EXIT_OK
    _complain(
        f"left out, because SQLite cannot read them: {', '.join(manifest.left_out)}. The rest can be restored;"
        " keep an older backup for these, and see `verify`"
    )
    return _EXIT_FAILED


def _restore(settings: TimeSeriesSettings, source: Path) -> int:
    started = time.monotonic()
    with folder.locked(settings.data_dir, NAME) as store, _Reporter(sys.stderr) as reporter:
        restored = restore(source, store, settings=settings.engine(), clock=SystemClock(), progress=reporter.progress)
    manifest = restored.manifest
    _say(
        f"restored {store} from the backup of {manifest.created_time}: {len(manifest.files)} files,"
        f" {_size(manifest.bytes)}, {restored.points:,} points, through sequence {manifest.last_sequence},"
        f" {time.monotonic() - started:.1f} s"
    )
    if manifest.left_out or restored.damaged:
        left_out = f"the backup was made without {', '.join(manifest.left_out)}. " if manifest.left_out else ""
        _complain(f"{left_out}{restored.damaged} damaged batches were left out; the rest can be served")
        return _EXIT_FAILED
    return _EXIT_OK


def _verify(path: Path) -> int:
    started = time.monotonic()
    with _Reporter(sys.stderr) as reporter:

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
        f"{path}: {verified.batches:,} batches in the journal, {_size(verified.bytes)} in all,"
        f" {time.monotonic() - started:.1f} s: {'nothing' if not verified.damages else verified.damages} damaged"
    )
    if verified.damages:
        _complain(
            "reads leave out what is damaged and answer the rest; to have it back, restore a backup that verifies"
        )
        return _EXIT_FAILED
    return _EXIT_OK


class _Reporter:
    """How far it is: a bar that redraws itself on a terminal, elsewhere a line for each file that is done."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._bar = out.isatty()
        self._drawn_at = 0.0

    def __enter__(self) -> "_Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def progress(self, name: str, done: int, total: int) -> None:
        if not self._bar:
            if done >= total:
                self._out.write(f"{name}  {_size(total)}\n")
                self._out.flush()
            return
        now = time.monotonic()
        if now - self._drawn_at < _BAR_INTERVAL_S:
            return
        self._drawn_at = now
        share = min(1.0, done / total) if total else 1.0
        full = round(_BAR_CELLS * share)
        self._out.write(f"\r\x1b[K[{'#' * full}{'.' * (_BAR_CELLS - full)}] {share:4.0%} {name}  {_size(total)}")
        self._out.flush()

    def clear(self) -> None:
        """Makes room for a line."""
        if self._bar:
            self._out.write("\r\x1b[K")
            self._out.flush()


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1_024:
            break
        size, unit = size / 1_024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _complain(text: str) -> None:
    sys.stderr.write(f"{NAME}: {text}\n")
    sys.stderr.flush()
