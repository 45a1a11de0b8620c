"""Maintenance windows in the record, held by PostgreSQL 18 and 15 alike."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from fleet.model import ServerDescriptor
from runtime.clock import ManualClock, SystemClock
from runtime.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from services.metadata import maintenance
from services.metadata.maintenance import MaintenanceStore, NewWindow
from services.metadata.store import MetadataStore
from tests.harness import eventually
from tests.metadata.parts import Parts

HOUR = timedelta(hours=1)


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def window(*, start: timedelta = -HOUR, end: timedelta = HOUR, **fields: str) -> NewWindow:
    return NewWindow(**{"server_id": "a", "start_time": now() + start, "end_time": now() + end} | fields)  # type: ignore[arg-type]


@pytest.fixture
async def windows(store: MetadataStore, parts: Parts) -> MaintenanceStore:
    await store.create_server(ServerDescriptor(server_id="a", hostname="a"))
    return MaintenanceStore(parts.database, clock=SystemClock(), changed=parts.copy.changed)


async def test_a_window_is_recorded_and_part_of_the_servers_record(
    windows: MaintenanceStore, store: MetadataStore, parts: Parts
) -> None:
    before = await store.get_server("a")
    new = window(reason="new disk", created_by="ann")
    made, details = await windows.add(new)
    assert (made.start_time, made.end_time, made.reason, made.created_by) == (
        new.start_time,
        new.end_time,
        "new disk",
        "ann",
    )
    assert await windows.get("a", made.id) == made
    after = await store.get_server("a")
    assert after.details == details
    assert details.revision == before.details.revision + 1
    assert details.maintenance == ((int(made.start_time.timestamp() * 1000), int(made.end_time.timestamp() * 1000)),)
    await eventually(lambda: parts.copy.get("a"))

    async def copied() -> bool:
        return (await parts.copy.get("a")) == after

    await eventually(copied)


async def test_a_window_may_bring_its_id_once(windows: MaintenanceStore, store: MetadataStore) -> None:
    own = "3f2b7c1e-8c1d-4f0e-9a53-0a4b6f0c2d11"
    made, details = await windows.add(window(id=own))
    assert made.id == own
    with pytest.raises(AlreadyExists) as refused:
        await windows.add(window(id=own))
    assert refused.value.field == "id"
    assert (await store.get_server("a")).details == details


async def test_named_fields_are_changed_and_windows_removed(windows: MaintenanceStore, store: MetadataStore) -> None:
    made, first = await windows.add(window(reason="disk", created_by="ann"))
    changed, second = await windows.change(made.id, window(end=3 * HOUR, reason="x", created_by="bob"), ["end_time"])
    assert (changed.reason, changed.created_by, changed.start_time) == ("disk", "ann", made.start_time)
    assert changed.end_time > made.end_time
    assert second.maintenance != first.maintenance
    assert (await store.get_server("a")).details == second
    gone = await windows.remove("a", made.id)
    assert (gone.maintenance, gone.revision) == ((), second.revision + 1)
    for call in (windows.get("a", made.id), windows.remove("a", made.id), windows.change(made.id, window())):
        with pytest.raises(NotFound) as refused:
            await call
        assert refused.value.field == "id"
    assert (await store.get_server("a")).details == gone  # a change that is refused is none


async def test_windows_are_listed_by_page_and_ended_ones_if_asked_for(windows: MaintenanceStore, parts: Parts) -> None:
    made = [(await windows.add(window(start=number * HOUR, end=(number + 1) * HOUR)))[0] for number in range(5)]
    ended, _ = await windows.change(made[0].id, window(start=-2 * HOUR, end=-HOUR))
    expected = [*reversed(made[1:]), ended]
    for shown, show_ended in ((expected[:-1], False), (expected, True)):
        found, token = [], ""
        while True:
            page = await windows.list("a", show_ended=show_ended, page_size=2, page_token=token)
            assert page.total_size == len(shown)
            found += page.items
            if not (token := page.next_page_token):
                break
        assert [each.id for each in found] == [each.id for each in shown]


async def test_servers_that_are_not_there_have_no_windows(windows: MaintenanceStore, store: MetadataStore) -> None:
    made, _ = await windows.add(window())
    await store.delete_server("a")
    for call in (windows.add(window()), windows.change(made.id, window()), windows.remove("a", made.id)):
        with pytest.raises(NotFound) as refused:
            await call
        assert (refused.value.reason, refused.value.field) == ("SERVER_NOT_FOUND", "server_id")
    with pytest.raises(NotFound):
        await windows.get("b", made.id)
    restored = await store.undelete_server("a")
    assert len(restored.details.maintenance) == 1


async def test_so_many_windows_may_be_open_also_when_asked_for_at_once(
    windows: MaintenanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "MAX_OPEN_WINDOWS", 3)
    results = await asyncio.gather(*(windows.add(window()) for _ in range(6)), return_exceptions=True)
    assert sum(isinstance(result, ResourceExhausted) for result in results) == 3
    page = await windows.list("a", show_ended=True, page_size=0, page_token="")
    ended, _ = await windows.change(page.items[0].id, window(start=-2 * HOUR, end=-HOUR))
    await windows.add(window())
    with pytest.raises(ResourceExhausted):
        await windows.change(ended.id, window())


async def test_of_windows_that_have_ended_so_many_are_kept(
    windows: MaintenanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "MAX_ENDED_WINDOWS", 3)
    ended = []
    for number in range(6):
        made, _ = await windows.add(window())
        ended.append(made.id)
        await windows.change(made.id, window(start=-9 * HOUR, end=(number - 8) * HOUR))
    last, _ = await windows.add(window())
    page = await windows.list("a", show_ended=True, page_size=0, page_token="")
    assert {each.id for each in page.items} == {last.id, *ended[3:]}


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (window(end=-2 * HOUR), "end_time"),
        (window(start=-3 * HOUR, end=-2 * HOUR), "end_time"),
        (window(start=HOUR, end=HOUR), "end_time"),
        (window(end=timedelta(days=367)), "end_time"),
        (NewWindow(server_id="a", start_time=None, end_time=None), "end_time"),
        (window(reason="x" * 1_001), "reason"),
        (window(reason="a\0"), "reason"),
        (window(created_by="a\0"), "created_by"),
        (window(server_id=""), "server_id"),
        (window(id="x"), "id"),
    ],
)
async def test_windows_that_cannot_be_are_refused_by_name(bad: NewWindow, field: str) -> None:
    blind = MaintenanceStore(None, clock=SystemClock(), changed=lambda _: None)  # type: ignore[arg-type]  # is not asked
    with pytest.raises(InvalidArgument) as refused:
        await blind.add(bad)
    assert refused.value.field == field


async def test_a_window_begins_now_unless_it_says_when(windows: MaintenanceStore, parts: Parts) -> None:
    clock = ManualClock()
    own = MaintenanceStore(parts.database, clock=clock, changed=lambda _seen: None)
    end = datetime.fromtimestamp(clock.now_ms() / 1000, UTC) + HOUR
    made, _ = await own.add(NewWindow(server_id="a", start_time=None, end_time=end))
    assert int(made.start_time.timestamp() * 1000) == clock.now_ms()
