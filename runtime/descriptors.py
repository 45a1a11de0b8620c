"""How many files and connections a process may have open.

What must stay true: strangers' connections never take the last descriptor, since a process that has none left can
neither open a file nor call another process, and its accepting thread would spin on an error that does not go away.
"""

import logging
import resource
from typing import Final

from runtime.logs import OF_SET_UP

WANTED: Final = 65_536
"""More is of no use: see the bounds of connections."""
RESERVED: Final = 256
"""For files, calls to other processes, and what libraries hold."""
LISTENERS: Final = 2
"""Of one process at most: gRPC and HTTP, each with an equal share of what is not reserved."""
MAX_CONNECTIONS: Final = 16_384
"""Of one listener at once. Each watcher of the fleet may hold one."""
FEW: Final = 1_000

_log = logging.getLogger(__name__)


def allow_many() -> None:
    """Lifts the soft limit of open files, often 1,024, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:  # macOS has a limit of its own below an infinite one
            _log.info("the limit of open files stays %d: %s", soft, error)
    if max_connections() < FEW:
        say = "at most %d connections can be open at once: raise the limit of open files"
        _log.warning(say, max_connections(), extra=OF_SET_UP)


def max_connections() -> int:
    """How many connections one listener may have at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (soft - RESERVED) // LISTENERS))
