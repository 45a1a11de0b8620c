"""The calibration report: does an answer that the AI is sure of turn out right as often as it says?

An interaction counts when it has a confidence and a rating; it was right when the rating is `right_rating` or more. The
confidences are put into bins of equal width, [low, high), the last one with its end. With n_b interactions in bin b, of
n in all, acc(b) the share of them that was right and conf(b) their mean confidence:

    expected calibration error  ECE = sum over b of n_b / n * |acc(b) - conf(b)|
    maximum calibration error   MCE = the largest |acc(b) - conf(b)|

Both as in Naeini, Cooper, Hauskrecht: Obtaining Well Calibrated Probabilities Using Bayesian Binning (AAAI 2015), and
Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks (ICML 2017), whose bins hold their upper ends. 0
is perfect. Few interactions in a bin make its gap large by chance; so the counts are in the report.
"""

from typing import Any, Final

from runtime.errors import InvalidArgument
from services.metadata import checks
from services.metadata.interaction_query import check_filters, in_postgres
from services.metadata.store import Calibration, CalibrationBin, InteractionFilter
from services.metadata.store_connection import Database

DEFAULT_BINS: Final = 10
MAX_BINS: Final = 100
DEFAULT_RIGHT_RATING: Final = 4
READ_WITHIN_S: Final = 30.0
"""All rows of the filter are read: about 0.3 s for a million."""


async def report(database: Database, filters: InteractionFilter, bins: int, right_rating: int) -> Calibration:
    """As `MetadataStore.calibration`, of what PostgreSQL has."""
    values: list[Any] = [[number / bins for number in range(bins)], right_rating]
    statement = f"""SELECT CASE WHEN confidence IS NOT NULL AND user_rating IS NOT NULL
                THEN width_bucket(confidence, $1::float[]) - 1 END AS bin,
            count(*) AS count, avg(confidence) AS mean_confidence, avg(user_rating)::float AS mean_rating,
            avg((user_rating >= $2::integer)::integer)::float AS accuracy,
            count(confidence) AS with_confidence, count(user_rating) AS with_rating
        FROM ai_interactions WHERE {in_postgres(filters, values)} GROUP BY 1 ORDER BY 1"""  # noqa: S608
    async with database.connection() as connection, connection.transaction(readonly=True):
        await connection.execute(f"SET LOCAL statement_timeout = '{READ_WITHIN_S:.0f}s'")
        rows = await connection.fetch(statement, *values, timeout=READ_WITHIN_S)
    found = [
        CalibrationBin(
            low=row["bin"] / bins,
            high=(row["bin"] + 1) / bins,
            count=row["count"],
            mean_confidence=row["mean_confidence"],
            accuracy=row["accuracy"],
            mean_rating=row["mean_rating"],
        )
        for row in rows
        if row["bin"] is not None
    ]
    rest = [row for row in rows if row["bin"] is None]  # they lack one of the two, or both
    count = sum(one.count for one in found)
    gaps = [abs(one.accuracy - one.mean_confidence) for one in found]
    return Calibration(
        bins=tuple(found),
        expected_error=sum(one.count * gap for one, gap in zip(found, gaps, strict=True)) / count if count else None,
        maximum_error=max(gaps, default=None),
        count=count,
        unrated=sum(row["with_confidence"] for row in rest),
        without_confidence=sum(row["with_rating"] for row in rest),
    )


def checked(filters: InteractionFilter, bins: int, right_rating: int) -> tuple[int, int]:
    """The number of bins and the rating, with their defaults; raises InvalidArgument naming the field."""
    check_filters(filters)
    if not 0 <= bins <= MAX_BINS:
        raise InvalidArgument(f"lies outside 1 to {MAX_BINS}", field="bins")
    checks.check_rating(right_rating or None, "right_rating")
    return bins or DEFAULT_BINS, right_rating or DEFAULT_RIGHT_RATING
