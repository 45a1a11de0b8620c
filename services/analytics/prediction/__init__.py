"""Failure prediction: for each server how likely it is to fail within the next hours, why, and when.

To fail means here: a resource that is measured in percent (disk, memory, swap, inodes) comes to `LIMIT`, where health
is critical, or the server falls silent. Four kinds of reasons have a probability each and are taken as independent:

    climbs      a resource that climbs to its limit in time, faster or higher than it usually does
    symptoms    minutes that are far from usual come thick, and counters of errors grow faster than usual
    falls       the server falls silent and comes back, again and again
    predictor   the four together, minute by minute; what is known is saved and goes on
    foresight   one minute's predictions, made into words when somebody asks
    course      a prediction that holds becomes a finding

What must stay true: it is a function of the closed minutes and of the rows' times alone, with one set of constants for
all servers (`parameters`, where it says how each was found); a resource that climbs and is cleaned as usual foretells
nothing; what is kept is bounded: .8 kB a resource and .1 kB a server.
"""
