"""What the launcher says of who may come in is what the gateway does."""

import shlex
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


def test_the_command_that_it_shows_can_be_copied_whatever_the_folder_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_ACCOUNTS", "true")
    shown = next(line for line in _welcome(Path("/srv/our $data")).splitlines() if "openmanager setup" in line)
    assert "/srv/our $data/metadata/setup-token" in shlex.split(shown)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["setup", "ann", "--setup-token-file", "data/metadata/setup-token"]),
        ({"GATEWAY_GRPC_ADDRESS": "127.0.0.1:9000"}, ["--address", "127.0.0.1:9000"]),
        ({"TLS_CERT_FILE": "/tls.crt"}, ["--address", "https://127.0.0.1:50050"]),
    ],
)
def test_the_command_that_it_shows_reaches_the_gateway(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: list[str]
) -> None:
    for name in ("GATEWAY_GRPC_ADDRESS", "TLS_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"GATEWAY_ACCOUNTS": "true"} | settings).items():
        monkeypatch.setenv(name, value)
    shown = next(line for line in _welcome(Path("data")).splitlines() if "openmanager setup" in line)
    assert shown.replace("NAME", "ann").split()[-len(words) :] == words
