"""`make bench`: what OpenManager's history costs beside dedicated servers, measured in one run on one machine.

`load` makes the points, `peers` starts the servers, `ingest`, `storage` and `queries` each measure one row of the
table, `report` judges it against the targets. What must stay true: every number is measured in this run; peers get the
same points, counted on both sides; what is compared runs interleaved, so that a busy neighbour hits all of them.
"""
