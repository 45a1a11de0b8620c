"""InfluxDB's HTTP API as the follower and the reader of history use it: one client, one border for its errors.

What must stay true: every request has a time-out; what the driver, urllib3 or InfluxDB says leaves here as an error of
ours, in words for an operator, and never with the token in it. What an operator mends (token, bucket, permission) and
what passes by itself is Unavailable.
"""

import email.utils
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.rest import ApiException
from urllib3.exceptions import HTTPError

from runtime.errors import OpenManagerError, Unavailable, clip
from runtime.redaction import redact, remember_secret

NAME: Final = "influxdb"
MEASUREMENT: Final = "server_metrics"

CONNECT_TIMEOUT_S: Final = 2.0
MAX_ERROR_BYTES: Final = 300

Judge = Callable[[int, str, ApiException], OpenManagerError | None]
"""From status, clipped text and the whole answer to an error; None: what `refused` says."""


class InfluxTarget:
    """Where the bucket is, and what to call it in errors."""

    def __init__(self, *, url: str, token: str, org: str, bucket: str) -> None:
        """Connects to nothing.

        Args:
            url: http:// or https://, checked by the settings.
            token: an API token.
            org: the organization's name.
            bucket: the bucket's name.
        """
        remember_secret(token)
        parts = urlsplit(url)
        self.address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.org, self.bucket = org, bucket
        self._url, self._token = url, token

    def client(self, timeout_s: float) -> Any:
        """A client of its own, not connected yet; `timeout_s` is for a request that names none."""
        return InfluxDBClient(url=self._url, token=self._token, org=self.org, timeout=round(timeout_s * 1_000))

    @contextmanager
    def as_ours(self, judge: Judge, verb: str) -> Iterator[None]:
        """The border where the driver's exceptions become ours; it lets urllib3's through.

        Args:
            judge: of an answer that is an error.
            verb: what the token may not do to the bucket, when it may not.
        """
        try:
            yield
        except ApiException as error:
            status, said = int(error.status or 0), clip(redact(text_of(error)), MAX_ERROR_BYTES)
            raise judge(status, said, error) or self.refused(status, said, error, verb) from None  # it holds headers
        except (HTTPError, OSError) as error:
            raise silent(error) from error

    def refused(self, status: int, said: str, error: ApiException, verb: str) -> Unavailable:
        """The outage that an answer means."""
        if status == 401:
            return Unavailable(f"InfluxDB refuses INFLUXDB_TOKEN: {said}", reason="STORE_REFUSED")
        if status == 403:
            return Unavailable(
                f"INFLUXDB_TOKEN may not {verb} the bucket {self.bucket!r}: {said}", reason="STORE_REFUSED"
            )
        if status == 404:
            return Unavailable(
                f"INFLUXDB_ORG {self.org!r} or INFLUXDB_BUCKET {self.bucket!r} does not exist: {said}",
                reason="STORE_REFUSED",
            )
        return Unavailable(
            f"InfluxDB answers {status}: {said}",
            reason="STORE_UNAVAILABLE",
            retry_after_s=seconds_of(error.headers.get("Retry-After") if error.headers else None),
        )


def text_of(error: ApiException) -> str:
    """What InfluxDB said."""
    return str(error.message)


def silent(error: Exception) -> Unavailable:
    """The outage that no answer means."""
    text = clip(redact(f"InfluxDB does not answer: {error}"), MAX_ERROR_BYTES)
    return Unavailable(text, reason="STORE_UNAVAILABLE")


def seconds_of(retry_after: str | None) -> float | None:
    """How long a Retry-After asks to wait; it is a number of seconds or, through some proxies, a date."""
    if retry_after is None:
        return None
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
