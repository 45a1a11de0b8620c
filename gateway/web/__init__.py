"""The web page at `/`: a shell, its scripts and its style. All that they show they ask the API for, as any client does.

What must stay true: nothing in these files tells anything of the fleet, so everybody may be served them, before he has
logged in; no script and no style stands in the page itself, and nothing comes from another server (POLICY, which the
browser holds the page to); the files are read once, at start.
"""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.http.compression import MIN_BYTES, accepts_gzip, compress

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
FOLDER: Final = Path(__file__).parent
SCRIPTS: Final = (
    "app.js",  # the entry
    "calls.js",
    "elements.js",
    "finding-words.js",
    "findings.js",
    "fleet-table.js",
    "fleet.js",
    "history.js",
    "live.js",
    "plot.js",
    "polls.js",
    "problems.js",
    "routing.js",
    "server-findings.js",
    "server-page.js",
    "session.js",
    "shown-server.js",
    "stores.js",
    "stream.js",
    "summary.js",
    "times-and-units.js",
)
FILES: Final = {
    "/": ("index.html", "text/html"),
    **{f"/web/{name}": (name, "text/javascript") for name in SCRIPTS},
    "/web/style.css": ("style.css", "text/css"),
    "/web/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""What is served where, and as what."""
PATHS: Final = frozenset(FILES)
"""To be open to everybody: who has not logged in yet needs them to log in."""

_Endpoint = Callable[[Request], Awaitable[Response]]


def routes() -> list[Route]:
    """The routes of the page. OSError when a file cannot be read."""
    return [
        Route(path, _endpoint((FOLDER / name).read_bytes(), media_type)) for path, (name, media_type) in FILES.items()
    ]


def _endpoint(body: bytes, media_type: str) -> _Endpoint:
    etag = sha256(body).hexdigest()[:32]
    packed = compress(body) if len(body) >= MIN_BYTES else None
    headers = {
        "cache-control": "no-cache",  # kept, and asked about each time: after an update no old script meets a new API
        "content-security-policy": POLICY,
        "etag": f'W/"{etag}"',  # weak: compressed it has other bytes
        "vary": "accept-encoding",
    }

    async def serve(request: Request) -> Response:
        if _has(request.headers.get("if-none-match"), etag):
            return Response(status_code=304, headers=headers)
        if packed is not None and accepts_gzip(request.headers.get("accept-encoding")):
            return Response(packed, headers=headers | {"content-encoding": "gzip"}, media_type=media_type)
        return Response(body, headers=headers, media_type=media_type)

    return serve


def _has(known: str | None, etag: str) -> bool:
    """Whether If-None-Match names the tag."""
    if known is None:
        return False
    tags = [tag.strip().removeprefix("W/").strip('"') for tag in known.split(",")]
    return "*" in tags or etag in tags
