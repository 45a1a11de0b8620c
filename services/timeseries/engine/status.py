"""What the engine says of itself."""

from dataclasses import dataclass
from datetime import date

from services.timeseries.engine.faults import LastError
from services.timeseries.engine.tail import FollowerStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """The truth about the engine. Points are those of blocks and heads; bytes are those of the files.

    Attributes:
        tier_bytes: size of the files of each tier, by its folder.
        unrolled_marks: how many runs of rows the roll-ups lack so far; reads take them from the finer tier.
        oldest_day: the oldest UTC day that has rows; None when there are none.
        refusing: why the last batches were not taken; empty when they were.
        evicted_partitions: days that went since the start, by age or by the limit.
        evicted_unshipped: by follower, how many points went with their day since the start before it had shipped them;
            an estimate from above, by whole blocks.
        disk_bytes_limit: what `disk_bytes` must not pass; None: no limit.
        disk_pressed: the limit is near, see `retention.PRESSED` and `retention.RELIEVED`.
        disk_over_limit: the limit is passed and there is no day left that may go.
    """

    points: int
    head_points: int
    head_bytes: int
    disk_bytes: int
    journal_bytes: int
    disk_free_bytes: int
    first_sequence: int
    last_sequence: int
    waiting_bytes: int
    waiting_appends: int
    damaged: int
    last_error: LastError | None
    closing_fails: bool
    refusing: str
    oldest_day: date | None
    tier_bytes: dict[str, int]
    unrolled_marks: int
    evicted_partitions: int
    evicted_unshipped: dict[str, int]
    disk_bytes_limit: int | None
    disk_pressed: bool
    disk_over_limit: bool
    followers: tuple[FollowerStatus, ...]
