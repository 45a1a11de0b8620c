"""Settings that make no sense are named, all at once."""

from pathlib import Path

import pytest

from runtime.settings import SettingsError
from services.simulator.settings import SimulatorSettings


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = SimulatorSettings.load({})
    assert settings.simulator_address == "127.0.0.1:50054"
    assert (settings.simulator_servers, settings.interval_ms, settings.simulator_mode) == (20, 10_000, "synthetic")
    assert settings.replay_speed == 1.0
    assert settings.simulator_replay_times == "shift"
    assert settings.timeseries_targets == ("127.0.0.1:50052",)


def test_every_setting_is_read(tmp_path: Path) -> None:
    file = tmp_path / "recording.csv"
    file.write_text("")
    settings = SimulatorSettings.load(
        {
            "SIMULATOR_SERVERS": "20000",
            "SIMULATOR_INTERVAL": "250ms",
            "SIMULATOR_MODE": "replay",
            "SIMULATOR_REPLAY_FILE": str(file),
            "SIMULATOR_REPLAY_SPEED": "max",
            "SIMULATOR_REPLAY_TIMES": "keep",
            "SIMULATOR_SEED": "0",
        }
    )
    assert (settings.simulator_servers, settings.interval_ms, settings.replay_speed) == (20_000, 250, None)


def test_all_bad_settings_are_told_in_one_message() -> None:
    bad = {
        "SIMULATOR_ADDRESS": "nowhere",
        "SIMULATOR_SERVERS": "20001",
        "SIMULATOR_INTERVAL": "1ms",
        "SIMULATOR_MODE": "fast",
        "SIMULATOR_SEED": "-1",
        "SIMULATOR_REPLAY_SPEED": "0",
        "SIMULATOR_REPLAY_TIMES": "later",
        "TIMESERIES_TARGET": "x",
    }
    with pytest.raises(SettingsError) as caught:
        SimulatorSettings.load(bad)
    assert {line.partition(":")[0] for line in caught.value.problems} == set(bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [("SIMULATOR_INTERVAL", "2h"), ("SIMULATOR_INTERVAL", "100.5ms"), ("SIMULATOR_REPLAY_SPEED", "nan")],
)
def test_a_value_out_of_range_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: "):
        SimulatorSettings.load({name: value})


def test_replay_needs_a_file_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="SIMULATOR_REPLAY_FILE: must be set"):
        SimulatorSettings.load({"SIMULATOR_MODE": "replay"})
    with pytest.raises(SettingsError, match=r"SIMULATOR_REPLAY_FILE: .* is no file"):
        SimulatorSettings.load({"SIMULATOR_MODE": "replay", "SIMULATOR_REPLAY_FILE": str(tmp_path / "none.csv")})
