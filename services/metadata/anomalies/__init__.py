"""The record of findings: what detectors told, and what people said of it.

    model      a finding with what was said of it; how parts that came from two places become one
    telling    findings and remarks as facts, and back; what is refused
    query      which findings a listing is of, said to PostgreSQL and to what is in memory
    postgres   the findings in PostgreSQL, as SQL
    store      what callers get: recorded in the journal, read from PostgreSQL and from what it lacks
    servicer   gRPC to the store

What must stay true: a finding that was acknowledged to its detector, or a remark to a person, is in every later answer;
what is answered without PostgreSQL says so; whoever follows the findings misses none.
"""
