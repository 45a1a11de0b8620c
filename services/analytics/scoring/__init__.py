"""How abnormal is a value, a series, a server? The mathematics of anomaly detection, and nothing else.

    rates     counters become rates; a reset is no value
    windows   rows closer than a minute become one-minute means
    series    four views of each series against what is usual for it -> a score a series, and how it departs
    copies    which series of a server say the same thing
    server    the departures of a server's series -> one score a server, with the series that made it
    threshold an alarm level a server, held so that it is passed about as often as is asked for

``command`` is ``python -m services.analytics score``.

What must stay true of every part: an answer depends on what was shown before and on nothing else (no clock, no chance,
no look ahead); what is kept is bounded, held in arrays and given back by `arrays`, so that a restart goes on with equal
scores; a NaN is no value, and changes nothing; x -> a * x + b with a > 0 changes no score beyond rounding.
"""
