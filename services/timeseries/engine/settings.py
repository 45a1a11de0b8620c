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
        head_rows: a head with so many rows becomes a block. Measured: 720 rows of 511 columns take 28 ms.
        head_age_s: a head closes so long after its first row, so that an idle server pins little of the journal.
        head_bytes_limit: rows of all heads; over half of it the oldest heads close early, over it `append` waits, or
            is refused (HEADS_FULL) while blocks cannot be stored. Measured at 20,000 heads of 24 rows and 511
            columns: the process grows by 1.08 bytes for each byte counted.
        close_group_heads: heads that become blocks in one transaction of a partition.
        compression_level: pcodec's. Measured on 511 columns of 720: level 1 26 ms, 2 28 ms and 3 % smaller, 4 39 ms
            and 5 % smaller.
        journal_keep_s: how long a batch stays in the journal although nobody needs it, so that a tail can resume.
        journal_bytes_limit: over it followers no longer hold the journal back; what they miss is a gap of their tail.
        raw_retention_s: a UTC day goes when all of it is older; rows for it are too late from then on. None: no age.
        disk_bytes_limit: size of journal and blocks over which the oldest days go, but never today nor the newest
            day; if those alone are over it the journal waits for no follower, and rows are taken all the same.
            None: no limit. It can be passed by what comes in within one `maintenance_interval_s`.
        sweep_rows: journal rows deleted in one transaction, so that appends wait little.
        maintenance_interval_s: how often ages are looked at and the journal is swept.
        partition_connections: idle partition files that are kept open; opening one takes 0.4 ms.
        read_threads: reads that run at once; more wait.
        max_series: series of one query; one more is refused (MAX_SERIES).
        max_points: points of one answer; one more is refused (MAX_POINTS).
        max_scanned_points: cells that one query may decompress; more is refused (MAX_SCANNED_POINTS).
        scan_cells: cells of one server held at once while a query runs.
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
    compression_level: int = 2
    journal_keep_s: float = 3_600.0
    journal_bytes_limit: int = 8 * GIB
    raw_retention_s: float | None = None
    disk_bytes_limit: int | None = None
    sweep_rows: int = 500
    maintenance_interval_s: float = 5.0
    partition_connections: int = 64
    read_threads: int = 2
    max_series: int = 20_000
    max_points: int = 10_000_000
    max_scanned_points: int = 1_000_000_000
    scan_cells: int = 8_000_000
    last_lookback_days: int = 7
    tail_read_bytes: int = 4 * MIB
    faults_remembered: int = 10_000
