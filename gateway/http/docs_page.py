"""/docs: the OpenAPI document as one plain page, complete without scripts and without another server.

What must stay true: every text of the document is escaped; the page may load nothing (see POLICY).
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from typing import Any, Final

from gateway.http.headers import OF_EVERY_REQUEST

_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { font: 14px ui-monospace, monospace; }
details { border-top: 1px solid #8884; padding: .4rem 0; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 4.5rem; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #8882; padding: .2rem .8rem .2rem 0; vertical-align: top; }
"""
_STYLE_HASH: Final = b64encode(sha256(_STYLE.encode()).digest()).decode()
POLICY: Final = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; frame-ancestors 'none'"


def render(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document of ours."""
    info = document["info"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} API</h1>{_text(info['description'])}",
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>.</p>',
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2>{_text(tag['description'])}")
        parts += [
            _operation(path, verb, operation, _parameters(document, operation))
            for path, verbs in document["paths"].items()
            for verb, operation in verbs.items()
            if tag["name"] in operation["tags"]
        ]
    parts.append("<h2>Types</h2>")
    parts += [_type(name, schema) for name, schema in document["components"]["schemas"].items()]
    parts.append("</body></html>")
    return "\n".join(parts)


def _text(text: str) -> str:
    """A comment: backquotes become code."""
    pieces = escape(text).split("`")
    return (
        "<p>" + "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces)) + "</p>"
    )


def _parameters(document: Mapping[str, Any], operation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters of an operation without the headers that all have, which the text at the top names."""
    known = document["components"]["parameters"]
    resolved = [known[each["$ref"].rpartition("/")[2]] if "$ref" in each else each for each in operation["parameters"]]
    return [parameter for parameter in resolved if parameter["name"] not in OF_EVERY_REQUEST]


def _operation(path: str, verb: str, operation: Mapping[str, Any], parameters: Sequence[Mapping[str, Any]]) -> str:
    rows = [(parameter["name"], parameter["in"], parameter) for parameter in parameters]
    body = operation.get("requestBody")
    if body:
        rows.append(("body", _kind(next(iter(body["content"].values()))["schema"]), body))
    media = operation["responses"]["200"].get("content", {})
    answers = ", ".join(f"{escape(name)}: {_kind(content['schema'])}" for name, content in media.items())
    return (
        f"<details><summary><b>{escape(verb.upper())}</b> <code>{escape(path)}</code> "
        f"{escape(operation['summary'])}</summary>{_text(operation['description'])}{_table(rows)}"
        f"<p>Answers {answers}</p></details>"
    )


def _type(name: str, schema: Mapping[str, Any]) -> str:
    rows = [(field, _kind(inner), inner) for field, inner in schema.get("properties", {}).items()]
    anchor = escape(name, quote=True)
    return (
        f'<details id="{anchor}"><summary><code>{anchor}</code></summary>'
        f"{_text(schema.get('description', ''))}{_table(rows)}</details>"
    )


def _table(rows: list[tuple[str, str, Mapping[str, Any]]]) -> str:
    if not rows:
        return ""
    lines = [
        f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{_text(about.get('description', ''))}</td></tr>"
        for name, kind, about in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _kind(schema: Mapping[str, Any]) -> str:
    """The type of a schema in few words, as HTML."""
    if "$ref" in schema:
        name = escape(str(schema["$ref"]).rpartition("/")[2], quote=True)
        return f'<a href="#{name}"><code>{name.rpartition(".")[2]}</code></a>'
    if "oneOf" in schema and "properties" in schema["oneOf"][0]:
        return ", ".join(_event(each["properties"]) for each in schema["oneOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    if "additionalProperties" in schema:
        return f"map of {_kind(schema['additionalProperties'])}"
    return escape(str(schema.get("format") or schema.get("type") or "number"))


def _event(properties: Mapping[str, Any]) -> str:
    """One kind of Server-Sent Event: its name, and the type of its data."""
    name = properties.get("event", {"const": "message"})["const"]
    return f"{escape(name)}: {_kind(properties['data']['contentSchema'])}"
