"""Whether 100 is the most that a metric can be."""

import re
from typing import Final

import numpy as np

from services.analytics.forecasting.robust import Floats

_NAME: Final = re.compile(r"(^|[^a-z])(percent|pct|usage|utili[sz]ation|util)([^a-z]|$)|%", re.IGNORECASE)


def is_percent_name(name: str) -> bool:
    """Whether the name says so."""
    return _NAME.search(name) is not None


def stays_within_percent(values: Floats) -> bool:
    """Whether a history was never outside of 0 to 100; one without a value was not."""
    known = values[np.isfinite(values)]
    return bool(((known >= 0) & (known <= 100)).all())


def is_percent(name: str, values: Floats) -> bool:
    """Whether the name says so and the history, which has a value, agrees, or the history stops there."""
    known = values[np.isfinite(values)]
    if not len(known) or not stays_within_percent(known):
        return False
    return bool(known.max() == 100) or is_percent_name(name)
