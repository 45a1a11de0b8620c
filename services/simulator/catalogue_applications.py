"""What the software on a server reports: HTTP, PostgreSQL, Redis, nginx, the queue, and each service.

Every server runs the same image, so all have all of it; where a server's role is another one, a program idles.
"""

from services.simulator.catalogue_words import EXACT, MetricSpec, Scale, constant, counter, gauge, percent
from services.simulator.drivers import Driver

_HTTP = frozenset({"web", "api", "lb"})
_POSTGRES = frozenset({"db"})
_REDIS = frozenset({"cache"})
_QUEUE = frozenset({"queue", "worker"})

_PERCENTILES = {"p50": 1.0, "p90": 2.1, "p95": 2.9, "p99": 5.2}
# Endpoint: its share of the requests and its median on an idle server, seconds.
_ENDPOINTS = {
    "login": (0.04, 0.060),
    "search": (0.22, 0.035),
    "catalog": (0.34, 0.012),
    "cart": (0.16, 0.018),
    "checkout": (0.05, 0.085),
    "images": (0.19, 0.004),
}
_STATUS_CLASSES = {"2xx": 0.93, "3xx": 0.05, "4xx": 0.02}


def http() -> list[MetricSpec]:
    """The application as its users meet it: rates, errors, latency percentiles by endpoint."""
    metrics = [
        gauge("http_requests_per_second", "1/s", Driver.REQUESTS, 0, 1_800, decimals=2, roles=_HTTP),
        counter("http_requests", "1", Driver.REQUESTS, 1_800, roles=_HTTP),
        *(
            counter(f"http_responses_{name}", "1", Driver.REQUESTS, 1_800 * share, roles=_HTTP)
            for name, share in _STATUS_CLASSES.items()
        ),
        counter("http_responses_5xx", "1", Driver.FAILURES, 1_000, roles=_HTTP),
        percent("http_error_usage", Driver.FAILURES, 0, 100, jitter=0.0001),
        gauge("http_requests_in_flight", "1", Driver.REQUESTS, 0, 240, jitter=0.05, roles=_HTTP),
        counter("http_request_bytes", "By", Driver.REQUESTS, 2.2e6, roles=_HTTP),
        counter("http_response_bytes", "By", Driver.REQUESTS, 41e6, roles=_HTTP),
        *(
            gauge(f"http_latency_{name}_seconds", "s", Driver.LATENCY, 0, 0.02 * factor, decimals=5)
            for name, factor in _PERCENTILES.items()
        ),
    ]
    for endpoint, (share, median_s) in _ENDPOINTS.items():
        prefix = f"http_{endpoint}"
        metrics += [
            counter(f"{prefix}_requests", "1", Driver.REQUESTS, 1_800 * share, roles=_HTTP),
            counter(f"{prefix}_failures", "1", Driver.FAILURES, 1_000 * share, roles=_HTTP),
            gauge(f"{prefix}_latency_p50_seconds", "s", Driver.LATENCY, 0, median_s, decimals=5),
            gauge(f"{prefix}_latency_p95_seconds", "s", Driver.LATENCY, 0, 2.9 * median_s, decimals=5),
            gauge(f"{prefix}_latency_p99_seconds", "s", Driver.LATENCY, 0, 5.2 * median_s, decimals=5),
        ]
    return metrics


_TUPLES = {"fetched": 120_000, "inserted": 900, "updated": 1_400, "deleted": 180, "returned": 210_000}


def postgres() -> list[MetricSpec]:
    """PostgreSQL: the statistics views."""
    return [
        gauge("postgres_connections_active", "1", Driver.REQUESTS, 1, 90, jitter=0.05, roles=_POSTGRES),
        gauge("postgres_connections_idle", "1", Driver.REQUESTS, 30, 110, roles=_POSTGRES),
        gauge("postgres_connections_waiting", "1", Driver.IOWAIT, 0, 60, jitter=0.01, roles=_POSTGRES),
        constant("postgres_connections_limit", "1", 400),
        percent("postgres_connections_usage", Driver.REQUESTS, 7, 50),
        counter("postgres_commits", "1", Driver.REQUESTS, 2_600, roles=_POSTGRES),
        counter("postgres_rollbacks", "1", Driver.FAILURES, 2_000, roles=_POSTGRES),
        counter("postgres_deadlocks", "1", Driver.FAILURES, 0.05, roles=_POSTGRES),
        *(
            counter(f"postgres_rows_{verb}", "1", Driver.REQUESTS, rate, roles=_POSTGRES)
            for verb, rate in _TUPLES.items()
        ),
        counter("postgres_blocks_hit", "1", Driver.REQUESTS, 310_000, roles=_POSTGRES),
        counter("postgres_blocks_read", "1", Driver.DISK_IO, 9_000, roles=_POSTGRES),
        percent("postgres_cache_hit_usage", Driver.DISK_IO, 99.7, 88, jitter=0.01),
        counter("postgres_temporary_bytes", "By", Driver.DISK_IO, 6e6, roles=_POSTGRES),
        counter("postgres_wal_bytes", "By", Driver.DISK_IO, 30e6, roles=_POSTGRES),
        counter("postgres_checkpoints_timed", "1", Driver.ONE, 1 / 300, scale=Scale.NONE),
        counter("postgres_checkpoints_requested", "1", Driver.DISK_IO, 0.002, roles=_POSTGRES),
        counter("postgres_buffers_checkpoint", "1", Driver.DISK_IO, 2_500, roles=_POSTGRES),
        counter("postgres_buffers_backend", "1", Driver.DISK_IO, 300, roles=_POSTGRES),
        gauge("postgres_database_bytes", "By", Driver.DISK_DATA, 0.05, 0.8, jitter=EXACT, scale=Scale.DISK_DATA),
        gauge("postgres_index_bytes", "By", Driver.DISK_DATA, 0.01, 0.22, jitter=EXACT, scale=Scale.DISK_DATA),
        gauge("postgres_replication_lag_seconds", "s", Driver.IOWAIT, 0.02, 9, jitter=0.002, decimals=3),
        gauge("postgres_replication_lag_bytes", "By", Driver.IOWAIT, 4e3, 60e6, jitter=0.002),
        gauge("postgres_longest_transaction_seconds", "s", Driver.LATENCY, 0, 1.4, jitter=0.2, decimals=2),
        gauge("postgres_locks_held", "1", Driver.REQUESTS, 12, 380, jitter=0.05),
        gauge("postgres_dead_rows", "1", Driver.DISK_DATA, 40_000, 3e6),
        counter("postgres_autovacuum_runs", "1", Driver.ONE, 1 / 600),
        gauge("postgres_query_latency_p50_seconds", "s", Driver.LATENCY, 0, 0.0012, decimals=6),
        gauge("postgres_query_latency_p95_seconds", "s", Driver.LATENCY, 0, 0.0095, decimals=6),
        gauge("postgres_query_latency_p99_seconds", "s", Driver.LATENCY, 0, 0.031, decimals=6),
        gauge("postgres_transaction_age", "1", Driver.UPTIME, 9e6, 9e6 + 40, jitter=EXACT, scale=Scale.NONE),
    ]


def redis() -> list[MetricSpec]:
    """Redis: INFO."""
    of = _REDIS
    return [
        gauge("redis_connected_clients", "1", Driver.REQUESTS, 24, 620, roles=of),
        gauge("redis_blocked_clients", "1", Driver.REQUESTS, 0, 8, jitter=0.1),
        gauge("redis_memory_used_bytes", "By", Driver.MEMORY, 0.02, 0.34, scale=Scale.MEMORY),
        gauge("redis_memory_resident_bytes", "By", Driver.MEMORY, 0.022, 0.39, scale=Scale.MEMORY),
        gauge("redis_memory_fragmentation_ratio", "1", Driver.MEMORY, 1.02, 1.25, decimals=2, scale=Scale.NONE),
        gauge("redis_operations_per_second", "1/s", Driver.REQUESTS, 0, 42_000, roles=of),
        counter("redis_commands", "1", Driver.REQUESTS, 42_000, roles=of),
        counter("redis_keyspace_hits", "1", Driver.REQUESTS, 36_000, roles=of),
        counter("redis_keyspace_misses", "1", Driver.REQUESTS, 2_100, roles=of),
        percent("redis_keyspace_hit_usage", Driver.REQUESTS, 97, 93, jitter=0.05),
        counter("redis_expired_keys", "1", Driver.REQUESTS, 380, roles=of),
        counter("redis_evicted_keys", "1", Driver.PAGING, 12, roles=of),
        counter("redis_connections_received", "1", Driver.REQUESTS, 45, roles=of),
        counter("redis_connections_rejected", "1", Driver.FAILURES, 1, roles=of),
        counter("redis_network_input_bytes", "By", Driver.REQUESTS, 4.2e6, roles=of),
        counter("redis_network_output_bytes", "By", Driver.REQUESTS, 31e6, roles=of),
        gauge("redis_keys", "1", Driver.MEMORY, 90_000, 4.2e6, roles=of),
        gauge("redis_keys_expiring", "1", Driver.MEMORY, 80_000, 3.9e6, roles=of),
        gauge("redis_changes_since_save", "1", Driver.REQUESTS, 0, 90_000, jitter=0.1, roles=of),
        gauge("redis_replication_lag_seconds", "s", Driver.LATENCY, 0, 0.02, decimals=3),
        gauge("redis_latency_p50_seconds", "s", Driver.LATENCY, 0, 0.00009, decimals=6),
        gauge("redis_latency_p99_seconds", "s", Driver.LATENCY, 0, 0.0009, decimals=6),
        counter("redis_slow_commands", "1", Driver.FAILURES, 9, roles=of),
        counter("redis_aof_rewrites", "1", Driver.ONE, 1 / 21_600),
    ]


def nginx() -> list[MetricSpec]:
    """nginx: stub status and upstream timing."""
    return [
        gauge("nginx_connections_active", "1", Driver.REQUESTS, 12, 2_900, roles=_HTTP),
        gauge("nginx_connections_reading", "1", Driver.REQUESTS, 0, 40, jitter=0.1, roles=_HTTP),
        gauge("nginx_connections_writing", "1", Driver.REQUESTS, 1, 310, jitter=0.05, roles=_HTTP),
        gauge("nginx_connections_waiting", "1", Driver.REQUESTS, 10, 2_500, roles=_HTTP),
        counter("nginx_connections_accepted", "1", Driver.REQUESTS, 900, roles=_HTTP),
        counter("nginx_connections_handled", "1", Driver.REQUESTS, 899, roles=_HTTP),
        counter("nginx_requests", "1", Driver.REQUESTS, 2_100, roles=_HTTP),
        gauge("nginx_upstream_latency_p50_seconds", "s", Driver.LATENCY, 0, 0.021, decimals=5),
        gauge("nginx_upstream_latency_p99_seconds", "s", Driver.LATENCY, 0, 0.11, decimals=5),
        counter("nginx_upstream_failures", "1", Driver.FAILURES, 800, roles=_HTTP),
        percent("nginx_cache_hit_usage", Driver.REQUESTS, 86, 94),
        counter("nginx_tls_handshakes", "1", Driver.REQUESTS, 210, roles=_HTTP),
        counter("nginx_tls_handshake_failures", "1", Driver.FAILURES, 40, roles=_HTTP),
        gauge("tls_certificate_days_left", "d", Driver.UPTIME, 88, 87.9999884, jitter=EXACT, scale=Scale.NONE),
    ]


_QUEUES = ("orders", "emails", "thumbnails")


def queues() -> list[MetricSpec]:
    """The message queue and the jobs that empty it."""
    metrics = []
    for queue in _QUEUES:
        prefix = f"queue_{queue}"
        metrics += [
            gauge(f"{prefix}_ready_messages", "1", Driver.LATENCY, 0, 12, jitter=0.3, roles=_QUEUE),
            gauge(f"{prefix}_unacknowledged_messages", "1", Driver.REQUESTS, 0, 140, jitter=0.05, roles=_QUEUE),
            gauge(f"{prefix}_oldest_message_seconds", "s", Driver.LATENCY, 0, 0.6, jitter=0.1, decimals=2),
            counter(f"{prefix}_published_messages", "1", Driver.REQUESTS, 110, roles=_QUEUE),
            counter(f"{prefix}_delivered_messages", "1", Driver.REQUESTS, 109, roles=_QUEUE),
            counter(f"{prefix}_redelivered_messages", "1", Driver.FAILURES, 60, roles=_QUEUE),
        ]
    return [
        *metrics,
        counter("jobs_completed", "1", Driver.REQUESTS, 95, roles=_QUEUE),
        counter("jobs_failed", "1", Driver.FAILURES, 70, roles=_QUEUE),
        gauge("jobs_running", "1", Driver.REQUESTS, 0, 48, jitter=0.05, roles=_QUEUE),
        gauge("job_duration_p50_seconds", "s", Driver.LATENCY, 0, 0.35, decimals=3),
        gauge("job_duration_p99_seconds", "s", Driver.LATENCY, 0, 4.4, decimals=3),
    ]


# Service: its share of the server's busy time and of its memory.
_SERVICES = {
    "application": (0.46, 0.38),
    "nginx": (0.08, 0.02),
    "postgres": (0.20, 0.27),
    "redis": (0.09, 0.14),
    "queue": (0.04, 0.04),
    "worker": (0.07, 0.08),
    "agent": (0.01, 0.004),
    "logger": (0.02, 0.006),
}


def services() -> list[MetricSpec]:
    """Each service of the machine, as its control group accounts for it."""
    metrics = []
    for name, (busy, memory) in _SERVICES.items():
        prefix = f"service_{name}"
        metrics += [
            constant(f"{prefix}_up", "1", 1),
            percent(f"{prefix}_cpu_usage", Driver.CPU, 0, 100 * busy),
            counter(f"{prefix}_cpu_seconds", "s", Driver.CPU, 16 * busy, decimals=2),
            gauge(f"{prefix}_memory_bytes", "By", Driver.MEMORY, 0.004 * memory, memory, scale=Scale.MEMORY),
            gauge(f"{prefix}_threads", "1", Driver.REQUESTS, 2 + 40 * busy, 4 + 400 * busy),
            gauge(f"{prefix}_open_files", "1", Driver.REQUESTS, 10 + 500 * busy, 20 + 9_000 * busy),
            gauge(f"{prefix}_uptime_seconds", "s", Driver.UPTIME, 0, 1, jitter=EXACT, scale=Scale.NONE),
        ]
    return metrics


def runtime() -> list[MetricSpec]:
    """The application's own process: heap, garbage collector, pools."""
    return [
        gauge("runtime_heap_used_bytes", "By", Driver.MEMORY, 0.004, 0.30, jitter=0.05, scale=Scale.MEMORY),
        constant("runtime_heap_limit_bytes", "By", 0.36, scale=Scale.MEMORY),
        counter("runtime_gc_runs", "1", Driver.REQUESTS, 6),
        counter("runtime_gc_pause_seconds", "s", Driver.REQUESTS, 0.03, decimals=3),
        gauge("runtime_gc_pause_p99_seconds", "s", Driver.LATENCY, 0, 0.006, decimals=5),
        counter("runtime_allocated_bytes", "By", Driver.REQUESTS, 480e6),
        gauge("runtime_threads", "1", Driver.REQUESTS, 32, 220),
        gauge("runtime_pool_connections_used", "1", Driver.REQUESTS, 1, 64, jitter=0.05),
        constant("runtime_pool_connections_limit", "1", 80),
        gauge("runtime_pool_wait_p99_seconds", "s", Driver.LATENCY, 0, 0.0012, decimals=5),
        counter("runtime_exceptions", "1", Driver.FAILURES, 900),
        counter("runtime_cache_hits", "1", Driver.REQUESTS, 14_000),
        counter("runtime_cache_misses", "1", Driver.REQUESTS, 900),
    ]
