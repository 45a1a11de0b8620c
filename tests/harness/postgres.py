"""Real PostgreSQL servers for tests: Debian's PostgreSQL 15 behind a password, and the product's own embedded 18.

Both are throw-away clusters, one of each a session, with a fresh database for whoever asks; `standby_of` adds a hot
standby that streams from a cluster of Debian's and can be promoted. `POSTGRES_BIN` names another folder of programs
than Debian's; without any the tests are skipped visibly, and fail where CI=true.
"""

import contextlib
import itertools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from services.metadata import postmaster
from services.metadata.target import DatabaseTarget, target_of_url
from tests.harness import free_port

DEBIAN_BIN = Path(os.environ.get("POSTGRES_BIN", "/usr/lib/postgresql/15/bin"))
START_BOUND_S = 60.0
OWNER = "om_owner"
ROOM_FOR_CLUSTERS_BYTES = 2 << 30
_numbers = itertools.count(1)


def scratch_folder() -> Path:
    """A new folder for a cluster: in memory where there is room, since making one is a thousand small writes."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM_FOR_CLUSTERS_BYTES
    return Path(tempfile.mkdtemp(prefix="om-pg-", dir=memory if roomy else None))


def need_debian_postgres() -> Path:
    """The folder of Debian's programs; skips the test, or fails it in CI, when they are not installed."""
    if (DEBIAN_BIN / "postgres").exists():
        return DEBIAN_BIN
    message = f"no PostgreSQL in {DEBIAN_BIN} (Debian package postgresql; POSTGRES_BIN names another folder)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@dataclass(kw_only=True)
class PostgresServer:
    """A running cluster. `kind` is `debian` (TCP, password) or `embedded` (Unix socket)."""

    kind: str
    folder: Path
    data: Path
    admin: dict[str, Any]
    password: str = ""
    command: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    async def fresh_database(self) -> DatabaseTarget:
        """A new empty database, owned by a role that is no superuser."""
        name = f"t{next(_numbers)}_{secrets.token_hex(3)}"
        connection = await asyncpg.connect(**self.admin)
        try:
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", OWNER):
                await connection.execute(f"CREATE ROLE {OWNER} LOGIN PASSWORD '{self.password or 'unused'}'")
            await connection.execute(f"CREATE DATABASE {name} OWNER {OWNER}")
        finally:
            await connection.close()
        return self.target(name)

    def target(self, database: str) -> DatabaseTarget:
        """How the service connects to one of its databases."""
        if self.kind == "debian":
            return target_of_url(self.url(database))
        return DatabaseTarget(
            role="embedded",
            hosts=((self.admin["host"], self.admin["port"]),),
            options={"user": OWNER, "password": "", "database": database, "target_session_attrs": "any", "ssl": False},
            address=f"unix:{self.admin['host']}",
            disk=self.folder,
        )

    def url(self, database: str) -> str:
        """The DATABASE_URL of one of its databases.

        Without asking for TLS, which it has not: the driver loses an exception when it is cancelled just then.
        """
        return f"postgresql://{OWNER}:{self.password}@127.0.0.1:{self.admin['port']}/{database}?sslmode=disable"

    def start(self) -> None:
        """Starts it and waits until it answers, after a SIGKILL also until what that left behind has ended."""
        log = self.folder / "log"
        ends = time.monotonic() + START_BOUND_S
        while True:
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", **self.options
                )
            while self.process.poll() is None and time.monotonic() < ends:
                if _is_ready(self.data / "postmaster.pid", self.process.pid):
                    return
                time.sleep(0.01)
            said = log.read_text()[-800:]
            if "pre-existing shared memory block" not in said or time.monotonic() > ends:
                raise AssertionError(f"PostgreSQL does not start: {said}")

    async def execute(self, statement: str, *values: Any, database: str = "postgres") -> Any:
        """Runs a statement as the superuser; returns the first value of the answer, if there is one."""
        connection = await asyncpg.connect(**(self.admin | {"database": database}))
        try:
            return await connection.fetchval(statement, *values)
        finally:
            await connection.close()

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stops it: fast with SIGINT, as a crash with SIGQUIT."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(START_BOUND_S)


def _is_ready(file: Path, pid: int) -> bool:
    """By the word of that process: of one that was killed the file is still there, and says so."""
    with contextlib.suppress(OSError, IndexError):
        lines = file.read_text().splitlines()
        return lines[0] == str(pid) and "ready" in lines[-1]
    return False


@contextlib.contextmanager
def debian_postgres() -> Iterator[PostgresServer]:
    """A cluster of Debian's PostgreSQL on a free port of 127.0.0.1, with scram-sha-256 and a random password."""
    programs = need_debian_postgres()
    password = secrets.token_hex(12)
    server = _debian_server(programs, password)
    try:
        password_file = server.folder / "password"
        password_file.write_text(password)
        password_file.chmod(0o644)
        subprocess.run(
            [
                str(programs / "initdb"),
                *("-D", str(server.data), "-U", "postgres", "--auth=scram-sha-256", "--encoding=UTF8"),
                *("--locale=C.UTF-8", "--no-sync", f"--pwfile={password_file}"),
            ],
            check=True,
            capture_output=True,
            cwd="/",
            **server.options,
        )
        server.start()
        yield server
    finally:
        _end(server, server.folder)


def _debian_server(programs: Path, password: str) -> PostgresServer:
    """A cluster that is not made yet, in a folder and on a port of its own."""
    folder = scratch_folder()
    options: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres" if _has_user("postgres") else "nobody")
        options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
    port = free_port()
    return PostgresServer(
        kind="debian",
        folder=folder,
        data=folder / "data",
        admin={"host": "127.0.0.1", "port": port, "user": "postgres", "password": password, "database": "postgres"},
        password=password,
        command=[
            str(programs / "postgres"),
            *("-D", str(folder / "data"), "-p", str(port), "-h", "127.0.0.1"),
            *("-c", f"unix_socket_directories={folder}", "-c", "fsync=off", "-c", "shared_buffers=16MB"),
            *("-c", "max_connections=40", "-c", "jit=off"),
        ],
        options=options,
    )


@contextlib.contextmanager
def standby_of(primary: PostgresServer, *, link_port: int | None = None) -> Iterator[PostgresServer]:
    """A hot standby of a running cluster of Debian's, made by pg_basebackup; it asks for the log by TCP.

    `link_port` is where it reaches the primary, that of a proxy for example; default: the primary's own. It retries a
    broken link every 200 ms. Blocking: about a second.
    """
    programs = need_debian_postgres()
    standby = _debian_server(programs, primary.password)
    port = primary.admin["port"]
    try:
        subprocess.run(
            [
                str(programs / "pg_basebackup"),
                *("-D", str(standby.data), "-h", "127.0.0.1", "-p", str(port), "-U", "postgres"),
                *("--checkpoint=fast", "--wal-method=stream", "--no-sync", "--write-recovery-conf"),
            ],
            check=True,
            capture_output=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "PGPASSWORD": primary.password},
            **standby.options,
        )
        link = f"host=127.0.0.1 port={link_port or port} user=postgres password={primary.password}"
        standby.command += ["-c", f"primary_conninfo={link}", "-c", "wal_retrieve_retry_interval=200ms"]
        standby.start()
        yield standby
    finally:
        _end(standby, standby.folder)


def _has_user(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())


@contextlib.contextmanager
def embedded_postgres() -> Iterator[PostgresServer]:
    """A cluster as the product makes and starts it, without the life around it, and without fsync for speed."""
    folder = scratch_folder()
    server = None
    try:
        cluster = postmaster.prepare(folder)
        server = PostgresServer(
            kind="embedded",
            folder=folder,
            data=cluster.data,
            admin={
                "host": str(cluster.socket_folder),
                "port": postmaster.SOCKET_PORT,
                "user": postmaster.SUPERUSER,
                "database": "postgres",
                "ssl": False,
            },
            command=[*cluster.command(), "-c", "fsync=off"],
            options=cluster.account.process_options(),
        )
        server.start()
        yield server
    finally:
        _end(server, folder)


def _end(server: PostgresServer | None, folder: Path) -> None:
    """Throws a cluster away: at once, since nothing of it is kept."""
    if server is not None and server.process is not None and server.process.poll() is None:
        server.stop(signal.SIGQUIT)
    shutil.rmtree(folder, ignore_errors=True)
