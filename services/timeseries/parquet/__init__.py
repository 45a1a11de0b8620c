"""The history as Parquet files, for any tool, and back: whose data it is must not depend on this program.

**Export reads a copy.** It copies the journal and the wanted days as a backup does (`engine.excerpt`), opens the
engine on that, queries it day by day and server by server, and writes what comes. That costs the room of the copy, 1.2
bytes a point beside the 2.2 of the Parquet files, and a hundredth of the time. For that there is one way, whether the
service runs, is down or hangs; it takes no lock that would keep the service from being started, and none of its
memory, reading threads and limits. All files are of one moment: no late row is in one day and missing in the next, and
no day goes while it is read. The other ways were: the running service's API, which cannot help when it is down, has
limits of points and series to work around, and would be read with one of its two reading threads for minutes; and the
engine on the store itself, which wants the service stopped and would close heads, sweep and evict by the settings of
whoever types the command.

**Import is a sender.** Only the service decides what is acknowledged, so an import goes to it, batch by batch over
gRPC, with the service's secret. When no service has the store, the command takes the store's lock, opens the engine
and calls the same servicer in its own process: the same checks in the same words. A row of a file that cannot be taken
is counted and named; a file that lacks a column is refused before anything is sent.

What must stay true:

* every bit of a value, every millisecond, label, unit and kind comes back; of points written twice the newest is kept;
* a folder that exists under the name asked for is whole; what broke off is under another name, or gone;
* importing again changes nothing: the same server, metric and time is the same point;
* memory does not grow with what is exported or imported: bounds are `exporting.ROW_GROUP_ROWS`,
  `exporting.READING` and `matrices.BUFFER_ROWS`;
* pyarrow is loaded only by this package, and this package only by the two commands: it is an extra.

`layout` says what lies where, `schema` which columns; `exporting` writes; `reading` reads files and finds their faults
(`faults`), `matrices` makes rows of metric sets of single points, `importing` sends them. docs/formats/parquet.md.
"""
