"""Logs as JSON lines on stderr: time, level, logger, message, the trace they belong to, and whatever `extra` holds.

What must stay true: one event is one line; a line never holds a secret; nothing but this module configures logging.
"""

import logging
import os
import sys
import time
from typing import Any, Final, TextIO

import orjson

from runtime import tracing
from runtime.redaction import MASK, is_secret_name, redact

_STANDARD_FIELDS: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
OF_SET_UP: Final = {"of_set_up": True}
"""`extra` of what whoever starts the process should see, although it starts: the launcher shows it on its terminal."""
MAX_TEXT_CHARS: Final = 8_192  # a line stays readable and a runaway message cannot fill the disk
# JSON lets these stand as they are, but readers of lines take some for line ends, and terminals some for commands.
_ESCAPED: Final = {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), 0x2028, 0x2029)}
# Libraries whose INFO is nobody's news.
_QUIET: Final = ("asyncio", "grpc", "opentelemetry", "_granian", "granian", "httpx2", "httpcore2")


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON."""

    def __init__(self, process_name: str = "") -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = int(record.created * 1_000)
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1_000))
        line: dict[str, Any] = {
            "time": f"{seconds}.{milliseconds % 1_000:03d}Z",
            "level": record.levelname,
            "process": self._process_name,
            "logger": record.name,
            "message": _text(record.getMessage()),
        }
        place = tracing.place()
        if place is not None:
            line["trace_id"] = f"{place.trace_id:032x}"
            line["span_id"] = f"{place.span_id:016x}"
        for name, value in vars(record).items():
            if name not in _STANDARD_FIELDS and name not in line:
                line[name] = MASK if is_secret_name(name) else _value(value)
        if record.exc_info:
            line["exception"] = _traceback(self.formatException(record.exc_info))
        if record.stack_info:
            line["stack"] = _text(record.stack_info)
        text = orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY).decode()
        return text if text.isascii() else text.translate(_ESCAPED)


def _traceback(text: str) -> str:
    """What was raised stands at its end, however many other exceptions led to it."""
    text = redact(text)
    if len(text) > MAX_TEXT_CHARS:
        text = f"{text[: MAX_TEXT_CHARS // 4]}\n...\n{text[-MAX_TEXT_CHARS // 4 * 3 :]}"
    return text.encode("utf-8", "replace").decode()


def _text(text: str) -> str:
    text = redact(text)
    text = text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + "..."
    return text.encode("utf-8", "replace").decode()  # lone surrogates are no UTF-8, and no JSON


def _value(value: object) -> object:
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    return _text(value if isinstance(value, str) else str(value))


# What libraries report as an ERROR with a traceback when a caller leaves while a stream's message is being sent. The
# access log has the call. Logger name -> how the report begins.
_ROUTINE: Final = {
    "grpc._cython.cygrpc": "ExecuteBatchError raised in core by servicer method",
}


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_ROUTINE[record.name])


def configure(process_name: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends every logger's lines to `stream` (default: stderr) as JSON. Calling it again replaces the first call's."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # nobody here forks to go on with gRPC in the child
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process_name))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, JsonFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    for name in _ROUTINE:
        logging.getLogger(name).addFilter(_is_news)  # adding it twice changes nothing
    logging.captureWarnings(capture=True)
