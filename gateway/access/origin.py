"""From where a call comes: the address of its connection, or what a trusted proxy in front of us says it had.

A proxy adds its entry at the end: nginx and Envoy to the header that is there, HAProxy as one more header of the name.
Whatever stands before may be the caller's own invention.

What must stay true: nobody else's X-Forwarded-For is believed, and of all its headers only the very last entry, the
proxy's own.
"""

import ipaddress
from collections.abc import Sequence


class Origin:
    """Knows the trusted proxies."""

    def __init__(self, trusted_proxy: str | None) -> None:
        """`trusted_proxy`: their network; None: there is none."""
        self._proxies = None if trusted_proxy is None else ipaddress.ip_network(trusted_proxy)

    @property
    def has_proxies(self) -> bool:
        """Whether anybody's X-Forwarded-For is believed."""
        return self._proxies is not None

    def of(self, host: str, forwarded_for: Sequence[str]) -> str:
        """The caller's address.

        Args:
            host: the address of the connection.
            forwarded_for: every X-Forwarded-For that came with the call, in their order.
        """
        if self._proxies is None or not forwarded_for:
            return host
        try:
            if ipaddress.ip_address(host) not in self._proxies:
                return host
            found = ipaddress.ip_address(forwarded_for[-1].rpartition(",")[2].strip())
        except ValueError:
            return host
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return str(mapped or found)  # a proxy that listens for both writes ::ffff:192.0.2.7
