"""The audit log's events, their chains, and the journal in which a writer keeps its own until they are shipped.

    event.py      what an event says, and the bytes that its hash is of (docs/formats/audit.md)
    journal.py    a writer's file: the number and the hash are given there, in the transaction that stores the event
    log.py        the journal behind a group commit: who changes something waits for one sync, shared with neighbours
    configuration.py  a start with other settings is an event
    refusals.py   refused calls, counted by minute before they become events

A writer is one process with one file. Its chain begins at 1 and has no gaps; what altered, removed or added an event
later breaks it, or a signed checkpoint of it (`services.metadata.audit`).
"""
