"""One value of a request, from a JSON value or from the text of a query parameter or path variable.

Accepted is what proto3 JSON accepts, and what people write on a command line:
    timestamps   RFC 3339, `now`, relative (`-1h`, `-1h30m`, `now-5m`), seconds since the Unix epoch
    durations    `60s`, `1.5s`, `250ms`, `5m`, `1h`, `1h30m`, `7d`, or seconds as a bare number
    enums        full name, short form in any case (`healthy` for SERVER_STATUS_HEALTHY), number
    field masks  comma-separated, camelCase or snake_case

What must stay true: a value that is not accepted raises BadValue saying what is wanted, never what was in our code;
`now` is read once a request, so that `start_time=-1h&end_time=now` is exactly one hour.
"""

import base64
import binascii
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from gateway.http.encode import FREE_FORM, WRAPPERS

Parse = Callable[[Any, int], Any]
"""(JSON value or text, now in ms since the epoch) -> what the field takes."""

_NANOS: Final = {"ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3_600 * 10**9, "d": 86_400 * 10**9}
_SPAN: Final = re.compile(r"([+-]?)((?:\d{1,12}(?:\.\d{1,9})?(?:ms|s|m|h|d))+)", re.ASCII)
_SPAN_PART: Final = re.compile(r"(\d+)(?:\.(\d+))?(ms|s|m|h|d)")
_NUMBER: Final = re.compile(r"-?\d{1,15}(\.\d{1,12})?", re.ASCII)
_INTEGER: Final = re.compile(r"-?\d{1,20}", re.ASCII)
_WHOLE: Final = re.compile(r"-?\d{1,40}(\.\d{1,40})?([eE][+-]?\d{1,3})?", re.ASCII)
_UNESCAPED_PLUS: Final = re.compile(r"(T[\d:.]+) (\d\d:\d\d)")
_MAX_TIMESTAMP_S: Final = 253_402_300_799  # 9999-12-31T23:59:59Z
_MIN_TIMESTAMP_S: Final = -62_135_596_800  # 0001-01-01T00:00:00Z
_MAX_DURATION_S: Final = 315_576_000_000  # what google.protobuf.Duration can hold
MAX_ECHO_CHARS: Final = 64


class BadValue(Exception):  # noqa: N818  it becomes an InvalidArgument as soon as the whole path is known
    """What is wrong with a value; `path` grows from the inside out on the way to the top."""

    def __init__(self, message: str, *path: str) -> None:
        super().__init__(message)
        self.message = message
        self.path = list(path)

    def inside(self, *outer: str) -> "BadValue":
        """The same fault, seen from the field around it."""
        self.path[:0] = outer
        return self

    @property
    def field(self) -> str:
        """`rows[3].time`: parts that are indices stick to what is before them."""
        return "".join(
            part if part.startswith("[") or not index else f".{part}" for index, part in enumerate(self.path)
        )


def shown(value: object) -> str:
    """A value in an error's text, cut short."""
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= MAX_ECHO_CHARS else text[:MAX_ECHO_CHARS] + "...")


def parser_of(field: FieldDescriptor) -> Parse | None:
    """What reads one value of a field; None for messages that are JSON objects, which `decode` reads."""
    if field.message_type is not None:
        return _message_parser(field.message_type)
    if field.enum_type is not None:
        return _enum_parser(field.enum_type)
    return _SCALARS[field.type]


def _message_parser(message: Descriptor) -> Parse | None:
    name = message.full_name
    if name == "google.protobuf.Timestamp":
        return timestamp
    if name == "google.protobuf.Duration":
        return duration
    if name == "google.protobuf.FieldMask":
        return field_mask
    if name in WRAPPERS:
        parse, wrapper = _SCALARS[message.fields_by_name["value"].type], GetMessageClass(message)
        return lambda value, now_ms: wrapper(value=parse(value, now_ms))
    if name in FREE_FORM:
        return _free_form(GetMessageClass(message))
    return None


def _free_form(kind: type[Message]) -> Parse:
    def parse(value: Any, _now_ms: int) -> Message:
        try:
            return json_format.ParseDict(value, kind())
        except ParseError:
            raise BadValue("not what this type takes") from None

    return parse


def timestamp(value: Any, now_ms: int) -> Timestamp:
    """RFC 3339, relative, or seconds since the epoch."""
    text = str(value).strip() if _is_textual(value) else ""
    if str(value).startswith(" ") and text[:1].isdigit() and _SPAN.fullmatch(text):
        text = f"+{text}"  # a query's `+1h` whose plus nobody escaped
    nanos = _nanos_from_epoch(text, now_ms)
    if nanos is not None:
        seconds, rest = divmod(nanos, 10**9)
        if not _MIN_TIMESTAMP_S <= seconds <= _MAX_TIMESTAMP_S:
            raise BadValue(f"{shown(value)} is outside of the years 1 to 9999")
        return Timestamp(seconds=seconds, nanos=rest)
    result = Timestamp()
    try:
        result.FromJsonString(_UNESCAPED_PLUS.sub(r"\1+\2", text.upper()))  # RFC 3339's t and z may be small
    except ValueError:
        raise BadValue(
            f"{shown(value)} is not a time: RFC 3339 (2026-01-31T12:00:00Z), relative (-1h, now) or epoch seconds"
        ) from None
    return result


def _nanos_from_epoch(text: str, now_ms: int) -> int | None:
    if _NUMBER.fullmatch(text):
        return _decimal_nanos(text)
    relative = text.removeprefix("now")
    if relative == "" and text:
        return now_ms * 10**6
    if relative[:1] in {"-", "+"} or relative.startswith(" "):
        span = _span_nanos(relative.replace(" ", "+", 1) if relative.startswith(" ") else relative)
        return None if span is None else now_ms * 10**6 + span
    return None


def duration(value: Any, _now_ms: int) -> Duration:
    """`60s`, `5m`, `1h30m`, or a number of seconds."""
    text = str(value).strip() if _is_textual(value) else ""
    nanos = _decimal_nanos(text) if _NUMBER.fullmatch(text) else _span_nanos(text)
    if nanos is None:
        raise BadValue(f"{shown(value)} is not a duration such as 60s, 1.5s, 5m, 1h or 7d")
    if abs(nanos) > _MAX_DURATION_S * 10**9:
        raise BadValue(f"{shown(value)} is longer than 10,000 years")
    seconds, rest = divmod(abs(nanos), 10**9)
    sign = -1 if nanos < 0 else 1
    return Duration(seconds=sign * seconds, nanos=sign * rest)


def _is_textual(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _decimal_nanos(text: str) -> int:
    whole, _, fraction = text.lstrip("-").partition(".")
    nanos = int(whole) * 10**9 + int(fraction[:9].ljust(9, "0"))
    return -nanos if text.startswith("-") else nanos


def _span_nanos(text: str) -> int | None:
    match = _SPAN.fullmatch(text)
    if match is None:
        return None
    nanos = 0
    for whole, fraction, unit in _SPAN_PART.findall(match[2]):
        nanos += int(whole) * _NANOS[unit] + int(fraction or 0) * _NANOS[unit] // 10 ** len(fraction)
    return -nanos if match[1] == "-" else nanos


def field_mask(value: Any, _now_ms: int) -> FieldMask:
    """Comma-separated paths; camelCase becomes snake_case."""
    if not isinstance(value, str):
        raise BadValue("a field mask is text such as hostname,role")
    snake_case = "".join("_" + char.lower() if char.isupper() else char for char in value)
    return FieldMask(paths=[path.strip() for path in snake_case.split(",") if path.strip()])


def _enum_parser(enum: EnumDescriptor) -> Parse:
    first = enum.values[0].name
    prefix = first.removesuffix("UNSPECIFIED") if first.endswith("_UNSPECIFIED") else ""
    numbers = {value.name: value.number for value in enum.values}
    short = {name.removeprefix(prefix): number for name, number in numbers.items()} | numbers
    known = ", ".join(name.removeprefix(prefix) for name in numbers)

    def parse(value: Any, _now_ms: int) -> int:
        if isinstance(value, str):
            number = short.get(value.strip().upper().replace("-", "_"))
            if number is not None:
                return number
        if _is_textual(value) and _INTEGER.fullmatch(str(value)) and int(value) in numbers.values():
            return int(value)
        raise BadValue(f"{shown(value)} is none of {known}")

    return parse


def _integer_parser(bits: int, *, signed: bool) -> Parse:
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)

    def parse(value: Any, _now_ms: int) -> int:
        whole = _whole(value) if _is_textual(value) else None
        if whole is None:
            raise BadValue(f"{shown(value)} is not a whole number")
        if not low <= whole <= high:
            raise BadValue(f"{shown(value)} is not between {low} and {high}")
        return whole

    return parse


def _whole(value: str | int | float) -> int | None:
    """The whole number that a value is, also as `1.0` or `1e2`, in quotes or not; None: it is none."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    text = str(value)
    if _INTEGER.fullmatch(text):
        return int(text)
    exact = Decimal(text) if _WHOLE.fullmatch(text) else Decimal("NaN")
    return int(exact) if exact == exact.to_integral_value() else None


_SPECIAL_NUMBERS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_DECIMAL: Final = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)


def number(value: Any, _now_ms: int = 0) -> float:
    """A number, its text, or "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, str):
        if value in _SPECIAL_NUMBERS:
            return _SPECIAL_NUMBERS[value]
        if _DECIMAL.fullmatch(value) and math.isfinite(float(value)):
            return float(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise BadValue(f"{shown(value)} is not a number")


def _boolean(value: Any, _now_ms: int) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in {"true", "false"}:
        return value == "true"
    raise BadValue(f"{shown(value)} is not true or false")


def _string(value: Any, _now_ms: int) -> str:
    if not isinstance(value, str):
        raise BadValue("not a string")
    return value


def _bytes(value: Any, _now_ms: int) -> bytes:
    try:
        text = value.replace("-", "+").replace("_", "/").rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (AttributeError, binascii.Error, ValueError):
        raise BadValue("not base64") from None


_I32, _I64 = _integer_parser(32, signed=True), _integer_parser(64, signed=True)
_U32, _U64 = _integer_parser(32, signed=False), _integer_parser(64, signed=False)
_SCALARS: Final[dict[int, Parse]] = {
    FieldDescriptor.TYPE_DOUBLE: number,
    FieldDescriptor.TYPE_FLOAT: number,
    FieldDescriptor.TYPE_INT32: _I32,
    FieldDescriptor.TYPE_SINT32: _I32,
    FieldDescriptor.TYPE_SFIXED32: _I32,
    FieldDescriptor.TYPE_INT64: _I64,
    FieldDescriptor.TYPE_SINT64: _I64,
    FieldDescriptor.TYPE_SFIXED64: _I64,
    FieldDescriptor.TYPE_UINT32: _U32,
    FieldDescriptor.TYPE_FIXED32: _U32,
    FieldDescriptor.TYPE_UINT64: _U64,
    FieldDescriptor.TYPE_FIXED64: _U64,
    FieldDescriptor.TYPE_BOOL: _boolean,
    FieldDescriptor.TYPE_STRING: _string,
    FieldDescriptor.TYPE_BYTES: _bytes,
}
