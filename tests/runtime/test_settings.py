"""Settings are typed, all problems are told at once, and secrets stay secret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from runtime.settings import (
    Address,
    ByteSize,
    CommonSettings,
    Duration,
    SettingsError,
    Target,
    Targets,
    is_loopback,
    load,
    parse_byte_size,
    parse_duration,
    setting,
    split_address,
)

ROOT = Path(__file__).parents[2]


class CacheSettings(CommonSettings):
    cache_address: Address = setting("CACHE_ADDRESS", "127.0.0.1:50051", "Where it listens.")
    metadata_target: Target = setting("METADATA_TARGET", "127.0.0.1:50053", "Whom it asks.")
    interval_s: Duration = setting("CACHE_INTERVAL", "10s", "How often.", gt=0)
    spool_bytes: ByteSize = setting("CACHE_SPOOL", "8GiB", "How much.")
    servers: int = setting("CACHE_SERVERS", 20, "How many.", ge=1, le=100)
    redis_url: str | None = setting("REDIS_URL", None, "Where Redis is.")
    token: SecretStr | None = setting("INFLUXDB_TOKEN", None, "Token.", min_length=4)
    kept_s: Duration | None = setting("CACHE_KEPT", None, "How long.", ge=86_400)
    journal_bytes: ByteSize = setting("CACHE_JOURNAL", "8MiB", "How much.", ge=1 << 20)
    lasting: bool = setting("CACHE_LASTING", False, "Whether.")


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        CacheSettings.load(environ)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def test_defaults_are_parsed_and_unknown_variables_are_ignored() -> None:
    settings = load(CacheSettings, {"SOMETHING_ELSE": "x", "PATH": "/bin", "cache_servers": "1"})
    assert settings.data_dir == Path("./data")
    assert (settings.interval_s, settings.spool_bytes, settings.servers) == (10.0, 8 << 30, 20)
    assert settings.service_secret is None


def test_values_come_from_variables_of_exactly_that_name() -> None:
    settings = CacheSettings.load(
        {"CACHE_ADDRESS": "[::1]:7", "CACHE_INTERVAL": "250ms", "CACHE_SERVERS": "3", "DATA_DIR": "/d", "REDIS_URL": ""}
    )
    assert (settings.cache_address, settings.interval_s, settings.servers) == ("[::1]:7", 0.25, 3)
    assert (settings.data_dir, settings.redis_url) == (Path("/d"), None)


def test_only_load_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_SERVERS", "7")
    assert CacheSettings().servers == 20
    assert CacheSettings.load().servers == 7


def test_every_bad_setting_is_named_in_one_message() -> None:
    assert problems(
        {
            "CACHE_ADDRESS": "abc",
            "METADATA_TARGET": "nowhere",
            "CACHE_INTERVAL": "10",
            "CACHE_SPOOL": "8GB",
            "CACHE_SERVERS": "0",
            "LOG_LEVEL": "LOUD",
            "TLS_CERT_FILE": "/nonexistent/cert.pem",
            "SERVICE_SECRET": "short",
        }
    ) == [
        "LOG_LEVEL: 'LOUD' should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
        "CACHE_ADDRESS: 'abc' is not host:port",
        "METADATA_TARGET: 'nowhere' is not host:port nor a gRPC target such as dns:///host:port",
        "CACHE_INTERVAL: '10' is not a duration such as 250ms, 10s, 5m, 1h or 7d",
        "CACHE_SPOOL: '8GB' is not a size such as 512MiB or 8GiB",
        "CACHE_SERVERS: '0' should be greater than or equal to 1",
        "TLS_KEY_FILE: must be set too, since TLS_CERT_FILE is",
        "TLS_CERT_FILE: '/nonexistent/cert.pem' cannot be read",
        "SERVICE_SECRET: shorter than 16 characters",
    ]


def test_what_is_allowed_is_said_as_it_is_written() -> None:
    told = problems(
        {
            "CACHE_KEPT": "90m",
            "CACHE_JOURNAL": "1KiB",
            "CACHE_LASTING": "sure",
            "CACHE_SERVERS": "0",
            "INFLUXDB_TOKEN": "x",
        }
    )
    assert sorted(told) == [
        "CACHE_JOURNAL: '1KiB' should be greater than or equal to 1MiB",
        "CACHE_KEPT: '90m' should be greater than or equal to 1d",
        "CACHE_LASTING: 'sure' should be true or false",
        "CACHE_SERVERS: '0' should be greater than or equal to 1",
        "INFLUXDB_TOKEN: should have at least 4 characters",
    ]


@pytest.mark.parametrize(
    ("locale", "name", "wrong"),
    [
        ("C.UTF-8", b"d\xc3\xa4ta", False),
        ("C.UTF-8", b"d\xe4ta", True),
        ("C", b"d\xc3\xa4ta", True),
        ("C", b"data", False),
    ],
)
def test_a_folder_whose_name_no_database_could_be_told_is_refused(locale: str, name: bytes, wrong: bool) -> None:
    code = (
        "from runtime.settings import *\ntry: CommonSettings.load()\nexcept SettingsError as error: print(ascii(error))"
    )
    environ = {
        b"PATH": os.environb[b"PATH"],
        b"LC_ALL": locale.encode(),
        b"PYTHONUTF8": b"0",
        b"DATA_DIR": b"/x/" + name,
    }
    said = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environ, stdout=subprocess.PIPE)
    assert (b"DATA_DIR: " in said.stdout and b"is not UTF-8 with this locale" in said.stdout) == wrong


def test_blanks_are_no_targets() -> None:
    """They were none at all: a sender with nobody to send to started, and said nothing."""

    class Sender(CommonSettings):
        targets: Targets = setting("TARGETS", "127.0.0.1:1", "Whom it asks.")
        peers: Targets = setting("PEERS", (), "Who else.")

    assert Sender.load({"TARGETS": "", "PEERS": ""}).targets == ("127.0.0.1:1",)
    with pytest.raises(SettingsError) as caught:
        Sender.load({"TARGETS": " ", "PEERS": "a:1,"})
    assert [line.partition(" is not host:port")[0] for line in caught.value.problems] == ["TARGETS: ''", "PEERS: ''"]


def test_an_open_address_without_tls_is_refused(tmp_path: Path) -> None:
    assert problems({"CACHE_ADDRESS": "0.0.0.0:50051"}) == [
        "CACHE_ADDRESS: '0.0.0.0:50051' is not a loopback address: set TLS_CERT_FILE and TLS_KEY_FILE"
    ]
    pem = tmp_path / "x.pem"
    pem.touch()
    files = {"TLS_CERT_FILE": str(pem), "TLS_KEY_FILE": str(pem)}
    assert CacheSettings.load({"CACHE_ADDRESS": "0.0.0.0:50051", **files}).cache_address == "0.0.0.0:50051"


def test_secrets_are_in_no_text() -> None:
    settings = CacheSettings.load(
        {
            "SERVICE_SECRET": "correct-horse-battery",
            "INFLUXDB_TOKEN": "staple-staple",
            "REDIS_URL": "redis://user:pa55word@host:6379",
        }
    )
    for text in (repr(settings), str(settings), f"{settings}"):
        assert "redis://user:***@host:6379" in text
        for secret in ("correct-horse", "staple", "pa55word"):
            assert secret not in text
    (line,) = problems({"INFLUXDB_TOKEN": "a!b"})
    assert line.startswith("INFLUXDB_TOKEN: should have at least 4")
    assert "a!b" not in line
    (line,) = problems({"CACHE_ADDRESS": "redis://user:pa55word@host"})
    assert "pa55word" not in line


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CacheSettings().servers = 1


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:65535", ("::1", 65535)), ("cache.local:1", ("cache.local", 1))],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["", "abc", ":1", "a:", "a:65536", "a:-1", "a:1x", "::1:1", "[]:1", "[abc]:1", "http://a:1", "a b:1", "a:²"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_hosts(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_durations_and_sizes() -> None:
    assert [parse_duration(text) for text in ("10s", "1.5s", "250ms", "5m", "1h", "7d")] == [
        10,
        1.5,
        0.25,
        300,
        3600,
        604800,
    ]
    assert [parse_byte_size(text) for text in ("512MiB", "8GiB", "1KiB", "5B", "77")] == [
        512 << 20,
        8 << 30,
        1024,
        5,
        77,
    ]
    for bad in ("", "s", "-1s", "1 week", "1e3s", "nan s", "inf", "9" * 400 + "s", "9" * 400 + "GiB"):
        with pytest.raises(ValueError, match="is not a duration"):
            parse_duration(bad)
        with pytest.raises(ValueError, match="is not a size"):
            parse_byte_size(bad)


@pytest.mark.parametrize("written", [" ", "http://", "http://[::1", "http://collector: 4317", "collector\n"])
def test_an_endpoint_that_nothing_could_be_sent_to_is_refused(written: str) -> None:
    """One that is no URL ended every process with a traceback, and the others said so with each batch, for ever."""
    (told,) = problems({"OTEL_EXPORTER_OTLP_ENDPOINT": written})
    assert told == f"OTEL_EXPORTER_OTLP_ENDPOINT: {written!r} is not a URL such as http://host:4317"


@pytest.mark.parametrize("written", ["http://collector:4317", "https://[::1]:4317/", "collector:4317", "collector"])
def test_an_endpoint_may_be_written_as_opentelemetry_takes_it(written: str) -> None:
    assert CacheSettings.load({"OTEL_EXPORTER_OTLP_ENDPOINT": written}).otel_exporter_otlp_endpoint == written
