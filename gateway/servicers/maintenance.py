"""``MaintenanceService``: windows are changed in the record, and then shown by the live state."""

from typing import Final

from fleet import access
from gateway.registry import Registry
from gateway.servicers.passing import inner_of
from openmanager.gateway.v1 import maintenance_pb2 as pb
from openmanager.metadata.v1 import maintenance_pb2 as inner_pb
from openmanager.metadata.v1 import maintenance_pb2_grpc as inner_grpc
from runtime.channel import Channel, calling
from runtime.errors import InvalidArgument, OpenManagerError

_UPDATABLE: Final = ("start_time", "end_time", "reason")


class MaintenanceServicer:
    """Answers ``openmanager.gateway.v1.MaintenanceService``."""

    def __init__(self, metadata: Channel, registry: Registry) -> None:
        self._stub = inner_grpc.MaintenanceStoreServiceStub(metadata.grpc)
        self._registry = registry

    async def CreateMaintenanceWindow(
        self, request: pb.CreateMaintenanceWindowRequest, _context: object
    ) -> pb.CreateMaintenanceWindowResponse:
        """Records one."""
        inner = inner_pb.AddMaintenanceWindowRequest(window=request.window)
        inner.window.created_by = _caller()
        try:
            async with calling("metadata"):
                response = await self._stub.AddMaintenanceWindow(inner)
        except OpenManagerError as error:
            raise _of_window(error) from None
        await self._registry.show_details(request.window.server_id, response.details)
        return pb.CreateMaintenanceWindowResponse(window=response.window)

    async def GetMaintenanceWindow(
        self, request: pb.GetMaintenanceWindowRequest, _context: object
    ) -> pb.GetMaintenanceWindowResponse:
        """Returns one."""
        inner = inner_pb.LoadMaintenanceWindowRequest(server_id=request.server_id, id=request.id)
        async with calling("metadata"):
            response = await self._stub.LoadMaintenanceWindow(inner)
        return pb.GetMaintenanceWindowResponse(window=response.window)

    async def ListMaintenanceWindows(
        self, request: pb.ListMaintenanceWindowsRequest, _context: object
    ) -> pb.ListMaintenanceWindowsResponse:
        """Lists those of a server."""
        inner = inner_of(request, inner_pb.QueryMaintenanceWindowsRequest)
        async with calling("metadata"):
            response = await self._stub.QueryMaintenanceWindows(inner)
        return pb.ListMaintenanceWindowsResponse.FromString(response.SerializeToString())

    async def UpdateMaintenanceWindow(
        self, request: pb.UpdateMaintenanceWindowRequest, _context: object
    ) -> pb.UpdateMaintenanceWindowResponse:
        """Changes one."""
        window = request.window
        given = {field.name for field, _ in window.ListFields()}
        fields = list(request.update_mask.paths) or [name for name in _UPDATABLE if name in given]
        for name in fields:
            if name not in _UPDATABLE:
                raise InvalidArgument(
                    f"{name} cannot be updated; {', '.join(_UPDATABLE)} can", field=f"update_mask.{name}"
                )
        if not fields:
            raise InvalidArgument("nothing to update: name at least one field", field="update_mask")
        inner = inner_pb.ChangeMaintenanceWindowRequest(window=window)
        inner.update_mask.paths.extend(fields)
        try:
            async with calling("metadata"):
                response = await self._stub.ChangeMaintenanceWindow(inner)
        except OpenManagerError as error:
            raise _of_window(error) from None
        await self._registry.show_details(window.server_id, response.details)
        return pb.UpdateMaintenanceWindowResponse(window=response.window)

    async def DeleteMaintenanceWindow(
        self, request: pb.DeleteMaintenanceWindowRequest, _context: object
    ) -> pb.DeleteMaintenanceWindowResponse:
        """Removes one."""
        inner = inner_pb.RemoveMaintenanceWindowRequest(server_id=request.server_id, id=request.id)
        async with calling("metadata"):
            response = await self._stub.RemoveMaintenanceWindow(inner)
        await self._registry.show_details(request.server_id, response.details)
        return pb.DeleteMaintenanceWindowResponse()


def _of_window(error: OpenManagerError) -> OpenManagerError:
    """The same error, naming the field of the public request."""
    if error.field and error.field != "update_mask":
        error.field = f"window.{error.field}"
    return error


def _caller() -> str:
    """Who calls."""
    caller = access.caller()
    return "" if caller is None else caller.name
