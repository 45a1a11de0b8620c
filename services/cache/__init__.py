"""The current state of every server: who reports, what it reports, and whether it is well.

Memory is the store and answers everything; Redis, when there is one, is a follower that is kept up to date.

    UpdateServers -> request (decode, refuse) -> core -> state (the truth) -+-> watch   a message a tick to each watcher
                                                          ^                 +-> follower -> store_redis | store_memory
                                                          +---- merge <---- peers <----------+  what others wrote

=============  =====================================================================================
model          a server's state and the fleet's counts, as values that never change
state          the truth: applies rows and descriptors, judges health and silence, numbers every change
metric_sets    the dictionaries that rows may name by id, least recently used ones forgotten
request        an UpdateServersRequest as the domain's values, or the error that refuses it
merge          what two replicas know of a server, joined: the same in any order
wire           states as protobuf bytes, made once for each version
watch          the stream: a watcher is a place in the order of changes, so it can be slow but never behind
store          the Protocol that every adapter of the follower passes the tests of
documents      the JSON in Redis, and the note beside it that replicas compare
redis_url      what a REDIS_URL says; redis_link: the connections to a server, Sentinel's primary or a cluster
follower       keeps a store up to date, whatever the store does
peers          hears what other replicas wrote, and reads all that differs after every gap
core           joins the parts; what the servicer calls
=============  =====================================================================================

What must stay true: no call ever waits for the follower; the versions (epoch, sequence) order every change here, and
among replicas each server has a version of its own (stamp, writer).
"""
