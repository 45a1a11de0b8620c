"""The page's files: what is served with them, what may not be in them, and that all they name of the API exists."""

import gzip
import re
from collections.abc import AsyncIterator
from graphlib import TopologicalSorter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class

from fleet.access import includes
from fleet.health import DEFAULT_RULES
from fleet.model import HEADLINE_METRICS
from gateway import web
from gateway.access.callers import ANYBODY, Callers
from gateway.http.guard import OPEN_PATHS, Guard
from gateway.http.routes import Route, routes_for
from openmanager.fleet.v1 import anomaly_pb2, history_pb2, metric_pb2, status_pb2
from openmanager.gateway.v1 import fleet_pb2, options_pb2
from services.analytics.silence import DETECTOR as SILENCE
from tests.gateway.http.serving import PACKAGE, SERVICES, Served, serving

ROOT = Path(__file__).resolve().parents[2]
FILES = {name: (web.FOLDER / name).read_text() for name, _ in web.FILES.values()}
HTML = FILES["index.html"]
MODULES = {name: FILES[name] for name in web.SCRIPTS}
IMPORT = re.compile(r"^import \{([^}]+)\} from \"\./([\w-]+\.js)\";$", re.MULTILINE)
"""The only way to import; what else does it is found by the tests."""
CODE = {name: IMPORT.sub("", text) for name, text in MODULES.items()}
SCRIPT = "\n".join(CODE.values())
PAGES = sorted(web.FILES)
SMALL_BYTES = 3_000
"""Up to so many a script repeats little of itself."""


@pytest_asyncio.fixture(scope="module")
async def served() -> AsyncIterator[Served]:
    async with serving(extra=web.routes()) as served:
        yield served


@pytest.mark.parametrize("path", PAGES)
async def test_each_file_is_served_as_what_it_is_and_kept_by_the_browser(served: Served, path: str) -> None:
    name, media_type = web.FILES[path]
    answer = await served.get(path)
    assert answer.status == 200
    assert answer.body.decode() == FILES[name]
    assert answer.headers["content-type"].partition(";")[0] == media_type
    assert answer.headers["cache-control"] == "no-cache", "or an old script might meet a new API"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in answer.headers

    etag = answer.headers["etag"]
    for known in (etag, f'"other", {etag}', "*"):
        again = await served.get(path, if_none_match=known)
        assert (again.status, again.body) == (304, b"")
        assert again.headers["etag"] == etag
    assert (await served.get(path, if_none_match='"other"')).status == 200
    assert (await served.call("HEAD", path)).headers["etag"] == etag
    assert (await served.call("POST", path, {})).status == 405


@pytest.mark.parametrize("path", PAGES)
async def test_what_is_large_is_compressed_for_who_takes_it(served: Served, path: str) -> None:
    plain = await served.get(path)
    packed = await served.get(path, accept_encoding="br, gzip")
    assert plain.headers["vary"] == packed.headers["vary"] == "accept-encoding"
    if len(plain.body) < 1_400:
        assert "content-encoding" not in packed.headers
    else:
        assert packed.headers["content-encoding"] == "gzip"
        assert len(packed.body) < len(plain.body) * (0.5 if len(plain.body) > SMALL_BYTES else 0.6)
        assert gzip.decompress(packed.body) == plain.body


@pytest.mark.parametrize("path", PAGES)
async def test_the_browser_is_told_to_allow_nothing_but_our_own(served: Served, path: str) -> None:
    policy = (await served.get(path)).headers["content-security-policy"]
    assert policy == web.POLICY
    given = dict(each.partition(" ")[::2] for each in policy.split("; "))
    assert given.pop("require-trusted-types-for") == "'script'"
    assert {given.pop(kind) for kind in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert given.pop("default-src") == "'none'"
    assert set(given) == {"form-action", "base-uri", "frame-ancestors", "trusted-types"}
    assert set(given.values()) == {"'none'"}


def test_the_paths_can_be_opened_to_everybody() -> None:
    guard = Guard(Callers("a token", None), open_paths=OPEN_PATHS | web.PATHS)
    for path in PAGES:
        assert guard.admit({"path": path, "headers": [], "method": "GET"}) is ANYBODY


class _Elements(HTMLParser):
    """All elements with their attributes; the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._open in {"script", "style"} and data.strip():
            self.inline.append(data)
        self._open = ""


@pytest.fixture(scope="module")
def elements() -> _Elements:
    parser = _Elements()
    parser.feed(HTML)
    return parser


def test_the_page_has_no_script_and_no_style_in_it(elements: _Elements) -> None:
    assert elements.inline == []
    for tag, attributes in elements.elements:
        assert tag not in {"style", "base", "iframe", "object", "embed"}
        assert not [name for name in attributes if name.startswith("on") or name in {"style", "action", "srcdoc"}], tag
        for name in ("src", "href"):
            address = attributes.get(name) or ""
            assert not address or re.match(r"#|/(?!/)", address), f"{tag} {name}={address}"
        if tag == "script":
            assert (attributes["type"], attributes["src"]) == ("module", "/web/app.js")


def imports(name: str) -> dict[str, set[str]]:
    """Which names a module imports of which others."""
    found: dict[str, set[str]] = {}
    for names, other in IMPORT.findall(MODULES[name]):
        assert other not in found, f"{name} imports {other} twice"
        found[other] = set(filter(None, re.split(r"[,\s]+", names)))
    return found


def exports(name: str) -> set[str]:
    return set(re.findall(r"^export (?:const|let|class|(?:async )?function) ([\w$]+)", CODE[name], re.MULTILINE))


def test_every_module_that_is_imported_is_served_and_announced(elements: _Elements) -> None:
    imported = {other: name for name in MODULES for other in imports(name)}
    for other, name in imported.items():
        assert web.FILES.get(f"/web/{other}") == (other, "text/javascript"), f"{name} imports it"
    assert {path.name for path in web.FOLDER.glob("*.js")} == set(MODULES) == {*imported, "app.js"}
    links = [attributes for tag, attributes in elements.elements if tag == "link"]
    announced = [attributes["href"] for attributes in links if attributes["rel"] == "modulepreload"]
    assert sorted(announced, key=str) == sorted(f"/web/{name}" for name in imported)
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()  # throws when they import in a circle


def test_the_modules_agree_on_names() -> None:
    wanted = set()
    for name, code in CODE.items():
        for other, names in imports(name).items():
            assert names <= exports(other), f"{name} imports what {other} does not export"
            wanted |= names
            for one in map(re.escape, names):
                assert re.search(rf"(?<![\w$.]){one}(?![\w$])", code), f"{name} does not use {one}"
                changed = rf"(?<![\w$.]){one} ?([-+*/%&|?]{{0,3}}=(?![=>])|\+\+|--)"
                assert not re.search(changed, code), f"{name} assigns {one}, which is {other}'s"
    every = [one for name in MODULES for one in exports(name)]
    assert sorted(every) == sorted(wanted), "exported twice, or imported by nobody"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_what_it_uses_of_others(name: str) -> None:
    code = re.sub(r"/\*\*(?s:.*?)\*/|//.*|\"[^\"\n]*\"", "", CODE[name])
    here = exports(name).union(*imports(name).values(), re.findall(r"\b(?:const|let|function) (\w+)", code))
    for one in {one for other in MODULES for one in exports(other)} - here:
        word = re.escape(one)  # called, or neither a key nor among other words of a text
        use = rf"(?<![\w$.])({word}\(|(?<!\w ){word}(?![\w$:/{{]| \w))"
        assert not re.search(use, code), f"{one} is not imported"


def test_what_is_asked_for_again_is_known_by_its_name() -> None:
    known = re.findall(r"^  \{ name: \"(\w+)\", task: \w+, everyS: \d+", MODULES["app.js"], re.MULTILINE)
    assert len(set(known)) == len(known) == MODULES["app.js"].count("task: ")
    assert set(re.findall(r"\bpoll(?:Soon|Every)\(([^,)]+)", SCRIPT)) - {"name"} <= {f'"{name}"' for name in known}


def test_nothing_comes_from_another_server() -> None:
    for name, text in FILES.items():
        plain = text.replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
        assert not re.search(r"\b(https?|wss?|ftp|data|blob|javascript):", plain), name
        assert not re.search(r"""["'(]//""", plain), name
        assert "@import" not in plain, name
    assert "url(" not in FILES["style.css"]


@pytest.mark.parametrize(
    "sink",
    [
        *(r"\.(inner|outer)HTML\b", r"\binsertAdjacentHTML\b", r"\bdocument\.write", r"\bDOMParser\b", r"\bsrcdoc\b"),
        *(r"\beval\s*\(", r"\bFunction\s*\(", r"\bset(Timeout|Interval)\(\s*[\"'`]", r"\bimport\b"),
        *(r"\bexport\s*[*{]", r"\bexport default\b"),
        *(r"setAttribute\(\s*[\"'`](on|style|src|href)", r"\bcreateContextualFragment\b", r"\bdocument\.cookie\b"),
        *(r"\.style\.cssText\b", r"\bconsole\.", r"\bsessionStorage\b", r"\bcreatePolicy\b"),
    ],
)
def test_the_scripts_make_no_markup_and_no_code_of_texts(sink: str) -> None:
    assert not re.search(sink, SCRIPT)


def test_every_element_that_the_scripts_name_is_there(elements: _Elements) -> None:
    ids = [attributes["id"] for _, attributes in elements.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    named = set(re.findall(r"\$\(\"([\w-]+)\"\)", SCRIPT)) | set(re.findall(r"\bon\(\"([\w-]+)\",", SCRIPT))
    named |= set(re.findall(r"fromTemplate\(\"([\w-]+)\"\)", SCRIPT))
    assert named - set(ids) == set()
    references = ("for", "aria-labelledby", "aria-describedby")
    pointed = {attributes[name] for _, attributes in elements.elements for name in references if attributes.get(name)}
    assert pointed - set(ids) == set()


def routes() -> dict[tuple[str, str], Route]:
    services = [default_pool().FindServiceByName(f"{PACKAGE}.{name}") for name in SERVICES]
    return {(route.verb, route.template): route for route in routes_for(services)}


def block(name: str) -> str:
    """What a constant of the scripts is: what stands in its braces, or its line."""
    pattern = rf"^(?:export )?const {name} = (?:\{{\n((?s:.*?))^\}}|([^\n]+));$"
    ((braces, line),) = re.findall(pattern, SCRIPT, re.MULTILINE)
    return str(braces or line)


def calls() -> list[str]:
    return re.findall(r'^  \w+: "([A-Z]+ /\S+)",$', block("CALLS"), re.MULTILINE)


def test_the_calls_are_all_that_is_asked_for() -> None:
    assert len(calls()) == block("CALLS").count("\n"), "a line that the other tests do not see"
    rest = SCRIPT.replace(block("CALLS"), "")
    assert "/v1" not in rest
    assert "/api" not in rest
    assert len(re.findall(r"\bfetch\(", rest)) == 2, "the one of call(), and the one that looks for OpenID"
    assert len(re.findall(r"new EventSource\(", rest)) == 1


@pytest.mark.parametrize("line", calls())
def test_every_call_has_a_route_that_takes_its_parameters(line: str) -> None:
    verb, _, target = line.partition(" ")
    template, _, names = target.partition("?")
    route = routes().get((verb, template))
    assert route is not None, f"nothing is at {verb} {template}"
    fields = {field.name for field in route.method.input_type.fields}
    assert set(filter(None, names.split("&"))) <= fields - set(route.variables)


def test_the_events_are_those_of_the_stream() -> None:
    options = [field.GetOptions().Extensions for field in fleet_pb2.WatchFleetResponse.DESCRIPTOR.fields]
    events = {option[options_pb2.sse_event] for option in options} - {""}
    assert set(re.findall(r"^  (\w+)\(", block("EVENTS"), re.MULTILINE)) == events


def names_of(enum: Any) -> set[str]:
    return set(enum.DESCRIPTOR.values_by_name)


def test_the_words_are_those_of_the_protos(elements: _Elements) -> None:
    statuses = {name.removeprefix("SERVER_STATUS_").lower() for name in names_of(status_pb2.ServerStatus)}
    statuses = statuses - {"unspecified"} | {"unknown", "maintenance"}
    assert set(re.findall(r"(\w+): \d", block("SEVERITY"))) == statuses
    tiles = {attributes["data-status"] for _, attributes in elements.elements if "data-status" in attributes}
    assert {tile or "total" for tile in tiles} == {field.name for field in fleet_pb2.FleetSummary.DESCRIPTOR.fields}
    assert set(re.findall(r"(ROLE_\w+):", block("ROLES"))) == names_of(options_pb2.Role) - {"ROLE_UNSPECIFIED"}
    ways = re.search(r'<select id="aggregation">(.*?)</select>', HTML, re.DOTALL)
    assert ways is not None
    for way in re.findall(r'value="(\w+)"', ways[1]):
        assert f"AGGREGATION_{way}" in names_of(history_pb2.Aggregation)
    assert "METRIC_KIND_COUNTER" in names_of(metric_pb2.MetricKind)
    assert {"STORE_STATE_UP", "STORE_STATE_DEGRADED", "STORE_STATE_DOWN"} <= names_of(status_pb2.StoreState)


def test_findings_are_told_in_the_words_of_who_makes_them(elements: _Elements) -> None:
    verdicts = dict(re.findall(r"(\w+): \"(\w+)\"", block("VERDICTS")))
    assert set(verdicts) == names_of(anomaly_pb2.AnomalyVerdict) - {"ANOMALY_VERDICT_UNSPECIFIED"}
    assert {f"ANOMALY_VERDICT_{word.upper()}" for word in verdicts.values()} == set(verdicts)
    said = [attributes["data-say"] for _, attributes in elements.elements if "data-say" in attributes]
    assert sorted(map(str, said)) == sorted(["care", *verdicts.values()])
    assert f'one.detector === "{SILENCE}"' in SCRIPT


@pytest.mark.parametrize("call", ["acknowledge", "feedback"])
def test_who_may_judge_is_offered_it(call: str) -> None:
    ((verb, template),) = re.findall(rf'^  {call}: "([A-Z]+) (/\S+)",$', block("CALLS"), re.MULTILINE)
    needed = routes()[verb, template].method.GetOptions().Extensions[options_pb2.required_role]
    may = {name for name, role in options_pb2.Role.items() if includes(role, needed)}
    assert set(re.findall(r"ROLE_\w+", block("JUDGES"))) == may


def test_values_are_marked_from_where_the_system_judges_them() -> None:
    rules = (DEFAULT_RULES.cpu, DEFAULT_RULES.memory, DEFAULT_RULES.disk)
    expected = {name: (rule.warning, rule.critical) for name, rule in zip(HEADLINE_METRICS, rules, strict=True)}
    found = re.findall(r"(\w+): \[(\d+), (\d+)\]", block("THRESHOLDS"))
    assert {name: (float(warning), float(critical)) for name, warning, critical in found} == expected


def test_the_reasons_are_given_by_somebody() -> None:
    reasons = set(re.findall(r"^  ([A-Z_]+): ", block("LOG_IN_ERRORS"), re.MULTILINE))
    reasons |= set(re.findall(r"\"([A-Z_]+)\"", block("NOT_FROM_HERE"))) | {"SESSION_ENDED"}
    folders = (ROOT / "gateway", ROOT / "services" / "metadata" / "access")
    sources = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    assert {reason for reason in reasons if f'"{reason}"' not in sources} == set()
