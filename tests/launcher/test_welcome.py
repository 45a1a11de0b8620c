"""What the launcher says of who may come in is what the gateway does."""

from pathlib import Path

import pytest

from gateway.settings import GatewaySettings
from launcher.__main__ import _welcome


@pytest.mark.parametrize(
    "written", ["true", "True", "1", "yes", "ON", "t", "y", "false", "0", "no", "off", "f", "n", ""]
)
def test_it_takes_for_accounts_what_the_gateway_does(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.delenv("GATEWAY_TOKEN", raising=False)
    monkeypatch.setenv("GATEWAY_ACCOUNTS", written)
    said = _welcome(Path("data"))
    accounts = GatewaySettings.load({"GATEWAY_ACCOUNTS": written}).accounts
    assert ("whoever has a token" in said) == accounts
    assert ("whoever is on this machine is administrator" in said) != accounts
