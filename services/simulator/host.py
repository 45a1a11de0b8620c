"""SIMULATOR_MODE=host: the real metrics of this machine, as one server named by its host name.

What must stay true: usages are measured between two ticks, by counters that this module keeps itself (psutil's own
``cpu_percent`` remembers per thread, and ours change); nothing blocks the event loop, as a hung network mount would;
the metric set is that of what is there now: a disk or an interface that comes or goes makes another set.
``disk_usage`` is the root file system's, or the fullest one's where no root is to be seen (in some containers).
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import psutil

from fleet.model import Metric, MetricKind, MetricSet, Rows, ServerDescriptor, WriteBatch

MAX_LABELLED: Final = 256
"""Mounts, interfaces, disks, cores or sensors of one kind that are reported; more are left out, and said so."""
MAX_LABEL_CHARS: Final = 255
_PSEUDO_FILESYSTEMS: Final = frozenset({"squashfs", "overlay", "tmpfs", "devtmpfs", "iso9660", "autofs"})
_log = logging.getLogger(__name__)

Sample = tuple[Metric, float]


def _gauge(name: str, unit: str, value: float, **labels: str) -> Sample:
    return Metric(name=name, unit=unit, kind=MetricKind.GAUGE, labels=_labels(labels)), float(value)


def _counter(name: str, unit: str, value: float, **labels: str) -> Sample:
    return Metric(name=name, unit=unit, kind=MetricKind.COUNTER, labels=_labels(labels)), float(value)


def _labels(labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Returns sorted labels; a mount point may hold characters that no label may."""
    return tuple(
        (name, "".join(c if c.isprintable() else "?" for c in text)[:MAX_LABEL_CHARS])
        for name, text in sorted(labels.items())
    )


class HostSource:
    """Measures this machine."""

    catches_up: Final = False
    """What was not measured in time cannot be measured afterwards."""

    def __init__(self, *, interval_ms: int, hostname: str | None = None) -> None:
        name = hostname or socket.gethostname() or "localhost"
        self._server = ServerDescriptor(
            server_id=name,
            hostname=name,
            environment="local",
            role="host",
            location="local",
            report_interval_ms=interval_ms,
        )
        self._parts: Mapping[str, Callable[[], Iterator[Sample]]] = {
            "processors": _CpuMeter().samples,
            "context switches and interrupts": _cpu_stats,
            "load": _load,
            "memory": _memory,
            "swap": _swap,
            "file systems": _filesystems,
            "rates of disks": _RateMeter(_disk_bytes).samples,
            "rates of interfaces": _RateMeter(_network_bytes).samples,
            "disks": _disks,
            "interfaces": _interfaces,
            "processes": _processes,
            "time since boot": _uptime,
            "sensors": _sensors,
        }
        self._lacking: dict[str, str] = {}  # why, of the parts that could not be measured last
        self._set = MetricSet(())

    @property
    def server_count(self) -> int:
        return 1

    @property
    def metric_count(self) -> int:
        return len(self._set)

    async def batches(self, tick: int, time_ms: int) -> list[WriteBatch]:  # noqa: ARG002 (the protocol's signature)
        samples = await asyncio.to_thread(self.measure)
        metrics = tuple(metric for metric, _ in samples)
        if metrics != self._set.metrics:
            self._set = MetricSet(metrics)
        rows = Rows(
            metric_set_id=self._set.id,
            server_ids=(self._server.server_id,),
            times_ms=np.array([time_ms], dtype=np.int64),
            values=np.array([[value for _, value in samples]]),
        )
        return [WriteBatch(metric_set=self._set, rows=rows, servers=(self._server,))]

    def measure(self) -> list[Sample]:
        """Returns every metric once, with its value now; blocking. What cannot be measured is left out, and the
        log says which part that is when it begins, changes and ends."""
        samples: dict[str, Sample] = {}
        for name, part in self._parts.items():
            try:
                for sample in part():
                    samples.setdefault(sample[0].key, sample)
            except Exception as error:  # what psutil does not understand of a system comes as anything
                self._tell_lacking(name, f"{type(error).__name__}: {error}")
            else:
                self._tell_lacking(name, "")
        return list(samples.values())

    def _tell_lacking(self, part: str, why: str) -> None:
        if why == self._lacking.get(part, ""):
            return
        if why:
            self._lacking[part] = why
            _log.warning("part of the machine cannot be measured", extra={"part": part, "error": why})
        else:
            del self._lacking[part]
            _log.info("part of the machine can be measured again", extra={"part": part})


class _CpuMeter:
    """Turns the processors' times into usages since the last call; the first call's are since boot."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float, float]] = {}

    def samples(self) -> Iterator[Sample]:
        times = psutil.cpu_times()
        usage, iowait = self._usage("all", times)
        yield _gauge("cpu_usage", "%", usage)
        yield _gauge("cpu_iowait_usage", "%", iowait)
        for mode, seconds in times._asdict().items():
            if mode not in {"guest", "guest_nice"}:  # these are in user and nice already
                yield _counter("cpu_seconds", "s", round(seconds, 2), mode=mode)
        for core, core_times in enumerate(psutil.cpu_times(percpu=True)[:MAX_LABELLED]):
            yield _gauge("cpu_core_usage", "%", self._usage(str(core), core_times)[0], core=str(core))
        yield _gauge("cpu_cores", "1", psutil.cpu_count() or 1)

    def _usage(self, name: str, times: "psutil._ntuples.scputimes") -> tuple[float, float]:
        parts = times._asdict()
        total = sum(seconds for mode, seconds in parts.items() if mode not in {"guest", "guest_nice"})
        iowait = parts.get("iowait", 0.0)
        idle = parts["idle"] + iowait
        last_total, last_idle, last_iowait = self._last.get(name, (0.0, 0.0, 0.0))
        self._last[name] = (total, idle, iowait)
        passed = total - last_total
        if passed <= 0.0:
            return 0.0, 0.0
        busy = 100.0 * (1.0 - (idle - last_idle) / passed)
        return _percent(busy), _percent(100.0 * (iowait - last_iowait) / passed)


def _cpu_stats() -> Iterator[Sample]:
    stats = psutil.cpu_stats()
    yield _counter("context_switches", "1", stats.ctx_switches)
    yield _counter("interrupts", "1", stats.interrupts)


def _load() -> Iterator[Sample]:
    for name, load in zip(("1m", "5m", "15m"), os.getloadavg(), strict=True):
        yield _gauge(f"load_{name}", "1", round(load, 2))


def _percent(value: float) -> float:
    return round(min(100.0, max(0.0, value)), 2)


class _RateMeter:
    """Bytes a second of totals, since the last call; none at the first."""

    def __init__(self, totals: Callable[[], dict[str, float]]) -> None:
        self._totals = totals
        self._last: dict[str, float] = {}
        self._last_s = 0.0

    def samples(self) -> Iterator[Sample]:
        now = self._totals()
        now_s = time.monotonic()
        passed_s = now_s - self._last_s
        for name, total in now.items():
            known = name in self._last and passed_s > 0.0
            rate = max(0.0, (total - self._last[name]) / passed_s) if known else float("nan")
            yield _gauge(name, "By/s", round(rate) if known else rate)
        self._last, self._last_s = now, now_s


def _disk_bytes() -> dict[str, float]:
    """Of all disks together."""
    disk = psutil.disk_io_counters()
    return {
        "disk_read_bytes_per_second": float(disk.read_bytes) if disk else 0.0,
        "disk_write_bytes_per_second": float(disk.write_bytes) if disk else 0.0,
    }


def _network_bytes() -> dict[str, float]:
    """Of all interfaces together."""
    net = psutil.net_io_counters()
    return {
        "network_receive_bytes_per_second": float(net.bytes_recv) if net else 0.0,
        "network_transmit_bytes_per_second": float(net.bytes_sent) if net else 0.0,
    }


def _memory() -> Iterator[Sample]:
    memory = psutil.virtual_memory()
    yield _gauge("memory_usage", "%", _percent(100.0 * (1.0 - memory.available / memory.total)))
    for part, amount in memory._asdict().items():
        if part != "percent":
            yield _gauge(f"memory_{part}_bytes", "By", amount)


def _swap() -> Iterator[Sample]:
    swap = psutil.swap_memory()
    yield _gauge("swap_usage", "%", _percent(100.0 * swap.used / swap.total if swap.total else 0.0))
    yield _gauge("swap_total_bytes", "By", swap.total)
    yield _gauge("swap_used_bytes", "By", swap.used)
    yield _gauge("swap_free_bytes", "By", swap.free)
    yield _counter("swap_in_bytes", "By", swap.sin)
    yield _counter("swap_out_bytes", "By", swap.sout)


def _filesystems() -> Iterator[Sample]:
    usages: dict[str, float] = {}
    partitions = psutil.disk_partitions(all=False)
    mounts = [part.mountpoint for part in partitions if part.fstype not in _PSEUDO_FILESYSTEMS]
    if "/" not in mounts:  # a container's root is an overlay: take it nevertheless
        mounts.insert(0, "/")
    for mount in mounts[:MAX_LABELLED]:
        try:
            usage = psutil.disk_usage(mount)
        except OSError as error:  # unmounted meanwhile, or not ours to look at
            _log.debug("a file system cannot be measured", extra={"mount": mount, "error": str(error)})
            continue
        usages[mount] = _percent(100.0 * usage.used / (usage.used + usage.free or 1))  # as df has it
        yield _gauge("filesystem_usage", "%", usages[mount], mount=mount)
        yield _gauge("filesystem_size_bytes", "By", usage.total, mount=mount)
        yield _gauge("filesystem_used_bytes", "By", usage.used, mount=mount)
        yield _gauge("filesystem_available_bytes", "By", usage.free, mount=mount)
    if usages:
        yield _gauge("disk_usage", "%", usages.get("/", max(usages.values())))


def _disks() -> Iterator[Sample]:
    for disk, io in list((psutil.disk_io_counters(perdisk=True) or {}).items())[:MAX_LABELLED]:
        yield _counter("disk_reads", "1", io.read_count, disk=disk)
        yield _counter("disk_writes", "1", io.write_count, disk=disk)
        yield _counter("disk_read_bytes", "By", io.read_bytes, disk=disk)
        yield _counter("disk_write_bytes", "By", io.write_bytes, disk=disk)
        busy_ms = getattr(io, "busy_time", None)  # Linux and FreeBSD have it
        if busy_ms is not None:
            yield _counter("disk_busy_seconds", "s", busy_ms / 1000.0, disk=disk)


def _interfaces() -> Iterator[Sample]:
    for interface, io in list(psutil.net_io_counters(pernic=True).items())[:MAX_LABELLED]:
        yield _counter("network_receive_bytes", "By", io.bytes_recv, interface=interface)
        yield _counter("network_transmit_bytes", "By", io.bytes_sent, interface=interface)
        yield _counter("network_receive_packets", "1", io.packets_recv, interface=interface)
        yield _counter("network_transmit_packets", "1", io.packets_sent, interface=interface)
        yield _counter("network_receive_errors", "1", io.errin, interface=interface)
        yield _counter("network_transmit_errors", "1", io.errout, interface=interface)
        yield _counter("network_receive_drops", "1", io.dropin, interface=interface)
        yield _counter("network_transmit_drops", "1", io.dropout, interface=interface)


def _processes() -> Iterator[Sample]:
    yield _gauge("process_count", "1", len(psutil.pids()))


def _uptime() -> Iterator[Sample]:
    boot_s = psutil.boot_time()
    yield _gauge("boot_time_seconds", "s", round(boot_s))
    yield _gauge("uptime_seconds", "s", round(time.time() - boot_s))


def _sensors() -> Iterator[Sample]:
    if not hasattr(psutil, "sensors_temperatures"):  # Linux and FreeBSD have it
        return
    for chip, readings in list(psutil.sensors_temperatures().items())[:MAX_LABELLED]:
        for number, reading in enumerate(readings[:MAX_LABELLED]):
            label = reading.label or str(number)
            yield _gauge("temperature_celsius", "Cel", round(reading.current, 1), chip=chip, sensor=label)
