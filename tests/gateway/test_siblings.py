"""One page of metrics of several workers; tests/system/test_worker_metrics.py has it of real ones."""

import asyncio
import secrets
import socket
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway import siblings
from gateway.siblings import UP, Siblings, labelled, merged
from tests.harness import eventually

AWKWARD = 'a "quoted" { } \\ and\nanother line'


def page(value: float, *, only: bool = False) -> bytes:
    """What a worker has: every kind of metric, and labels that are hard to read."""
    registry = CollectorRegistry()
    Gauge("plain", "No labels.", registry=registry).set(value)
    Counter("calls", f"Help with {AWKWARD}", ["method"], registry=registry).labels(AWKWARD).inc(value)
    Histogram("took_seconds", "A histogram.", ["method"], registry=registry).labels("get").observe(value)
    if only:
        Gauge("only_here", "Not at the others.", registry=registry).set(1)
    return generate_latest(registry)


def read(text: bytes) -> dict[str, Any]:
    """Series -> value, as Prometheus's own parser has them; each family may come once only."""
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families)
    samples = [sample for family in families for sample in family.samples]
    series = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
    assert len(series) == len(samples), "no series twice"
    return series


def test_the_whole_page_is_that_of_each_with_its_number() -> None:
    pages = {1: page(1), 2: page(2, only=True), 7: page(3)}
    expected = {
        (name, *sorted((*labels, ("worker", str(number))))): value
        for number, one in pages.items()
        for (name, *labels), value in read(one).items()
    }
    expected |= {(UP, ("worker", str(number))): float(number in pages) for number in range(1, 9)}
    assert read(merged(pages, range(1, 9))) == expected


def test_a_line_is_labelled_whatever_is_in_its_other_labels() -> None:
    assert labelled('a{b="{ }"} 1.0', 3) == 'a{worker="3",b="{ }"} 1.0'
    assert labelled("a 1.0", 3) == 'a{worker="3"} 1.0'


def ups(text: bytes) -> dict[int, float]:
    return {int(dict(labels)["worker"]): value for (name, *labels), value in read(text).items() if name == UP}


async def test_the_others_are_asked_and_one_that_is_away_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "ANSWER_WITHIN_S", 20.0)
    run = secrets.token_hex(8)
    first, second = Siblings(run, 1, 3, lambda: page(1)), Siblings(run, 2, 3, lambda: page(2))
    async with first.answering():
        async with second.answering():
            whole = await asyncio.to_thread(first.whole_page)
            assert ups(whole) == {1: 1, 2: 1, 3: 0}
            assert {read(whole)[("plain", ("worker", name))] for name in ("1", "2")} == {1, 2}
            assert ups(await asyncio.to_thread(second.whole_page)) == {1: 1, 2: 1, 3: 0}
        assert ups(await asyncio.to_thread(first.whole_page)) == {1: 1, 2: 0, 3: 0}


@pytest.mark.parametrize("says", [b"", b"half a page\n"], ids=["nothing", "half"])
async def test_one_that_is_stuck_costs_a_second_and_its_own_lines(monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    monkeypatch.setattr(siblings, "ANSWER_WITHIN_S", 0.5)
    run = secrets.token_hex(8)
    first, third = Siblings(run, 1, 3, lambda: page(1)), Siblings(run, 3, 3, lambda: page(3))

    over, ended = asyncio.Event(), asyncio.Event()
    whole = b""

    async def stick(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await over.wait()
        writer.close()
        await writer.wait_closed()
        ended.set()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0openmanager-{run}-2")
        listener.listen()
        async with await asyncio.start_unix_server(stick, sock=listener), first.answering(), third.answering():

            async def is_whole() -> bool:
                nonlocal whole
                whole = await asyncio.to_thread(first.whole_page)
                return ups(whole) == {1: 1, 2: 0, 3: 1}

            try:
                async with asyncio.timeout(20):  # one that is stuck goes on to be
                    await eventually(is_whole)  # again: on a busy machine the third one may be too late as well
            finally:
                over.set()
            await asyncio.wait_for(ended.wait(), 20)
    assert b"half a page" not in whole


@pytest.mark.parametrize("cut", [1, 5, 20, 200, 400])
async def test_one_that_dies_while_it_tells_costs_its_own_lines_and_leaves_none_cut_short(
    monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Killed half-way through its page: `calls_total 12` of 1234 would be believed, half a label is no page at all."""
    monkeypatch.setattr(siblings, "ANSWER_WITHIN_S", 20.0)
    run, alive = secrets.token_hex(8), secrets.token_hex(8)
    first, second = Siblings(run, 1, 2, lambda: page(1)), Siblings(alive, 2, 2, lambda: page(1234))

    async def die(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told, asking = await asyncio.open_unix_connection(f"\0openmanager-{alive}-2")
        writer.write((await told.read())[:-cut])
        for each in (asking, writer):
            each.close()
            await each.wait_closed()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0openmanager-{run}-2")
        listener.listen()
        async with await asyncio.start_unix_server(die, sock=listener), second.answering():
            whole = await asyncio.to_thread(first.whole_page)
    assert ups(whole) == {1: 1, 2: 0}
    assert {dict(labels).get("worker") for name, *labels in read(whole) if name != UP} == {"1"}


async def test_another_users_process_is_neither_given_a_page_nor_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = secrets.token_hex(8)
    first, second = Siblings(run, 1, 2, lambda: page(1)), Siblings(run, 2, 2, lambda: page(2))
    async with second.answering():
        monkeypatch.setattr("os.getuid", lambda: 12_345)
        assert ups(await asyncio.to_thread(first.whole_page)) == {1: 1, 2: 0}
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(stranger, f"\0openmanager-{run}-2")
            assert await loop.sock_recv(stranger, 100) == b""
