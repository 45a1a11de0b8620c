"""A setting that is written wrongly is told, with the right one; nothing else in the environment is."""

from pathlib import Path

import pytest

from runtime.misspelt import misspelt
from tests.runtime.test_process import started
from tools.document_settings import CLASSES, settings_class

ALL = {process: settings_class(process) for process in CLASSES}
RIGHT = {name: "x" for settings in ALL.values() for name in settings.env_names().values()} | {
    f"{process.upper()}_TARGET": "x" for process in ALL
}


def told(process: str, *names: str) -> list[str]:
    return list(misspelt(ALL[process], process, dict.fromkeys(names, "x")))


@pytest.mark.parametrize(
    ("process", "written", "meant"),
    [
        ("timeseries", "TIMESERIES_RETENSION_RAW", "TIMESERIES_RETENTION_RAW"),
        ("timeseries", "TIME_SERIES_RETENTION_RAW", "TIMESERIES_RETENTION_RAW"),
        ("timeseries", "timeseries_disk_limit", "TIMESERIES_DISK_LIMIT"),
        ("timeseries", "INFLUX_DB_URL", "INFLUXDB_URL"),
        ("cache", "REDIS_ULR", "REDIS_URL"),
        ("metadata", "DATABSE_URL", "DATABASE_URL"),
        ("metadata", "AUDIT_RETENTIONS", "AUDIT_RETENTION"),
        ("gateway", "GATEWAY_WORKER", "GATEWAY_WORKERS"),
        ("gateway", "GATEWAY_ACOUNTS", "GATEWAY_ACCOUNTS"),
        ("gateway", "OIDC_CLIENTID", "OIDC_CLIENT_ID"),
        ("simulator", "SIMULATR_SERVERS", "SIMULATOR_SERVERS"),
        ("analytics", "ANALYTICS_TARGETS", "ANALYTICS_TARGET"),
        ("cache", "DATADIR", "DATA_DIR"),
        ("cache", "LOG_LEVLE", "LOG_LEVEL"),
    ],
)
def test_what_was_meant_is_named(process: str, written: str, meant: str) -> None:
    assert told(process, written) == [f"{written} is no setting and changes nothing: did you mean {meant}?"]


def test_what_is_like_none_is_told_where_it_can_be_nobody_elses() -> None:
    assert told("simulator", "SIMULATOR_X") == ["SIMULATOR_X is no setting and changes nothing, see docs/settings.md"]
    assert list(misspelt(ALL["simulator"], "simulator", {"SIMULATOR_X": ""})) == []  # set to nothing is unset


@pytest.mark.parametrize("process", ALL)
def test_no_right_setting_of_any_process_is_told_by_another(process: str) -> None:
    assert told(process, *RIGHT) == []


@pytest.mark.parametrize("process", ALL)
def test_what_is_of_others_is_not_told(process: str) -> None:
    own = process.upper()
    linked = ["PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT_50051_TCP", "PORT_50051_TCP_ADDR"]
    others = ["SSL_CERT_FILE", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS", "PGDATABASE"]
    others += ["OPENMANAGER_PARENT_PID", "NOTIFY_SOCKET", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "INFLUXDB_PASSWORD"]
    assert told(process, *others, *(f"{own}_{name}" for name in linked)) == []


async def test_a_process_says_it_when_it_starts(tmp_path: Path) -> None:
    async with started(tmp_path, ECHO_ADRESS="secret-value-of-it") as running:
        await running.says("ECHO_ADRESS is no setting and changes nothing: did you mean ECHO_ADDRESS?")
        line = next(line for line in running.lines() if "ECHO_ADRESS" in line["message"])
        assert line["level"] == "WARNING"
        assert "secret-value-of-it" not in running.text
