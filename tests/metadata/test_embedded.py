"""The embedded PostgreSQL: private, guarded, started again, stopped, and never at the cost of a foreign process."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from fleet.model import ServerDescriptor
from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, Unavailable
from services.metadata import embedded, postmaster
from services.metadata.account import account_of
from services.metadata.embedded import EmbeddedPostgres
from services.metadata.store_connection import Database
from services.metadata.store_postgres import PostgresStore
from tests.harness import eventually
from tests.harness.postgres import PostgresServer, scratch_folder
from tests.metadata.parts import EVERYTHING

FORGOTTEN: "list[subprocess.Popen[bytes]]" = []
"""Postmasters left behind on purpose; they are children of this process all the same."""
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it is about changing the user")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that works on `folder`: initdb, postmasters, and their sessions by their parent."""
    masters = []
    for process in psutil.process_iter():
        try:
            if (
                any(argument.startswith(f"{folder}/") for argument in process.cmdline())
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                masters.append(process)
        except psutil.NoSuchProcess:
            continue
    for master in list(masters):
        with contextlib.suppress(psutil.NoSuchProcess):
            masters += master.children(recursive=True)
    return masters


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a cluster; whatever still runs on it when the test has ended is killed."""
    made = scratch_folder()
    yield made
    for process in processes_of(made):
        process.kill()
    for child in FORGOTTEN:
        child.wait(30.0)
    FORGOTTEN.clear()
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def ready_folder(folder: Path, made_cluster: Path) -> Path:
    subprocess.run(["cp", "-a", str(made_cluster), str(folder)], check=True)
    return folder


def embedded_in(folder: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(folder, clock=SystemClock())


@asynccontextmanager
async def opened(postgres: EmbeddedPostgres) -> AsyncIterator[PostgresStore]:
    async with Database(postgres.target(), clock=SystemClock()) as database:
        yield PostgresStore(database)


async def size(store: PostgresStore) -> int:
    try:
        return (await store.list_servers(EVERYTHING))[1]
    except Unavailable:
        return -1


async def orphan(folder: Path) -> int:
    """Leaves a running postmaster with one server recorded behind, as a service killed with -9 does; its PID."""
    postgres = embedded_in(folder)
    async with postgres:
        async with opened(postgres) as store:
            await store.create_server(ServerDescriptor(server_id="kept", hostname="kept"))
        FORGOTTEN.append(postgres._process)
        postgres._process = None
    return int((folder / "postgresql" / "postmaster.pid").read_text().split()[0])


async def test_it_is_private_and_leaves_nothing_behind(ready_folder: Path) -> None:
    folder = ready_folder
    async with embedded_in(folder) as postgres:
        async with opened(postgres) as store:
            assert await size(store) == 0
        socket_folder = postgres.socket_folder.stat()
        assert stat.S_IMODE(socket_folder.st_mode) == 0o700
        assert stat.S_IMODE((folder / "postgresql").stat().st_mode) == 0o700
        users, listening = set(), []
        for process in processes_of(folder):
            with contextlib.suppress(psutil.NoSuchProcess):  # that of a connection that was closed just now
                listening += [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                users.add(process.uids().real)
        assert not listening
        assert users == {socket_folder.st_uid} - {0}, "and there are some"
        assert postgres.target().address == f"unix:{postgres.socket_folder}"
        connection = await asyncpg.connect(host=str(postgres.socket_folder), user="postgres", database="postgres")
        rows = await connection.fetch("SELECT name, setting FROM pg_settings")
        values = {row["name"]: row["setting"] for row in rows}
        wanted = {"listen_addresses": "", "fsync": "on", "synchronous_commit": "on", "max_connections": "40"}
        assert {name: values[name] for name in wanted} == wanted
        assert values["shared_buffers"] == str((32 << 20) // 8192)
        assert not await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = $1", embedded.USER)
        await connection.close()
    assert processes_of(folder) == []


async def test_what_was_written_is_there_after_a_restart(ready_folder: Path) -> None:
    for expected in (0, 1):
        async with embedded_in(ready_folder) as postgres, opened(postgres) as store:
            assert await size(store) == expected
            await store.register_servers([ServerDescriptor(server_id="a", hostname="a")])


async def test_a_killed_postmaster_is_started_again_and_the_store_recovers(
    ready_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with embedded_in(ready_folder) as postgres, Database(postgres.target(), clock=SystemClock()) as database:
        store = PostgresStore(database)

        async def down() -> bool:
            try:
                await database.probe()
            except Unavailable:
                return True
            return False

        async def recovered() -> bool:
            return await size(store) == 1

        await store.create_server(ServerDescriptor(server_id="a", hostname="a"))
        killed, start, seen_down = postgres.pid, postgres._start, threading.Event()
        assert killed is not None

        def start_later() -> None:
            seen_down.wait(60)
            start()

        monkeypatch.setattr(postgres, "_start", start_later)  # or it may be up again before anybody has looked
        os.kill(killed, signal.SIGKILL)
        await eventually(down)
        seen_down.set()
        await eventually(lambda: postgres.pid not in (None, killed))
        await eventually(recovered)
        assert (await database.probe()).server_version.startswith("PostgreSQL 18")
    assert processes_of(ready_folder) == []


async def test_an_orphaned_postmaster_is_stopped_and_its_data_served(ready_folder: Path) -> None:
    left = await orphan(ready_folder)
    started = time.monotonic()
    async with embedded_in(ready_folder) as postgres, opened(postgres) as store:
        assert time.monotonic() - started < 30.0
        assert await size(store) == 1
        assert postgres.pid != left
        for process in processes_of(ready_folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                assert postgres.pid in (process.pid, *(parent.pid for parent in process.parents()))
    assert "received fast shutdown request" in (ready_folder / "postgresql.log").read_text()
    assert processes_of(ready_folder) == []


async def test_an_orphan_is_recognised_by_its_socket_when_the_clock_was_set(ready_folder: Path) -> None:
    left = await orphan(ready_folder)
    _note(ready_folder, line=2, text=str(int(time.time()) - 86_400))
    async with embedded_in(ready_folder) as postgres, opened(postgres) as store:
        assert await size(store) == 1
    assert left not in [process.pid for process in processes_of(ready_folder)]


async def test_a_postmaster_that_began_at_another_time_is_not_touched(ready_folder: Path) -> None:
    left = await orphan(ready_folder)
    _note(ready_folder, line=2, text=str(int(time.time()) - 86_400))
    (ready_folder / "run" / ".s.PGSQL.5432").unlink()
    with pytest.raises(FailedPrecondition, match=f"process {left} "):
        async with embedded_in(ready_folder):
            pass
    assert psutil.Process(left).is_running()


@pytest.mark.parametrize("kind", ["any process", "another cluster's postmaster", "another cluster's session"])
async def test_a_foreign_process_named_in_postmaster_pid_lives_on(
    ready_folder: Path, embedded_server: PostgresServer, kind: str
) -> None:
    sleeper = subprocess.Popen(["sleep", "60"], **account_of(ready_folder / "postgresql").process_options())
    assert embedded_server.process is not None
    master = psutil.Process(embedded_server.process.pid)
    foreign = {"any": psutil.Process(sleeper.pid), "another": master}[kind.split(maxsplit=1)[0]]
    if kind.endswith("session"):
        foreign = min(master.children(), key=psutil.Process.create_time)  # others, such as autovacuum's, end
    began = int(foreign.create_time())
    pid_file = ready_folder / "postgresql" / "postmaster.pid"
    pid_file.write_text(f"{foreign.pid}\n{ready_folder / 'postgresql'}\n{began}\n5432\n{ready_folder / 'run'}\n\n")
    account_of(ready_folder / "postgresql").own(pid_file)
    try:
        async with embedded_in(ready_folder) as postgres, opened(postgres) as store:
            assert await size(store) == 0
        assert foreign.is_running()
        assert foreign.status() != psutil.STATUS_ZOMBIE
    finally:
        sleeper.kill()
        sleeper.wait()


async def test_a_postgres_that_somebody_else_runs_on_the_folder_is_not_touched(ready_folder: Path) -> None:
    cluster = postmaster.prepare(ready_folder)
    command = cluster.command()
    command[1:3] = ["-c", "jit=off", "-D", "."]
    theirs = subprocess.Popen(
        command,
        cwd=ready_folder / "postgresql",
        stderr=subprocess.DEVNULL,
        **cluster.account.process_options(),
    )
    try:
        await eventually(lambda: postmaster.PidFile.read(cluster.data))
        with pytest.raises(FailedPrecondition, match="is not ours"):
            async with embedded_in(ready_folder):
                pass
        assert theirs.poll() is None
    finally:
        theirs.send_signal(signal.SIGQUIT)
        theirs.wait()


async def test_a_half_made_cluster_is_made_anew(folder: Path) -> None:
    half = folder / "postgresql.unfinished-x1"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    async with embedded_in(folder) as postgres, opened(postgres) as store:
        assert await size(store) == 0
    assert not list(folder.glob("postgresql.unfinished-*"))


async def test_data_of_another_version_is_refused_at_once(folder: Path) -> None:
    (folder / "postgresql").mkdir(mode=0o700)
    (folder / "postgresql" / "PG_VERSION").write_text("16\n")
    with pytest.raises(FailedPrecondition, match="data of PostgreSQL 16, but 18 is installed"):
        async with embedded_in(folder):
            pass


async def test_a_deep_folder_gets_a_short_private_socket_folder(folder: Path, made_cluster: Path) -> None:
    deep = folder / ("x" * 100) / ", \"quoted\" and 'spaced'"
    deep.mkdir(parents=True)
    subprocess.run(["cp", "-a", str(made_cluster), str(deep)], check=True)
    async with embedded_in(deep) as postgres, opened(postgres) as store:
        assert await size(store) == 0
        assert len(os.fsencode(postgres.socket_folder / ".s.PGSQL.5432")) <= 107
        assert stat.S_IMODE(postgres.socket_folder.stat().st_mode) == 0o700
        socket_folder = postgres.socket_folder
    shutil.rmtree(socket_folder)


@AS_ROOT
async def test_a_socket_folder_of_somebody_else_is_not_used(folder: Path, made_cluster: Path) -> None:
    deep = folder / ("x" * 110)
    deep.mkdir()
    subprocess.run(["cp", "-a", str(made_cluster), str(deep)], check=True)
    account = account_of(deep / "postgresql")
    trap = postmaster._socket_folder(deep.resolve() / "postgresql", account)
    os.chown(trap, pwd.getpwnam("daemon").pw_uid, -1)
    try:
        with pytest.raises(FailedPrecondition, match="belongs to somebody else"):
            async with embedded_in(deep):
                pass
    finally:
        shutil.rmtree(trap)


@pytest.mark.parametrize("when", ["making the cluster", "waiting for its first answer"])
async def test_stopping_while_it_starts_leaves_no_process(
    folder: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: EmbeddedPostgres, process: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(EmbeddedPostgres, "_until_it_answers", never)
    postgres = embedded_in(folder)
    entering = asyncio.create_task(postgres.__aenter__())
    if when.startswith("making"):
        await eventually(lambda: list(folder.glob("postgresql.unfinished-*")) or postgres._process)  # made by now
    else:
        await eventually(lambda: postgres._process)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert processes_of(folder) == []


async def test_the_log_is_bounded_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MAX_LOG_BYTES", 1_000)
    file = tmp_path / "postgresql.log"
    with file.open("ab", buffering=0) as held_by_the_server:
        held_by_the_server.write(b"x" * 900)
        embedded._bound_log(file)
        assert file.stat().st_size == 900
        held_by_the_server.write(b"y" * 200)
        embedded._bound_log(file)
        held_by_the_server.write(b"after")
    assert file.read_bytes() == b"after"
    assert file.with_name("postgresql.log.1").stat().st_size == 1_100


@AS_ROOT
def test_it_runs_for_an_ordinary_user(folder: Path) -> None:
    # Everything is imported before root is given up: the interpreter itself may be closed to other users.
    script = """
        import asyncio, os, pwd, sys, encodings.idna, asyncpg, uvloop
        from pathlib import Path
        from runtime.clock import SystemClock
        from services.metadata.embedded import EmbeddedPostgres
        user = pwd.getpwnam("nobody")
        os.chown(sys.argv[1], user.pw_uid, user.pw_gid)
        os.setgroups([]); os.setgid(user.pw_gid); os.setuid(user.pw_uid)
        async def main():
            async with EmbeddedPostgres(Path(sys.argv[1]), clock=SystemClock()) as postgres:
                assert os.stat(Path(sys.argv[1]) / "postgresql").st_uid == user.pw_uid
                print("serves", postgres.pid)
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.stdout.startswith("serves "), done.stderr
    assert done.returncode == 0, done.stderr
    assert processes_of(folder) == []


def _note(folder: Path, *, line: int, text: str) -> None:
    file = folder / "postgresql" / "postmaster.pid"
    lines = file.read_text().splitlines()
    lines[line] = text
    file.write_text("\n".join(lines) + "\n")
