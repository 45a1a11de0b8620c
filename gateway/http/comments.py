"""The comments of the protos, which generated code does not carry: read from gen/openmanager/descriptors.binpb.

What must stay true: without the file everything works and only the descriptions are missing, said once in the log.
"""

import logging
from collections.abc import Iterator
from importlib.resources import files

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet

_log = logging.getLogger(__name__)

Path = tuple[int, ...]
Named = tuple[Path, str]

# Field numbers of descriptor.proto, of which source locations are made.
_FILE_MESSAGES, _FILE_ENUMS, _FILE_SERVICES = 4, 5, 6
_MESSAGE_FIELDS, _MESSAGE_MESSAGES, _MESSAGE_ENUMS = 2, 3, 4
_ENUM_VALUES, _SERVICE_METHODS = 2, 2


def load() -> dict[str, str]:
    """Full name of a service, method, message, field, enum or enum value -> its comment, as one paragraph a line."""
    try:
        raw = files("openmanager").joinpath("descriptors.binpb").read_bytes()
    except OSError:
        _log.warning("gen/openmanager/descriptors.binpb is missing: /openapi.json has no descriptions (run `make gen`)")
        return {}
    return {name: text for file in FileDescriptorSet.FromString(raw).file for name, text in _of_file(file)}


def _of_file(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    names = dict(_names(file))
    for location in file.source_code_info.location:
        name = names.get(tuple(location.path))
        if name is not None and location.leading_comments:
            yield name, _joined(location.leading_comments)


def _joined(text: str) -> str:
    paragraphs = [" ".join(line.strip() for line in part.splitlines()) for part in text.strip().split("\n\n")]
    return "\n".join(paragraphs)


def _names(file: FileDescriptorProto) -> Iterator[Named]:
    for index, message in enumerate(file.message_type):
        yield from _of_message(message, (_FILE_MESSAGES, index), file.package)
    for index, enum in enumerate(file.enum_type):
        yield from _of_enum(enum, (_FILE_ENUMS, index), file.package)
    for index, service in enumerate(file.service):
        name = f"{file.package}.{service.name}"
        yield (_FILE_SERVICES, index), name
        for number, method in enumerate(service.method):
            yield (_FILE_SERVICES, index, _SERVICE_METHODS, number), f"{name}.{method.name}"


def _of_message(message: DescriptorProto, path: Path, outer: str) -> Iterator[Named]:
    name = f"{outer}.{message.name}"
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, _MESSAGE_FIELDS, index), f"{name}.{field.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _of_message(nested, (*path, _MESSAGE_MESSAGES, index), name)
    for index, enum in enumerate(message.enum_type):
        yield from _of_enum(enum, (*path, _MESSAGE_ENUMS, index), name)


def _of_enum(enum: EnumDescriptorProto, path: Path, outer: str) -> Iterator[Named]:
    name = f"{outer}.{enum.name}"
    yield path, name
    for index, value in enumerate(enum.value):
        yield (*path, _ENUM_VALUES, index), f"{name}.{value.name}"
