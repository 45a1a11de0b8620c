"""What an agent reads from the operating system: processors, memory, processes, sensors."""

from services.simulator.catalogue_words import EXACT, MetricSpec, Scale, constant, counter, gauge, percent
from services.simulator.drivers import Driver

CORES = 16
"""Every server has as many: one fleet, one metric set."""

# Share of the busy time, and of the counters in /proc/stat.
_CPU_MODES = {"user": 0.66, "system": 0.21, "nice": 0.01, "irq": 0.02, "softirq": 0.07, "steal": 0.03}
_LOADS = {"1m": Driver.LOAD_1M, "5m": Driver.LOAD_5M, "15m": Driver.LOAD_15M}


def cpu() -> list[MetricSpec]:
    """Processors: usage by mode and core, load, scheduler, pressure."""
    return [
        percent("cpu_usage", Driver.CPU, 0, 100, jitter=0.004),
        *(percent(f"cpu_{mode}_usage", Driver.CPU, 0, 100 * share) for mode, share in _CPU_MODES.items()),
        percent("cpu_iowait_usage", Driver.IOWAIT, 0, 100),
        percent("cpu_idle_usage", Driver.CPU, 100, 0, jitter=0.004),
        *(percent(f"cpu_core_{core:02d}_usage", Driver.CPU, 0, 100, jitter=0.03) for core in range(CORES)),
        *(
            gauge(f"cpu_core_{core:02d}_frequency_hertz", "Hz", Driver.CPU, 1.8e9, 3.6e9, scale=Scale.NONE, high=3.7e9)
            for core in range(CORES)
        ),
        *(
            counter(f"cpu_{mode}_seconds", "s", Driver.CPU, CORES * share, decimals=2, scale=Scale.NONE)
            for mode, share in _CPU_MODES.items()
        ),
        counter("cpu_iowait_seconds", "s", Driver.IOWAIT, CORES, decimals=2, scale=Scale.NONE),
        *(
            gauge(f"load_{name}", "1", driver, 0, CORES, jitter=0.004, decimals=2, scale=Scale.NONE)
            for name, driver in _LOADS.items()
        ),
        gauge("load_per_core_1m", "1", Driver.LOAD_1M, 0, 1, jitter=0.004, decimals=3, scale=Scale.NONE),
        constant("cpu_cores", "1", CORES),
        counter("context_switches", "1", Driver.CPU, 90_000),
        counter("interrupts", "1", Driver.CPU, 52_000),
        counter("soft_interrupts", "1", Driver.NETWORK, 160_000),
        counter("forks", "1", Driver.CPU, 35),
        counter("cpu_throttled_periods", "1", Driver.CPU, 0.4),
        percent("pressure_cpu_some_10s", Driver.LOAD_1M, 0, 22),
        percent("pressure_cpu_some_60s", Driver.LOAD_5M, 0, 20),
        percent("pressure_io_some_10s", Driver.IOWAIT, 0, 90),
        percent("pressure_io_full_10s", Driver.IOWAIT, 0, 60),
        percent("pressure_memory_some_10s", Driver.SWAP, 0, 45),
        percent("pressure_memory_full_10s", Driver.SWAP, 0, 30),
    ]


# Parts of memory that grow with what is used, as fractions of all memory where everything is used.
_MEMORY_PARTS = {
    "active": 0.62,
    "inactive": 0.21,
    "anonymous": 0.71,
    "mapped": 0.11,
    "shared": 0.04,
    "slab": 0.05,
    "slab_reclaimable": 0.035,
    "slab_unreclaimable": 0.015,
    "kernel_stack": 0.0006,
    "page_tables": 0.003,
    "committed": 1.15,
    "writeback": 0.0001,
    "per_cpu": 0.0004,
    "unevictable": 0.0008,
    "transparent_huge_pages": 0.22,
}


def _of_memory(
    name: str, rest: float, full: float, driver: Driver = Driver.MEMORY, jitter: float = 0.004
) -> MetricSpec:
    return gauge(f"memory_{name}_bytes", "By", driver, rest, full, jitter=jitter, scale=Scale.MEMORY)


def memory() -> list[MetricSpec]:
    """Memory and swap; used + available = total, used + cached + buffers + free = total."""
    return [
        percent("memory_usage", Driver.MEMORY, 0, 100, jitter=EXACT),
        constant("memory_total_bytes", "By", 1, scale=Scale.MEMORY),
        _of_memory("used", 0, 1, jitter=EXACT),
        _of_memory("available", 1, 0, jitter=EXACT),
        _of_memory("cached", 0.70, 0, jitter=EXACT),
        _of_memory("buffers", 0.06, 0, jitter=EXACT),
        _of_memory("free", 0.24, 0, jitter=EXACT),
        _of_memory("dirty", 0, 0.004, Driver.DISK_IO, jitter=0.1),
        _of_memory("commit_limit", 0.6, 0.6, jitter=EXACT),
        *(_of_memory(part, 0, share) for part, share in _MEMORY_PARTS.items()),
        percent("swap_usage", Driver.SWAP, 0, 100, jitter=EXACT),
        constant("swap_total_bytes", "By", 1, scale=Scale.SWAP),
        gauge("swap_used_bytes", "By", Driver.SWAP, 0, 1, jitter=EXACT, scale=Scale.SWAP),
        gauge("swap_free_bytes", "By", Driver.SWAP, 1, 0, jitter=EXACT, scale=Scale.SWAP),
        gauge("swap_cached_bytes", "By", Driver.SWAP, 0, 0.1, jitter=EXACT, scale=Scale.SWAP),
        counter("swap_in_pages", "1", Driver.PAGING, 25),
        counter("swap_out_pages", "1", Driver.PAGING, 30),
        counter("page_faults", "1", Driver.CPU, 28_000),
        counter("page_major_faults", "1", Driver.PAGING, 40),
        counter("pages_paged_in", "1", Driver.DISK_IO, 60_000),
        counter("pages_paged_out", "1", Driver.DISK_IO, 90_000),
        counter("pages_scanned", "1", Driver.PAGING, 900),
        counter("pages_reclaimed", "1", Driver.PAGING, 850),
        counter("pages_allocated", "1", Driver.CPU, 75_000),
        counter("pages_freed", "1", Driver.CPU, 74_500),
        counter("compaction_stalls", "1", Driver.PAGING, 0.2),
        counter("numa_hits", "1", Driver.CPU, 64_000),
        counter("numa_misses", "1", Driver.CPU, 900),
    ]


_PROCESS_STATES = {"sleeping": 260, "idle": 96, "stopped": 0, "zombie": 1}


def processes() -> list[MetricSpec]:
    """Processes, files, time and the kernel's tables."""
    return [
        gauge("process_count", "1", Driver.REQUESTS, 360, 460),
        gauge("process_running_count", "1", Driver.LOAD_1M, 1, 18, jitter=0.05),
        gauge("process_blocked_count", "1", Driver.IOWAIT, 0, 40, jitter=0.01),
        *(
            gauge(f"process_{state}_count", "1", Driver.REQUESTS, count, count * 1.25)
            for state, count in _PROCESS_STATES.items()
        ),
        gauge("thread_count", "1", Driver.REQUESTS, 1_400, 2_600),
        constant("thread_limit", "1", 513_000),
        gauge("file_descriptors_open", "1", Driver.REQUESTS, 6_000, 21_000),
        constant("file_descriptors_limit", "1", 1_048_576),
        gauge("inodes_cached", "1", Driver.DISK_IO, 240_000, 900_000),
        gauge("dentries_cached", "1", Driver.DISK_IO, 310_000, 1_200_000),
        gauge("conntrack_entries", "1", Driver.REQUESTS, 3_000, 60_000),
        constant("conntrack_limit", "1", 262_144),
        gauge("logged_in_users", "1", Driver.REQUESTS, 0, 3, jitter=0.3),
        gauge("clock_offset_seconds", "s", Driver.NETWORK, 0.0004, 0.0016, jitter=0.2, decimals=6),
        gauge("clock_frequency_error_ppm", "[ppm]", Driver.HEAT, 8, 12, jitter=0.05, decimals=3),
        constant("clock_synchronized", "1", 1),
        gauge("uptime_seconds", "s", Driver.UPTIME, 0, 1, jitter=EXACT, scale=Scale.NONE),
        gauge("boot_time_seconds", "s", Driver.EPOCH, 0, 1, jitter=EXACT, scale=Scale.NONE),
        counter("systemd_units_failed_total", "1", Driver.FAILURES, 0.002),
        gauge("updates_pending_count", "1", Driver.UPTIME, 2, 2.000012, jitter=EXACT, scale=Scale.NONE),
        counter("oom_kills", "1", Driver.PAGING, 0.000002),
        counter("log_lines", "1", Driver.REQUESTS, 900),
        counter("log_error_lines", "1", Driver.FAILURES, 2_000),
        counter("audit_records", "1", Driver.REQUESTS, 12),
    ]


_TEMPERATURES = {
    "cpu_package": (34, 96),
    "cpu_core_hottest": (36, 99),
    "mainboard": (29, 58),
    "memory": (31, 72),
    "disk_nvme0": (33, 68),
    "disk_nvme1": (33, 67),
    "inlet_air": (21, 27),
    "exhaust_air": (29, 55),
}


def sensors() -> list[MetricSpec]:
    """Temperatures, fans, power, memory errors; an accelerator for the media jobs."""
    return [
        *(
            gauge(
                f"temperature_{place}_celsius", "Cel", Driver.HEAT, cold, hot, jitter=0.01, decimals=1, scale=Scale.NONE
            )
            for place, (cold, hot) in _TEMPERATURES.items()
        ),
        *(gauge(f"fan_{fan}_rpm", "{rpm}", Driver.HEAT, 2_400, 11_000, jitter=0.01) for fan in ("1", "2")),
        gauge("power_draw_watts", "W", Driver.HEAT, 110, 520, jitter=0.01, decimals=1),
        gauge("power_supply_1_watts", "W", Driver.HEAT, 58, 270, jitter=0.01, decimals=1),
        gauge("power_supply_2_watts", "W", Driver.HEAT, 52, 250, jitter=0.01, decimals=1),
        counter("energy_joules", "J", Driver.CPU, 600),
        counter("memory_corrected_errors", "1", Driver.ONE, 0.00001),
        counter("memory_uncorrected_errors", "1", Driver.ONE, 0.0),
        percent("gpu_0_usage", Driver.REQUESTS, 0, 80, jitter=0.04),
        percent("gpu_0_memory_usage", Driver.REQUESTS, 12, 70, jitter=0.01),
        gauge("gpu_0_memory_used_bytes", "By", Driver.REQUESTS, 2.9e9, 17e9),
        gauge("gpu_0_temperature_celsius", "Cel", Driver.HEAT, 34, 88, jitter=0.01, decimals=1, scale=Scale.NONE),
        gauge("gpu_0_power_watts", "W", Driver.REQUESTS, 32, 280, decimals=1),
        gauge("gpu_0_clock_hertz", "Hz", Driver.REQUESTS, 0.9e9, 1.9e9, scale=Scale.NONE),
    ]
