"""A span for every query, while spans go anywhere.

What must stay true: parameters are never recorded; the instrumentation takes 150 ms to import, so nobody else pays it.
"""

from runtime import telemetry


def trace_queries() -> None:
    """Has the driver make one of each query of this process from now on."""
    if telemetry.tracing_enabled():
        from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor  # noqa: PLC0415  see the module

        instrumentor = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]
        if not instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.instrument()
