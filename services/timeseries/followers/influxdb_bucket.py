"""The bucket that is shipped to: made where it is missing, kept for as long as the setting says.

What must stay true: a bucket that exists is never deleted or emptied; without INFLUXDB_RETENTION its retention is left
alone; a token that may write the bucket and nothing else is enough as long as the bucket exists.
"""

import logging
import threading
from typing import Any, Final

from influxdb_client.domain.bucket_retention_rules import BucketRetentionRules
from influxdb_client.domain.patch_bucket_request import PatchBucketRequest
from influxdb_client.domain.patch_retention_rule import PatchRetentionRule
from influxdb_client.domain.post_bucket_request import PostBucketRequest
from influxdb_client.rest import ApiException
from influxdb_client.service.buckets_service import BucketsService
from influxdb_client.service.organizations_service import OrganizationsService

from runtime.errors import AlreadyExists, OpenManagerError, PermissionDenied, Unavailable
from services.timeseries.followers.influxdb_api import InfluxTarget

BACKFILL: Final = "`python -m services.timeseries backfill --to influxdb --from -30d` copies older history into it"

_log = logging.getLogger(__name__)


class Bucket:
    """Makes and changes the bucket. Called in worker threads."""

    def __init__(self, target: InfluxTarget, client: Any, retention_s: float | None, timeout_s: float) -> None:
        """`retention_s`: None: a new bucket keeps everything, an existing one is left alone."""
        self._target = target
        self._retention_s = None if retention_s is None else round(retention_s)
        self._timeout_ms = round(timeout_s * 1_000)
        self._buckets: Any = BucketsService(client.api_client)  # type: ignore[no-untyped-call]  # half typed
        self._orgs: Any = OrganizationsService(client.api_client)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._is_settled = retention_s is None
        self._is_told = False

    def make(self) -> bool:
        """Creates the bucket; False when another was quicker.

        Raises:
            Unavailable: it cannot be made with this token, or not now.
        """
        with self._lock:
            try:
                with self._target.as_ours(_judge, "create"):
                    self._create()
            except AlreadyExists:
                return False
            except PermissionDenied as error:
                raise Unavailable(
                    f"INFLUXDB_BUCKET {self._target.bucket!r} does not exist and INFLUXDB_TOKEN may not create it: "
                    f"create the bucket, or give the token write permission for buckets: {error.message}",
                    reason="STORE_REFUSED",
                ) from None
            self._is_settled = True
            kept = "for ever" if self._retention_s is None else f"{self._retention_s} s"
            name = self._target.bucket
            _log.warning("the bucket %r was missing in InfluxDB and is created, kept %s; %s", name, kept, BACKFILL)
            return True

    def settle(self) -> None:
        """Gives the bucket the retention that is set, once. Where that cannot be done it is said, and shipping goes on;
        what may pass is tried again with the next rows."""
        if self._is_settled:
            return
        try:
            with self._target.as_ours(_judge, "change"):
                self._settle()
        except OpenManagerError as error:
            if not self._is_told:
                name = self._target.bucket
                _log.warning("INFLUXDB_RETENTION is not applied to the bucket %r yet: %s", name, error.message)
            self._is_told = True
            self._is_settled = not isinstance(error, Unavailable)
        else:
            self._is_settled = True

    def _create(self) -> None:
        found = self._orgs.get_orgs(org=self._target.org, _request_timeout=self._timeout_ms).orgs
        if not found:
            raise PermissionDenied(f"it may not read the organization {self._target.org!r}")
        rules = []
        if self._retention_s is not None:
            rules.append(BucketRetentionRules(type="expire", every_seconds=self._retention_s))  # type: ignore[no-untyped-call]
        words = {"org_id": found[0].id, "name": self._target.bucket, "retention_rules": rules}
        wanted = PostBucketRequest(**words)  # type: ignore[no-untyped-call]
        self._buckets.post_buckets(post_bucket_request=wanted, _request_timeout=self._timeout_ms)

    def _settle(self) -> None:
        target = self._target
        found = self._buckets.get_buckets(org=target.org, name=target.bucket, _request_timeout=self._timeout_ms).buckets
        if not found:
            raise PermissionDenied("INFLUXDB_TOKEN may not read what it is like")
        (bucket,) = found
        kept_s = bucket.retention_rules[0].every_seconds if bucket.retention_rules else 0
        if kept_s == self._retention_s:
            return
        # 0: InfluxDB chooses how long its files are; longer ones than the retention, as they may be, it refuses
        words = {"type": "expire", "every_seconds": self._retention_s, "shard_group_duration_seconds": 0}
        rule = PatchRetentionRule(**words)  # type: ignore[no-untyped-call]
        change = PatchBucketRequest(retention_rules=[rule])  # type: ignore[no-untyped-call]
        self._buckets.patch_buckets_id(bucket.id, patch_bucket_request=change, _request_timeout=self._timeout_ms)
        _log.warning(
            "the retention of the bucket %r is changed from %s to %d s, as INFLUXDB_RETENTION says",
            target.bucket,
            f"{kept_s} s" if kept_s else "for ever",
            self._retention_s,
        )


def _judge(status: int, said: str, _error: ApiException) -> OpenManagerError | None:
    """A token that may do less is answered 401, as a wrong one is: only what was done before tells them apart."""
    if status in (401, 403):
        return PermissionDenied(said)
    return AlreadyExists(said) if status == 422 else None
