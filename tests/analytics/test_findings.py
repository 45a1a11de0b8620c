"""The store of findings: bounded, listed newest first, paged by tokens that hold no state here."""

import base64
from dataclasses import replace

import pytest

from runtime.errors import InvalidArgument
from runtime.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE
from services.analytics.findings import Anomaly, Filter, FindingStore, finding_id


def finding(start_ms: int, end_ms: int | None = -1, server: str = "web-1", metric: str = "cpu_usage") -> Anomaly:
    return Anomaly(
        id=finding_id(server, "departure", start_ms),
        server_id=server,
        metric=metric,
        start_ms=start_ms,
        end_ms=start_ms + 10 if end_ms == -1 else end_ms,
        peak_ms=start_ms,
        score=0.75,
        value=99.0,
        expected_low=10.0,
        expected_high=20.0,
        detector="departure",
    )


def store_of(*findings: Anomaly, limit: int = 10_000) -> FindingStore:
    store = FindingStore(limit)
    store.put(findings)
    return store


def pages(store: FindingStore, size: int, wanted: Filter = Filter()) -> list[list[Anomaly]]:  # noqa: B008  frozen
    page = store.list(wanted, page_size=size, page_token="")
    all_pages = [list(page.findings)]
    while page.next_page_token:
        page = store.list(wanted, page_size=size, page_token=page.next_page_token)
        all_pages.append(list(page.findings))
    return all_pages


def starts(store: FindingStore, **wanted: object) -> list[int]:
    page = store.list(Filter(**wanted), page_size=0, page_token="")  # type: ignore[arg-type]
    return [one.start_ms for one in page.findings]


def test_ids_depend_on_what_a_finding_is_about() -> None:
    about = [("a", "departure", 1), ("b", "departure", 1), ("a", "silence", 1), ("a", "departure", 2)]
    ids = [finding_id(*one) for one in about]
    assert len(set(ids)) == 4
    assert finding_id(*about[0]) == ids[0]
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)


def test_a_finding_that_changes_stays_one_finding() -> None:
    opened = finding(1_000, None)
    store = store_of(opened, replace(opened, score=0.9), replace(opened, score=0.9, end_ms=2_000))
    assert store.all() == (replace(opened, score=0.9, end_ms=2_000),)


def test_newest_come_first_and_pages_hold_each_once() -> None:
    made = [finding(start_ms, server=f"s{start_ms % 3}") for start_ms in (5, 1, 9, 3, 9_000, 7)]
    twins = [finding(9, server="x"), finding(9, server="y")]
    store = store_of(*made, *twins)
    flat = [one for page in pages(store, 3) for one in page]
    assert [len(page) for page in pages(store, 3)] == [3, 3, 2]
    assert [one.start_ms for one in flat] == [9_000, 9, 9, 9, 7, 5, 3, 1]
    assert len({one.id for one in flat}) == 8
    assert [len(page) for page in pages(store, 4)] == [4, 4]  # no empty page at the end


def test_a_page_goes_on_where_it_was_when_findings_come_and_go() -> None:
    store = store_of(*(finding(start_ms) for start_ms in range(1, 9)), limit=8)
    first = store.list(Filter(), page_size=3, page_token="")
    store.put([finding(100), finding(101)])  # drops 1 and 2
    second = store.list(Filter(), page_size=10, page_token=first.next_page_token)
    assert [one.start_ms for one in first.findings] == [8, 7, 6]
    assert [one.start_ms for one in second.findings] == [5, 4, 3]


def test_all_pages_are_of_the_first_pages_times() -> None:
    store = store_of(*(finding(start_ms, start_ms + 5) for start_ms in range(100, 200, 10)))
    first = store.list(Filter(start_ms=105, end_ms=181), page_size=3, page_token="")
    assert [one.start_ms for one in first.findings] == [180, 170, 160]
    for start_ms, end_ms in ((105, 181), (145, 221), (0, 130), (1_000, 1)):
        wanted = Filter(start_ms=start_ms, end_ms=end_ms)
        second = store.list(wanted, page_size=100, page_token=first.next_page_token)
        assert [one.start_ms for one in second.findings] == [150, 140, 130, 120, 110, 100]
        assert (second.total_size, second.next_page_token) == (9, "")
    for other in (Filter(), Filter(start_ms=105), Filter(end_ms=181)):
        with pytest.raises(InvalidArgument) as caught:
            store.list(other, page_size=3, page_token=first.next_page_token)
        assert caught.value.field == "page_token"


def test_filters() -> None:
    store = store_of(finding(100, 200), finding(300, 400, server="db-1"), finding(500, None))
    assert starts(store, server_id="db-1") == [300]
    assert starts(store, server_id="nobody") == []
    assert starts(store, start_ms=200) == [500, 300, 100]
    assert starts(store, start_ms=201) == [500, 300]
    assert starts(store, start_ms=10_000) == [500]  # it goes on
    assert starts(store, end_ms=300) == [100]
    assert starts(store, end_ms=301) == [300, 100]
    assert starts(store, start_ms=250, end_ms=500) == [300]
    assert store.list(Filter(server_id="db-1"), page_size=1, page_token="").total_size == 1


def test_the_end_before_the_start_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        starts(store_of(), start_ms=2, end_ms=1)
    assert caught.value.field == "end_time"


def test_page_sizes() -> None:
    store = store_of(*(finding(start_ms) for start_ms in range(1_500)))
    assert len(store.list(Filter(), page_size=0, page_token="").findings) == DEFAULT_PAGE_SIZE
    assert len(store.list(Filter(), page_size=10**9, page_token="").findings) == MAX_PAGE_SIZE
    with pytest.raises(InvalidArgument) as caught:
        store.list(Filter(), page_size=-1, page_token="")
    assert caught.value.field == "page_size"


def test_a_token_that_is_not_ours_is_refused() -> None:
    store = store_of(*(finding(start_ms) for start_ms in range(10)))
    token = store.list(Filter(), page_size=3, page_token="").next_page_token
    altered = ("A" if token[-3] != "A" else "B").join((token[:-3], token[-2:]))
    forged = base64.urlsafe_b64encode(b"12345678[1,2]").decode()
    for bad in ("x", "ü", "!!!!", "=", token[:-4], altered, forged, token * 100):
        with pytest.raises(InvalidArgument) as caught:
            store.list(Filter(), page_size=3, page_token=bad)
        assert caught.value.field == "page_token", bad
    with pytest.raises(InvalidArgument):
        store.list(Filter(server_id="web-1"), page_size=3, page_token=token)
    assert store.list(Filter(), page_size=5, page_token=token).findings


def test_the_store_is_bounded_and_drops_the_oldest_that_is_over() -> None:
    store = store_of(finding(1, None), finding(2), finding(3), finding(4), limit=3)
    assert starts(store) == [4, 3, 1]
    store = store_of(*(finding(start_ms, None) for start_ms in range(1, 6)), limit=3)
    assert starts(store) == [5, 4, 3]
    store.put([finding(4, 50), finding(6, None)])
    assert starts(store) == [6, 5, 3]
    assert len(store) == 3
