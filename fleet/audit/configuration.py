"""A process that starts with other settings than the last time leaves an event: what they were, and what they are.

What must stay true: no secret is in it, not even a digest of one; a process starts all the same when its disk is full.
"""

import logging
from typing import Final

import orjson
from pydantic import SecretBytes, SecretStr

from fleet.audit.event import draft
from fleet.audit.log import AuditLog
from runtime.clock import Clock
from runtime.errors import OpenManagerError
from runtime.redaction import redact
from runtime.settings import CommonSettings

KEY: Final = "configuration"
HIDDEN: Final = "(set)"

log = logging.getLogger(__name__)


def shown(settings: CommonSettings) -> dict[str, str]:
    """Variable -> value of what is set, or has a default."""
    found = {}
    for name, variable in settings.env_names().items():
        value = getattr(settings, name)
        if value is not None:
            found[variable] = HIDDEN if isinstance(value, SecretStr | SecretBytes) else redact(str(value))
    return found


async def record_configuration(journal: AuditLog, name: str, settings: CommonSettings, clock: Clock) -> None:
    """Writes an event when the settings of the process `name` are others than at its last start, or it has none yet."""
    try:
        now = orjson.dumps(shown(settings), option=orjson.OPT_SORT_KEYS).decode()
        before = await journal.noted(KEY)
        if before == now:
            return
        said = draft(
            time_us=clock.now_ms() * 1_000,
            actor=name,
            action=f"openmanager.{name}.Configure",
            target=name,
            before=orjson.loads(before) if before else None,
            after=orjson.loads(now),
        )
        await journal.append(said)
        await journal.note(KEY, now)
    except OpenManagerError as error:
        log.warning("the settings are not recorded in the audit log: %s", error.message)
