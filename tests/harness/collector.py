"""An OTLP collector for tests: it keeps the bytes of whatever a process sends it, and reads the spans out of them."""

from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_SERVICES = {"traces": "trace.v1.TraceService", "metrics": "metrics.v1.MetricsService"}


class Collector:
    """Listens while the block runs; `environ` makes a process send everything here, without waiting long.

    Attributes:
        received: the requests as they came, by `traces` and `metrics`.
    """

    def __init__(self) -> None:
        self.received: dict[str, list[bytes]] = {kind: [] for kind in _SERVICES}
        self._server = grpc.aio.server()
        for kind, name in _SERVICES.items():
            methods = {"Export": grpc.unary_unary_rpc_method_handler(self._taking(kind))}
            service = f"opentelemetry.proto.collector.{name}"
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
        self._port = 0

    @property
    def environ(self) -> dict[str, str]:
        """Settings of a process that samples every trace and sends it here."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._port}",
            "OTEL_TRACES_SAMPLER": "always_on",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        }

    def spans(self) -> list[tuple[str, Any]]:
        """(name of the service, span) of all that came."""
        found = []
        for raw in self.received["traces"]:
            for group in ExportTraceServiceRequest.FromString(raw).resource_spans:
                (name,) = (one.value.string_value for one in group.resource.attributes if one.key == "service.name")
                found += [(name, span) for scope in group.scope_spans for span in scope.spans]
        return found

    def _taking(self, kind: str) -> Any:
        async def export(request: bytes, _context: object) -> bytes:
            self.received[kind].append(request)
            return b""  # an answer without any field set

        return export

    async def __aenter__(self) -> Self:
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(0)
