"""JSON schemas of protobuf messages in their proto3 JSON form, for /openapi.json.

What must stay true: a schema describes what `encode` writes; requests may use more forms (see `values`), which the
descriptions name. Message types become components under their full proto names, so that no two can collide.
"""

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

Schema = dict[str, Any]

_NUMBER_OR_TEXT: Final[Schema] = {"oneOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
_INT64: Final[Schema] = {"type": "string", "format": "int64", "pattern": "^-?[0-9]+$"}
_INT32: Final[Schema] = {"type": "integer", "format": "int32"}
_UINT32: Final[Schema] = {"type": "integer", "format": "int64", "minimum": 0}
_SCALARS: Final[dict[int, Schema]] = {
    FieldDescriptor.TYPE_DOUBLE: _NUMBER_OR_TEXT,
    FieldDescriptor.TYPE_FLOAT: _NUMBER_OR_TEXT,
    FieldDescriptor.TYPE_INT32: _INT32,
    FieldDescriptor.TYPE_SINT32: _INT32,
    FieldDescriptor.TYPE_SFIXED32: _INT32,
    FieldDescriptor.TYPE_UINT32: _UINT32,
    FieldDescriptor.TYPE_FIXED32: _UINT32,
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_WELL_KNOWN: Final[dict[str, Schema]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?s$"},
    "google.protobuf.FieldMask": {"type": "string"},
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Value": {},
    "google.protobuf.ListValue": {"type": "array", "items": {}},
    "google.protobuf.Any": {"type": "object", "properties": {"@type": {"type": "string"}}},
}
_ASKED: Final[dict[str, Schema]] = {
    "google.protobuf.Timestamp": {
        "type": "string",
        "examples": ["-1h", "2026-01-31T12:00:00Z", "now", "1769860800"],
    },
    "google.protobuf.Duration": {"type": "string", "examples": ["60s", "5m", "1h"]},
}


class Schemas:
    """Collects the component schemas that were referred to."""

    def __init__(self, comments: Mapping[str, str]) -> None:
        self._comments = comments
        self.components: dict[str, Schema] = {}

    def message(self, descriptor: Descriptor) -> Schema:
        """A reference to a message's schema, which is collected; well-known types stand for themselves."""
        name = descriptor.full_name
        if name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[name])
        if name.startswith("google.protobuf.") and name.endswith("Value"):
            return self._one(descriptor.fields_by_name["value"])
        if name not in self.components:
            schema = self.components[name] = {"type": "object"}  # there before its fields are, which may refer to it
            self._describe(schema, name)
            schema["properties"] = {field.json_name: self.field(field) for field in descriptor.fields}
            if always := [field.json_name for field in descriptor.fields if not field.has_presence]:
                schema["x-always-present"] = always
        return {"$ref": f"#/components/schemas/{name}"}

    def field(self, field: FieldDescriptor) -> Schema:
        """The schema of a field, with its comment."""
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            schema: Schema = {"type": "object", "additionalProperties": self._one(kind.fields_by_name["value"])}
        elif field.is_repeated:
            schema = {"type": "array", "items": self._one(field)}
        else:
            schema = self._one(field)
        self._describe(schema, field.full_name)
        return schema

    def parameter(self, field: FieldDescriptor) -> Schema:
        """The schema of a field in a path or query, where relative times and short forms of enums are allowed."""
        name = field.message_type.full_name if field.message_type is not None else ""
        if name in _ASKED:
            one = dict(_ASKED[name])
        elif field.enum_type is not None:
            one = {"type": "string", "enum": [*_short_names(field.enum_type), *field.enum_type.values_by_name]}
        else:
            one = self._one(field)
        return {"type": "array", "items": one} if field.is_repeated else one

    def _one(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None:
            return self.message(field.message_type)
        if field.enum_type is not None:
            return self._enum(field.enum_type)
        return dict(_SCALARS.get(field.type, _INT64))

    def _enum(self, enum: EnumDescriptor) -> Schema:
        name = enum.full_name
        if name not in self.components:
            schema = self.components[name] = {"type": "string", "enum": [value.name for value in enum.values]}
            lines = [f"- {value.name}: {self._comments.get(f'{name}.{value.name}', '')}" for value in enum.values]
            schema["description"] = "\n".join((self._comments.get(name, ""), *lines)).strip()
        return {"$ref": f"#/components/schemas/{name}"}

    def _describe(self, schema: Schema, name: str) -> None:
        if name in self._comments:
            schema["description"] = self._comments[name]


def _short_names(enum: EnumDescriptor) -> list[str]:
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    return [value.name.removeprefix(prefix).lower() for value in enum.values if value.number != 0]
