"""A real browser for tests: Chromium without a window, driven over its DevTools protocol.

The protocol is spoken over two pipes (--remote-debugging-pipe: JSON texts that end with a zero byte), which needs no
port and no library. Each page is held to more than its test asks for: what its script throws and what the browser logs
as an error, such as what the content security policy had to block, fails the test when the page is closed.
"""

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Final, Self

import pytest

from tests.harness.launched import within

PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWER_WITHIN_S: Final = 30.0
_FLAGS: Final = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers, where Chromium has no other way
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--password-store=basic",
    "--hide-scrollbars",
)


def require_chromium() -> str:
    """The path of the program, or the test is skipped visibly (in CI: fails)."""
    for name in PROGRAMS:
        path = shutil.which(name)
        if path is not None:
            return path
    pytest.skip("chromium is not on PATH (Debian: chromium)")


class Browser:
    """One process; every page has a profile of its own, and so no cookies."""

    def __init__(self, folder: Path) -> None:
        commands, self._commands = os.pipe()
        self._messages, messages = os.pipe()
        line = f'exec "$@" 3<&{commands} 4>&{messages}'
        program = [require_chromium(), *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        with (folder / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["/bin/bash", "-c", line, "bash", *program], pass_fds=(commands, messages), stdout=log, stderr=log
            )
        os.close(commands)
        os.close(messages)
        self._writing = threading.Lock()
        self._last_id = 0
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read, name="chromium", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._messages, 1 << 20):
            *whole, rest = (rest + chunk).split(b"\0")
            for message in map(json.loads, whole):
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].happened(message["method"], message["params"])

    def tell(self, method: str, session: str | None = None, /, **params: Any) -> Queue[dict[str, Any]]:
        """One command, and where its answer will be."""
        queue: Queue[dict[str, Any]] = Queue()
        with self._writing:
            self._last_id += 1
            self._answers[self._last_id] = queue
            message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
            if session is not None:
                message["sessionId"] = session
            data = json.dumps(message).encode() + b"\0"
            while data:
                data = data[os.write(self._commands, data) :]
        return queue

    def ask(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        queue = self.tell(method, session, **params)
        try:
            answer = queue.get(timeout=ANSWER_WITHIN_S)
        except Empty:
            raise AssertionError(f"{method}: no answer within {ANSWER_WITHIN_S} s") from None
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    @contextmanager
    def page(self, width: int = 1280, height: int = 900, **media: str) -> Iterator["Page"]:
        """A window of this size. `media`: features as the sheet asks for them, such as prefers_color_scheme="dark"."""
        context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        page.ask("Emulation.setEmulatedMedia", features=features)
        try:
            yield page
        finally:
            self.ask("Target.disposeBrowserContext", browserContextId=context)
            del self._pages[session]
        assert page.complaints == [], page.complaints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._commands)  # it ends with its pipe
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(15)
        self._reader.join(15)
        os.close(self._messages)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self._answer: dict[str, Any] = {}
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def happened(self, method: str, params: Mapping[str, Any]) -> None:
        """What the browser tells."""
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            if params["entry"]["source"] != "network":  # an error status may be what the test is about
                self.complaints.append(params["entry"]["text"])
        elif method == "Fetch.requestPaused":
            self._browser.tell("Fetch.fulfillRequest", self._session, requestId=params["requestId"], **self._answer)
        elif method == "Network.requestWillBeSent":
            self.requests.append(f"{params['request']['method']} {params['request']['url']}")

    def ask(self, method: str, /, **params: Any) -> dict[str, Any]:
        """One command about this tab."""
        return self._browser.ask(method, self._session, **params)

    def open(self, url: str) -> None:
        """Goes there, and does not wait for anything."""
        self.ask("Page.navigate", url=url)

    def answer(self, url: str, status: int, **headers: str) -> None:
        """Answers what the page asks for at these addresses (a pattern with *) in place of the server."""
        pairs = [{"name": name, "value": value} for name, value in headers.items()]
        self._answer = {"responseCode": status, "responseHeaders": pairs}
        self.ask("Fetch.enable", patterns=[{"urlPattern": url}])

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is worth; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def within(self, bound_s: float, expression: str) -> Any:
        """Waits until an expression throws no more and is true; returns its value, of an element true."""
        shown = f"(() => {{ try {{ const it = {expression}; return it instanceof Node || it; }} catch {{ }} }})()"
        return within(bound_s, lambda: self.value(shown))

    def text(self, selector: str) -> str:
        """What is to be read there; "" where there is nothing."""
        return str(self.value(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def texts(self, selector: str) -> list[str]:
        """What is to be read at each of them."""
        found: list[str] = self.value(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.innerText)"
        )
        return found

    def click(self, selector: str) -> None:
        """As a script does it."""
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Into a field, as the keyboard does it."""
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.ask("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """What is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))
