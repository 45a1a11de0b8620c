"""What is abnormal in the fleet, found in the history as it is written.

    TailMetrics -> follow (decode, order) -> core -+-> detect    what a detector is; fleet_detector: the one there is
                                                   +-> outbox  findings on their way to metadata
                                                   +-> checkpoint  state, what waits and the place in the tail, one file

``fleet_detector`` is made of ``registry``, ``open_windows``, ``scoring``, ``openings`` and ``silence``. ``__main__``
joins the parts, ``servicer`` speaks gRPC, ``settings`` is what can be told.

What must stay true: every journaled row is judged exactly once, also over a kill -9. The tail can be read again from
any sequence, a checkpoint holds the state together with the sequence that comes next, and a row that was taken before
is known by its second. So any checkpoint is a right one, and reading on from it gives the results of a run that was
never interrupted.
"""
