"""Calls to other processes: deadlines that shrink from hop to hop, retries only where they are safe."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from runtime import deadline, errors
from runtime.channel import RETRY_ATTEMPTS, Channel, calling, service_config
from tests.harness import eventually, free_port
from tests.runtime.conftest import Serving, serving
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoStub


def unavailable(request: Any, context: Any) -> Any:
    raise errors.Unavailable("not now")


async def test_only_idempotent_methods_are_retried() -> None:
    async with serving(EchoServicer(unavailable)) as running, running.channel() as channel:
        for method, calls in (("Get", RETRY_ATTEMPTS), ("Create", 1)):
            running.servicer.calls = 0
            with pytest.raises(errors.Unavailable, match="not now"):
                async with calling("echo"):
                    await getattr(EchoStub(channel.grpc), method)(Echo())
            assert running.servicer.calls == calls, method


async def test_only_unavailable_is_retried() -> None:
    def aborted(request: Any, context: Any) -> Any:
        raise errors.Aborted("lost a race")

    async with serving(EchoServicer(aborted)) as running, running.channel() as channel:
        with pytest.raises(errors.Aborted):
            async with calling("echo"):
                await EchoStub(channel.grpc).Get(Echo())
        assert running.servicer.calls == 1


def test_the_policy_names_the_methods_that_say_they_are_safe() -> None:
    (policy,) = service_config(SERVICE)["methodConfig"]
    assert policy["name"] == [{"service": SERVICE, "method": "Get"}]
    assert service_config("openmanager.nobody.v1.Nobody") == {}


async def test_a_call_without_deadline_gets_the_default() -> None:
    def left(request: Any, context: Any) -> Any:
        return Echo(size=int(context.time_remaining() * 1_000))

    async with serving(EchoServicer(left)) as running:
        async with running.channel() as channel:
            assert 2_000 < (await EchoStub(channel.grpc).Get(Echo())).size <= 10_100
            assert 22_000 < (await EchoStub(channel.grpc).Get(Echo(), timeout=30)).size <= 30_100
        async with running.channel(default_deadline_s=50.0) as channel:
            assert 42_000 < (await EchoStub(channel.grpc).Get(Echo())).size <= 50_100


@contextlib.asynccontextmanager
async def two_hops(after: asyncio.Event | None = None) -> AsyncIterator[tuple[Serving, "list[asyncio.Task[Any]]"]]:
    """front.Get calls back.Get and answers the time the back had; with `after`, a task of front's does, later."""
    background: list[asyncio.Task[Any]] = []

    def left(request: Any, context: Any) -> Any:
        return Echo(size=int(context.time_remaining() * 1_000))

    async with serving(EchoServicer(left)) as back, back.channel() as onward:

        async def ask(request: Any, context: Any) -> Any:
            return await EchoStub(onward.grpc).Get(request)

        async def leave_behind(request: Any, context: Any) -> Any:
            async def later() -> Any:
                assert after is not None
                await after.wait()
                return await ask(request, context)

            background.append(asyncio.create_task(later()))
            return request

        async with serving(EchoServicer(ask if after is None else leave_behind)) as front:
            yield front, background


async def test_a_hop_gets_what_its_caller_has_left_less_a_margin() -> None:
    async with two_hops() as (front, _), front.channel() as channel:
        answer = await EchoStub(channel.grpc).Get(Echo(), timeout=9)
        assert 1_000 < answer.size < 9_000 - deadline.DEADLINE_MARGIN_S * 1_000 + 20


async def test_a_task_that_outlives_the_call_does_not_keep_its_deadline() -> None:
    answered = asyncio.Event()
    async with two_hops(answered) as (front, background), front.channel() as channel:
        await EchoStub(channel.grpc).Get(Echo(), timeout=4)
        answered.set()
        assert (await background[0]).size > 5_000


async def test_calling_beyond_the_callers_deadline_fails_at_once() -> None:
    async with serving() as running, running.channel() as channel:
        token = deadline.current.set(deadline.CallDeadline(time.monotonic() - 1))
        try:
            with pytest.raises(errors.DeadlineExceeded, match="no time is left"):
                async with calling("echo"):
                    await EchoStub(channel.grpc).Get(Echo())
        finally:
            deadline.current.reset(token)
        assert running.servicer.calls == 0


async def test_a_dead_peer_is_unavailable_by_name_and_found_again_soon() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with Channel(address) as channel:
        stub = EchoStub(channel.grpc)
        with pytest.raises(errors.Unavailable, match="echo is not reachable") as caught:
            async with calling("echo"):
                await stub.Create(Echo())
        assert caught.value.reason == "PEER_UNAVAILABLE"
        for _ in range(2):  # and again after a restart of the peer
            async with serving(address=address):

                async def answers() -> bool:
                    with contextlib.suppress(errors.Unavailable):
                        async with calling("echo"):
                            return bool((await stub.Create(Echo(text="x"))).text)
                    return False

                assert await eventually(answers)


async def test_cancelling_a_call_stays_a_cancellation() -> None:
    async with serving() as running, running.channel() as channel:

        async def watch() -> None:
            async with calling("echo"):
                _ = [answer async for answer in EchoStub(channel.grpc).Watch(Echo())]

        task = asyncio.create_task(watch())
        await eventually(lambda: running.servicer.watching == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: running.servicer.watching == 0)
