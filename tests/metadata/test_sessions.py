"""People who log in: who comes in, who does not and what he is told, and how often anybody may try."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fleet.access import ADMIN, OPERATOR, VIEWER
from runtime.clock import ManualClock
from runtime.errors import (
    InvalidArgument,
    NotFound,
    OpenManagerError,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from services.metadata.access import attempts, secrets
from services.metadata.access import sessions as module
from services.metadata.access.attempts import OF_ACCOUNT, OF_ADDRESS, Attempts
from services.metadata.access.model import MAX_PASSWORD_BYTES, Scope, Token, User
from services.metadata.access.sessions import MAX_SESSIONS, Identity, Sessions
from services.metadata.access.store import AccessStore, changing
from services.metadata.store_connection import Database
from tests.harness import eventually

PASSWORD, HOME = "correct horse battery", "192.0.2.1"
ISSUER = "https://id.example"


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argon2id with the least work: what takes how long is tried by a test of its own."""
    hasher = secrets.argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(secrets, "_hasher", hasher)
    monkeypatch.setattr(secrets, "_NOBODYS", hasher.hash("nobody's"))


def sessions_on(database: Database, *, lifetime_s: float = 3_600.0) -> Sessions:
    return Sessions(database, ManualClock(), lifetime_s=lifetime_s)


async def with_users(database: Database) -> AccessStore:
    store = AccessStore(database)
    await store.create_user(User(name="Ada", role=ADMIN), PASSWORD)
    await store.create_user(User(name="Grace", role=VIEWER, scope=Scope(server_ids=("web-01",))), PASSWORD)
    await store.create_user(User(name="Gone", role=VIEWER, disabled=True), PASSWORD)
    await store.create_user(User(name="Passwordless", role=OPERATOR), "")
    return store


async def refusal(sessions: Sessions, name: str, password: str, address: str = HOME) -> tuple[str, str]:
    with pytest.raises(OpenManagerError) as refused:
        await sessions.by_password(name, password, address)
    return refused.value.reason, refused.value.message


async def test_who_knows_the_password_has_a_session_of_his_own_rights(database: Database) -> None:
    store, sessions = await with_users(database), sessions_on(database)
    before = datetime.now(UTC)
    secret, credential = await sessions.by_password("gRACE", PASSWORD, HOME)
    assert (credential.name, credential.role, credential.scope) == ("Grace", VIEWER, Scope(server_ids=("web-01",)))
    assert credential.is_session and credential.hash == secrets.digest(secret) and secret not in str(credential)
    assert credential.expire_time is not None
    assert timedelta(minutes=59) < credential.expire_time - before < timedelta(minutes=61)
    assert credential in (await store.known()).credentials
    assert (await store.list_tokens(10, "", show_ended=True)).total_size == 0  # it is no token
    await store.update_user(User(name="Grace", role=OPERATOR), ["role"])
    assert [one.role for one in (await store.known()).credentials] == [OPERATOR]
    assert await sessions.end(credential.hash) == "Grace" and await sessions.end(credential.hash) == ""
    assert not (await store.known()).credentials


async def test_a_name_that_postgresql_cannot_hold_is_a_fault_of_the_callers_that_names_the_field(
    database: Database,
) -> None:
    store, name = await with_users(database), "Ada\0"
    for call, field in (
        (store.update_user(User(name=name, role=VIEWER), ["role"]), "user.name"),
        (store.delete_user(name), "name"),
        (store.set_password(name, PASSWORD), "name"),
        (store.create_token(Token(name="t", role=VIEWER, user=name)), "token.user"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await call
        assert refused.value.field == field


async def test_whatever_is_wrong_the_answer_is_one(database: Database) -> None:
    store = await with_users(database)
    sessions = sessions_on(database)
    tries = [
        ("Ada", "not the password"), ("Ada", ""), ("Ada", PASSWORD + "x" * 2_000), ("Nobody", PASSWORD),
        ("Gone", PASSWORD), ("Passwordless", ""), ("Passwordless", PASSWORD), ("", ""), ("A" * 300, PASSWORD),
        ("A\0da", PASSWORD), ("Ada'; --", PASSWORD), ("%", PASSWORD),
    ]  # fmt: skip
    told = {await refusal(sessions, *each) for each in tries}
    assert told == {("LOGIN_FAILED", "the name or the password is not right")}
    await sessions.by_password("Ada", PASSWORD, HOME)
    longest = "\N{EURO SIGN}" * (MAX_PASSWORD_BYTES // 3) + "x" * (MAX_PASSWORD_BYTES % 3)
    await store.set_password("Ada", longest)
    await sessions.by_password("Ada", longest, HOME)
    assert (await refusal(sessions, "Ada", longest + "x"))[0] == "LOGIN_FAILED"


async def test_each_try_compares_a_password_whoever_it_is_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_users(database)
    compared: list[str] = []
    real = secrets._hasher.verify

    class Watched:
        def verify(self, kept: str, typed: str) -> bool:
            compared.append(kept)
            return real(kept, typed)

    monkeypatch.setattr(secrets, "_hasher", Watched())
    for name in ("Ada", "Nobody", "Gone", "Passwordless"):
        await refusal(sessions_on(database), name, "wrong")
    assert len(compared) == 4


async def test_what_ends_sessions(database: Database) -> None:
    store, sessions = await with_users(database), sessions_on(database)

    async def alive() -> int:
        return len((await store.known()).credentials)

    for change in (
        lambda: store.set_password("Grace", "another password"),
        lambda: store.update_user(User(name="Grace", role=VIEWER, disabled=True), ["disabled"]),
        lambda: store.delete_user("Grace"),
    ):
        await store.update_user(User(name="Grace", role=VIEWER), ["disabled"])
        await store.set_password("Grace", PASSWORD)
        await sessions.by_password("Grace", PASSWORD, HOME)
        assert await alive() == 1
        await change()
        assert await alive() == 0
    for _ in range(MAX_SESSIONS + 3):
        newest, _ = await sessions.by_password("Ada", PASSWORD, HOME)
    hashes = {one.hash for one in (await store.known()).credentials}
    assert len(hashes) == MAX_SESSIONS and secrets.digest(newest) in hashes
    async with database.connection() as connection:
        await connection.execute("UPDATE access_tokens SET expires_at = now() WHERE is_session")
        assert await alive() == 0
        await sessions.by_password("Ada", PASSWORD, HOME)
        assert await connection.fetchval("SELECT count(*) FROM access_tokens WHERE is_session") == 1


async def test_a_password_that_is_changed_while_it_is_compared_opens_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sessions = await with_users(database), sessions_on(database)
    real = secrets.matches

    async def changed_meanwhile(kept: str | None, typed: str) -> bool:
        found = await real(kept, typed)
        await store.set_password("Ada", "another password")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(secrets, "matches", changed_meanwhile)
        assert (await refusal(sessions, "Ada", PASSWORD))[0] == "LOGIN_FAILED"
    assert not (await store.known()).credentials
    async with database.connection() as connection, connection.transaction():  # as set_password, which is not over yet
        await connection.execute("UPDATE access_users SET password_hash = 'another' WHERE name = 'Ada'")
        await connection.execute("DELETE FROM access_tokens WHERE is_session")
        late = asyncio.create_task(refusal(sessions, "Ada", "another password"))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"

        async def is_over_or_waits() -> bool:
            return late.done() or await connection.fetchval(waits) > 0

        await eventually(is_over_or_waits)
    assert (await late)[0] == "LOGIN_FAILED"
    assert not (await store.known()).credentials


async def test_an_account_has_its_tries_however_its_name_is_spelt(database: Database) -> None:
    store, sessions = AccessStore(database), sessions_on(database)
    await store.create_user(User(name="admin", role=ADMIN), PASSWORD)
    spelt = ["admin", "ADMIN", "ADM\u0130N"]  # all of them are "admin" to PostgreSQL; Python's lower() tells two apart
    tries = [(await refusal(sessions, spelt[n % 3], "guess", f"192.0.2.{n}"))[0] for n in range(OF_ACCOUNT + 3)]
    assert tries == ["LOGIN_FAILED"] * OF_ACCOUNT + ["LOGIN_RATE_LIMITED"] * 3


async def test_guessing_comes_to_an_end_for_an_account_and_for_an_address(database: Database) -> None:
    await with_users(database)
    clock = ManualClock()
    sessions = Sessions(database, clock, lifetime_s=60.0)
    at_once = await asyncio.gather(*(refusal(sessions, "Ada", f"guess {n}", f"192.0.2.{n}") for n in range(40)))
    assert [reason for reason, _ in at_once].count("LOGIN_FAILED") == OF_ACCOUNT
    assert (await refusal(sessions, "ADA", PASSWORD, "198.51.100.1"))[0] == "LOGIN_RATE_LIMITED"
    clock.advance(attempts.ACCOUNT_REFILL_S)
    await sessions.by_password("Ada", PASSWORD, "198.51.100.1")
    names = [(await refusal(sessions, f"user {n}", "guess", "203.0.113.9"))[0] for n in range(OF_ADDRESS + 5)]
    assert names == ["LOGIN_FAILED"] * OF_ADDRESS + ["LOGIN_RATE_LIMITED"] * 5
    assert (await refusal(sessions, "Ada", PASSWORD, "203.0.113.9"))[0] == "LOGIN_RATE_LIMITED"
    await sessions.by_password("Ada", PASSWORD, "203.0.113.10")


def test_the_bounds_of_guessing() -> None:
    clock = ManualClock()
    counted = Attempts(clock)
    for n in range(OF_ADDRESS):  # one /64 is one address, and so is an IPv4 in IPv6's clothes
        counted.spend(f"user {n}", f"2001:db8::{n:x}")
    for address in ("2001:db8::ffff", "2001:db8:0:0:1::1"):
        with pytest.raises(ResourceExhausted) as refused:
            counted.spend("another", address)
        assert refused.value.retry_after_s == pytest.approx(attempts.ADDRESS_REFILL_S)
    counted.spend("another", "2001:db8:0:1::1")
    for _ in range(OF_ACCOUNT - 1):
        counted.spend("another", "192.0.2.1")
    with pytest.raises(ResourceExhausted):
        counted.spend("another", "192.0.2.2")
    counted.give_back("another", "192.0.2.1")
    counted.spend("another", "::ffff:192.0.2.1")
    with pytest.raises(ResourceExhausted):  # one try came back, and no more
        counted.spend("another", "192.0.2.1")
    counted.right("another", "192.0.2.1")
    for _ in range(OF_ACCOUNT):
        counted.spend("another", "192.0.2.1")


def test_right_passwords_cost_an_address_nothing() -> None:
    counted = Attempts(ManualClock())
    for n in range(2 * OF_ADDRESS):
        counted.spend(f"user {n}", HOME)
        counted.right(f"user {n}", HOME)
    for n in range(OF_ADDRESS):
        counted.spend(f"user {n}", HOME)
    counted.right("user 0", HOME)
    counted.spend("user 0", HOME)
    with pytest.raises(ResourceExhausted):  # a right one gives one try back, and no more
        counted.spend("user 0", HOME)


def test_who_tries_again_and_again_does_not_keep_those_after_him_remembered() -> None:
    clock = ManualClock()
    counted = Attempts(clock)
    counted.spend("first", "192.0.2.1")
    counted.spend("second", "192.0.2.2")
    clock.advance(OF_ACCOUNT * attempts.ACCOUNT_REFILL_S - 1)
    counted.spend("first", "192.0.2.1")
    clock.advance(1)
    counted.spend("third", "192.0.2.3")
    assert len(counted._left) == 4


def test_filling_the_memory_of_tries_buys_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "MAX_KEPT", 20)
    clock = ManualClock()
    counted = Attempts(clock)
    for _ in range(OF_ACCOUNT):
        counted.spend("Ada", "192.0.2.1")
    for n in range(50):
        with pytest.raises(ResourceExhausted) if n >= 9 else contextlib.nullcontext():
            counted.spend(f"user {n}", f"198.51.100.{n}")
    assert len(counted._left) <= 20
    with pytest.raises(ResourceExhausted):
        counted.spend("Ada", "192.0.2.1")
    clock.advance(OF_ACCOUNT * attempts.ACCOUNT_REFILL_S)
    counted.spend("new", "203.0.113.1")
    assert len(counted._left) == 2


def test_who_has_no_tries_left_cannot_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "MAX_KEPT", OF_ADDRESS + 3)
    counted = Attempts(ManualClock())
    for n in range(OF_ADDRESS):
        counted.spend(f"user {n}", HOME)
    for n in range(100):
        with pytest.raises(ResourceExhausted):
            counted.spend(f"another {n}", HOME)
    counted.spend("Ada", "203.0.113.1")  # there is room for her
    counted = Attempts(ManualClock())
    for n in range(100):
        counted.spend(f"user {n}", f"192.0.2.{n}")
        counted.give_back(f"user {n}", f"192.0.2.{n}")


async def test_an_outage_costs_nobody_a_try(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await with_users(database)
    sessions = sessions_on(database)

    def away() -> Any:
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(database, "connection", away)
        for _ in range(OF_ADDRESS + 1):
            assert (await refusal(sessions, "Ada", PASSWORD))[0] == "UNAVAILABLE"
    with monkeypatch.context() as patched:
        patched.setattr(module, "MAX_WAITING", 0)
        for _ in range(OF_ADDRESS + 1):
            assert (await refusal(sessions, "Ada", PASSWORD))[0] == "LOGIN_BUSY"
    await sessions.by_password("Ada", PASSWORD, HOME)


async def test_whom_a_provider_has_seen_is_bound_to_what_he_is_there(database: Database) -> None:
    store, sessions = await with_users(database), sessions_on(database)

    async def name_of(subject: str, name: str, role: int = 0, issuer: str = ISSUER) -> tuple[str, int]:
        identity = Identity(issuer=issuer, subject=subject, name=name, role=role)
        _, credential = await sessions.by_identity(identity)
        return credential.name, credential.role

    async def is_refused(*words: Any, **more: Any) -> bool:
        with pytest.raises(PermissionDenied) as refused:
            await name_of(*words, **more)
        return refused.value.reason == "IDENTITY_UNKNOWN"

    assert await name_of("1", "passwordless") == ("Passwordless", OPERATOR)
    assert await name_of("1", "Renamed There") == ("Passwordless", OPERATOR)
    assert await is_refused("2", "Passwordless")  # it is somebody's already
    assert await is_refused("1", "Passwordless", issuer="https://other.example")
    assert await is_refused("3", "Ada") and await is_refused("3", "Ada", ADMIN)  # has a password: nobody takes her over
    assert await is_refused("4", "Stranger")
    assert await name_of("4", "Stranger", VIEWER) == ("Stranger", VIEWER)
    assert await name_of("4", "Stranger", OPERATOR) == ("Stranger", OPERATOR)  # the provider says so now
    assert await name_of("4", "Stranger") == ("Stranger", OPERATOR)
    await store.update_user(User(name="Stranger", role=OPERATOR, disabled=True), ["disabled"])
    with pytest.raises(OpenManagerError) as refused:
        await name_of("4", "Stranger", ADMIN)
    assert refused.value.reason == "LOGIN_FAILED"
    for wrong, field in (
        ({"name": ""}, "identity.name"), ({"name": "a/b"}, "identity.name"), ({"subject": "\0"}, "identity.subject"),
        ({"issuer": "x" * 2_000}, "identity.issuer"), ({"role": 17}, "identity.role"),
    ):  # fmt: skip
        given: dict[str, Any] = {"issuer": ISSUER, "subject": "9", "name": "Nine", "role": VIEWER} | wrong
        with pytest.raises(InvalidArgument) as caught:
            await sessions.by_identity(Identity(**given))
        assert caught.value.field == field


async def test_the_last_administrator_stays_one_whatever_the_provider_says(database: Database) -> None:
    store, sessions = AccessStore(database), sessions_on(database)

    async def role_after(subject: str, role: int) -> int:
        identity = Identity(issuer=ISSUER, subject=subject, name=f"user {subject}", role=role)
        return (await sessions.by_identity(identity))[1].role

    assert await role_after("1", ADMIN) == ADMIN
    assert await role_after("1", VIEWER) == ADMIN
    assert await role_after("2", ADMIN) == ADMIN
    assert await role_after("1", VIEWER) == VIEWER  # there is another one
    assert await role_after("2", OPERATOR) == ADMIN
    await store.create_user(User(name="Gone", role=ADMIN, disabled=True), "")
    assert await role_after("2", OPERATOR) == ADMIN


async def test_two_first_log_ins_at_once_are_one_user(database: Database) -> None:
    store, sessions = await with_users(database), sessions_on(database)
    for subject, name, role in (("1", "Passwordless", 0), ("2", "Stranger", VIEWER)):
        identity = Identity(issuer=ISSUER, subject=subject, name=name, role=role)
        opened = await asyncio.gather(*(sessions.by_identity(identity) for _ in range(4)))
        assert {credential.name for _, credential in opened} == {name}
    assert (await store.list_users(10, "")).total_size == 5


async def test_changes_at_once_do_not_wait_for_each_other_in_a_circle(database: Database) -> None:
    store, sessions = await with_users(database), sessions_on(database)
    for n in range(20):
        _, opened = await sessions.by_password("Grace", PASSWORD, HOME)
        token, _ = await store.create_token(Token(name="a token", role=VIEWER, user="Grace"))
        await asyncio.gather(
            store.set_password("Grace", PASSWORD),
            store.update_user(User(name="Grace", role=VIEWER, disabled=bool(n % 2)), ["disabled"]),
            store.revoke_token(token.id),
            sessions.end(opened.hash),
        )
        await store.update_user(User(name="Grace", role=VIEWER), ["disabled"])


async def test_a_token_for_a_user_who_is_being_deleted_does_not_wait_in_a_circle(database: Database) -> None:
    store = await with_users(database)

    async def waits() -> bool:
        async with database.connection() as other:
            waiting = "datname = current_database() AND wait_event_type = 'Lock'"
            return bool(await other.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}"))

    async with changing(database) as connection:
        making = asyncio.create_task(store.create_token(Token(name="a", role=VIEWER, user="Grace")))
        await eventually(waits)
        await connection.execute("DELETE FROM access_users WHERE name = 'Grace'")
    with pytest.raises(NotFound):
        await making
