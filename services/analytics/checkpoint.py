"""The state on disk: one file that holds what the detector knows, the findings that metadata lacks, the scores that
timeseries lacks, and the sequence that comes next.

    openmanager-analytics-checkpoint <version> <sha256 of the rest> <bytes of the rest>\\n
    an npz archive: the detector's arrays, each under `detector.<name>`; `about`, JSON as bytes; `waiting` and
    `open_findings`, a line of JSON for each finding; `scores`, one for each minute (earlier versions wrote none)

What must stay true: the file is a whole checkpoint at every moment, also over a power cut (written beside, synced,
renamed, folder synced); one that cannot be used is set aside and told, and never keeps the service from starting; all
work on the file is done in threads.
"""

import asyncio
import hashlib
import io
import logging
import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import orjson
from numpy.typing import NDArray

from fleet.anomaly import Anomaly, Contribution
from runtime import telemetry
from runtime.clock import Clock
from services.analytics.core import Analysis, Snapshot
from services.analytics.detect import DetectorState
from services.analytics.scores import Scored

FILE_NAME: Final = "checkpoint"
SET_ASIDE_SUFFIX: Final = ".unusable"
"""The last one set aside is kept for whoever wants to know why."""
VERSION: Final = 3
"""1: of the EWMA detector; 2: before there were predictions."""
MAGIC: Final = "openmanager-analytics-checkpoint"
MAX_HEADER_BYTES: Final = 256

_WRITE_BYTES: Final = 1 << 20

_ARRAY_PREFIX: Final = "detector."
_log = logging.getLogger(__name__)
_failures = telemetry.meter(__name__).create_counter(
    "openmanager.analytics.checkpoint_failures", unit="{checkpoint}", description="Checkpoints that were not written."
)


class UnusableCheckpointError(Exception):
    """What is on disk is no checkpoint that this version can go on from."""


class _Hashing(io.RawIOBase):
    """Writes through to a file, and hashes what is written; cannot seek, so that nothing is written twice."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.length += size
        return size


def write(snapshot: Snapshot, file: BinaryIO) -> None:
    """Writes the file's content, of which no copy is made: the arrays may be hundreds of megabytes, and a copy holds up
    the event loop, in whatever thread it is made."""
    detector = snapshot.detector
    about = {
        "next_sequence": snapshot.next_sequence,
        "verdicts_until": snapshot.verdicts_until,
        "detector": detector.detector,
        "texts": detector.texts,
    }
    arrays = {
        "about": np.frombuffer(orjson.dumps(about), np.uint8),
        "waiting": _lines(snapshot.waiting),
        "open_findings": _lines(detector.open_findings),
        "scores": _lines([[one.start_ms, one.server_ids, one.scores.tolist()] for one in snapshot.scores]),
        **{_ARRAY_PREFIX + name: array for name, array in detector.arrays.items()},
    }
    file.write(_header("0" * 64, 0))
    body = _Hashing(file)
    with zipfile.ZipFile(body, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                whole = np.ascontiguousarray(array)
                np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(whole))
                content = whole.reshape(-1).view(np.uint8)
                for start in range(0, len(content), _WRITE_BYTES):
                    member.write(content[start : start + _WRITE_BYTES].data)
    file.seek(0)
    file.write(_header(body.digest.hexdigest(), body.length))


def _header(digest: str, length: int) -> bytes:
    """Always as long."""
    return f"{MAGIC} {VERSION} {digest} {length:015d}\n".encode()


def decode(content: bytes) -> Snapshot:
    """What `write` wrote.

    Raises:
        UnusableCheckpointError: damaged, cut, or of another version.
    """
    header, newline, _ = content[:MAX_HEADER_BYTES].partition(b"\n")
    words = header.split(b" ")
    if not newline or len(words) != 4 or words[0] != MAGIC.encode():
        raise UnusableCheckpointError("it does not begin as a checkpoint does")
    if words[1] != str(VERSION).encode():
        raise UnusableCheckpointError(f"it is of format {words[1][:20].decode(errors='replace')}, not {VERSION}")
    body = memoryview(content)[len(header) + 1 :]
    if words[3] != f"{len(body):015d}".encode() or words[2] != hashlib.sha256(body).hexdigest().encode():
        raise UnusableCheckpointError("its checksum is wrong")
    try:
        return _snapshot(body)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UnusableCheckpointError(f"it cannot be read: {error}") from error


def _snapshot(body: memoryview) -> Snapshot:
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        about = orjson.loads(archive["about"].tobytes())
        arrays: dict[str, NDArray[Any]] = {
            name.removeprefix(_ARRAY_PREFIX): archive[name] for name in archive.files if name.startswith(_ARRAY_PREFIX)
        }
        waiting, open_findings = (_findings(archive[name]) for name in ("waiting", "open_findings"))
        scores = _scores(archive["scores"]) if "scores" in archive.files else ()
    return Snapshot(
        next_sequence=int(about["next_sequence"]),
        verdicts_until=int(about["verdicts_until"]),
        detector=DetectorState(
            detector=about["detector"],
            arrays=arrays,
            texts={name: tuple(texts) for name, texts in about["texts"].items()},
            open_findings=open_findings,
        ),
        waiting=waiting,
        scores=scores,
    )


def _lines(values: Sequence[Anomaly] | Sequence[Sequence[Any]]) -> NDArray[np.uint8]:
    """One by one, as to make JSON of them all would hold up the event loop for 20 ms."""
    return np.frombuffer(b"\n".join([orjson.dumps(value) for value in values]), np.uint8)


def _scores(lines: NDArray[np.uint8]) -> tuple[Scored, ...]:
    made = []
    for line in lines.tobytes().splitlines():
        start_ms, server_ids, values = orjson.loads(line)
        scores = np.array(values, np.float64)
        if scores.shape != (len(server_ids),):
            raise ValueError("a minute has not a score for each of its servers")
        made.append(Scored(start_ms=int(start_ms), server_ids=tuple(server_ids), scores=scores))
    return tuple(made)


def _findings(lines: NDArray[np.uint8]) -> tuple[Anomaly, ...]:
    made = []
    for line in lines.tobytes().splitlines():
        fields = orjson.loads(line)
        parts = tuple(Contribution(**part) for part in fields.pop("contributions"))
        made.append(Anomaly(**fields, contributions=parts))
    return tuple(made)


class CheckpointFile:
    """The file in the process's folder. Its methods block: call them in threads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._writing = threading.Lock()

    def save(self, snapshot: Snapshot) -> None:
        """Returns once the snapshot is on disk; OSError when it cannot be, and what was there stays."""
        with self._writing:
            draft = self.path.with_name(f"{FILE_NAME}.new")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
                write(snapshot, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path)
            _sync_folder(self.path.parent)

    def load(self) -> Snapshot | None:
        """The checkpoint; None when there is none.

        Raises:
            UnusableCheckpointError: it cannot be used.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnusableCheckpointError(f"it cannot be read: {error.strerror}") from error
        return decode(content)

    def set_aside(self) -> Path:
        """Moves the file out of the way and returns where to; the one set aside before is gone."""
        aside = self.path.with_name(FILE_NAME + SET_ASIDE_SUFFIX)
        self.path.replace(aside)
        return aside


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpointer:
    """Brings an analysis back from disk and keeps the disk up to date with it."""

    def __init__(self, file: CheckpointFile, analysis: Analysis, clock: Clock, interval_s: float) -> None:
        self._file = file
        self._analysis = analysis
        self._clock = clock
        self._interval_s = interval_s
        self._saved = (0, 0)

    async def restore(self) -> None:
        """Goes on from the checkpoint, or from nothing when there is none that can be used."""
        try:
            snapshot = await asyncio.to_thread(self._file.load)
            if snapshot is None:
                _log.info("no checkpoint: learning begins with the rows that come from now on")
                return
            try:
                self._analysis.restore(snapshot)
            except ValueError as error:
                raise UnusableCheckpointError(str(error)) from error
        except UnusableCheckpointError as error:
            await self._give_up(error)
            return
        self._saved = snapshot.next_sequence, snapshot.verdicts_until
        _log.info("going on at sequence %d, metadata lacks %d findings", snapshot.next_sequence, len(snapshot.waiting))

    async def _give_up(self, why: UnusableCheckpointError) -> None:
        try:
            aside: object = await asyncio.to_thread(self._file.set_aside)
        except OSError as error:
            aside = f"nowhere ({error.strerror})"
        _log.error(
            "the checkpoint %s cannot be used: %s. It is moved to %s; learning begins with the rows that come from now",
            self._file.path,
            why,
            aside,
        )

    async def run(self) -> None:
        """Saves as soon as there is a place in the tail, then at every interval, until cancelled.

        Raises:
            OSError: a checkpoint could not be written; call again.
        """
        await self._analysis.has_place.wait()
        while True:
            await self.save()
            await self._clock.sleep(self._interval_s)

    async def save(self) -> None:
        """Saves the state as it is now, if it is not on disk yet."""
        if (self._analysis.next_sequence, self._analysis.verdicts_until) == self._saved:
            return
        snapshot = await self._analysis.snapshot()
        try:
            await asyncio.to_thread(self._file.save, snapshot)
        except OSError:
            _failures.add(1)
            raise
        self._saved = snapshot.next_sequence, snapshot.verdicts_until

    async def save_last(self) -> None:
        """Saves at the end, when nobody can try again: a failure is told and costs the rows since the last one,
        which the next start reads again."""
        try:
            await self.save()
        except OSError as error:
            _log.error("the last checkpoint could not be written: %s", error)
