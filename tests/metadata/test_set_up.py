"""Making the first administrator, which anybody may ask for."""

import asyncio

import pytest

from runtime.errors import Unauthenticated
from services.metadata.access import secrets
from services.metadata.access.store import AccessStore
from services.metadata.store_connection import Database

PASSWORD = "correct horse battery"


async def test_a_stranger_who_sets_up_has_no_password_hashed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hashed = AccessStore(database), []
    hash_of = secrets.hashed

    async def noted(password: str) -> str:
        hashed.append(password)
        return await hash_of(password)

    monkeypatch.setattr(secrets, "hashed", noted)
    setup_token = await store.new_setup_token()
    for shown in ("", "om-setup_" + "x" * 43):
        with pytest.raises(Unauthenticated, match="set-up token"):
            await store.set_up(shown, "Ada", PASSWORD)
    assert not hashed
    both = await asyncio.gather(
        *(store.set_up(setup_token, name, PASSWORD) for name in ("Ada", "Grace")), return_exceptions=True
    )
    assert [getattr(one, "reason", "") for one in both if isinstance(one, Exception)] == ["SETUP_TOKEN_INVALID"]
    hashed.clear()
    with pytest.raises(Unauthenticated, match="set-up token"):
        await store.set_up(setup_token, "Eve", PASSWORD)
    assert not hashed
