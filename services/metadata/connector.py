"""How a connection is made: to which host, with which settings, and so that what is committed on it is durable.

What must stay true: a change is on the database's disk when it is acknowledged, however the server is set up. With
`synchronous_commit = off`, which a server, a database or a role may have for everybody, a commit is answered some 0.6 s
before it is synced, and PostgreSQL's death takes it away. Other values stay as they are set: they are about standbys.
"""

from typing import Any, Final, Self

import asyncpg

from services.metadata.driver_errors import UNAVAILABLE
from services.metadata.hosts import first_that_serves
from services.metadata.line import untraced
from services.metadata.target import DatabaseTarget

STATEMENT_SHARE: Final = 0.9
"""The server gives up on a statement before we do, so that the connection stays usable."""

_SYNCED: Final = """SELECT set_config('synchronous_commit', 'local', false)
    WHERE current_setting('synchronous_commit') = 'off';"""


class DurableConnection(asyncpg.Connection):  # type: ignore[misc]  # the driver has no types
    """A connection that stays durable when the pool resets it; `begin` makes it so."""

    async def begin(self, within_s: float) -> Self:
        """To be called once, as soon as it is connected; where that fails it is closed."""
        try:
            with untraced():
                await self.execute(_SYNCED, timeout=within_s)
        except BaseException:
            self.terminate()
            raise
        return self

    def __del__(self) -> None:
        """What the driver gave up in the middle of making, since the server is none, it does not close either."""
        if hasattr(self, "_source_traceback"):
            super().__del__()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._transport.abort)

    def get_reset_query(self) -> Any:
        return f"{super().get_reset_query()}\n{_SYNCED}"


class Connector:
    """Connects to the first host that serves, beginning with the one that did last time."""

    def __init__(self, target: DatabaseTarget, command_s: float) -> None:
        """`command_s`: how long a statement may take."""
        self._target = target
        self._command_s = command_s
        self._first_host = 0

    def leave_host(self) -> None:
        """Where another host takes writes, the next connection begins with that."""
        self._first_host += 1

    async def connect(self, within_s: float, **pool_options: Any) -> Any:
        """A connection, made within so many seconds."""
        hosts = self._target.hosts

        async def connect(number: int) -> Any:
            host, port = hosts[number]
            try:
                connection = await asyncpg.connect(
                    host=host,
                    port=port,
                    timeout=within_s,
                    command_timeout=self._command_s,
                    server_settings={
                        "application_name": "openmanager-metadata",
                        "statement_timeout": str(int(self._command_s * STATEMENT_SHARE * 1000)),
                        "idle_in_transaction_session_timeout": "30000",
                        "timezone": "UTC",
                    },
                    **self._target.options,
                    **({"connection_class": DurableConnection} | pool_options),
                )
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                if isinstance(error, asyncpg.InterfaceError | OSError):
                    raise
                raise asyncpg.InterfaceError(f"it does not answer as PostgreSQL does: {error}") from error
            return await connection.begin(within_s)

        first = self._first_host % len(hosts)
        self._first_host, connection = await first_that_serves(len(hosts), first, connect, UNAVAILABLE)
        return connection
