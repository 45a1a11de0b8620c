"""Variables that look like settings and are none: `TIMESERIES_RETENSION_RAW=365d`, taken for nothing, deletes history.

A process answers for what begins with its own name, of which it knows every one, and for what is nearly one of its
settings. What must stay true: it only tells, for the environment is everybody's; no value is shown; a setting of
another process, and what OpenTelemetry, OpenSSL, Docker and Kubernetes set, is none of its business.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Final

from runtime.settings import CommonSettings

NEARLY: Final = 0.88
"""How alike (difflib's ratio) any other name must be: REDIS_ULR is (0.89), SSL_CERT_FILE is no TLS_CERT_FILE (0.85)."""
_LINKED: Final = re.compile(r"SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")
"""What Kubernetes and Docker put behind the name of a service, of which ours may well be called `cache`."""
_OTHERS: Final = ("OTEL_", "OPENMANAGER_")


def misspelt(settings: type[CommonSettings], process: str, environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable of `environ` that was probably meant to be a setting of `process`."""
    own = f"{process.upper()}_"
    known = [*settings.env_names().values(), f"{own}TARGET"]  # which is for those who call it
    for name, value in sorted(environ.items()):
        written = name.upper()
        if not value or name in known or written.startswith(_OTHERS):
            continue
        rest = written.removeprefix(own)
        if rest == written:
            nearest = difflib.get_close_matches(written, known, n=1, cutoff=NEARLY)
        elif not _LINKED.fullmatch(rest):
            parts = [setting.removeprefix(own) for setting in known if setting.startswith(own)]
            nearest = [own + part for part in difflib.get_close_matches(rest, parts, n=1)] or [""]
        else:
            nearest = []
        for meant in nearest:
            hint = f": did you mean {meant}?" if meant else ", see docs/settings.md"
            yield f"{name} is no setting and changes nothing{hint}"
