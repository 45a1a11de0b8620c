"""Which traces are recorded: OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG, by one rule for all spans.

    always_on, always_off, traceidratio                          by the trace id alone
    parentbased_always_on (default), parentbased_always_off,     as the caller decided; without a caller by the trace id
    parentbased_traceidratio

What must stay true: the decision needs nothing but the trace id and the caller's flag, so that it is made before a
span is; the same trace id is decided alike in every process, and as OpenTelemetry's own ratio sampler decides it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SAMPLER: Final = "OTEL_TRACES_SAMPLER"
ARGUMENT: Final = "OTEL_TRACES_SAMPLER_ARG"
DEFAULT: Final = "parentbased_always_on"

_PARENT_BASED: Final = "parentbased_"
_RATIO: Final = "traceidratio"
_FIXED: Final = {"always_on": 1.0, "always_off": 0.0}
_ID_MASK: Final = (1 << 64) - 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """`bound`: ids whose lower 64 bits are below it are taken; `by_parent`: a caller's decision comes first."""

    bound: int
    by_parent: bool

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Sampling":
        """As the environment says. What cannot be read is said in the log and, as in the SDK, means the default."""
        name = environ.get(SAMPLER, DEFAULT).strip().lower() or DEFAULT
        base = name.removeprefix(_PARENT_BASED)
        if base != _RATIO and base not in _FIXED:
            _log.warning("%s=%s is not known; it is taken for %s", SAMPLER, name, DEFAULT)
            return cls(1 << 64, by_parent=True)
        ratio = _ratio(environ.get(ARGUMENT, "")) if base == _RATIO else _FIXED[base]
        return cls(round(ratio * (1 << 64)), name.startswith(_PARENT_BASED))

    def takes(self, trace_id: int, parent_sampled: bool | None) -> bool:
        """Whether to record; `parent_sampled` None: nobody has decided before."""
        if parent_sampled is not None and self.by_parent:
            return parent_sampled
        return trace_id & _ID_MASK < self.bound


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if 0.0 <= ratio <= 1.0:
        return ratio
    _log.warning("%s=%s is not a number from 0 to 1; it is taken for 1, so everything is recorded", ARGUMENT, text)
    return 1.0
