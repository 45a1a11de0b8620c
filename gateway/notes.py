"""What people wrote down of servers: read from the record when somebody asks, and kept while the record is as it was.

The live state says of each server whether there are notes, and of which revision of the record it is; 64 KiB of text a
server would otherwise be sent around with every tick.
"""

from collections import OrderedDict
from typing import Final

from openmanager.metadata.v1 import metadata_pb2, metadata_pb2_grpc
from runtime.channel import Channel, calling

MAX_KEPT_BYTES: Final = 32 << 20
"""Of notes, as UTF-8. Those that were read longest ago go first."""


class Notes:
    """Those that were asked for lately."""

    def __init__(self, metadata: Channel) -> None:
        self._records = metadata_pb2_grpc.ServerRegistryServiceStub(metadata.grpc)
        self._kept: OrderedDict[str, tuple[int, str, int]] = OrderedDict()  # revision, text, bytes
        self._bytes = 0

    def known(self, server_id: str, revision: int) -> str | None:
        """The notes of that revision, if they were read."""
        found = self._kept.get(server_id)
        if found is None or found[0] != revision:
            return None
        self._kept.move_to_end(server_id)
        return found[1]

    async def read(self, server_id: str) -> tuple[int, str]:
        """Asks the record: its revision and notes.

        Raises:
            NotFound: it was deleted meanwhile.
            Unavailable: metadata is away.
        """
        async with calling("metadata"):
            answer = await self._records.GetServerRecord(metadata_pb2.GetServerRecordRequest(server_id=server_id))
        revision, text = answer.server.details.revision, answer.server.notes
        self._keep(server_id, revision, text)
        return revision, text

    def _keep(self, server_id: str, revision: int, text: str) -> None:
        before = self._kept.pop(server_id, None)
        size = len(text.encode())
        self._bytes += size - (0 if before is None else before[2])
        self._kept[server_id] = revision, text, size
        while self._bytes > MAX_KEPT_BYTES:
            _, (_, _, gone) = self._kept.popitem(last=False)
            self._bytes -= gone
