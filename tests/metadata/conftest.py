"""Two real databases for every test of the store: the embedded PostgreSQL 18 and Debian's 15, a cluster each."""

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from runtime.clock import SystemClock
from services.metadata.store_connection import Database
from services.metadata.store_local import LocalFirstStore
from services.metadata.target import DatabaseTarget, target_of_url
from tests.harness import cluster
from tests.harness.postgres import PostgresServer, debian_postgres, embedded_postgres, scratch_folder
from tests.metadata.audit_parts import Audit, auditing
from tests.metadata.parts import PATIENT, Parts, assemble, opened
from tests.metadata.service import postmasters


@pytest.fixture(scope="session")
def embedded_server() -> Iterator[PostgresServer]:
    with embedded_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def debian_server() -> Iterator[PostgresServer]:
    with debian_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def _breakable_server() -> Iterator[PostgresServer]:
    with debian_postgres() as server:
        yield server


@pytest.fixture
def own_server(_breakable_server: PostgresServer) -> Iterator[PostgresServer]:
    """A server that a test may stop and break; it runs again when the test has ended."""
    yield _breakable_server
    if _breakable_server.process is None or _breakable_server.process.poll() is not None:
        _breakable_server.start()


@pytest.fixture(scope="session")
def made_cluster() -> Path:
    """A folder with an embedded cluster that does not run, to be copied."""
    return cluster.made_cluster()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    made = scratch_folder()
    yield made
    for process in postmasters(made):
        process.kill()
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(params=["embedded-18", pytest.param("debian-15", marks=pytest.mark.full)])
def server(request: pytest.FixtureRequest) -> PostgresServer:
    found: PostgresServer = request.getfixturevalue(f"{request.param.partition('-')[0]}_server")
    return found


@pytest.fixture
async def target(server: PostgresServer) -> DatabaseTarget:
    """A fresh, empty database."""
    return await server.fresh_database()


@pytest.fixture
async def database(target: DatabaseTarget) -> AsyncIterator[Database]:
    async with Database(target, clock=SystemClock(), bounds=PATIENT) as opened:
        yield opened


@pytest.fixture
def blind_store(tmp_path: Path) -> LocalFirstStore:
    """A store without a database, for calls that must be refused before one is asked: all others are Unavailable."""
    return assemble(target_of_url("postgresql://127.0.0.1:1/none"), tmp_path).store


@pytest.fixture
async def parts(target: DatabaseTarget, tmp_path: Path) -> AsyncIterator[Parts]:
    """The store of the product on a fresh database, and what it is made of."""
    async with opened(target, tmp_path) as made:
        yield made


@pytest.fixture
def store(parts: Parts) -> LocalFirstStore:
    return parts.store


@pytest.fixture
async def audit(target: DatabaseTarget, server: PostgresServer, tmp_path: Path) -> AsyncIterator[Audit]:
    async with auditing(target, server, tmp_path) as made:
        yield made


@pytest.fixture
async def on_one(embedded_server: PostgresServer, tmp_path: Path) -> AsyncIterator[Audit]:
    """For what does not depend on the version of the database."""
    async with auditing(await embedded_server.fresh_database(), embedded_server, tmp_path) as made:
        yield made
