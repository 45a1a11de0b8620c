"""The JSON in Redis: its exact form, and that it can be read back."""

import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.model import Metric
from services.cache.documents import basic_document, full_document, parse_document, parse_metric_key
from tests.cache.samples import HEADLINE, T0, World, descriptor, rows_of, set_of

names = st.text(st.characters(codec="utf-8", exclude_characters='{}"=,'), min_size=1)
texts = st.text(st.characters(codec="utf-8"))


def test_the_full_document_is_flat_and_complete() -> None:
    world = World()
    world.describe(descriptor("a", report_interval_ms=5_000))
    world.rows(rows_of(HEADLINE, {"a": (97.5, 20, math.nan)}, T0 + 7))
    world.clock.advance(0)
    state = world.live.get("a")
    assert state is not None
    assert orjson.loads(full_document(state)[0]) == {
        "id": "a",
        "hostname": "a.example",
        "environment": "production",
        "role": "web",
        "location": "eu-1a",
        "status": "critical",
        "observed_time": "2023-11-14T22:13:20.007Z",
        "receive_time": "2023-11-14T22:13:20.000Z",
        "report_interval_ms": 5_000,
        "cpu_usage": 97.5,
        "memory_usage": 20.0,
    }
    assert orjson.loads(basic_document(state)) == {
        "id": "a",
        "hostname": "a.example",
        "environment": "production",
        "role": "web",
        "location": "eu-1a",
        "status": "critical",
        "observed_time": "2023-11-14T22:13:20.007Z",
        "cpu_usage": 97.5,
        "memory_usage": 20.0,
    }


def test_a_metric_called_like_one_of_our_keys_does_not_replace_it() -> None:
    world = World()
    world.rows(rows_of(set_of("id", "status", "x"), {"a": (1, 2, 3)}, T0))
    state = world.live.get("a")
    assert state is not None
    document = orjson.loads(full_document(state)[0])
    assert (document["id"], document["status"], document["x"]) == ("a", "healthy", 3)


@pytest.mark.parametrize(
    "document",
    [{}, {"id": 1}, [], "x", None, {"id": "a", "hostname": "a", "environment": "", "role": "", "location": ""}],
)
def test_what_is_not_a_servers_document_is_a_value_error(document: object) -> None:
    with pytest.raises(ValueError, match="not a server's document"):
        parse_document(document, {})  # type: ignore[arg-type]


@given(names, st.dictionaries(names, texts, max_size=4))
def test_a_metrics_identity_as_text_can_be_read_back(name: str, labels: dict[str, str]) -> None:
    metric = Metric(name=name, labels=tuple(sorted(labels.items())))
    assert parse_metric_key(metric.key) == metric


@pytest.mark.parametrize("key", ["a{", "a{b}", 'a{b="c}', 'a{b="c"x}', 'a{b="c"}x', "}{", ""])
def test_a_text_of_no_such_form_is_a_bare_name(key: str) -> None:
    assert parse_metric_key(key).key == key
