"""How far a back-fill is, in a small file that survives whatever ends it.

What must stay true: what the file says is copied was acknowledged by the target before it was written; what was
acknowledged since is copied again, which changes nothing.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Self

from runtime.sqlite import sync_folder

STATE_NAME: Final = "state.json"


@dataclass(slots=True, kw_only=True)
class State:
    """One back-fill, of the range `[start_ms, end_ms)`, which stays as it was when it began.

    Attributes:
        target: where to, in words that differ for different places.
        options: what was asked for, as it was typed: the same words go on with it.
        day: the UTC day that is being copied, counted from the epoch; None: none yet.
        server: the last server of it that is copied.
        after: rows of copied days that came with this sequence or a later one are yet to be looked for.
        points: that the target has taken.
        again: of those, rows that were written while the back-fill ran, for what it had copied.
        likely: of those, points whose tags are only likely ones.
        unseen: batches that left the journal before they were looked at.
        refused: points that the target refuses for good, by reason.
        short: [day, server, points here, points there] where the target has fewer.
        left_out: partitions that cannot be read or are gone.
        damaged: some blocks of others cannot be read.
        is_done: all of it is copied.
    """

    target: str
    options: str
    start_ms: int
    end_ms: int
    day: int | None = None
    server: str = ""
    after: int = 0
    points: int = 0
    again: int = 0
    likely: int = 0
    unseen: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    short: list[tuple[str, str, int, int]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    damaged: bool = False
    is_done: bool = False

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The state in a folder; None: there is none, or of another version's shape, which is of no use."""
        try:
            return cls(**json.loads((folder / STATE_NAME).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def save(self, folder: Path) -> None:
        """Replaces the file, durably."""
        draft = folder / f"{STATE_NAME}.draft"
        with draft.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / STATE_NAME)
        sync_folder(folder)

    def goes_on(self, target: str, options: str) -> bool:
        """Whether it is the unfinished one of the same words."""
        return not self.is_done and (self.target, self.options) == (target, options)
