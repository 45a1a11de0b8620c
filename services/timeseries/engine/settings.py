"""Every bound of the engine, with its unit, in one place; nothing here comes from the environment.

The service maps its own settings onto these. Each bound says what happens when it is reached.
"""

from dataclasses import dataclass

DAY_MS = 86_400_000
MIB = 1 << 20
GIB = 1 << 30

MIN_TIME_MS = 0
"""The earliest time a row may have: the Unix epoch."""

MAX_TIME_MS = 9_223_372_036_854
"""The latest time a row may have, 2262-04-11: what a follower that counts int64 nanoseconds can still hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Bounds and periods.

    Attributes:
        waiting_bytes_limit: batches handed to the writer and not yet committed; over it `append` waits. Also the
            largest single batch, over which it is refused (BATCH_TOO_LARGE).
        waiting_appends_limit: appends that may wait for room; one more is refused (TOO_MANY_WAITING).
        head_rows: a head with so many rows becomes a block. Measured: 720 rows of 511 columns take 6 ms.
        head_age_s: a head closes so long after its first row, so that an idle server pins little of the journal.
        head_bytes_limit: rows of all heads; over half of it the oldest heads close early, over it `append` waits, or
            is refused (HEADS_FULL) while blocks cannot be stored. Measured at 20,000 heads of 24 rows and 511
            columns: the process grows by 1.08 bytes for each byte counted.
        close_group_heads: heads that become blocks in one transaction of a partition.
        journal_keep_s: how long a batch stays in the journal although nobody needs it, so that a tail can resume.
        journal_bytes_limit: over it followers no longer hold the journal back; what they miss is a gap of their tail.
        raw_retention_s: a UTC day of points goes when all of it is older and in the roll-ups. None: no age.
        five_minute_retention_s: the same of the 5 min roll-ups, by files of 8 days.
        hour_retention_s: the same of the 1 h roll-ups, by files of 64 days; rows that are older are too late.
        disk_bytes_limit: size of journal and blocks over which the oldest days go, but never today nor the newest
            day; if those alone are over it the journal waits for no follower, and rows are taken all the same.
            None: no limit. It can be passed by what comes in within one `maintenance_interval_s`.
        sweep_rows: journal rows deleted in one transaction, so that appends wait little.
        maintenance_interval_s: how often ages are looked at and the journal is swept.
        partition_connections: idle partition files that are kept open; opening one takes 0.4 ms.
        opened_bytes_limit: memory of directories and times of blocks that were read; those used last are kept. One of
            720 rows of 511 columns takes 8 KB, and reading a column of it 13 us instead of 58.
        listed_bytes_limit: the same of the lists of the blocks that a cohort has on a day.
        read_threads: reads that run at once; more wait.
        max_series: series of one query; one more is refused (MAX_SERIES).
        max_points: points of one answer; one more is refused (MAX_POINTS).
        max_scanned_points: cells that one query may decompress; more is refused (MAX_SCANNED_POINTS).
        scan_cells: cells of one server held at once while a query runs, and while blocks are merged or rolled up.
        sparse_points_a_day: with fewer points a file spans up to 32 days and has small pages. Measured on 20 machines
            with 6 metrics every 5 min, 33,600 points a day: 0.72 bytes a point, in files of a day 3.56.
        merged_rows: rows of a block that others are merged into: a day of one row in 10 s has 8,640.
        merged_level: pcodec's for those. Measured on 511 columns of 8,640 rows: level 4 0.990 bytes a point, 8 0.959,
            both 8.4 M values/s with all else that encoding takes.
        merge_blocks: so many short blocks (under half of `head_rows`) of a cohort in a partition are merged at once.
        late_grace_s: a day that is too old, but has got rows of an import, stays for so long after the last of them;
            a partition that is complete is merged so long after its last ones.
        last_lookback_days: how far behind a server's newest row `last_values` looks for a series.
        tail_read_bytes: what a tail reads from the journal at once.
        faults_remembered: distinct damaged blocks that are counted and named; further ones are only logged.
    """

    waiting_bytes_limit: int = 64 * MIB
    waiting_appends_limit: int = 1024
    head_rows: int = 720
    head_age_s: float = 7_200.0
    head_bytes_limit: int = GIB
    close_group_heads: int = 16
    journal_keep_s: float = 3_600.0
    journal_bytes_limit: int = 8 * GIB
    raw_retention_s: float | None = None
    five_minute_retention_s: float | None = None
    hour_retention_s: float | None = None
    disk_bytes_limit: int | None = None
    sweep_rows: int = 500
    maintenance_interval_s: float = 5.0
    partition_connections: int = 64
    opened_bytes_limit: int = 48 * MIB
    listed_bytes_limit: int = 16 * MIB
    read_threads: int = 2
    max_series: int = 20_000
    max_points: int = 10_000_000
    max_scanned_points: int = 1_000_000_000
    scan_cells: int = 8_000_000
    sparse_points_a_day: int = 4_000_000
    merged_rows: int = 16_384
    merged_level: int = 8
    merge_blocks: int = 16
    late_grace_s: float = 3_600.0
    last_lookback_days: int = 7
    tail_read_bytes: int = 4 * MIB
    faults_remembered: int = 10_000
