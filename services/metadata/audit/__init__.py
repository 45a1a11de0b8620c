"""The audit log where all chains come together: kept once, proved by signed checkpoints, dropped by age.

    checkpoint.py  what is signed, the key, the file under DATA_DIR
    chains.py      holds one chain after another to its hashes, its checkpoints and what is known of its end
    proofs.py      which checkpoints are right, and what they say
    sink.py        takes the writers' events, as facts (`services.metadata.facts`), and knows where each chain ends
    store.py       the log in PostgreSQL
    keeper.py      signs checkpoints, verifies, drops months that are too old
    servicer.py    gRPC

What must stay true: whoever may write to the database, but not to DATA_DIR, cannot alter what is older than the last
checkpoint without `keeper.verify` naming it.
"""
