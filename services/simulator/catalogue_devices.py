"""What an agent reads from disks, file systems and the network."""

from services.simulator.catalogue_words import EXACT, MetricSpec, Scale, constant, counter, gauge, percent
from services.simulator.drivers import Driver

# Each disk's share of the server's input and output.
_DISKS = {"nvme0": 0.55, "nvme1": 0.40, "sda": 0.05}


def _disk(name: str, share: float) -> list[MetricSpec]:
    prefix = f"disk_{name}"
    return [
        counter(f"{prefix}_reads", "1", Driver.DISK_IO, 9_000 * share),
        counter(f"{prefix}_writes", "1", Driver.DISK_IO, 14_000 * share),
        counter(f"{prefix}_read_bytes", "By", Driver.DISK_IO, 700e6 * share),
        counter(f"{prefix}_write_bytes", "By", Driver.DISK_IO, 950e6 * share),
        counter(f"{prefix}_read_seconds", "s", Driver.DISK_IO, 2.0 * share, decimals=3),
        counter(f"{prefix}_write_seconds", "s", Driver.DISK_IO, 3.5 * share, decimals=3),
        counter(f"{prefix}_busy_seconds", "s", Driver.DISK_IO, 0.9 * share, decimals=3),
        counter(f"{prefix}_merged_requests", "1", Driver.DISK_IO, 2_200 * share),
        percent(f"{prefix}_busy_usage", Driver.DISK_IO, 0, 100 * share**0.5, jitter=0.02),
        gauge(f"{prefix}_queue_length", "1", Driver.IOWAIT, 0, 24 * share**0.5, decimals=2),
        gauge(f"{prefix}_read_latency_seconds", "s", Driver.LATENCY, 0.0, 0.0004, decimals=6),
        gauge(f"{prefix}_write_latency_seconds", "s", Driver.LATENCY, 0.0, 0.0009, decimals=6),
        percent(f"{prefix}_wear_usage", Driver.ONE, 0, 11 + 20 * share, jitter=EXACT),
    ]


def disks() -> list[MetricSpec]:
    """Block devices; ``disk_usage`` is the root file system's."""
    return [
        percent("disk_usage", Driver.DISK_ROOT, 0, 100, jitter=EXACT),
        gauge("disk_read_bytes_per_second", "By/s", Driver.DISK_IO, 0, 700e6),
        gauge("disk_write_bytes_per_second", "By/s", Driver.DISK_IO, 0, 950e6),
        *(metric for name, share in _DISKS.items() for metric in _disk(name, share)),
    ]


# Mount point in words, driver of its filling, size, inodes of a terabyte.
_FILESYSTEMS = {
    "root": (Driver.DISK_ROOT, Scale.DISK_ROOT),
    "data": (Driver.DISK_DATA, Scale.DISK_DATA),
    "var_log": (Driver.DISK_LOGS, Scale.DISK_LOGS),
}
_SMALL_FILESYSTEMS = {"boot": (1_020_702_720, 0.31), "tmp": (8_589_934_592, 0.04), "home": (53_687_091_200, 0.22)}


def filesystems() -> list[MetricSpec]:
    """File systems: three that fill up and are cleaned, three that hardly move."""
    metrics = []
    for name, (driver, size) in _FILESYSTEMS.items():
        prefix = f"filesystem_{name}"
        metrics += [
            percent(f"{prefix}_usage", driver, 0, 100, jitter=EXACT),
            constant(f"{prefix}_size_bytes", "By", 1, scale=size),
            gauge(f"{prefix}_used_bytes", "By", driver, 0, 1, jitter=EXACT, scale=size),
            gauge(f"{prefix}_available_bytes", "By", driver, 1, 0, jitter=EXACT, scale=size),
            percent(f"{prefix}_inodes_usage", driver, 2, 38, jitter=EXACT),
            gauge(f"{prefix}_inodes_used", "1", driver, 120_000, 2_500_000, jitter=EXACT),
            constant(f"{prefix}_read_only", "1", 0),
        ]
    for name, (size_bytes, used) in _SMALL_FILESYSTEMS.items():
        prefix = f"filesystem_{name}"
        metrics += [
            gauge(f"{prefix}_usage", "%", Driver.ONE, 0, 100 * used, jitter=EXACT, decimals=2, scale=Scale.NONE),
            constant(f"{prefix}_size_bytes", "By", size_bytes),
            constant(f"{prefix}_used_bytes", "By", round(size_bytes * used)),
        ]
    return metrics


# Interface, its share of the traffic and its speed in bytes per second.
_INTERFACES = {"eth0": (0.8, 1.25e9), "eth1": (0.2, 1.25e9), "lo": (0.3, 1.25e9)}


def _interface(name: str, share: float, speed: float) -> list[MetricSpec]:
    prefix = f"network_{name}"
    return [
        counter(f"{prefix}_receive_bytes", "By", Driver.NETWORK, 0.45 * speed * share),
        counter(f"{prefix}_transmit_bytes", "By", Driver.NETWORK, 0.55 * speed * share),
        counter(f"{prefix}_receive_packets", "1", Driver.NETWORK, 420_000 * share),
        counter(f"{prefix}_transmit_packets", "1", Driver.NETWORK, 460_000 * share),
        counter(f"{prefix}_receive_errors", "1", Driver.LOSS, 40 * share),
        counter(f"{prefix}_transmit_errors", "1", Driver.LOSS, 15 * share),
        counter(f"{prefix}_receive_drops", "1", Driver.LOSS, 900 * share),
        counter(f"{prefix}_transmit_drops", "1", Driver.LOSS, 300 * share),
        counter(f"{prefix}_multicast_packets", "1", Driver.ONE, 3.0 * share),
        percent(f"{prefix}_usage", Driver.NETWORK, 0, 100 * share, jitter=0.01),
        gauge(f"{prefix}_receive_bytes_per_second", "By/s", Driver.NETWORK, 0, 0.45 * speed * share),
        gauge(f"{prefix}_transmit_bytes_per_second", "By/s", Driver.NETWORK, 0, 0.55 * speed * share),
    ]


_TCP_STATES = {"syn_received": 6, "time_wait": 2_400, "close_wait": 12, "fin_wait": 30, "listen": 38}


def network() -> list[MetricSpec]:
    """Interfaces, sockets, the protocols' counters, and what a probe to the gateway sees."""
    return [
        *(metric for name, (share, speed) in _INTERFACES.items() for metric in _interface(name, share, speed)),
        constant("network_eth0_speed_bytes_per_second", "By/s", 1.25e9),
        gauge("network_latency_gateway_seconds", "s", Driver.LATENCY, 0, 0.00035, decimals=6),
        percent("network_packet_loss_usage", Driver.LOSS, 0, 100, jitter=0.00002),
        gauge("tcp_established_connections", "1", Driver.REQUESTS, 120, 4_200),
        *(
            gauge(f"tcp_{state}_connections", "1", Driver.REQUESTS, count * 0.1, count)
            for state, count in _TCP_STATES.items()
        ),
        gauge("tcp_memory_bytes", "By", Driver.REQUESTS, 2e6, 64e6),
        gauge("tcp_round_trip_seconds", "s", Driver.LATENCY, 0, 0.0011, decimals=6),
        counter("tcp_active_opens", "1", Driver.REQUESTS, 420),
        counter("tcp_passive_opens", "1", Driver.REQUESTS, 960),
        counter("tcp_attempt_failures", "1", Driver.LOSS, 900),
        counter("tcp_established_resets", "1", Driver.LOSS, 600),
        counter("tcp_segments_received", "1", Driver.NETWORK, 400_000),
        counter("tcp_segments_sent", "1", Driver.NETWORK, 440_000),
        counter("tcp_segments_retransmitted", "1", Driver.LOSS, 90_000),
        counter("tcp_receive_errors", "1", Driver.LOSS, 50),
        counter("tcp_resets_sent", "1", Driver.LOSS, 700),
        counter("tcp_timeouts", "1", Driver.LOSS, 5_000),
        counter("tcp_fast_retransmits", "1", Driver.LOSS, 40_000),
        counter("tcp_syn_retransmits", "1", Driver.LOSS, 800),
        counter("tcp_listen_overflows", "1", Driver.FAILURES, 4),
        counter("tcp_listen_drops", "1", Driver.FAILURES, 5),
        counter("udp_datagrams_received", "1", Driver.NETWORK, 9_000),
        counter("udp_datagrams_sent", "1", Driver.NETWORK, 8_500),
        counter("udp_receive_errors", "1", Driver.LOSS, 300),
        counter("udp_buffer_errors", "1", Driver.LOSS, 80),
        counter("ip_packets_received", "1", Driver.NETWORK, 415_000),
        counter("ip_packets_sent", "1", Driver.NETWORK, 455_000),
        counter("ip_packets_discarded", "1", Driver.LOSS, 700),
        counter("icmp_messages_received", "1", Driver.ONE, 0.9),
        counter("icmp_messages_sent", "1", Driver.ONE, 0.9),
        counter("icmp_errors_received", "1", Driver.LOSS, 30),
        gauge("sockets_used", "1", Driver.REQUESTS, 420, 5_200),
        gauge("udp_sockets_used", "1", Driver.REQUESTS, 12, 40),
        counter("dns_queries", "1", Driver.REQUESTS, 85),
        counter("dns_failures", "1", Driver.LOSS, 30),
        gauge("dns_lookup_seconds", "s", Driver.LATENCY, 0, 0.0016, decimals=6),
    ]
