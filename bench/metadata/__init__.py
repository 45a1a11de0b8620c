"""`make bench-metadata`: what the record costs, beside bare inserts into the same PostgreSQL, in one run.

The service runs as shipped, with its embedded PostgreSQL; the yardstick is the same driver on the same server. What
must stay true: contenders take turns in the same minutes; what was acknowledged is counted in the table afterwards, or
the row is void.
"""
