"""Says in time that a certificate ends: without it the first to notice is whoever is refused, in the night after.

Every process that has TLS files looks at them once an hour, so a file that was replaced counts although nothing was
started again. A warning is logged once a day while less than a fourth of a certificate's life is left, or less than
WARN_BEFORE_S where that is less; an error once a day when it is over. A metric says how much is left all the time.

What must stay true: this only tells; files that cannot be read are the business of runtime.tls, and stop nothing here.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runtime import telemetry
from runtime.clock import Clock
from runtime.settings import CommonSettings

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation

LOOK_EVERY_S: Final = 3_600.0
SAY_EVERY_S: Final = 86_400.0
WARN_BEFORE_S: Final = 14 * 86_400.0
WARN_BEFORE_SHARE: Final = 0.25
"""Of its life: who renews automatically does so at a third, so that this is late for them, too."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Of the certificates of a file, seconds since 1970: of that one that decides how long the file is of use."""

    begins_s: float
    ends_s: float

    def is_ending(self, now_s: float) -> bool:
        """Whether it is time to say so."""
        return self.ends_s - now_s < min(WARN_BEFORE_S, WARN_BEFORE_SHARE * (self.ends_s - self.begins_s))


def life_of(file: Path, *, is_chain: bool) -> Life:
    """When the certificates of a PEM file begin and end: of a chain, all of which are needed, what ends first; of
    authorities, one of which may follow the other, what ends last.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    from cryptography import x509  # noqa: PLC0415  only who has such files needs it

    lives = [
        Life(begins_s=found.not_valid_before_utc.timestamp(), ends_s=found.not_valid_after_utc.timestamp())
        for found in x509.load_pem_x509_certificates(file.read_bytes())
    ]
    return (min if is_chain else max)(lives, key=lambda life: life.ends_s)


class Expiry:
    """Looks at the files of a process."""

    def __init__(self, settings: CommonSettings, clock: Clock) -> None:
        self._files: dict[str, Path] = {}
        if settings.tls_cert_file is not None:
            self._files["TLS_CERT_FILE"] = settings.tls_cert_file
        if settings.tls_ca_file is not None:
            self._files["TLS_CA_FILE"] = settings.tls_ca_file
        self._clock = clock
        self._lives: dict[str, Life] = {}
        self._said_s: dict[str, float] = {}

    async def watch(self) -> None:
        """Looks until cancelled; returns at once where there are no files."""
        if not self._files:
            return
        telemetry.meter(__name__).create_observable_gauge(
            "openmanager.tls.certificate.remaining",
            [self._remaining],
            unit="s",
            description="Time until the certificate of a file ends; negative when it has.",
        )
        while True:
            for setting, file in self._files.items():
                await self._look(setting, file)
            await self._clock.sleep(LOOK_EVERY_S)

    async def _look(self, setting: str, file: Path) -> None:
        try:  # in a thread, since the library alone takes 40 ms the first time
            life = await asyncio.to_thread(life_of, file, is_chain=setting == "TLS_CERT_FILE")
        except (OSError, ValueError) as error:
            _log.info("%s (%s): cannot be looked at: %s", file, setting, error)
            return
        self._lives[setting] = life
        now_s, at_s = self._clock.now_ms() / 1e3, self._clock.monotonic()
        if life.is_ending(now_s) and at_s - self._said_s.get(setting, float("-inf")) >= SAY_EVERY_S:
            self._said_s[setting] = at_s
            self._say(setting, file, life.ends_s, now_s)

    @staticmethod
    def _say(setting: str, file: Path, ends_s: float, now_s: float) -> None:
        when = datetime.fromtimestamp(ends_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        left_s = ends_s - now_s
        what = f"the certificate {file} ({setting})"
        todo = "replace the file, it is read anew while this runs"
        if left_s <= 0:
            _log.error("%s has ended on %s and is refused: %s", what, when, todo)
        else:
            left = f"{left_s / 86_400:.0f} days" if left_s >= 2 * 86_400 else f"{left_s / 3_600:.0f} hours"
            _log.warning("%s ends in %s, on %s: %s", what, left, when, todo)

    def _remaining(self, _options: "CallbackOptions") -> "Iterable[Observation]":
        from opentelemetry.metrics import Observation  # noqa: PLC0415  only called where there are metrics

        now_s = self._clock.now_ms() / 1e3
        for setting, life in self._lives.items():
            yield Observation(life.ends_s - now_s, {"setting": setting})
