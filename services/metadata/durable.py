"""Connections on which a change is on the database's disk when it is acknowledged, however the server is set up.

With `synchronous_commit = off`, which a server, a database or a role may have for everybody, a commit is answered some
0.6 s before it is synced, and PostgreSQL's death takes it away. Other values stay as they are set: they are about
standbys.
"""

from typing import Any, Final, Self

import asyncpg

from services.metadata.line import untraced

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

    def get_reset_query(self) -> Any:
        return f"{super().get_reset_query()}\n{_SYNCED}"
