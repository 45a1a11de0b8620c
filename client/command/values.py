"""Times, spans and counts, from the command line and for people.

What must stay true: what is accepted here is what the gateway accepts over HTTP (`-1h`, `now-5m`, RFC 3339, seconds).
"""

import argparse
import datetime
import re
import time
from typing import Final

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_SPAN: Final = re.compile(r"(?:\d{1,12}(?:\.\d{1,9})?(?:ms|s|m|h|d))+")
_SPAN_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_RELATIVE: Final = re.compile(r"(?:now)?([+-])(.+)")
_NUMBER: Final = re.compile(r"\d{1,12}(?:\.\d{1,9})?")
MAX_TIME_S: Final = 253_402_300_799  # 9999-12-31T23:59:59Z


def span_s(text: str) -> float:
    """Seconds of `60s`, `5m`, `1h30m`, `7d` or a bare number of seconds."""
    if _NUMBER.fullmatch(text):
        return float(text)
    if not _SPAN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 60s, 5m, 1h30m or 7d")
    return sum(float(count) * _UNITS[unit] for count, unit in _SPAN_PART.findall(text))


def moment_s(text: str, now_s: float | None = None) -> float:
    """Seconds since the epoch of `-1h`, `now`, `now-7d`, a date, RFC 3339 (UTC where no zone is said), or seconds."""
    now = time.time() if now_s is None else now_s
    if text == "now":
        return now
    relative = _RELATIVE.fullmatch(text)
    try:
        if relative is not None:
            span = span_s(relative[2])
            seconds = now - span if relative[1] == "-" else now + span
        elif _NUMBER.fullmatch(text) and len(text) != 8:  # eight digits are a date
            seconds = float(text)
        else:
            moment = datetime.datetime.fromisoformat(text)
            moment = moment.replace(tzinfo=datetime.UTC) if moment.tzinfo is None else moment
            seconds = moment.timestamp()
    except (ValueError, OverflowError, argparse.ArgumentTypeError):
        shapes = "-1h, now-7d, 2026-11-01 or 2026-11-01T12:00:00Z"
        raise argparse.ArgumentTypeError(f"{text!r} is no time: {shapes}") from None
    if not 0 <= seconds <= MAX_TIME_S:
        raise argparse.ArgumentTypeError(f"{text!r} lies outside of the years 1970 to 9999")
    return seconds


def time_text(seconds: float) -> str:
    """`2026-11-23 00:30:30`, with milliseconds where there are some; UTC."""
    ms = round(seconds * 1_000)
    moment = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(milliseconds=ms)
    return moment.strftime("%Y-%m-%d %H:%M:%S") + (f".{ms % 1_000:03}" if ms % 1_000 else "")


def number_text(value: float) -> str:
    """A value to at most four significant decimals: `42.5`, `1234567`, `0.001234`."""
    if value == int(value) if abs(value) < 1e15 else False:
        return str(int(value))
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"


def size_text(count: int) -> str:
    """`137.8 MiB`."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1_024:
            break
        size, unit = size / 1_024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def age_text(seconds: float) -> str:
    """`12s`, `5m`, `3h`, `12d`."""
    for unit, width in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * width:
            return f"{seconds // width:.0f}{unit}"
    return f"{max(seconds, 0.0):.0f}s"
