"""What breaks the stores must mend them, too, or the tests that use it wait for what never comes."""

import asyncio
import signal

import asyncpg

from tests.harness import eventually
from tests.harness.postgres import debian_postgres

BUSY = "SELECT count(*) FROM (SELECT generate_series(1, 5000000)) AS numbers"


async def test_a_killed_postgresql_answers_when_its_start_returns() -> None:
    """Though one of its sessions works on for a while, and nobody can start beside it."""
    with debian_postgres() as server:
        connection = await asyncpg.connect(**server.admin)
        working = asyncio.create_task(connection.execute(BUSY))
        active = f"SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = '{BUSY}'"
        await eventually(lambda: server.execute(active), within_s=20)
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        await asyncio.to_thread(server.start)
        assert await server.execute("SELECT 1") == 1
        await asyncio.gather(working, return_exceptions=True)
        connection.terminate()
