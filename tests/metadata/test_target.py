"""DATABASE_URL: what is understood, what is refused, and that no part of a secret comes back out."""

import pytest

from runtime.settings import SettingsError
from services.metadata.settings import MetadataSettings
from services.metadata.target import target_of_url

SECRET = "s3cr3t-w0rd"


@pytest.mark.parametrize(
    ("url", "hosts", "address"),
    [
        ("postgresql://db/om", [("db", 5432)], "db:5432/om"),
        ("postgres://u:p@db:6000", [("db", 6000)], "db:6000"),
        (f"postgresql://u:{SECRET}@a,b:6000,c/om", [("a", 5432), ("b", 6000), ("c", 5432)], "a:5432,b:6000,c:5432/om"),
        ("postgresql://u@[::1]:6000,[fe80::1%25eth0]/om", [("::1", 6000), ("fe80::1%eth0", 5432)], None),
        ("postgresql:///om?host=/run/postgresql", [("/run/postgresql", 5432)], "/run/postgresql:5432/om"),
        ("postgresql://%2Frun%2Fpg:6543/om?port=6543", [("/run/pg", 6543)], None),
        ("postgresql://?host=a,b&port=1,2&dbname=om", [("a", 1), ("b", 2)], "a:1,b:2/om"),
        ("postgresql://u:%40%2F%3F@db/om?sslmode=require", [("db", 5432)], "db:5432/om"),
    ],
)
def test_urls_are_understood(url: str, hosts: list[tuple[str, int]], address: str | None) -> None:
    target = target_of_url(url)
    assert list(target.hosts) == hosts
    assert target.role == "primary"
    assert address is None or target.address == address
    assert target.options["target_session_attrs"] == "read-write"


def test_a_url_may_ask_for_other_session_attributes() -> None:
    assert "target_session_attrs" not in target_of_url("postgresql://db/om?target_session_attrs=any").options


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"mysql://u:{SECRET}@db/om", "must begin with postgresql://"),
        (SECRET, "must begin with postgresql://"),
        (f"postgresql://u:{SECRET}@", "must name a host"),
        (f"postgresql://u:a@{SECRET}@db/om", "write %40"),
        (f"postgresql://u:x#{SECRET}@db/om", "write %40 or %23"),
        (f"postgresql://u:a/{SECRET}@db/om", "must name a host"),
        (f"postgresql://u:a?{SECRET}=@db/om", "has a parameter that is not one of"),
        (f"postgresql://u:a?{SECRET}", "percent-encoded"),
        (f"postgresql://u:{SECRET}@db:0/om", "port outside"),
        (f"postgresql://u:{SECRET}@db:65536/om", "port outside"),
        (f"postgresql://u:{SECRET}@db:no/om", "must name a host"),
        (f"postgresql://u:{SECRET}@a,,b/om", "must name a host"),
        (f"postgresql://u:{SECRET}@[::1/om", "percent-encoded"),
        (f"postgresql://u:{SECRET}@db/om?sslmode=on", "sslmode must be one of"),
        (f"postgresql://u:{SECRET}@db/om?target_session_attrs=x", "target_session_attrs must be one of"),
        (f"postgresql://u:{SECRET}@db/om?connect_timeout=3", "has a parameter that is not one of"),
        (f"postgresql://u:{SECRET}@{','.join('abcdefghi')}/om", "more than 8 hosts"),
        (f"postgresql://u:{SECRET}@a,b/om?port=1,2,3", "one port"),
    ],
)
def test_a_bad_url_is_a_settings_error_that_quotes_nothing(url: str, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        MetadataSettings.load({"DATABASE_URL": url, "METADATA_ADDRESS": "nowhere"})
    (line,) = [line for line in refused.value.problems if line.startswith("DATABASE_URL: ")]
    assert says in line
    assert SECRET not in str(refused.value)
    assert any(line.startswith("METADATA_ADDRESS: ") for line in refused.value.problems)


def test_no_repr_shows_the_password() -> None:
    url = f"postgresql://user:{SECRET}@db/om?sslpassword={SECRET}"
    settings = MetadataSettings.load({"DATABASE_URL": url})
    target = target_of_url(url)
    for text in (repr(settings), str(settings), repr(target), target.address):
        assert SECRET not in text
    assert "user" not in target.address
    assert SECRET in target.secrets


def test_defaults() -> None:
    settings = MetadataSettings.load({})
    assert settings.metadata_address == "127.0.0.1:50053"
    assert settings.database_url is None


@pytest.mark.parametrize("name", ["METADATA_AI_RETENTION", "METADATA_SESSION_LIFETIME", "AUDIT_RETENTION"])
def test_a_span_that_no_date_can_say_is_refused(name: str) -> None:
    """PostgreSQL and Python have no date for it: log-in and the deletion of what is old failed each time."""
    MetadataSettings.load({name: "36500d"})
    with pytest.raises(SettingsError, match=f"{name}: '999999d' should be less than or equal to 36500d"):
        MetadataSettings.load({name: "999999d"})
