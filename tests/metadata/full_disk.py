"""What test_full_disk.py runs where the disk is small: `python -m tests.metadata.full_disk FOLDER`.

The database is away all the while; what is on the disk that gets full is the journal of the real service.
"""

import asyncio
import signal
import sys
from pathlib import Path

from openmanager.gateway.v1 import ai_pb2
from runtime.channel import calling
from runtime.errors import ResourceExhausted
from tests.harness import free_port
from tests.harness.small_disk import fill
from tests.metadata.service import Recorder, running

NOWHERE = f"postgresql://127.0.0.1:{free_port()}/none"
ROOM_BYTES = 2 << 20


async def refused(recorder: Recorder) -> str:
    """Records until it is refused; returns why."""
    for _ in range(2_000):
        try:
            await recorder.record(response="x" * 20_000)
        except ResourceExhausted as error:
            return error.reason
    raise AssertionError("the disk does not get full")


async def main(disk: Path) -> None:
    acknowledged: list[str] = []
    async with running(disk, DATABASE_URL=NOWHERE) as service:
        recorder = Recorder(service)
        await recorder.record()
        ballast = fill(disk, ROOM_BYTES)
        assert await refused(recorder) == "DISK_FULL"
        assert len(recorder.acknowledged) > 10
        fill(disk, 0)
        assert await refused(recorder) == "DISK_FULL"
        acknowledged += recorder.acknowledged
        service.stop(signal.SIGKILL)
    async with running(disk, DATABASE_URL=NOWHERE) as service:
        recorder = Recorder(service)
        for one in acknowledged:
            async with calling("metadata"):
                loaded = await service.interactions.GetInteraction(ai_pb2.GetInteractionRequest(id=one))
            assert loaded.interaction.id == one
        ballast.unlink()
        await recorder.record()
        assert service.stop() == 0


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
