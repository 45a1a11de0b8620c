"""Findings as a detector tells them, put into the record of a running product."""

import grpc

from fleet.anomaly import Anomaly, Contribution, anomaly_to_pb, finding_id
from openmanager.metadata.v1 import anomaly_pb2, anomaly_pb2_grpc
from tests.harness.launched import Launched


def finding(server_id: str, start_ms: int, *, detector: str = "departure", end_ms: int | None = None) -> Anomaly:
    """A finding of one metric."""
    part = Contribution(metric="cpu_usage", value=97.5, expected_low=10.0, expected_high=30.0, score=0.75)
    return Anomaly(
        id=finding_id(server_id, detector, start_ms),
        server_id=server_id,
        metric=part.metric,
        start_ms=start_ms,
        end_ms=end_ms,
        peak_ms=start_ms,
        score=0.625,
        value=part.value,
        expected_low=part.expected_low,
        expected_high=part.expected_high,
        detector=detector,
        contributions=(part,),
    )


DOCUMENTED = finding("web-01", 1_790_000_000_000, detector="silence")
"""The one that the examples of docs/api.md are about."""


def tell(product: Launched, *findings: Anomaly) -> None:
    """Records them in a launched product."""
    record(product.addresses["metadata"], (product.data / "service-secret").read_text().strip(), *findings)


def record(metadata: str, secret: str, *findings: Anomaly) -> None:
    """Records them as analytics does."""
    with grpc.insecure_channel(metadata) as channel:
        request = anomaly_pb2.RecordAnomaliesRequest(anomalies=[anomaly_to_pb(one) for one in findings])
        stub = anomaly_pb2_grpc.AnomalyStoreServiceStub(channel)  # type: ignore[no-untyped-call]
        stub.RecordAnomalies(
            request, metadata=(("authorization", f"Bearer {secret}"),), timeout=30, wait_for_ready=True
        )
