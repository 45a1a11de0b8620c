"""What the scorer is measured beside: k-means as in Netdata, and EWMA; own implementations after their descriptions.

*k-means*: for each series the differences of neighbouring values, smoothed over 3, and of these the newest 6 (lags) as
a point in 6 dimensions. Every 3 h two clusters are found in the last 6 h; a model is their centres and the range of the
mean distances to them. A row is anomalous for a series when it is beyond .99 of that range for each of the last 18
models. A server's score is the share of its series that are (Netdata's own), or the mean of the highest sixth of the
distances.

*EWMA*: the distance from an exponentially weighted mean in the deviations of the same weights; values are clipped at 4
of them before they move either. A server's score is the mean over its series, or over the highest sixth.

What must stay true: a row's score depends on the rows up to it; train and test are one stream, as for the product;
whoever reads the result takes the best of these settings for the yardstick, on the labels themselves.
"""

from typing import Final

import numpy as np

from bench.analytics.recordings import Floats

LAGS: Final = 6
SMOOTHED: Final = 3
MODELS: Final = 18
WINDOW_S: Final = 6 * 3600
EVERY_S: Final = 3 * 3600
LLOYD_TURNS: Final = 30
ANOMALOUS: Final = 0.99
DISTANCE_CAP: Final = 2.0
"""Best of 2 and 5."""

MEMORIES: Final = (12, 30, 100)
"""Of EWMA, in rows; 300 found less."""
CLIP: Final = 4.0
DEVIATION_CAP: Final = 16.0
"""Best of 8, 16 and 50."""
TRUSTED_ROWS: Final = 10
TOP: Final = 6
"""The highest so many-th part of the series."""


def top_mean(scores: Floats) -> Floats:
    """The mean of the highest sixth of each row; shape (rows, series) to (rows,)."""
    count = -(-scores.shape[1] // TOP)
    highest: Floats = np.partition(scores, scores.shape[1] - count, axis=1)[:, -count:]
    return np.asarray(highest.mean(axis=1), np.float64)


def kmeans(values: Floats, step_s: int) -> dict[str, Floats]:
    """A score a row, by how a server's is made of its series'; `values`: shape (rows, series)."""
    distances = _distances(values, WINDOW_S // step_s, EVERY_S // step_s)
    return {
        "share of anomalous series": (distances > ANOMALOUS).mean(axis=1),
        "highest sixth of distances": top_mean(np.minimum(distances, DISTANCE_CAP)),
    }


def _distances(values: Floats, window: int, every: int) -> Floats:
    """Of each value the least over the models of the distance in parts of the model's range."""
    rows, series = values.shape
    changes = np.diff(values, axis=0, prepend=values[:1])
    before = np.concatenate((np.zeros((1, series)), np.cumsum(changes, axis=0)))
    first = np.maximum(np.arange(rows) + 1 - SMOOTHED, 0)
    places = np.arange(rows)
    smooth = (before[places + 1] - before[first]) / (places + 1 - first)[:, None]
    points = np.lib.stride_tricks.sliding_window_view(smooth, LAGS, axis=0)  # row i is of the rows up to i + LAGS - 1
    centres = np.zeros((MODELS, 2, series, LAGS))
    ranges = np.zeros((MODELS, 2, series))
    result = np.zeros((rows, series))
    known = 0
    trainings = [row for row in range(window + LAGS, rows) if row % every == 0]
    for number, row in enumerate(trainings):
        end = row - LAGS + 2
        place = number % MODELS
        centres[place], ranges[place] = _model(np.ascontiguousarray(points[end - window : end]))
        known = min(known + 1, MODELS)
        until = trainings[number + 1] + 1 if number + 1 < len(trainings) else rows
        block = np.ascontiguousarray(points[end : until - LAGS + 1])
        result[row + 1 : until] = _least(block, centres[:known], ranges[:known])
    return result


def _model(points: Floats) -> tuple[Floats, Floats]:
    """The centres, shape (2, series, lags), and the range of distances, (2, series), of points (rows, series, lags)."""
    norms, each = (points * points).sum(axis=2), np.arange(points.shape[1])
    centres = np.stack((points[norms.argmin(axis=0), each], points[norms.argmax(axis=0), each]))
    labels = np.zeros(norms.shape, np.bool_)
    for turn in range(LLOYD_TURNS):
        to_first, to_second = (((points - centre) ** 2).sum(axis=2) for centre in centres)
        new = to_first > to_second
        if turn and (new == labels).all():
            break
        labels = new
        for place, members in enumerate((~labels, labels)):
            count = members.sum(axis=0)
            total = np.einsum("rs,rsl->sl", members.astype(np.float64), points)
            np.copyto(centres[place], total / np.maximum(count, 1)[:, None], where=(count > 0)[:, None])
    mean = sum(np.sqrt(((points - centre) ** 2).sum(axis=2)) for centre in centres) / 2
    return centres, np.stack((np.min(mean, axis=0), np.max(mean, axis=0)))


def _least(points: Floats, centres: Floats, ranges: Floats) -> Floats:
    squares = np.zeros((*centres.shape[:2], len(points), points.shape[1]))
    for lag in range(LAGS):
        squares += (points[:, :, lag] - centres[:, :, None, :, lag]) ** 2
    mean = np.sqrt(squares).mean(axis=1)
    low, high = ranges[:, 0, None], ranges[:, 1, None]
    width = high - low
    still = np.where(mean <= low + 1e-12, 0.0, DISTANCE_CAP)  # a model of a constant: anything else is beyond it
    share = np.where(width > 0, (mean - low) / np.where(width > 0, width, 1.0), still)
    least: Floats = np.maximum(share.min(axis=0), 0.0)
    return least


def ewma(values: Floats) -> dict[str, Floats]:
    """A score a row, by memory and by how a server's is made of its series'; `values`: shape (rows, series)."""
    relative = values - values[0]
    rows, series = values.shape
    slowest = 1.0 / np.array(MEMORIES, np.float64)[:, None]
    mean, variance = np.zeros((len(MEMORIES), series)), np.zeros((len(MEMORIES), series))
    ranges = np.maximum.accumulate(relative) - np.minimum.accumulate(relative)
    floors = 1e-3 * ranges + 1e-12 * np.abs(relative) + 1e-100
    deviations = np.zeros((rows, len(MEMORIES), series))
    for row, (now, floor) in enumerate(zip(relative, floors, strict=True)):
        apart = now - mean
        size = np.maximum(np.sqrt(variance), floor)
        deviations[row] = np.abs(apart) / size
        if row >= TRUSTED_ROWS:
            np.clip(apart, -CLIP * size, CLIP * size, out=apart)
        rate = np.maximum(slowest, 1.0 / (row + 1))
        mean += rate * apart
        variance = (1.0 - rate) * (variance + rate * apart * apart)
    np.minimum(deviations, DEVIATION_CAP, out=deviations)
    found = {}
    for place, memory in enumerate(MEMORIES):
        found[f"{memory} rows, mean"] = deviations[:, place].mean(axis=1)
        found[f"{memory} rows, highest sixth"] = top_mean(deviations[:, place])
    return found
