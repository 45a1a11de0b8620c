"""The first administrator: a set-up token in a file that only this account can read, for as long as there is no user.

What must stay true: there is no default password; the token works once, and no more once there is a user; it is in no
log. Each start makes another one, which ends the one before.
"""

import asyncio
import logging
from pathlib import Path
from typing import Final

from runtime.folder import write_private
from services.metadata.access.store import AccessStore

FILE_NAME: Final = "setup-token"

log = logging.getLogger(__name__)


async def offer_setup(folder: Path, store: AccessStore) -> None:
    """Writes the file, once PostgreSQL answers, or takes it away where there is a user. Never ends.

    Raises:
        Unavailable: it does not answer.
    """
    path = folder / FILE_NAME
    secret = await store.new_setup_token()
    if secret:
        await asyncio.to_thread(write_private, path, secret.encode() + b"\n")
        log.info("there is no user yet; the first administrator needs the token in %s", path)
    else:
        await asyncio.to_thread(withdraw_setup, folder)
    await asyncio.Event().wait()


def withdraw_setup(folder: Path) -> None:
    """Takes the file away."""
    (folder / FILE_NAME).unlink(missing_ok=True)
