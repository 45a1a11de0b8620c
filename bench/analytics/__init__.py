"""`make bench-analytics`: how good the analytics service is, on recordings and on disks whose truth is known.

    detection   events found at a given rate of false alarms, beside k-means as in Netdata and EWMA
    operating   the alarm that is shipped, learnt without labels
    forecast    a week ahead of real machines, beside "as 24 hours before"
    exhaustion  the date a disk is full, beside predict_linear
    quiet       false findings of a simulated fleet on which nothing happens, and what the detector costs there
    scenarios   leaks, full disks, outages and more, played on a simulated fleet
    restart     scores after restarts, beside those of a detector that was not restarted
    cost        a window and an hour of 10,220 series

A row is a module with `ROW`, `measure` and `judged`, named in ``rows``.

What must stay true: everything goes through the code that is shipped, with the one set of parameters that is shipped;
yardsticks are measured in the same run on the same data, each by the setting that serves it best; the judge of events
comes with the recordings and is not ours; a row whose recordings are not there says so and is judged neither way.
"""
