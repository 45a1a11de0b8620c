"""Writes the table of docs/settings.md from the settings classes, so that the page cannot lie; run by `make docs`."""

import importlib
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from runtime.settings import CommonSettings
from runtime.settings import _duration as parse_duration_setting  # the validator that marks a duration

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"
CLASSES = {
    "gateway": ("gateway.settings", "GatewaySettings"),
    "cache": ("services.cache.settings", "CacheSettings"),
    "timeseries": ("services.timeseries.settings", "TimeSeriesSettings"),
    "metadata": ("services.metadata.settings", "MetadataSettings"),
    "simulator": ("services.simulator.settings", "SimulatorSettings"),
    "analytics": ("services.analytics.settings", "AnalyticsSettings"),
}
HEAD = """# Settings

Every process reads its settings from the environment and from nowhere else. What makes no sense stops the process
before it does anything, and every bad setting is named at once. A variable set to nothing counts as unset. One that is
no setting and looks like one (`TIMESERIES_RETENSION_RAW`) changes nothing; a WARNING at the start names it, and the
setting that is most like it.

Durations are written `250ms`, `10s`, `5m`, `1h`, `7d`; sizes `512MiB`, `8GiB`. This page is written from the code
(`make docs`).
"""

TAIL = """
## The launcher (`make run`)

It passes its environment on to the processes and reads `DATA_DIR`. Where only `CACHE_ADDRESS` is set, the others are
given it as `CACHE_TARGET`, and so on: a second install beside the first wants another `DATA_DIR` and seven addresses.
It sets two variables that they understand: `OPENMANAGER_PARENT_PID`, whose end they follow, and `NOTIFY_SOCKET` (the
protocol of sd_notify). It tells whoever started it when all of them are ready, as each process does that is started
alone, so `Type=notify` works under systemd; `ExecStart` is `.venv/bin/python -m launcher` then, in the checkout.
"""


def settings_class(process: str) -> type[CommonSettings]:
    """The settings class of a process."""
    module, name = CLASSES[process]
    found: type[CommonSettings] = getattr(importlib.import_module(module), name)
    return found


def page() -> str:
    """The whole page."""
    common = set(CommonSettings.env_names().values())
    parts = [HEAD, "## All processes\n", _table(CommonSettings, set())]
    for process in CLASSES:
        parts += [f"\n## `{process}`\n", _table(settings_class(process), common)]
    parts.append(TAIL)
    return "\n".join(parts)


def _table(settings: type[CommonSettings], without: set[str]) -> str:
    rows = ["| variable | default | what |", "|---|---|---|"]
    for name, field in settings.model_fields.items():
        env = settings.env_names()[name]
        if env in without:
            continue
        default = _written(field)
        secret = SecretStr.__name__ in str(field.annotation)
        shown = f"`{default}`" if default else ""
        text = (field.description or "").replace("|", "\\|")
        if get_origin(field.annotation) is Literal:
            text += f" One of {', '.join(f'`{value}`' for value in get_args(field.annotation))}."
        rows.append(f"| `{env}` | {shown} | {text}{' Secret.' if secret else ''} |")
    return "\n".join(rows) + "\n"


def _written(field: FieldInfo) -> str:
    """A default as people write it."""
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    is_duration = any(getattr(entry, "func", None) is parse_duration_setting for entry in field.metadata)
    if is_duration and not isinstance(field.default, str):
        for unit, seconds in (("h", 3600), ("m", 60)):
            if field.default % seconds == 0:
                return f"{field.default // seconds:g}{unit}"
        return f"{field.default:g}s"
    return str(field.default)


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
