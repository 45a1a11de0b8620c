"""The record: which servers there are and what the AI said, in PostgreSQL.

The database is the embedded one (``embedded``) unless ``DATABASE_URL`` names another. The files from the outside in:
``__main__`` joins the parts, ``servicer`` speaks gRPC, ``store`` is the contract. ``store_local`` keeps it whether the
database is there or not: with ``facts`` (``journal``, ``kinds``, ``interactions``), which are on our own disk before
they are in PostgreSQL, and ``server_copy``, which is read while it is away. ``store_postgres`` is the SQL, ``queries``
what listings ask of either. Interactions have files of their own: ``interactions_servicer``, ``interactions_local``,
``interactions_postgres``, ``interactions_export``, ``interaction_query`` (filters, said to PostgreSQL and to the
journal), ``known``, ``embeddings``, ``calibration``, ``personal``, ``erasing``. ``store_connection`` is the only border
to the driver (``hosts``, ``line``, ``driver_errors``), ``store_migrate`` the schema's history; ``embedded``,
``postmaster`` and ``account`` run a PostgreSQL of our own. ``maintenance`` keeps the windows in which a server is
worked on. ``access`` knows users and tokens, ``audit`` keeps and proves the audit log. ``commands`` is what operators
type.
"""
