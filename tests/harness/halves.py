"""Which of many alike are tried by `make test`, and which by `make test-full`; CI runs both."""

from collections.abc import Iterable
from typing import Any

import pytest


def every_other(items: Iterable[Any]) -> list[Any]:
    """Parameters of a test: each second one is for `make test-full`."""
    return [pytest.param(item, marks=[pytest.mark.full] * (at % 2)) for at, item in enumerate(items)]
