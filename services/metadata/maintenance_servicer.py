"""gRPC to the maintenance windows and back: decode, call, encode."""

from datetime import UTC, datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from fleet.codec import details_to_pb
from openmanager.fleet.v1 import details_pb2
from openmanager.metadata.v1 import maintenance_pb2 as pb
from runtime.errors import InvalidArgument
from services.metadata.maintenance import MaintenanceStore, NewWindow, Window

MAINTENANCE_STORE: Final = "openmanager.metadata.v1.MaintenanceStoreService"


class MaintenanceStoreServicer:
    """``MaintenanceStoreService`` on a store."""

    def __init__(self, store: MaintenanceStore) -> None:
        self._store = store

    async def AddMaintenanceWindow(
        self, request: pb.AddMaintenanceWindowRequest, _context: object
    ) -> pb.AddMaintenanceWindowResponse:
        window, details = await self._store.add(_new(request.window))
        return pb.AddMaintenanceWindowResponse(window=_message(window), details=details_to_pb(details))

    async def LoadMaintenanceWindow(
        self, request: pb.LoadMaintenanceWindowRequest, _context: object
    ) -> pb.LoadMaintenanceWindowResponse:
        window = await self._store.get(request.server_id, request.id)
        return pb.LoadMaintenanceWindowResponse(window=_message(window))

    async def QueryMaintenanceWindows(
        self, request: pb.QueryMaintenanceWindowsRequest, _context: object
    ) -> pb.QueryMaintenanceWindowsResponse:
        page = await self._store.list(
            request.server_id,
            show_ended=request.show_ended,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.QueryMaintenanceWindowsResponse(
            windows=[_message(window) for window in page.items],
            next_page_token=page.next_page_token,
            total_size=page.total_size,
        )

    async def ChangeMaintenanceWindow(
        self, request: pb.ChangeMaintenanceWindowRequest, _context: object
    ) -> pb.ChangeMaintenanceWindowResponse:
        said = request.window
        window, details = await self._store.change(said.id, _new(said), request.update_mask.paths)
        return pb.ChangeMaintenanceWindowResponse(window=_message(window), details=details_to_pb(details))

    async def RemoveMaintenanceWindow(
        self, request: pb.RemoveMaintenanceWindowRequest, _context: object
    ) -> pb.RemoveMaintenanceWindowResponse:
        details = await self._store.remove(request.server_id, request.id)
        return pb.RemoveMaintenanceWindowResponse(details=details_to_pb(details))


def _new(said: details_pb2.MaintenanceWindow) -> NewWindow:
    return NewWindow(
        server_id=said.server_id,
        start_time=_instant(said.start_time, "start_time") if said.HasField("start_time") else None,
        end_time=_instant(said.end_time, "end_time") if said.HasField("end_time") else None,
        reason=said.reason,
        created_by=said.created_by,
        id=said.id,
    )


def _instant(time: Timestamp, field: str) -> datetime:
    try:
        return time.ToDatetime(UTC)
    except ValueError:
        raise InvalidArgument("is no time of this calendar", field=field) from None


def _message(window: Window) -> details_pb2.MaintenanceWindow:
    return details_pb2.MaintenanceWindow(
        id=window.id,
        server_id=window.server_id,
        start_time=_time(window.start_time),
        end_time=_time(window.end_time),
        reason=window.reason,
        created_by=window.created_by,
        create_time=_time(window.create_time),
        update_time=_time(window.update_time),
    )


def _time(instant: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(instant)
    return message
