"""A product that asks who somebody is, and how a browser says it."""

from typing import Any

from tests.harness.launched import Launched, within
from tests.web.browser import Page

PASSWORD = "correct horse battery staple"
SHOWN_WITHIN_S = 20.0
MARKUP = "<img src=x onerror=document.title='broken'><b>bold</b>"


class Guarded:
    """A product that wants accounts, with a few people in it."""

    def __init__(self, launched: Launched) -> None:
        self.launched = launched
        self.url = f"http://{launched.http_address}/"
        setup = (launched.data / "metadata" / "setup-token").read_text().strip()
        first = {"setupToken": setup, "name": "Ada", "password": PASSWORD}
        self._token = within(30, lambda: launched.post("/v1/users:setUp", first).json.get("tokenSecret"))
        within(10, lambda: launched.get("/v1/session", self._as_ada).status == 200)
        grace = {"name": "Grace", "role": "ROLE_VIEWER", "scope": {"serverIds": ["web-01"]}}
        for user in (grace, {"name": "Bob", "role": "ROLE_VIEWER"}):
            self.post("/v1/users", {"user": user, "password": PASSWORD})

    @property
    def _as_ada(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._token}"}

    def get(self, path: str) -> Any:
        answer = self.launched.get(path, self._as_ada)
        assert answer.status == 200, answer.body
        return answer.json

    def post(self, path: str, body: Any, method: str | None = None) -> Any:
        answer = self.launched.post(path, body, method=method, headers=self._as_ada)
        assert answer.status == 200, answer.body
        return answer.json


def log_in(page: Page, name: str, password: str = PASSWORD) -> None:
    page.within(SHOWN_WITHIN_S, "!document.querySelector('#log-in').hidden")
    page.type("#log-in-name", name)
    page.type("#log-in-password", password)
    page.click("#log-in-button")


def wait_for_rows(page: Page, count: int) -> None:
    page.within(SHOWN_WITHIN_S, f"document.querySelectorAll('#servers tr').length >= {count}")
