"""The record: which servers there are and what the AI said, in PostgreSQL.

The database is the embedded one (``embedded``) unless ``DATABASE_URL`` names another. The files from the outside in:
``__main__`` joins the parts, ``servicer`` speaks gRPC, ``store`` is the contract, ``store_postgres`` the SQL,
``store_connection`` the only border to the driver, ``store_migrate`` the schema's history; ``embedded``, ``postmaster``
and ``account`` run a PostgreSQL of our own.
"""
