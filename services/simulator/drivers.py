"""What drives a server's metrics: some twenty hidden quantities that 511 metrics follow.

Metrics of a real machine are not independent: a busy hour raises CPU, load, traffic and latency at once. Here each
metric follows one driver, and scenarios bend drivers, never metrics, so that consequences stay correlated.
"""

from enum import IntEnum, auto


class Driver(IntEnum):
    """A hidden quantity of a server; fractions are 0 to 1 unless said otherwise.

    Those up to ``FAILURES`` are rates with an integral in closed form: only they may drive a counter.
    """

    ONE = 0
    """Always 1: for constants, and for counters that grow with time alone."""
    CPU = auto()
    """Fraction of all cores that is busy."""
    IOWAIT = auto()
    """Fraction of time that cores wait for a disk."""
    PAGING = auto()
    """Activity of the pager."""
    DISK_IO = auto()
    """Fraction of the disks' throughput in use."""
    NETWORK = auto()
    """Fraction of the link in use."""
    LOSS = auto()
    """Fraction of packets lost, dropped or sent again; 0.001 is ordinary."""
    REQUESTS = auto()
    """Application activity."""
    FAILURES = auto()
    """Fraction of requests that fail; 0.002 is ordinary."""
    LOAD_1M = auto()
    """Runnable tasks per core, averaged over one minute; 1 means saturated, more is possible."""
    LOAD_5M = auto()
    LOAD_15M = auto()
    MEMORY = auto()
    """Fraction of memory in use."""
    SWAP = auto()
    """Fraction of swap in use."""
    DISK_ROOT = auto()
    """Fraction of the root file system in use."""
    DISK_DATA = auto()
    DISK_LOGS = auto()
    LATENCY = auto()
    """How many times slower than an idle server things are; 1 or more."""
    HEAT = auto()
    """0 at room temperature, 1 where a processor throttles."""
    UPTIME = auto()
    """Seconds since boot."""
    EPOCH = auto()
    """Seconds since the Unix epoch at boot."""


RATES = int(Driver.FAILURES) + 1
"""How many drivers, from the first, have an integral."""
DRIVERS = len(Driver)
