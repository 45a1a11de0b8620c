"""The pages tell the truth: every setting, reason and telemetry name is in them, and links lead somewhere."""

import re
from pathlib import Path

from tools import document_settings

ROOT = Path(__file__).resolve().parents[2]
CODE = [path for folder in ("runtime", "fleet", "services", "gateway") for path in (ROOT / folder).rglob("*.py")]


def documented(page: str) -> set[str]:
    """Everything in backquotes on a page."""
    return set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / page).read_text()))


def named(pattern: str) -> set[str]:
    """What the groups of a pattern match in the code."""
    return {name for path in CODE for name in re.findall(pattern, path.read_text(), re.MULTILINE)}


def test_the_settings_page_is_written_from_the_code() -> None:
    assert document_settings.PAGE.read_text() == document_settings.page(), "run `make docs`"


def test_the_settings_page_says_which_words_a_setting_takes() -> None:
    page = document_settings.page()
    assert "One of `synthetic`, `replay`, `host`." in page
    assert "One of `local`, `remote`." in page
    assert "| `TIMESERIES_PEERS` |  |" in page
    assert "| `AUDIT_LEGAL_HOLD` | `false` |" in page


def test_every_reason_is_explained() -> None:
    reasons = named(r'(?:reason=|REASON[^=\n]*= |default_reason(?:: ClassVar\[str\])? = )"([A-Z_]+)"')
    plain = {name for name in reasons if f"`{name}`" not in (ROOT / "docs" / "errors.md").read_text()}
    page = (ROOT / "docs" / "errors.md").read_text()
    assert {name for name in plain if not re.search(rf"\b{name}\b", page)} == set()
    assert "METRIC_SET_UNKNOWN" in reasons


def test_every_span_and_metric_is_listed() -> None:
    spans = named(r'start_(?:as_current_)?span\(\s*"([a-z_.]+)"') | named(r'_SPAN[^=\n]*= "([a-z_.]+)"')
    metrics = named(r'create_\w+\(\s*"([a-z_.]+)"') | named(r'^    \("(openmanager\.[a-z_.]+)", ')
    metrics |= named(r'^METRIC[^=\n]*= "([a-z_]+\.[a-z_.]+)"')
    assert {"fleet.write", "journal.commit", "rpc.server.call.duration"} <= spans | metrics
    assert (spans | metrics) - documented("telemetry.md") == set()


def test_links_between_pages_lead_somewhere() -> None:
    clients = ROOT / "examples" / "clients"
    pages = [*(ROOT / "docs").rglob("*.md"), *clients.glob("*.md"), *clients.glob("*/README.md")]
    assert len(pages) > 10
    for page in [ROOT / "README.md", *pages]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
