"""What the tests of the detector look at."""

from collections.abc import Iterator
from typing import Any

import pytest

from services.analytics.scoring.server import FleetScorer, ServerWindow


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, Any, ServerWindow]]]:
    """What is judged: start, values and window."""
    seen: list[tuple[float, Any, ServerWindow]] = []
    update = FleetScorer.update

    def spy(scorer: FleetScorer, time_s: float, values: Any) -> ServerWindow:
        window = update(scorer, time_s, values)
        seen.append((time_s, values.copy(), window))
        return window

    monkeypatch.setattr(FleetScorer, "update", spy)
    yield seen
