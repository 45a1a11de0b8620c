"""What verifying finds, and how much of it is told."""

from typing import Final, NamedTuple

ALTERED: Final = "ALTERED"
REMOVED: Final = "REMOVED"
INSERTED: Final = "INSERTED"
REORDERED: Final = "REORDERED"
RECOMPUTED: Final = "RECOMPUTED"
PARTITION_REMOVED: Final = "PARTITION_REMOVED"
CHECKPOINT_REMOVED: Final = "CHECKPOINT_REMOVED"
CHECKPOINT_ALTERED: Final = "CHECKPOINT_ALTERED"
MAX_TOLD: Final = 1_000


class Finding(NamedTuple):
    """What somebody did to the log: `kind` is one of the above."""

    kind: str
    message: str
    writer_id: str = ""
    first_seq: int = 0
    last_seq: int = 0
    event_id: str = ""


class Findings:
    """All of them, the first MAX_TOLD in full."""

    def __init__(self) -> None:
        self.told: list[Finding] = []
        self.total = 0

    def add(self, finding: Finding) -> None:
        """One more."""
        self.total += 1
        if len(self.told) < MAX_TOLD:
            self.told.append(finding)
