"""What is to come, as callers get it: trends, dates of exhaustion and forecasts of the history that timeseries keeps.

    servicer      gRPC: what is asked -> arguments, measurements -> the mathematics in a thread -> answers
      arguments     what makes no sense is told with its field
      measurements  one metric by the hour, asked of timeseries; counters as rates
      workers       the threads, and how many calls may wait for them
      answers       plain values -> messages; what is not known is absent
    ranking       the same limit for many servers: as many as there is time for, the others the next time

What must stay true: the event loop only reads, since one answer of `forecasting` takes 20 to 80 ms; a caller who
leaves ends the reading at once and the computing at the next series; nothing here knows the fleet or who may see what
of it: the gateway asks only for what its caller sees.
"""
