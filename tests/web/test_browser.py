"""The page in a real browser, before the real product: what a person sees, and is told when something breaks."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gateway import web
from tests.harness.launched import Launched, within
from tests.harness.shared_product import METRICS, SERVERS
from tests.web.browser import Browser
from tests.web.guarded import MARKUP, PASSWORD, SHOWN_WITHIN_S, Guarded, log_in, wait_for_rows

pytestmark = pytest.mark.full


def test_every_server_is_shown_and_goes_on_changing(product: Launched, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"http://{product.http_address}/")
        wait_for_rows(page, SERVERS)
        page.within(SHOWN_WITHIN_S, "document.querySelector('#live-text').textContent === 'Live'")
        page.within(SHOWN_WITHIN_S, f"Number(document.querySelector('.tile b').textContent) >= {SERVERS}")
        assert page.text("#caller") == "local-administrator · administrator"
        assert page.value("document.querySelector('#log-out').hidden")
        assert page.text("#banners") == ""
        before = page.texts("#servers .value")
        within(10, lambda: page.texts("#servers .value") != before)
        assert {request.partition("/v1")[0] for request in page.requests if "/v1" in request} == {
            f"GET http://{product.http_address}"
        }
        assert all(f"//{product.http_address}/" in request for request in page.requests)
        scripts = [request.rpartition("/")[2] for request in page.requests if request.endswith(".js")]
        assert sorted(scripts) == sorted(web.SCRIPTS), "each is fetched, and only once"


def test_servers_are_filtered_and_sorted(product: Launched, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"http://{product.http_address}/")
        wait_for_rows(page, SERVERS)
        everything = page.texts("#servers a")
        page.type("#filter", "WEB production")
        rows = page.texts("#servers tr")
        assert rows
        assert all("web" in row and "production" in row for row in rows)
        assert f"{len(rows)} of" in page.text("#shown")
        page.type("#filter", "no such server")
        assert page.text("#no-servers") == "No server matches the filter."
        page.value("document.querySelector('#filter').value = ''")
        page.value("document.querySelector('#filter').dispatchEvent(new Event('input'))")
        page.click("[data-sort=cpu_usage] button")
        assert page.value("document.querySelector('[data-sort=cpu_usage]').getAttribute('aria-sort')") == "descending"
        shown = page.texts("#servers td:nth-child(5) .value")
        values = [float(text.removesuffix(" %")) for text in shown if text != "–"]
        assert values == sorted(values, reverse=True)
        assert sorted(page.texts("#servers a")) == sorted(everything)
        page.click(".tile.offline")
        page.within(5, "document.querySelector('#status').value === 'offline'")
        assert all("offline" in row for row in page.texts("#servers tr"))


def test_a_server_has_its_metrics_and_a_history(product: Launched, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"http://{product.http_address}/#/servers/web-01")
        page.within(SHOWN_WITHIN_S, f"document.querySelectorAll('#metrics tr').length === {METRICS}")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#plot .curve')")
        assert "production" in page.text("#about")
        page.type("#metric-filter", "memory_bytes")
        assert all("memory_bytes" in row for row in page.texts("#metrics tr"))
        page.type("#metric-filter", "context_switches")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#metrics tr').length === 1")
        page.click("[data-metric=context_switches]")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#aggregation').value === 'RATE'")
        page.click("[name=range][value='6h']")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#plot-summary').textContent.includes('every minute')")
        assert "/s" in page.text("#plot-summary")
        assert page.value("location.hash") == "#/servers/web-01?metric=context_switches&range=6h"
        page.value("document.querySelector('#plot').focus()")
        for kind in ("keyDown", "keyUp"):
            page.ask("Input.dispatchKeyEvent", type=kind, key="End", code="End")
        assert page.text("#plot-reading").endswith(" UTC")
        assert page.value("document.querySelectorAll('#plot .at').length") == 1


def test_values_that_differ_in_the_last_digit_do_not_freeze_it_and_extreme_ones_are_short(
    product: Launched, browser: Browser
) -> None:
    """Means of a constant differ so; ticks between two doubles that are neighbours were counted for ever."""
    now = int(time.time()) // 10 * 10
    named = {"constant": 31589.599999999995, "huge": -1.5e300, "tiny": 2.5e-200, "percent": 1e300, "zero": 0.0}
    named |= {"packets": -1.23e13, "smallest": 5e-324, "largest": sys.float_info.max, "lowest": -sys.float_info.max}
    units = {"percent": "%", "huge": "By", "zero": "{context switches}/s", "packets": "{packet}"}
    metrics = [{"name": name, "unit": units.get(name, "1")} for name in named]
    for age_s, constant in ((60, 31589.599999999995), (50, 31589.600000000002), (40, 31589.6)):
        rows = [{"serverId": "extreme-1", "time": now - age_s}]
        values = [constant, *list(named.values())[1:]]
        assert product.post("/v1/metrics:write", {"metrics": metrics, "rows": rows, "values": values}).status == 200
    with browser.page() as page:
        for name in named:
            page.open(f"http://{product.http_address}/#/servers/extreme-1?metric={name}")
            page.within(SHOWN_WITHIN_S, f"document.querySelector('#plot-title').textContent === 'History of {name}'")
            page.within(SHOWN_WITHIN_S, "document.querySelector('#plot .curve')")
            labels = page.value("[...document.querySelectorAll('#plot text')].map((each) => each.textContent)")
            assert all(len(label) < 20 for label in labels)
            edges = page.value("[...document.querySelectorAll('#plot text')].map((each) => each.getBBox().x)")
            assert min(edges) >= 0, "cut off"
            assert "NaN" not in page.value("document.querySelector('#plot').innerHTML")
            assert "∞" not in page.text("#plot") + page.text("#plot-summary")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#metrics').textContent.includes('PiB')")  # units are there
        shown = dict(zip(page.texts("#metrics th"), page.texts("#metrics td"), strict=True))
    assert shown["constant"] == "31,590"
    assert shown["huge"] == "-1.33E285 PiB"
    assert shown["tiny"] == "2.5E-200"
    assert shown["percent"] == "1E300 %"
    assert shown["zero"] == "0 context switches/s"
    assert shown["smallest"] == "5E-324"
    assert shown["largest"] == "1.8E296 T"


def test_a_server_that_there_is_not(product: Launched, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"http://{product.http_address}/#/servers/%2e%2e%2Fnothing")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#server-error').textContent")
        assert "There is no server ../nothing" in page.text("#server-error")


def test_a_server_without_metrics_shows_no_history_of_another_one(product: Launched, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"http://{product.http_address}/#/servers/web-01")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#plot .curve')")
        assert product.post("/v1/servers", {"id": "silent-1"}).status == 200
        try:
            page.value("location.hash = '#/servers/silent-1'")
            page.within(SHOWN_WITHIN_S, "document.querySelector('#about').textContent.includes('never')")
            page.within(SHOWN_WITHIN_S, "document.querySelector('#plot-summary').textContent.includes('no metric')")
        finally:
            assert product.post("/v1/servers/silent-1", None, method="DELETE").status == 200
        assert page.text("#plot-title") == "History"
        assert page.value("document.querySelector('#plot svg')") is None
        press = "document.querySelector('#plot').dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'}))"
        assert page.value(f"({press}, document.querySelector('#plot-reading').textContent)") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_and_says_what_everything_is(product: Launched, browser: Browser, scheme: str) -> None:
    with browser.page(400, 800, prefers_color_scheme=scheme) as page:
        for address, sign in (("", "#servers tr"), ("#/servers/web-01", "#plot .curve")):
            page.open(f"http://{product.http_address}/{address}")
            page.within(SHOWN_WITHIN_S, f"document.querySelector('{sign}')")
            assert page.value("document.documentElement.scrollWidth") <= 400
            nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
            asked = {"button", "link", "searchbox", "combobox", "radio", "table"}
            seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in asked]
            assert seen
            assert [node for node in seen if not node.get("name", {}).get("value")] == []


def test_who_is_not_logged_in_logs_in_and_out(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"{guarded.url}?login_error=OPENID_REFUSED")
        page.within(SHOWN_WITHIN_S, "!document.querySelector('#log-in').hidden")
        assert page.text("#log-in-error") == "The OpenID provider did not let you in."
        assert page.value("location.search") == ""
        assert page.value("document.querySelector('#openid').hidden"), "there is no provider"
        assert page.value("document.querySelector('#fleet').hidden")

        log_in(page, "Grace", "nonsense")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#log-in-error').textContent.includes('not right')")
        log_in(page, "grace")
        wait_for_rows(page, 1)
        assert page.text("#caller-name") == "Grace · viewer · server web-01 only"
        assert page.texts("#servers a") == ["web-01"]
        assert page.value("document.querySelector('#log-in-password').value") == ""
        assert page.value("document.cookie") == "", "no script sees it"

        page.ask("Page.reload")
        wait_for_rows(page, 1)
        page.click("#servers a")
        page.within(SHOWN_WITHIN_S, f"document.querySelectorAll('#metrics tr').length === {METRICS}")
        page.click("#log-out")
        page.within(SHOWN_WITHIN_S, "!document.querySelector('#log-in').hidden")
        assert "web-01" not in page.value("document.documentElement.outerHTML"), "nothing that he saw stays"
        assert page.value("location.hash") == ""
        assert page.text("#log-in-error") == ""
        assert page.texts("#servers tr") == []
        page.ask("Page.reload")
        page.within(SHOWN_WITHIN_S, "!document.querySelector('#log-in').hidden")


def test_openid_is_offered_where_there_is_a_provider(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.answer("*/auth/openid/login", 204)
        page.open(guarded.url)
        page.within(SHOWN_WITHIN_S, "!document.querySelector('#openid').hidden")
        assert page.value("document.querySelector('#openid a').pathname") == "/auth/openid/login"


def test_an_invented_log_in_error_says_nothing(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"{guarded.url}?login_error=Call+555-0100+and+tell+your+password")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#log-in-error').textContent")
        assert page.text("#log-in-error") == "Logging in with OpenID did not work (UNKNOWN)."


def test_who_tries_too_often_is_told_how_long_to_wait(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        for _ in range(15):
            log_in(page, "Bob", "nonsense")
            page.within(SHOWN_WITHIN_S, "!/Log in/.test(document.querySelector('#log-in-button').textContent) || "
                                        "!document.querySelector('#log-in-button').disabled")  # fmt: skip
            if page.text("#log-in-button").startswith("Try again in"):
                break
        assert "too many" in page.text("#log-in-error")
        first = page.text("#log-in-button")
        within(5, lambda: page.text("#log-in-button") != first)


def test_a_session_that_is_ended_elsewhere_shows_the_log_in(guarded: Guarded, browser: Browser) -> None:
    guarded.post("/v1/users", {"user": {"name": "Edsger", "role": "ROLE_VIEWER"}, "password": PASSWORD})
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Edsger")
        wait_for_rows(page, 4)
        guarded.post("/v1/users/Edsger", {"disabled": True}, method="PATCH")
        page.within(SHOWN_WITHIN_S, "!document.querySelector('#log-in').hidden")
        assert page.text("#log-in-error") == "The session has ended."
        assert page.texts("#servers tr") == []
        page.open(f"{guarded.url}?login_error=OPENID_REFUSED")  # the cookie of the session is still there
        page.within(SHOWN_WITHIN_S, "document.querySelector('#log-in-error').textContent")
        assert page.text("#log-in-error") == "The OpenID provider did not let you in."


def test_whoever_comes_next_sees_a_whole_server_and_nothing_of_before(guarded: Guarded, browser: Browser) -> None:
    guarded.post("/v1/users", {"user": {"name": "Alan", "role": "ROLE_VIEWER"}, "password": PASSWORD})
    with browser.page() as page:
        page.open(f"{guarded.url}#/servers/web-01?range=constructor")
        for name in ("Alan", "Ada"):
            log_in(page, name)
            page.within(SHOWN_WITHIN_S, "document.querySelector('#about').textContent.includes('Host name')")
            page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#metrics tr').length > 10")
            page.within(SHOWN_WITHIN_S, "document.querySelector('#plot svg')")
            if name == "Alan":
                guarded.post("/v1/users/Alan", {"disabled": True}, method="PATCH")
                page.within(SHOWN_WITHIN_S, "!document.querySelector('#log-in').hidden")
                assert page.text("#about") == "" and page.texts("#metrics tr") == []
                press = "document.querySelector('#plot').dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'}))"
                assert page.value(f"({press}, document.querySelector('#plot-reading').textContent)") == ""


def test_what_somebody_saw_goes_when_another_tab_logs_somebody_else_in(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        wait_for_rows(page, 4)
        grace = json.dumps({"name": "Grace", "password": PASSWORD})
        asked = f"{{method: 'POST', headers: {{'content-type': 'application/json'}}, body: {grace!r}}}"
        assert page.value(f"fetch('/v1/session', {asked}).then((answer) => answer.status)") == 200
        page.within(SHOWN_WITHIN_S, "document.querySelector('#caller-name').textContent.startsWith('Grace')")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#servers tr').length === 1")
        assert page.texts("#servers a") == ["web-01"]
        assert page.text("#caller-name") == "Grace · viewer · server web-01 only"


def test_what_somebody_saw_goes_when_he_may_see_less(guarded: Guarded, browser: Browser) -> None:
    guarded.post("/v1/users", {"user": {"name": "Niklaus", "role": "ROLE_OPERATOR"}, "password": PASSWORD})
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Niklaus")
        wait_for_rows(page, 4)
        less = {"role": "ROLE_VIEWER", "scope": {"serverIds": ["web-01"]}}
        guarded.post("/v1/users/Niklaus", less, method="PATCH")
        page.within(SHOWN_WITHIN_S, "document.querySelectorAll('#servers tr').length === 1")
        assert page.text("#caller-name") == "Niklaus · viewer · server web-01 only"


def test_a_clock_that_is_set_back_stops_nothing(product: Launched, browser: Browser) -> None:
    with browser.page() as page:
        page.open(f"http://{product.http_address}/")
        wait_for_rows(page, SERVERS)
        page.within(SHOWN_WITHIN_S, "document.querySelector('#live-text').textContent === 'Live'")
        page.value("(() => { const now = Date.now; Date.now = () => now() - 3_600_000; })()")
        before = len(page.requests)
        for path in ("/v1/fleet/summary", "/v1/storage/status"):
            within(30, lambda path=path: any(path in request for request in page.requests[before:]))
        ages = "[...document.querySelectorAll('#servers .age')].map((each) => parseInt(each.innerText))"
        assert max(page.within(SHOWN_WITHIN_S, ages)) < 120, "by the gateway's clock, as before"


def test_what_people_write_is_text_and_never_markup(guarded: Guarded, browser: Browser) -> None:
    name = f"a {MARKUP.partition('<b>')[0]}"  # an id has no slash
    server = {"id": name, "hostname": MARKUP, "environment": "<b>test</b>", "role": "<i>web</i>"}
    guarded.post("/v1/servers", server | {"location": MARKUP, "labels": {"<b>": "<i>"}, "notes": MARKUP})
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        wait_for_rows(page, 5)
        assert MARKUP in "\n".join(page.texts("#servers small"))
        page.type("#filter", "onerror")
        page.click("#servers a")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#about').textContent.includes('Notes')")
        assert page.text("#server-title") == name
        assert page.text("#about").count(MARKUP) == 3
        assert page.value("document.querySelectorAll('main img, #servers b, #about b, h1 b').length") == 0
        assert page.value("document.title") == f"{name} – OpenManager"


def test_a_broken_stream_is_told_and_mends_itself(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        wait_for_rows(page, 4)
        page.within(SHOWN_WITHIN_S, "document.querySelector('#live-text').textContent === 'Live'")
        os.kill(guarded.launched.pid_of("gateway"), signal.SIGKILL)
        page.within(5, "document.querySelector('#live').classList.contains('bad')")
        assert "The live stream is broken since" in page.text("#live-text")
        assert len(page.texts("#servers tr")) >= 4, "what was known stays"
        page.within(60, "document.querySelector('#live-text').textContent === 'Live'")
        before = page.texts("#servers .value")
        within(10, lambda: page.texts("#servers .value") != before)


def test_a_gateway_that_hangs_is_noticed(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        wait_for_rows(page, 4)
        frozen = guarded.launched.pid_of("gateway")
        os.kill(frozen, signal.SIGSTOP)
        try:
            page.within(30, "document.querySelector('#live').classList.contains('bad')")
            assert page.text("#live-text").startswith("The gateway does not answer.")
        finally:
            os.kill(frozen, signal.SIGCONT)
        page.within(60, "document.querySelector('#live-text').textContent === 'Live'")


def test_a_store_that_is_away_is_told(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        wait_for_rows(page, 4)
        frozen = guarded.launched.pid_of("metadata")
        os.kill(frozen, signal.SIGSTOP)
        try:
            page.within(30, "document.querySelector('#banners').textContent.includes('postgresql')")
            assert "is down since" in page.text("#banners")
            assert "1 up" in page.text("#stores-summary")
        finally:
            os.kill(frozen, signal.SIGCONT)
        page.within(60, "document.querySelector('#banners').textContent === ''")


def test_a_full_disk_is_told_as_one(guarded: Guarded, browser: Browser) -> None:
    with browser.page() as page:
        page.open(guarded.url)
        log_in(page, "Ada")
        wait_for_rows(page, 4)
        page.value("window.ask = window.fetch; window.fetch = async (...request) => {"
                   " const answer = await window.ask(...request);"
                   " if (!String(request[0].url ?? request[0]).includes('storage')) return answer;"
                   " const text = (await answer.text()).replace(/(\"diskFreeBytes\":\")\\d+/g, '$10');"
                   " return new Response(text, answer); }; 0")  # fmt: skip
        cells = "[...document.querySelectorAll('#stores-rows tr')].map((row) => row.children[4].textContent)"
        page.within(30, f"{cells}.length === 2 && {cells}.every((free) => free === '0 B')")


def test_thousands_of_servers_do_not_freeze_it(tmp_path: Path, browser: Browser) -> None:
    with Launched(tmp_path, SIMULATOR_SERVERS="2000", SIMULATOR_INTERVAL="10s") as launched, browser.page() as page:
        within(60, lambda: launched.get("/v1/fleet/summary").json["total"] == 2000)
        page.open(f"http://{launched.http_address}/")
        page.within(SHOWN_WITHIN_S, "document.querySelector('#shown').textContent.includes('first 200 of 2,000')")
        page.value("window.gaps = []; (function next(last) { requestAnimationFrame((now) => {"
                   " gaps.push(now - last); next(now); }); })(performance.now())")  # fmt: skip
        before = page.texts("#servers .value")
        within(30, lambda: page.texts("#servers .value") != before)
        time.sleep(1)  # frames are counted in it; nothing is waited for
        assert page.value("Math.max(...gaps)") < 1_000, "milliseconds between two frames"
        assert page.value("gaps.length") > 10
        page.type("#filter", "web-1")
        assert "of 2,000 servers" in page.text("#shown")
