"""The one parameter set, for every series and every sampling interval.

What must stay true: nothing here is a property of one server, metric or recording. Memories are times, shapes are
numbers of windows. The numbers beside them were measured on the labelled recordings; all lie on plateaus, where what is
left of difference is an event or two of 94.
"""

from typing import Final

DAY_S: Final = 86_400.0
HOUR_S: Final = 3_600.0

MIN_WINDOW_S: Final = 60.0
"""Faster samples are averaged to windows of this length: what was measured was measured at one and five minutes."""

MEMORY_S: Final = 7 * DAY_S
"""Time constant of what is usual; 2,016 windows of five minutes. Two days or fourteen: -.01."""
MIN_MEMORY_WINDOWS: Final = 500
"""The least windows in it, for hourly samples."""
LEVEL_MEMORY_S: Final = 12 * HOUR_S
"""Time constant of the level about which a day's profile lies: a shift is usual after about a day."""
UNSEEN_DAY: Final = 0.5
"""By this part the distance from the profile counts at an hour of which only the other kind of day has been seen, a
weekend or a working day. A simulated fleet that began on a Saturday made 10 false findings on its first Monday, with
this 1; the labelled recordings: see docs/accuracy.md."""
SEASON_GAIN: Final = 0.2
"""Part by which an hour of the profile follows that hour's mean, once a day. .15 to .5: within .01."""
CLIP_DEVIATIONS: Final = 12.0
"""A value moves what is usual at most as one so far away does, so that an outlier does not make a series deaf. 6 to
none: within .02; 4: two points less on single metrics, whose heavy tails are surprises then."""
TRUST_WINDOWS: Final = 10
"""Before that many values nothing is clipped."""

LEARN_S: Final = DAY_S
LEARN_WINDOWS: Final = 100
"""A series is judged once it has lasted for the time and has so many values, and not before."""
FRESH_WINDOWS: Final = 6
"""After a silence longer than this, the neighbourhood of a value begins anew."""

SHIFT_WINDOWS: Final = 6
SPREAD_WINDOWS: Final = 12
"""Lengths of the mean that shows a shift and of the variance that shows a collapse (FORESIGHT)."""
LEVELS: Final = 15
LEVEL_DEVIATIONS: Final = 0.7
"""Into how many levels, of how many standard deviations, values are put for the surprise of their order (FORESIGHT)."""
MAX_TRANSITIONS: Final = 4_096.0
"""Transitions remembered from a level; then all are halved."""
CHANNEL_CAP: Final = 12.0
"""The most that one view adds to a series' score. 10 to 16: the same within a point; 4: four points less."""
SERIES_ALARM: Final = 13.0
"""The sum of views that is a score of .5 and begins the rest: more than one view alone can add. Found on made series of
many kinds, the best level lay between 12 and 14 for each kind."""
REST_WINDOWS: Final = 100
"""After an alarm a single series is quiet for so many windows (FORESIGHT: worth 5 to 20 points)."""

BREAK_REST: Final = 2.5
"""A sum of views so many times that of the alarm breaks the rest."""

RELATIVE_FLOOR: Final = 1e-3
"""Least standard deviation, in parts of the range seen."""
ROUNDING: Final = 1e-15
"""Least standard deviation, in parts of the value's magnitude: what a double may have lost."""

SOFT_DEVIATIONS: Final = 8.0
"""z -> z / (1 + z / this): large departures count, but none alone. 6 to 15: within .02; a hard cap: -.2."""
TOP_SHARE: Final = 0.25
"""A server's score is the mean of this part of its series. A third to a sixth: within .05."""
COPY_SQUARED_CORRELATION: Final = 0.95
"""Series whose departures correlate so much are copies of each other; see `copies` for why not less."""
SMOOTHING: Final = (0.7, 0.3)
"""Weights of a server's newest windows. Without, .53 of the events are found at .25 false alarms a day instead of .70;
with (5, 5, 2) / 12 .69, and .03 less at one a day."""

ALARMS_PER_DAY: Final = 2.0
"""Openings a server and day that its alarm level is held at. About a third of them are incidents in the labelled
recordings, so that about one a day is false."""
THRESHOLD_STEP: Final = 0.15
"""An opening raises the level by this part, a quiet day lowers it by `ALARMS_PER_DAY` times this part."""
OPENING_S: Final = 1_800.0
OPENING_WINDOWS: Final = 3
"""Above the level again within this time, or so many windows, is the same opening."""
THRESHOLD_MEMORY_S: Final = 14 * DAY_S
THRESHOLD_RATES: Final = (6.0, 0.25)
"""The level stays between those that were passed in so many half-hours a day: a long incident cannot carry it off."""
SERVER_ALARM: Final = 4.0
"""The level of a usual server."""
OWN_SHARE: Final = 0.5
"""A score is .5 where `raw` is so far (geometrically) from that level to what the server's own history passes as often
as its alarm level. Found at 1 and .25 false alarms a day, with one threshold for servers of one kind and for all nine
servers: by 0, .84 / .69 and .73 / .55; by .5, .84 / .70 and .88 / .64; by 1, .83 / .70 and .88 / .74."""
FINDING_LEVEL: Final = 4.0
"""A server's alarm is worth telling somebody from here on, in the unit of `raw`. Levels are held at a rate, so that
even the quietest server passes its own. In a week 20 quiet servers of 511 made series came to 3.3; of the events of the
two kinds of recordings .71 and .87 are found from here on, .71 and .89 without."""
