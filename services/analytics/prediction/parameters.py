"""The constants of prediction, the same for every server and metric.

Measured on simulated fleets of 20 servers with a tick a minute, 14 days each, on which 4 climbs a server were laid (of
memory or of a disk, straight to 98 or 99 % in 1 to 32 hours; 3 of 10 ended before, between a fifth and four fifths of
the way). Seeds 1 and 2 served to find them, seed 3 and those of the tests to judge.
"""

from typing import Final

LIMIT: Final = 95.0
"""A resource at so many percent is what health calls critical (`fleet.health`)."""
HORIZON_MINUTES: Final = 8 * 60
"""Probabilities are those of failing within this time. With 12 hours a noisy metric (a graphics card's memory, up and
down by 20 points in hours) makes 14 false findings in six weeks of 20 quiet servers, with 8 hours 2."""

SCALES: Final = (2, 5, 10)
"""Minutes of one point; a climb is looked at over the last 32 minutes, 80 and 160. Without the middle one a climb of
four hours is foretold 1.7 hours before the limit instead of 2.5."""
POINTS: Final = 16
LAG: Final = 4
"""Slopes are between points that lie so far apart. A single step touches 4 of 12 pairs and so never looks like a climb,
as it does to the pairs of halves that are usual."""
PAIRS: Final = POINTS - LAG
LEAST_PAIRS: Final = 9
REACH: Final = 3
"""A climb is thought to go on for at most so many times the time that it was looked at."""

TURN: Final = 5.0
"""A climb is over when the value fell by so many percent, and one begins when it rose by as many."""
REMEMBERED: Final = 8
"""Climbs that are remembered, the highest of each day at most: so many days, or weekly clean-ups."""
FEW: Final = 3
"""With fewer the highest of them is the usual one, else the second, so that one that went too far is not."""
HIGHER: Final = 3.0
STEEPER: Final = 1.3
"""A climb is as usual up to so many percent above the usual height, and so many times as steep. 198 saw-tooth disks of
a period of 6 hours to a week, with peaks between 60 and 93 % that were equal within 2 points, made 1 finding in four
weeks once two days were over, and 80 in these, mostly in a first cycle of hours; 102 whose peaks varied by 3 points
(standard deviation) made 116 in the four weeks."""
DEEP: Final = 10.0
"""At the limit it has failed if it came from so far below: what was always there (a read-only image) has not."""

SHARES: Final = (0.0, 0.5, 0.75, 11 / 12, 1.0)
RELIABILITY: Final = (0.0, 0.2, 0.45, 0.5, 0.9)
"""Which part of the pairs' slopes reach the limit within the horizon, and how often it then was reached: with all 12,
in .88 to .94 of the minutes; with 11 in .43 to .56; with 9 in .46 to .50; with 6 in .17 to .19."""
MARGIN: Final = 0.05
"""The interval of the time until the limit is that of the slopes' tenth and ninetieth part, wider by this part. Without
it held .35 to .46, by 2 % of what was left; with it .93 to .95 of straight climbs: real ones are not as straight."""

LATELY: Final = 1 / 15
BEFORE: Final = 1 / 360
"""Time constants, per minute, of what is lately and of the hours before."""
ABNORMAL: Final = 3.5
"""A server's minute is abnormal from this raw score on; of the minutes of a quiet fleet .00035 are, of those of a
processor's spike, of packet loss or of thrashing over .9."""
GROWING: Final = 5.0
"""A counter of errors runs away where its rate is above what is usual and departs by so much (`scoring.series`). Of
a server's at most .05 do while it is well, .1 when it thrashes, .3 when the link is full, .7 with packet loss."""
ANOMALIES: Final = ((0.3, 0.7), (0.0, 0.3))
"""How much thicker than in the hours before abnormal minutes came, and the probability of failing. Measured in four
days of 20 servers with all eight scenarios in turn (seed 11), at a score of 3: of the minutes with more than .4 .24 to
.29 were followed by failing within the horizon."""
ERRORS: Final = ((0.05, 0.3), (0.0, 0.2))
"""The part of the counters of errors that run away, and the probability of failing. This is a belief, not measured: the
simulator's packet loss ends as it began, and failing followed no more often than else. With anomalies it comes to .44,
so that both together are told but make no finding."""
FALL_INTERVALS: Final = 3.25
LEAST_FALL_MS: Final = 30_000
"""As `silence` has them: a server is silent after so many intervals, and never before so long."""
FALLS_DECAY: Final = 59 / 60
"""What is left of the number of falls after a minute: those of about the last hour count."""
FALLS: Final = ((1.0, 2.4), (0.0, 0.85))
"""How often it fell lately, and the probability that it falls again: 2.4 are three falls in half an hour."""

OPEN: Final = 0.5
MOST_OPEN: Final = 0.89
"""However often people said that it was false, a resource that all slopes bring to its limit (.9) is found."""
CLOSE: Final = 0.2
HOLD_MINUTES: Final = 3
QUIET_MINUTES: Final = 10
"""A finding begins when the probability was so high for so long, and ends when it was so low for so long."""
