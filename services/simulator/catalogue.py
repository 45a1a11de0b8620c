"""The 511 metrics that every simulated server reports, in the order of the columns.

What must stay true: there are exactly ``METRIC_COUNT``, their names are unique and carry no labels, and the headline
metrics are among them. The order is the metric set's identity: changing it makes another set, and nothing worse.
"""

from typing import Final

from fleet.model import MetricSet
from services.simulator import catalogue_applications as applications
from services.simulator import catalogue_devices as devices
from services.simulator import catalogue_system as system
from services.simulator.catalogue_words import MetricSpec

METRIC_COUNT: Final = 511

CATALOGUE: Final[tuple[MetricSpec, ...]] = (
    *system.cpu(),
    *system.memory(),
    *devices.disks(),
    *devices.filesystems(),
    *devices.network(),
    *system.processes(),
    *system.sensors(),
    *applications.http(),
    *applications.postgres(),
    *applications.redis(),
    *applications.nginx(),
    *applications.queues(),
    *applications.services(),
    *applications.runtime(),
)
METRIC_SET: Final = MetricSet(tuple(spec.metric for spec in CATALOGUE))
COLUMN: Final[dict[str, int]] = {spec.metric.name: column for column, spec in enumerate(CATALOGUE)}
"""Name of a metric to its column."""
