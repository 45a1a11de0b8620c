"""A metric's identity as Prometheus labels, and back: the engine's exact key, whatever is in it.

    disk_used{mount="/data"} of server db-1   ->   disk_used{environment="E",mount="/data",role="R",server_id="db-1"}

A name that is plain there stays as it is. Any other one is escaped as Prometheus itself escapes names ("values"
escaping): `U__`, then letters and digits, `_` doubled, and each other character as `_hex_`. So is a label of the metric
that would clash with ours or with Prometheus' own, and a name that begins with `U__` already. A label without a value,
which Prometheus does not know, is named in the label `openmanager_empty_labels`.

What must stay true: `key_of(labels_of(metric))` is the metric's key, and two metrics never get the same labels.
Format: docs/formats/prometheus.md.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from fleet.model import metric_key

NAME: Final = "__name__"
SERVER_ID: Final = "server_id"
ENVIRONMENT: Final = "environment"
ROLE: Final = "role"
EMPTY_LABELS: Final = "openmanager_empty_labels"
METRIC: Final = "openmanager_metric"
"""Where answers to our own expressions carry the metric's name; nothing is stored under it."""
MAX_LABEL_NAME_BYTES: Final = 256
"""VictoriaMetrics drops a series with a longer label name and says nothing."""

_ESCAPED: Final = "U__"
_RESERVED: Final = frozenset({SERVER_ID, ENVIRONMENT, ROLE, EMPTY_LABELS, METRIC})
_METRIC_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*", re.ASCII)
_LABEL_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*", re.ASCII)
_UNFIT: Final = re.compile(r"^[0-9]|[^a-zA-Z0-9]", re.ASCII)
_ESCAPE: Final = re.compile(r"__|_([0-9a-f]{1,6})_")


def escaped_name(name: str) -> str:
    """A metric's name as the value of `__name__`."""
    plain = _METRIC_NAME.fullmatch(name) and not name.startswith(_ESCAPED)
    return name if plain else _escaped(name)


def escaped_label(label: str) -> str:
    """The name of a metric's own label."""
    plain = _LABEL_NAME.fullmatch(label) and not label.startswith((_ESCAPED, "__")) and label not in _RESERVED
    return label if plain else _escaped(label)


@lru_cache(maxsize=65_536)
def unescaped(name: str) -> str:
    """The inverse of both; a name that nobody escaped is itself."""
    return _ESCAPE.sub(_character, name[len(_ESCAPED) :]) if name.startswith(_ESCAPED) else name


def labels_of(name: str, labels: Iterable[tuple[str, str]]) -> dict[str, str] | None:
    """The labels of a metric, `__name__` among them, without those of its server.

    None when a label's name would be longer than MAX_LABEL_NAME_BYTES.
    """
    found = {NAME: escaped_name(name)}
    empty = []
    for label, value in labels:
        escaped = escaped_label(label)
        if len(escaped) > MAX_LABEL_NAME_BYTES:
            return None
        if value:
            found[escaped] = value
        else:
            empty.append(escaped)
    if empty:
        found[EMPTY_LABELS] = ",".join(sorted(empty))
    return found


def key_of(labels: Mapping[str, str]) -> str:
    """The key of the metric that has these labels, those of its server and `__name__` among them."""
    own = [(unescaped(label), value) for label, value in labels.items() if label not in _RESERVED and label != NAME]
    if EMPTY_LABELS in labels:
        own += [(unescaped(label), "") for label in labels[EMPTY_LABELS].split(",")]
    return metric_key(name_of(labels), own)


def name_of(labels: Mapping[str, str]) -> str:
    """The name of the metric that has these labels."""
    return unescaped(labels.get(METRIC) or labels.get(NAME, ""))


def _escaped(name: str) -> str:
    return _ESCAPED + _UNFIT.sub(lambda found: "__" if found[0] == "_" else f"_{ord(found[0]):x}_", name)


def _character(found: re.Match[str]) -> str:
    code = int(found[1], 16) if found[1] else ord("_")
    return chr(code) if code <= 0x10FFFF else found[0]
