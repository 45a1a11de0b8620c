"""Looks in PostgreSQL for ids that callers chose: whoever asks while a question is on its way shares the next one.

A question for each recording would cost more than the recording; so, as with the sync of the journal, those who come at
once are answered at once. What must stay true: an answer is of a question that was put after its caller came.
"""

import asyncio
from typing import Final
from uuid import UUID

from runtime import tasks
from runtime.errors import OpenManagerError, Unavailable
from services.metadata.interactions_postgres import PostgresInteractions
from services.metadata.store import Interaction

MAX_ASKED: Final = 500


class Known:
    """What PostgreSQL has under ids."""

    def __init__(self, postgres: PostgresInteractions, within_s: float) -> None:
        self._postgres = postgres
        self._within_s = within_s
        self._waiting: list[tuple[UUID, asyncio.Future[Interaction | None]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def find(self, interaction_id: UUID) -> Interaction | None:
        """None: nothing; Unavailable: it does not answer within the bound."""
        answer: asyncio.Future[Interaction | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((interaction_id, answer))
        if self._asking is None or self._asking.done():
            self._asking = tasks.start("known-interactions", self._ask())
        return await answer

    async def _ask(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting[:MAX_ASKED], self._waiting[MAX_ASKED:]
            error: OpenManagerError = Unavailable("the service is stopping", reason="CLOSING")
            found: dict[str, Interaction] | None = None
            try:
                found = await self._postgres.get_all([one for one, _ in asked], within_s=self._within_s)
            except OpenManagerError as failure:
                error = failure
            finally:
                for one, answer in asked:
                    if answer.done():  # the caller went away
                        continue
                    if found is None:
                        answer.set_exception(error)
                    else:
                        answer.set_result(found.get(str(one)))
