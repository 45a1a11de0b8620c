"""Server reflection in both versions, so that grpcurl and other clients work without our protos.

grpcio-reflection ships v1alpha only; newer clients ask for v1 first. The two are the same messages under another
package name, so the stock servicer answers both, and the v1 file is derived from the v1alpha one for the descriptor
pool (`grpcurl describe` without arguments asks for every service that is listed, this one too).

The stock servicer is given our view of the pool, for two things that Python's own lacks: generated descriptors carry no
JSON names, without which clients write `observed_time` for `observedTime`; and a method is a symbol that can be asked
for.
"""

from collections.abc import Sequence
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class
from grpc_reflection.v1alpha import reflection as stock
from grpc_reflection.v1alpha import reflection_pb2

from runtime.handlers import Bound

V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
V1: Final = "grpc.reflection.v1.ServerReflection"


def bound(services: Sequence[str]) -> tuple[Bound, ...]:
    """Both reflection services, announcing `services` and themselves."""
    _ensure_v1_descriptor()
    servicer = stock.aio.ReflectionServicer((*services, V1, V1ALPHA), _Pool())
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        )
    }
    return tuple(Bound(service=service, handlers=handlers) for service in (V1, V1ALPHA))


class _File:
    """A file's descriptor as the stock servicer uses it."""

    def __init__(self, descriptor: Any) -> None:
        self._descriptor = descriptor
        self.name: str = descriptor.name

    @property
    def dependencies(self) -> "list[_File]":
        return [_File(dependency) for dependency in self._descriptor.dependencies]

    def CopyToProto(self, proto: descriptor_pb2.FileDescriptorProto) -> None:
        self._descriptor.CopyToProto(proto)
        for message in proto.message_type:
            _name_fields(message, self._descriptor.message_types_by_name[message.name])


def _name_fields(message: descriptor_pb2.DescriptorProto, descriptor: Any) -> None:
    for field in message.field:
        field.json_name = descriptor.fields_by_name[field.name].json_name
    for nested in message.nested_type:
        _name_fields(nested, descriptor.nested_types_by_name[nested.name])


class _Pool:
    """The default descriptor pool, seen as reflection needs it."""

    def __init__(self) -> None:
        self._pool: Any = default_pool()

    def FindFileByName(self, name: str) -> _File:
        return _File(self._pool.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> _File:
        try:
            return _File(self._pool.FindFileContainingSymbol(symbol))
        except KeyError:
            service = self._pool.FindServiceByName(symbol.rpartition(".")[0])
            if symbol.rpartition(".")[2] not in service.methods_by_name:
                raise
            return _File(service.file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


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
