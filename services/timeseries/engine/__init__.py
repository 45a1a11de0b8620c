"""The embedded time-series engine: a journal that is synced before it answers, and columns that cost a byte a point.

**The slots.** A point travels through these places, and is in at least one of them from its acknowledgement on::

    append ──> journal.db ──> head (memory) ──> block (blocks/YYYY-MM-DD.db) ──> roll-ups of 5 min ──> of 1 h
               sequence,      by UTC day and     sorted columns, each compressed   a file for 8 days    for 64
               fsync          cohort             and checked by itself
                  └──> tail, followers

*Journal* (`journal`, `journal_reader`, `batch`, `writer`): every batch gets the next sequence. One thread takes all
batches that wait into one transaction; COMMIT returns after the sync, the rows are put into heads, and only then the
callers are told. Sets, servers, cohorts and descriptors (`catalog`) are stored with the first batch that needs them;
whom a sender names tick after tick is remembered (`roster`).

*Heads* (`head`): a cohort is the columns that share their times: the metrics of one set on one server. A head is a
cohort's matrix of one UTC day; rows are appended as they come. A series is a metric key on a server and may lie in
several cohorts, for a server may change its set at any time. A sender of few points, or of series with times of their
own, is a cohort of few columns: the same head, the same block.

*Blocks* (`block`, `decimals`, `partition`): a head that is full (720 rows), old (2 h) or in the way of others is
sorted, compressed by pcodec column by column and stored, together with the head's `blocked_through` and marks of the
buckets it touches, in one transaction of its day's file. Reading one metric of 511 reads the directory, the times and
that column. When the day is over its blocks become one for each cohort (`merge`).

*Roll-ups* (`tiers`, `rollup`, `upkeep`): a bucket keeps of each metric what every aggregation can be made of. It is
made of all that the finer tier has for it, never added to; while a mark or a head says that it is out of date, reads
take the finer tier instead. A roll-up is a block whose columns are fields, so all of the above holds for it too.

*Reads* (`scan`, `aggregate`, `query`, `last`): a plan says which tier answers for which part of the range; heads
first, then blocks; rows of all cohorts of a series are put together and equal times are resolved by sequence; then
windows are made of them. Points of many servers are read and put into windows together. Blocks never change, so the
times and directories of those read last are kept (`cache`), and a read of one metric fetches its column only. `store`
is all of this without an event loop; `reads` asks it asynchronously, and `engine` adds appending and upkeep.

*Followers* (`tail`, `cursors`): the journal is read in order, and a cursor says how far a follower's store has it.
What that store may lack is looked up for queries that join the two (`unshipped`); what the journal let go comes out
of blocks by its sequence (`rows`, `unsent`), with what its server said of itself at the time (`told`), and is counted
until then (`left`).

*The end* (`retention`, `frozen`): a file whose rows are all too old, or the oldest one when the disk's limit is
reached, goes as a whole, rolled up before. That is noted in the journal first, so that no replay brings rows of it
back, and buckets whose points are gone are never made anew of the few that come later.

**The threads.** One writes the journal, one closes heads, one does the upkeep (roll-ups, merging, the end), a few
read. One lock guards catalog, heads and marks; it is held for microseconds, and never over I/O.

**The promises**, each with a test in tests/timeseries/engine that was seen to fail with the bug planted:

* What `append` returned for is on disk. After `kill -9` at any moment it is there, once: a replay skips, for each
  head, the rows up to the durable `blocked_through`, and a sweep of the journal waits for heads and followers.
* The row with the higher sequence wins at an equal time, within a batch the later one, so sending again is harmless.
  NaN is "no value" and takes nothing away. Late, doubled and unordered rows are normal.
* A sequence is given once, also after everything is swept and the process restarted.
* A read sees each acknowledged row once, also while its head becomes a block, blocks are merged, and roll-ups are
  made. Windows are epoch-aligned, labelled by their start and clipped to [start, end); a gap is an absent point.
  Every bit of a value comes back.
* Every tier gives what the points would: MIN, MAX, COUNT, FIRST, LAST and RATE exactly, SUM and AVG within 1e-9.
* Damaged bytes are noticed by checksums, counted and left out; nothing else suffers.
* An evicted day is gone as a whole, also across a crash, and its bytes are the file system's again; who reads it at
  that moment ends in order; rows that come for it later are new ones. Nothing stops taking rows because of a limit.
* Everything has a bound with a name (`settings`): over it callers wait, or are told which bound it was.

**What the design gives up.** One process, one disk: more is the business of followers. A batch is written twice, to
the log and to the file of the journal, and a third time compressed: an acknowledgement costs one sync, not one of
each. A head's rows live in memory uncompressed (8 bytes a cell) until they close, 59 MB for 20 servers of 511 metrics.
Short columns are dear in pcodec, so short blocks are frames, of which one metric is dear to read; late rows make small
blocks, to be merged. There is no index on values and no deletion of single points: a day goes as a file.

Formats: docs/formats/journal.md and docs/formats/block.md. Copies, and verifying them: `services.timeseries.archive`.
"""

from services.timeseries.engine.aggregate import Aggregation as Aggregation
from services.timeseries.engine.catalog import MetricInfo as MetricInfo
from services.timeseries.engine.engine import Engine as Engine
from services.timeseries.engine.last import LastValues as LastValues
from services.timeseries.engine.query import Query as Query
from services.timeseries.engine.query import SeriesResult as SeriesResult
from services.timeseries.engine.settings import EngineSettings as EngineSettings
from services.timeseries.engine.status import EngineStatus as EngineStatus
from services.timeseries.engine.tail import FollowerStatus as FollowerStatus
from services.timeseries.engine.tail import TailBatch as TailBatch
