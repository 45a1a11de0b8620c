"""Pages follow each other without a gap or an overlap, also while the list changes, and tokens are checked."""

import base64

import pytest

from runtime import paging
from runtime.errors import InvalidArgument
from runtime.paging import Window


def page(items: list[str], size: int, token: str, *filters: object) -> tuple[list[str], str]:
    shown, following = paging.page_of(
        items, lambda item: (item,), listing="letters", filters=filters, size=size, token=token
    )
    return list(shown), following


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 11])
def test_pages_cover_everything_once(size: int) -> None:
    items = [f"server-{index:02}" for index in range(10)]
    seen, token = page(items, size, "")
    while token:
        shown, token = page(items, size, token)
        seen += shown
    assert seen == items


def test_an_empty_list_has_one_empty_page() -> None:
    assert page([], 5, "") == ([], "")


def test_a_removed_item_moves_nothing() -> None:
    items = ["a", "b", "c", "d"]
    first, token = page(items, 2, "")
    items.remove("b")
    assert (first, page(items, 2, token)[0]) == (["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    "token",
    [
        "garbage!",
        "AAAA",
        "zzzz",
        "é",
        "A" * 5_000,
        paging.page_token("letters", ("other",), ["a"]),
        paging.page_token("numbers", (), ["a"]),
        paging.page_token("letters", (), [1]),
        paging.page_token("letters", (), ["a"])[:-2],
    ],
)
def test_tokens_that_are_not_of_this_listing_are_refused(token: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        page(["a", "b"], 1, token)
    assert refused.value.field == "page_token"


def test_page_sizes() -> None:
    assert (paging.page_size(0), paging.page_size(5), paging.page_size(10**6)) == (100, 5, paging.MAX_PAGE_SIZE)
    with pytest.raises(InvalidArgument) as refused:
        paging.page_size(-1)
    assert refused.value.field == "page_size"


def test_a_token_of_another_installation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "_key", b"")  # as it was, afterwards
    paging.sign_with("one secret")
    _, token = page(["a", "b"], 1, "")
    assert page(["a", "b"], 1, token) == (["b"], "")
    paging.sign_with("another secret")
    with pytest.raises(InvalidArgument):
        page(["a", "b"], 1, token)


@pytest.mark.parametrize("first", [Window(10, 20), Window(None, 20), Window(10, None), Window(0, 0), Window()])
def test_a_token_carries_the_window_of_the_first_page(first: Window) -> None:
    token = paging.page_token("letters", ["x"], ["a", 1], first)
    later = Window(*(None if edge is None else edge + 7 for edge in first))
    for asked in (first, later):
        assert paging.continued("letters", ["x"], asked, token, (str, int)) == (first, ["a", 1])
    assert paging.continued("letters", ["x"], later, "", (str, int)) == (later, None)


@pytest.mark.parametrize(
    ("filters", "asked", "kinds"),
    [
        (["y"], Window(10, 20), (str,)),
        (["x"], Window(10, None), (str,)),
        (["x"], Window(None, 20), (str,)),
        (["x"], Window(), (str,)),
        (["x"], Window(10, 20), (int,)),
        (["x"], Window(10, 20), (str, int)),
    ],
)
def test_a_token_is_bound_to_which_edges_there_are(
    filters: list[object], asked: Window, kinds: tuple[type, ...]
) -> None:
    token = paging.page_token("letters", ["x"], ["a"], Window(10, 20))
    with pytest.raises(InvalidArgument) as refused:
        paging.continued("letters", filters, asked, token, kinds)
    assert refused.value.field == "page_token"


def test_the_window_in_a_token_cannot_be_altered() -> None:
    token = paging.page_token("letters", [], ["a"], Window(10, 20))
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    altered = base64.urlsafe_b64encode(raw.replace(b"20]", b"99]")).rstrip(b"=").decode()
    assert altered != token
    with pytest.raises(InvalidArgument):
        paging.continued("letters", [], Window(10, 20), altered, (str,))
