"""A browser and a product with accounts, for the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.harness.launched import Launched
from tests.web.browser import Browser, require_chromium
from tests.web.guarded import Guarded


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    require_chromium()
    settings = {"GATEWAY_ACCOUNTS": "true", "SIMULATOR_INTERVAL": "1s", "SIMULATOR_SERVERS": "4"}
    with Launched(tmp_path_factory.mktemp("guarded"), **settings) as launched:
        yield Guarded(launched)
