"""How long to wait before the gateway is asked again."""

import random
from dataclasses import dataclass, field

from client.errors import OpenManagerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """After the n-th failure in a row initial * 2^n, capped, less up to half at random; more if the gateway says so."""

    initial_s: float = 0.2
    max_s: float = 10.0
    rng: random.Random = field(default_factory=random.Random)

    def delay_s(self, failures: int, error: OpenManagerError) -> float:
        """The pause after the `failures`-th failure, counted from 0."""
        full_s: float = min(self.max_s, self.initial_s * 2 ** min(failures, 30))
        return max(full_s * (1 - self.rng.random() / 2), error.retry_after_s or 0.0)
