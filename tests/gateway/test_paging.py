"""Pages follow each other without a gap or an overlap, also while the list changes, and tokens are checked."""

import pytest

from gateway.paging import MAX_PAGE_SIZE, decode_token, encode_token, page, page_size_of
from runtime.errors import InvalidArgument


def walk(items: list[str], size: int) -> list[str]:
    seen: list[str] = []
    token = ""
    while True:
        chosen, token = page(items, str, size=size, token=token, filters=("f",))
        seen.extend(chosen)
        if not token:
            return seen


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 11])
def test_pages_cover_everything_once(size: int) -> None:
    items = [f"server-{index:02}" for index in range(10)]
    assert walk(items, size) == items


def test_an_empty_list_has_one_empty_page() -> None:
    assert page([], str, size=5, token="", filters=()) == ([], "")


def test_a_removed_item_moves_nothing() -> None:
    items = ["a", "b", "c", "d"]
    first, token = page(items, str, size=2, token="", filters=())
    items.remove("b")
    second, _ = page(items, str, size=2, token=token, filters=())
    assert (list(first), list(second)) == (["a", "b"], ["c", "d"])


@pytest.mark.parametrize("token", ["garbage!", "AAAA", "zzzz", encode_token("a", ("other",)), "é", "A" * 1000])
def test_tokens_that_are_not_ours_are_refused(token: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        decode_token(token, ("mine",))
    assert refused.value.field == "page_token"


def test_page_sizes() -> None:
    assert (page_size_of(0), page_size_of(5), page_size_of(10**6)) == (100, 5, MAX_PAGE_SIZE)
    with pytest.raises(InvalidArgument):
        page_size_of(-1)
