"""Signed checkpoints: the ends of all chains at one moment, by a key that the database does not have.

What must stay true: the key and the file of checkpoints are readable by nobody else; a checkpoint is on our disk before
it is given to the database; each names the hash of the one before, so that none goes missing unseen.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fleet.audit.event import Link
from runtime.errors import DataLoss
from runtime.sqlite import sync_folder

KEY_FILE: Final = "audit-key"
CHECKPOINTS_FILE: Final = "audit-checkpoints.jsonl"
VERSION: Final = 1
NOTHING: Final = "0" * 64
"""The hash before the first checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Events of one chain that went by age: numbers, the hash before the first, the hash of the last, their month."""

    month: str
    writer_id: str
    first_seq: int
    last_seq: int
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was signed."""

    number: int
    body: str
    signature: bytes

    @property
    def hash(self) -> str:
        """By which the next one names it."""
        return hashlib.sha256(self.body.encode() + self.signature).hexdigest()

    def said(self) -> "Said":
        """What its body says; raises ValueError where that is none."""
        try:
            said = orjson.loads(self.body)
            return Said(
                number=int(said["number"]),
                time_us=int(said["time_us"]),
                previous=str(said["previous"]),
                chains={str(writer): Link(int(seq), bytes.fromhex(text)) for writer, seq, text in said["chains"]},
                months=tuple(said["months"]),
                dropped=tuple(Dropped(**one) for one in said["dropped"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no checkpoint: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The content of a checkpoint.

    Attributes:
        number: from 1 on.
        time_us: when it was made.
        previous: hash of the one before.
        chains: writer -> the end of its chain.
        months: "YYYY-MM" that have events.
        dropped: what goes by age with this one; empty: it is one of every minute.
    """

    number: int
    time_us: int
    previous: str
    chains: Mapping[str, Link]
    months: tuple[str, ...] = ()
    dropped: tuple[Dropped, ...] = ()

    def text(self) -> str:
        """The body."""
        body: dict[str, Any] = {
            "version": VERSION,
            "number": self.number,
            "time_us": self.time_us,
            "previous": self.previous,
            "chains": [[writer, end.seq, end.hash.hex()] for writer, end in sorted(self.chains.items())],
            "months": sorted(self.months),
            "dropped": list(self.dropped),
        }
        return orjson.dumps(body).decode()


class Signer:
    """The key."""

    def __init__(self, folder: Path) -> None:
        """Reads DATA_DIR/metadata/audit-key, or makes it.

        Raises:
            DataLoss: it is no key.
            OSError: the disk failed.
        """
        path = folder / KEY_FILE
        if not path.exists():
            _write_once(path, os.urandom(32).hex().encode() + b"\n")
        try:
            self._key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text("ascii").strip()))
        except ValueError as error:
            raise DataLoss(
                f"{path} is no key: put it back from a backup; without it old checkpoints prove nothing"
            ) from error

    @property
    def public_key(self) -> str:
        """64 hexadecimal digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, said: Said) -> Checkpoint:
        """Makes it a checkpoint."""
        body = said.text()
        return Checkpoint(number=said.number, body=body, signature=self._key.sign(body.encode()))


def is_signed(checkpoint: Checkpoint, public_key: str) -> bool:
    """Whether the signature is right."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(
            checkpoint.signature, checkpoint.body.encode()
        )
    except InvalidSignature:
        return False
    return True


def _write_once(path: Path, content: bytes) -> None:
    """A file of mode 0600 that is whole, or not there."""
    draft = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    sync_folder(path.parent)


class CheckpointFile:
    """DATA_DIR/metadata/audit-checkpoints.jsonl: a line for each."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINTS_FILE

    def append(self, checkpoint: Checkpoint) -> None:
        """Adds one durably; a line that a loss of power has cut is ended first."""
        line = orjson.dumps(
            {"number": checkpoint.number, "body": checkpoint.body, "signature": checkpoint.signature.hex()}
        )
        is_new = not self.path.exists()
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self.path.parent)

    def read(self) -> list[Checkpoint]:
        """All that are whole, as they lie there."""
        if not self.path.exists():
            return []
        found = []
        with self.path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    said = orjson.loads(line)
                    found.append(
                        Checkpoint(
                            number=int(said["number"]),
                            body=str(said["body"]),
                            signature=bytes.fromhex(said["signature"]),
                        )
                    )
        return found


def last_of(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one with the highest number, the later one where a failing disk was given it twice."""
    return max(reversed(checkpoints), key=lambda one: one.number, default=None)
