"""Findings on the page, in a real browser before the real product: seen, looked into and judged."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fleet.anomaly import Anomaly, Contribution
from tests.harness.findings import finding, record
from tests.harness.launched import within
from tests.web.browser import Browser, Page
from tests.web.guarded import MARKUP, PASSWORD, SHOWN_WITHIN_S, Guarded, log_in, wait_for_rows

pytestmark = pytest.mark.full

MINUTE_MS = 60_000
SERVERS = 4
TOLD_WITHIN_S = 10.0
"""By the stream: what is asked for again comes later."""


def told(guarded: Guarded, *findings: Anomaly) -> None:
    launched = guarded.launched
    record(launched.addresses["metadata"], (launched.data / "service-secret").read_text().strip(), *findings)


@contextmanager
def going_on(guarded: Guarded, *findings: Anomaly) -> Iterator[None]:
    """They end with the test."""
    told(guarded, *findings)
    try:
        yield
    finally:
        told(guarded, *(one.changed(end_ms=minutes_ago(0)) for one in findings))


def minutes_ago(minutes: float) -> int:
    return int(time.time() * 1_000 - minutes * MINUTE_MS)


def departure(server_id: str, start_ms: int, end_ms: int | None = None) -> Anomaly:
    """A finding of three metrics."""
    parts = (
        Contribution(metric="memory_usage", value=97.5, expected_low=10.0, expected_high=30.0, score=0.9),
        Contribution(metric="context_switches", value=9_000.0, expected_low=100.0, expected_high=500.0, score=0.8),
        Contribution(metric="cpu_usage", value=90.0, expected_low=5.0, expected_high=20.0, score=0.7),
    )
    return replace(finding(server_id, start_ms, end_ms=end_ms), metric="memory_usage", contributions=parts, score=0.9)


def silence(server_id: str, start_ms: int) -> Anomaly:
    """A server that is not heard; it was silent for 45 s when that was told, which is now."""
    one = finding(server_id, start_ms, detector="silence")
    heard = replace(one, metric="", contributions=(), expected_low=0.0, expected_high=30.0)
    return replace(heard, peak_ms=minutes_ago(0), value=45.0)


def others(guarded: Guarded) -> list[str]:
    """The servers that Grace does not see."""
    return sorted(one["id"] for one in guarded.get("/v1/servers")["servers"] if one["id"] != "web-01")


def open_server(page: Page, guarded: Guarded, name: str, server_id: str) -> None:
    """Opens the newest finding of a server."""
    page.open(f"{guarded.url}#/servers/{server_id}")
    log_in(page, name)
    page.within(SHOWN_WITHIN_S, "document.querySelector('#found li')")
    page.click("#found summary")
    page.within(SHOWN_WITHIN_S, "document.querySelector('#found .remarks li')")


def say(page: Page, what: str, comment: str) -> None:
    page.value(f"document.querySelector('#found input').value = {comment!r}")
    page.click(f"#found [data-say={what}]")


def test_what_is_abnormal_now_is_listed_and_marked_until_it_ends(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        wait_for_rows(page, SERVERS)
        quiet = (
            r"/^Still learning what is usual, \d+ % done\.$/.test(document.querySelector('#findings-said').innerText)"
        )
        page.within(SHOWN_WITHIN_S, quiet)
        assert page.value("document.querySelector('#findings-scroll').hidden")
        first, second = page.texts("#servers a")[:2]
        older, newer = departure(first, minutes_ago(10)), silence(second, minutes_ago(1))
        told(guarded, older, newer, departure("not-of-the-fleet", minutes_ago(5)))
        page.within(TOLD_WITHIN_S, "document.querySelectorAll('#findings tr').length === 2")
        assert page.text("#findings-said").startswith("2 findings on 2 servers.")
        assert page.texts("#findings a") == [second, first], "newest first"
        assert page.texts("#findings .what")[1] == "memory_usage and 2 more"
        within(5, lambda: int(page.texts("#findings .what")[0].removeprefix("silent for ").removesuffix(" s")) > 45)
        assert page.texts("#findings .value") == ["0.63", "0.90"]
        assert page.value("document.querySelector('#findings .bar i').style.width") == "63%"
        assert page.texts("#findings .who") == ["nobody yet", "nobody yet"]
        assert all(text.endswith(" UTC") for text in page.texts("#findings time"))
        marked = "[...document.querySelectorAll('#servers .abnormal')].filter((mark) => !mark.hidden).length"
        assert page.value(marked) == 2
        assert ["abnormal" in row for row in page.texts("#servers tr")] == [True, True, False, False]

        guarded.post(f"/v1/anomalies/{older.id}:acknowledge", {"comment": "on it"})
        guarded.post(f"/v1/anomalies/{older.id}:feedback", {"verdict": "real"})
        page.within(TOLD_WITHIN_S, "document.querySelectorAll('#findings .who')[1].innerText === 'Ada; real, says Ada'")
        told(guarded, newer.changed(end_ms=minutes_ago(0)))
        page.within(TOLD_WITHIN_S, "document.querySelectorAll('#findings tr').length === 1")
        assert page.text("#findings-said").startswith("1 finding on 1 server.")
        within(5, lambda: page.value(marked) == 1)

        page.click("#findings a")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#plot-title').innerText === 'History of memory_usage'")
        told(guarded, older.changed(end_ms=minutes_ago(0)))
        page.within(TOLD_WITHIN_S, "document.querySelector('#found .badge').innerText === 'over'")
        page.click(".back a")
        page.within(TOLD_WITHIN_S, quiet)
        assert page.value(marked) == 0


def test_a_finding_is_looked_into_and_judged(guarded: Guarded, browser: Browser) -> None:
    server_id = others(guarded)[2]
    one = departure(server_id, minutes_ago(30), minutes_ago(20))
    told(guarded, one, departure(server_id, minutes_ago(9 * 24 * 60), minutes_ago(8 * 24 * 60)))
    with browser.page() as page, browser.page() as other:
        open_server(page, guarded, "Ada", server_id)
        open_server(other, guarded, "Ada", server_id)
        first = page.text("#found summary")
        assert "memory_usage and 2 more" in first
        assert "for 10 min" in first
        page.within(SHOWN_WITHIN_S, "document.querySelector('#found .parts').innerText.includes('9,000 /s')")
        rows = [row.split("\t") for row in page.texts("#found .parts tbody tr")]
        assert [[cell.strip() for cell in row[:3]] for row in rows] == [
            ["memory_usage", "97.5 %", "10.0 % to 30.0 %"],
            ["context_switches", "9,000 /s", "100 /s to 500 /s"],
            ["cpu_usage", "90.0 %", "5.0 % to 20.0 %"],
        ]
        assert page.texts("#found .remarks li") == ["Nobody has said anything of it yet."]
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#plot .span').length === 1")
        assert "Shaded: when something was abnormal." in page.text("#plot-summary")
        page.click("#found [data-metric=context_switches]")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#plot-title').innerText === 'History of context_switches'")

        say(page, "care", MARKUP)
        page.within(SHOWN_WITHIN_S, "document.querySelector('#found .done').innerText === 'It is recorded.'")
        (remark,) = page.texts("#found .remarks li")
        assert remark.startswith("Ada takes care of it (")
        assert remark.endswith(f"): {MARKUP}")
        assert page.value("document.querySelectorAll('main img, #found b').length") == 0
        assert page.value("document.querySelector('#found input').value") == ""
        other.within(TOLD_WITHIN_S, "document.querySelector('#found .who').innerText === 'taken care of by Ada'")
        other.value("document.querySelector('#found input').value = 'not sent yet'")
        other.value("document.querySelector('#found [data-metric=cpu_usage]').focus()")
        say(page, "false", "")
        other.within(TOLD_WITHIN_S, "document.querySelectorAll('#found .remarks li').length === 2")
        assert other.texts("#found .remarks li")[1].startswith("Ada says it was false (")
        assert other.value("document.querySelector('#found input').value") == "not sent yet", (
            "it is drawn anew around it"
        )
        assert other.value("document.activeElement.dataset.metric") == "cpu_usage"
        shown = guarded.get(f"/v1/anomalies/{one.id}")
        assert (shown["verdict"], shown["acknowledgement"]["comment"]) == ("ANOMALY_VERDICT_FALSE", MARKUP)

        count = len(page.texts("#found li details"))
        page.click("[name=range][value='30d']")
        page.within(SHOWN_WITHIN_S, f"document.querySelectorAll('#found details').length === {count + 1}")
        assert page.text("#found-title") == "Findings of the last 30 days"
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#plot .span').length > 1")


def test_what_is_not_known_of_a_finding_is_no_number(guarded: Guarded, browser: Browser) -> None:
    server_id = others(guarded)[1]
    part = Contribution(metric="cpu_usage", value=math.nan, expected_low=math.nan, expected_high=25.0, score=0.75)
    unknown = replace(finding(server_id, minutes_ago(2)), value=math.nan, expected_low=math.nan, contributions=(part,))
    silent = replace(silence(server_id, minutes_ago(1)), value=math.nan, expected_high=math.nan)
    with going_on(guarded, unknown, silent), browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#findings tr').length === 2")
        assert page.texts("#findings .what") == ["silent", "cpu_usage"]
        page.click("#findings a")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#found li').length >= 2")
        page.value("document.querySelectorAll('#found summary').forEach((each) => each.click())")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#found .parts tbody tr')")
        assert page.texts("#found .usual")[0] == "Usual is up to – between two messages."
        page.within(
            SHOWN_WITHIN_S, "document.querySelector('#found .parts tbody tr').innerText.includes('– to 25.0 %')"
        )
        assert "NaN" not in page.text("#found")


def test_what_is_refused_is_told_where_it_was_asked(guarded: Guarded, browser: Browser) -> None:
    told(guarded, departure("web-01", minutes_ago(0.5), minutes_ago(0)))
    with browser.page() as page:
        open_server(page, guarded, "Ada", "web-01")
        say(page, "real", "x" * 17_000)
        page.within(SHOWN_WITHIN_S, "!document.querySelector('#found .error').hidden")
        assert "16384" in page.text("#found .error").replace(",", "")
        assert page.text("#found .done") == ""
        assert len(page.value("document.querySelector('#found input').value")) == 17_000, "it can be mended"
        say(page, "real", "a second look")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#found .error').hidden")
        page.within(SHOWN_WITHIN_S, "/ a second look$/.test(document.querySelector('#found .remarks').innerText)")


def test_who_only_reads_is_offered_nothing_and_sees_his_servers_only(guarded: Guarded, browser: Browser) -> None:
    mine, another = departure("web-01", minutes_ago(3)), departure(others(guarded)[0], minutes_ago(2))
    with going_on(guarded, mine, another), browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Grace")
        wait_for_rows(page, 1)
        page.within(TOLD_WITHIN_S, "document.querySelectorAll('#findings tr').length > 0")
        assert page.texts("#findings a") == ["web-01"]
        page.click("#findings a")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#found li')")
        page.click("#found summary")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#found .parts button').length === 3")
        assert page.value("document.querySelector('#found form').hidden")
        page.click("#log-out")
        page.within(SHOWN_WITHIN_S, "!document.querySelector('#log-in').hidden")
        assert "web-01" not in page.value("document.documentElement.outerHTML"), "nothing that she saw stays"
        assert mine.id not in page.value("document.documentElement.outerHTML")
        assert page.texts("#found li") == page.texts("#findings tr") == []

        log_in(page, "Ada")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#findings tr').length === 2")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_findings_fit_a_telephone_and_keys_are_enough(guarded: Guarded, browser: Browser, scheme: str) -> None:
    one = departure("web-01", minutes_ago(0.5))
    with going_on(guarded, one), browser.page(400, 800, prefers_color_scheme=scheme) as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#findings a')")
        assert page.value("document.documentElement.scrollWidth") <= 400
        assert page.value("document.querySelector('#findings-scroll').scrollWidth") <= 400
        press(page, "#findings a", "Enter")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#found li')")
        press(page, "#found summary", "Enter")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#found .remarks li')")
        assert page.value("document.documentElement.scrollWidth") <= 400
        nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
        asked = {"button", "link", "textbox", "table", "DisclosureTriangle"}
        seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in asked]
        assert {node["role"]["value"] for node in seen} == asked
        assert [node for node in seen if not node.get("name", {}).get("value")] == []
        before = page.texts("#found .remarks li")
        page.type("#found input", f"by keys, in {scheme}")
        press(page, "#found input", "Enter")
        assert page.texts("#found .remarks li") == before, "it does not say which of the three is meant"
        press(page, "#found [data-say=care]", "Enter")
        page.within(SHOWN_WITHIN_S, f"document.querySelector('#found .remarks').innerText.includes('in {scheme}')")
        assert page.value("document.activeElement.dataset.say") == "care", "the focus stays"
        page.within(
            SHOWN_WITHIN_S, "document.querySelector('#plot .span') && document.querySelector('#plot path.curve')"
        )
        press(page, "#plot", "End")
        assert page.text("#plot-reading").endswith(", something was abnormal"), "what is shaded is read out"


def press(page: Page, selector: str, key: str) -> None:
    page.value(f"document.querySelector({selector!r}).focus()")
    enter = {"windowsVirtualKeyCode": 13, "text": "\r"} if key == "Enter" else {}
    for kind in ("keyDown", "keyUp"):
        page.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, **enter)


def test_lists_of_findings_end(guarded: Guarded, browser: Browser) -> None:
    server_id = others(guarded)[2]
    many = [departure(server_id, minutes_ago(400 - number)) for number in range(203)]
    with going_on(guarded, *many), browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#findings-said').innerText.startsWith('203 findings')")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#findings tr').length === 200")
        assert page.text("#more-findings") == "and 3 more"
        page.click("#findings a")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#found > li').length === 200")
        total = guarded.get(f"/v1/anomalies?server_id={server_id}&start_time=-7d&page_size=1")["totalSize"]
        assert page.text("#more-found") == f"and {total - 200} more"


def test_that_nobody_looks_for_findings_is_told(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#findings-said').innerText.includes('Still learning')")
        frozen = guarded.launched.pid_of("analytics")
        os.kill(frozen, signal.SIGSTOP)
        try:
            page.ask("Page.reload")
            away = "Analytics does not answer: nothing new may be found."
            page.within(SHOWN_WITHIN_S, f"document.querySelector('#findings-said').innerText.includes('{away}')")
        finally:
            os.kill(frozen, signal.SIGCONT)
        page.within(60, "document.querySelector('#findings-said').innerText.includes('Still learning')")


def test_whoever_may_say_something_is_heard(guarded: Guarded, browser: Browser) -> None:
    guarded.post("/v1/users", {"user": {"name": "Otto", "role": "ROLE_OPERATOR"}, "password": PASSWORD})
    told(guarded, departure("web-01", minutes_ago(0.5), minutes_ago(0)))
    with browser.page() as page:
        open_server(page, guarded, "Otto", "web-01")
        say(page, "real", "seen")
        page.within(SHOWN_WITHIN_S, "/^Otto says it was real .*: seen$/.test("
                                    "document.querySelector('#found .remarks').innerText)")  # fmt: skip
