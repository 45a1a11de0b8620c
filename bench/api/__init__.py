"""`make bench-api`: what the front door costs, as ratios to yardsticks of the same run on the same machine.

The yardsticks do as little as can be done with the same transport (`bench.api.bare`): what is missing to them is what
the gateway itself costs. What must stay true: contenders take turns in the same minutes; every reply is known to be
right, by a real client before, during and after, and by counts of bytes; a row where any was not is void.
"""
