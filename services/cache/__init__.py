"""The current state of every server: who reports, what it reports, and whether it is well.

Memory is the store and answers everything; Redis, when there is one, is a follower that is kept up to date.

    UpdateServers -> request (decode, refuse) -> core -> state (the truth) -+-> watch   a message a tick to each watcher
                                                                            +-> follower -> store_redis | store_memory

=============  =====================================================================================
model          a server's state and the fleet's counts, as values that never change
state          the truth: applies rows and descriptors, judges health and silence, numbers every change
metric_sets    the dictionaries that rows may name by id, least recently used ones forgotten
request        an UpdateServersRequest as the domain's values, or the error that refuses it
wire           states as protobuf bytes, made once for each version
watch          the stream: a watcher is a place in the order of changes, so it can be slow but never behind
store          the Protocol that every adapter of the follower passes the tests of
follower       keeps a store up to date, whatever the store does
core           joins the parts; what the servicer calls
=============  =====================================================================================

What must stay true: no call ever waits for the follower; the versions (epoch, sequence) order every change.
"""
