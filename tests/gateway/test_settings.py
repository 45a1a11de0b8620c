"""The gateway never listens beyond this machine without authentication and TLS, and names what to set."""

import pytest

from gateway.settings import GatewaySettings
from runtime.settings import SettingsError

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"GATEWAY_HTTP_ADDRESS": "0.0.0.0:8080"}, ("GATEWAY_TOKEN", "TLS_CERT_FILE", "TRUSTED_PROXY")),
        ({"GATEWAY_GRPC_ADDRESS": "[::]:50050"}, ("GATEWAY_TOKEN", "TLS_CERT_FILE")),
        ({"GATEWAY_HTTP_ADDRESS": "0.0.0.0:8080", "GATEWAY_TOKEN": TOKEN}, ("TLS_CERT_FILE", "TRUSTED_PROXY")),
        ({"GATEWAY_HTTP_ADDRESS": "0.0.0.0:8080", "TRUSTED_PROXY": "10.0.0.0/8"}, ("GATEWAY_TOKEN",)),
        ({"TRUSTED_PROXY": "everyone"}, ("TRUSTED_PROXY",)),
        ({"GATEWAY_TOKEN": "short"}, ("GATEWAY_TOKEN",)),
    ],
)
def test_unsafe_settings_are_refused(environ: dict[str, str], named: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as refused:
        GatewaySettings.load(environ)
    for name in named:
        assert name in str(refused.value)
    assert "short" not in str(refused.value), "a secret is not shown"


@pytest.mark.parametrize("env", ["GATEWAY_TOKEN", "SERVICE_SECRET"])
def test_a_secret_that_no_header_carries_is_refused(env: str) -> None:
    for secret, why in (
        (f"{TOKEN}\n", "a line's end"),
        (f" {TOKEN}", "white space"),
        (" " * 16, "white space"),
        (f"{TOKEN}\x00{TOKEN}", "printable ASCII"),
        (f"{TOKEN}\N{LATIN SMALL LETTER A WITH DIAERESIS}", "printable ASCII"),
        ("x", "16 characters"),
    ):
        with pytest.raises(SettingsError) as refused:
            GatewaySettings.load({env: secret})
        (line,) = refused.value.problems
        assert line.startswith(f"{env}: ") and why in line and TOKEN not in line
    GatewaySettings.load({env: f"{TOKEN} with spaces, and punctuation"})


def test_a_proxy_and_a_token_are_enough() -> None:
    environ = {"GATEWAY_HTTP_ADDRESS": "0.0.0.0:8080", "TRUSTED_PROXY": "10.0.0.0/8", "GATEWAY_TOKEN": TOKEN}
    settings = GatewaySettings.load(environ)
    assert TOKEN not in repr(settings)


def test_the_defaults_are_loopback() -> None:
    settings = GatewaySettings.load({})
    assert (settings.grpc_address, settings.http_address) == ("127.0.0.1:50050", "127.0.0.1:8080")
