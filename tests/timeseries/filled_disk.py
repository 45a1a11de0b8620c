"""What test_full_disk.py runs where the disk is small: `python -m tests.timeseries.filled_disk FOLDER`.

Files that were closed in order are opened again on a disk that has no room at all, as by a start after an orderly stop.
"""

import asyncio
import sys
from pathlib import Path

from runtime.clock import ManualClock
from runtime.errors import OpenManagerError
from runtime.local_file import FileThread, connect
from services.timeseries.engine import Engine, EngineSettings
from tests.harness.small_disk import fill


async def main(disk: Path) -> None:
    thread = FileThread("file")
    (await thread.run(connect, disk / "a.db")).close()
    async with Engine.open(disk / "timeseries", clock=ManualClock(), settings=EngineSettings()):
        pass
    fill(disk, 0)
    said = []
    for opens in (lambda: thread.run(connect, disk / "a.db"), lambda: opened(disk / "timeseries")):
        try:
            await opens()
        except OpenManagerError as error:
            said.append((error.reason, error.message))
    thread.close()
    assert said == [
        ("DISK_FULL", "the disk of DATA_DIR is full; nothing of this was kept"),
        ("DISK_FULL", f"the disk of {disk / 'timeseries'} is full: make room and start again"),
    ], said


async def opened(folder: Path) -> None:
    async with Engine.open(folder, clock=ManualClock(), settings=EngineSettings()):
        pass


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
