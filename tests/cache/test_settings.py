"""Settings that make no sense are told by name and without their secrets."""

import pytest

from runtime.settings import SettingsError
from services.cache.settings import CacheSettings


def test_the_defaults() -> None:
    settings = CacheSettings.load({})
    assert (settings.cache_address, settings.redis_url) == ("127.0.0.1:50051", None)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1",
        "redis://[::1]:6379/3",
        "rediss://user:pa%2Fss@redis.example:6380/0?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=true",
        "redis+sentinel://user:pa%2Fss@a,b:1,[::1]:2/mymaster/3?sentinel_password=pa%2Fss",
        "rediss+sentinel://a/mymaster?ssl_ca_certs=/etc/ca.pem",
        "redis+cluster://user:pa%2Fss@a:7000,b:7001",
        "rediss+cluster://a",
    ],
)
def test_urls_of_redis(url: str) -> None:
    settings = CacheSettings.load({"REDIS_URL": url})
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == url
    assert "pa%2Fss" not in repr(settings) + str(settings)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host:1",
        "hunter2",
        "redis://",
        "redis://user:hunter2@host:port",
        "redis://host:hunter2",
        "redis://user:hunter2@host:0",
        "redis://user:hunter2@host:1/database",
        "redis://user:hunter2@host:1?socket_timeout=hunter2",
        "rediss://user:hunter2@host:1?hunter2=1",
        "unix:///tmp/hunter2.sock",
        "redis+sentinel://:hunter2@host:1",
        "redis+sentinel://:hunter2@host:1/service/hunter2",
        "redis+sentinel://:hunter2@host:1,/service",
        "redis+cluster://:hunter2@host:1/0",
        "redis+cluster://:hunter2@host:1?sentinel_password=hunter2",
        "redis+hunter2://host:1",
        "redis://:hunter2@a,b",
    ],
)
def test_what_is_no_url_of_redis_is_refused_by_name_and_without_its_text(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        CacheSettings.load({"REDIS_URL": url, "CACHE_ADDRESS": "nowhere"})
    lines = sorted(caught.value.problems)
    assert [line.split(":")[0] for line in lines] == ["CACHE_ADDRESS", "REDIS_URL"]
    assert "hunter2" not in str(caught.value)


def test_an_address_beyond_this_machine_wants_tls() -> None:
    with pytest.raises(SettingsError, match=r"CACHE_ADDRESS.*TLS_CERT_FILE"):
        CacheSettings.load({"CACHE_ADDRESS": "0.0.0.0:50051"})
