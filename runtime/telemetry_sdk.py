"""The parts of telemetry that need OpenTelemetry's SDK: imported by runtime.telemetry only when something is sent."""

import threading
import time
from collections.abc import Iterable
from typing import Any

from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, Exemplar, MeterProvider, TraceBasedExemplarFilter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from runtime import durations
from runtime.sampling import Sampling
from runtime.tracing_sdk import SpanRecorder, SpanSampler


class Fanout(SpanProcessor):
    """Hands spans to processors that come and go, which the SDK's own (add only, no remove) cannot."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processors: tuple[SpanProcessor, ...] = ()

    def add(self, processor: SpanProcessor) -> None:
        with self._lock:
            self._processors = (*self._processors, processor)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        for processor in self._processors:
            processor.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        for processor in self._processors:
            processor.on_end(span)

    def close(self, timeout_ms: int) -> None:
        """Flushes, shuts down and forgets every processor."""
        with self._lock:
            processors, self._processors = self._processors, ()
        for processor in processors:
            processor.force_flush(timeout_ms)
            processor.shutdown()

    def shutdown(self) -> None:
        self.close(0)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return all(processor.force_flush(timeout_millis) for processor in self._processors)


def resource(service_name: str) -> Resource:
    """Who the spans and metrics are from. OTEL_RESOURCE_ATTRIBUTES adds to it."""
    return Resource.create({"service.name": service_name, "service.namespace": "openmanager"})


class Spans:
    """The one tracer provider of the process, and where its spans go."""

    def __init__(self, who: Resource) -> None:
        self.fanout = Fanout()
        self._who = who
        self._sampler = SpanSampler(Sampling.of({}))
        self.provider = TracerProvider(resource=who, shutdown_on_exit=False, sampler=self._sampler)
        self.provider.add_span_processor(self.fanout)

    def recorder(self, rule: Sampling) -> SpanRecorder:
        """What records calls from now on; spans that the SDK makes follow the same rule."""
        self._sampler.rule = rule
        return SpanRecorder(rule, self._who, self.fanout)


def meter_provider(who: Resource, readers: list[MetricReader], *, traced: bool) -> MeterProvider:
    """`traced`: exemplars name the traces of what is measured, for 9 of the 21 us that a measurement then takes."""
    exemplars = TraceBasedExemplarFilter() if traced else AlwaysOffExemplarFilter()
    provider = MeterProvider(metric_readers=readers, resource=who, shutdown_on_exit=False, exemplar_filter=exemplars)
    # Also for the sake of readers, which the SDK does not call where nothing was measured.
    provider.get_meter(__name__).create_observable_gauge(
        "process.uptime", [_uptime], unit="s", description="Time since the process began to measure."
    )
    return provider


def _uptime(_options: CallbackOptions) -> Iterable[Observation]:
    return (Observation((time.time_ns() - durations.since_ns()) / 1e9),)


def direct_spans(exporter: SpanExporter) -> SpanProcessor:
    """Each span at once, in the thread that ends it: for tests."""
    return SimpleSpanProcessor(exporter)


def otlp_spans(endpoint: str) -> SpanProcessor:
    from runtime import otlp  # noqa: PLC0415  heavy

    return BatchSpanProcessor(otlp.SpanExporter(endpoint=endpoint))


def otlp_metrics(who: Resource, endpoint: str) -> MetricReader:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter  # noqa: PLC0415  heavy
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415

    class Reader(PeriodicExportingMetricReader):
        def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
            super()._receive_metrics(_with_durations(metrics_data, who), timeout_millis, **kwargs)

    return Reader(OTLPMetricExporter(endpoint=endpoint))


def prometheus_metrics(who: Resource) -> MetricReader:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader  # noqa: PLC0415  only the gateway needs it

    class Reader(PrometheusMetricReader):
        def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
            super()._receive_metrics(_with_durations(metrics_data, who), timeout_millis, **kwargs)

    return Reader()


def _with_durations(collected: MetricsData | None, who: Resource) -> MetricsData:
    """What the SDK has collected, and how long calls took (runtime.durations)."""
    now_ns = time.time_ns()
    points = [_point(dict(attributes), series, now_ns) for attributes, series in durations.found()]
    ours: list[ResourceMetrics] = []
    if points:
        histogram = Histogram(data_points=points, aggregation_temporality=AggregationTemporality.CUMULATIVE)
        metric = Metric(durations.METRIC, durations.DESCRIPTION, durations.UNIT, histogram)
        scope = ScopeMetrics(InstrumentationScope(durations.__name__), [metric], "")
        ours = [ResourceMetrics(who, [scope], "")]
    return MetricsData([*(collected.resource_metrics if collected is not None else ()), *ours])


def _point(attributes: dict[str, str], series: durations.Series, now_ns: int) -> HistogramDataPoint:
    counts = list(series.counts)
    exemplars = [
        Exemplar({}, one.seconds, one.at_ns, one.span_id, one.trace_id) for one in tuple(series.exemplars.values())
    ]
    return HistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=durations.since_ns(),
        time_unix_nano=now_ns,
        count=sum(counts),
        sum=series.sum_s,
        bucket_counts=counts,
        explicit_bounds=durations.BOUNDS_S,
        min=series.min_s,
        max=series.max_s,
        exemplars=exemplars,
    )
