"""Server reflection in both versions, so that grpcurl and other clients work without our protos.

grpcio-reflection ships v1alpha only; newer clients ask for v1 first. The two are the same messages under another
package name, so the stock servicer answers both, and the v1 file is derived from the v1alpha one for the descriptor
pool (`grpcurl describe` without arguments asks for every service that is listed, this one too).
"""

from collections.abc import Sequence
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class
from grpc_reflection.v1alpha import reflection as stock
from grpc_reflection.v1alpha import reflection_pb2

V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
V1: Final = "grpc.reflection.v1.ServerReflection"


def add_to_server(server: Any, services: Sequence[str]) -> None:
    """Registers both reflection services, announcing `services` and themselves."""
    _ensure_v1_descriptor()
    servicer = stock.aio.ReflectionServicer((*services, V1, V1ALPHA))
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        )
    }
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(service, handlers) for service in (V1, V1ALPHA))
    )


def _ensure_v1_descriptor() -> None:
    pool: Any = default_pool()
    try:
        pool.FindServiceByName(V1)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        alpha.name = "grpc/reflection/v1/reflection.proto"
        alpha.package = "grpc.reflection.v1"
        _rename(alpha)
        pool.AddSerializedFile(alpha.SerializeToString())


def _rename(file: descriptor_pb2.FileDescriptorProto) -> None:
    def renamed(name: str) -> str:
        return name.replace(".grpc.reflection.v1alpha.", ".grpc.reflection.v1.")

    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = renamed(field.type_name)
    for service in file.service:
        for method in service.method:
            method.input_type = renamed(method.input_type)
            method.output_type = renamed(method.output_type)
