"""Copies of a store, and the proof that it, or a copy, is what was written: in processes of their own.

`backup` copies the files while they are written, and restores them (`journal_copy`: what must be of one moment);
`excerpt` copies some days, for an export; `manifest` says what a backup holds; `verify` reads every byte and names what
is damaged (`block_checks`: in a block). What must stay true: a store is only read, its lock is not wanted, and nothing
waits for anything here; the engine knows nothing of it. docs/operations.md, docs/formats/backup.md.
"""
