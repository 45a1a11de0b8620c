"""Typed settings from the environment: each is a variable of exactly the name given, and every problem is told at once.

What must stay true: only `load` reads the environment (constructing a settings class in a test does not); a bad
setting never starts a process; no message and no repr shows a secret (SecretStr fields, and passwords inside URLs).
"""

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretBytes, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from runtime.redaction import redact

S = TypeVar("S", bound="CommonSettings")

_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NUMBER_AND_UNIT: Final = re.compile(r"(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]+)")  # 400 digits are infinite
MAX_SHOWN_VALUE_CHARS: Final = 80


class SettingsError(Exception):
    """Settings that make no sense; the text has one line for each, beginning with the variable's name."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 host stands in brackets in the text and without them in the result."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    shape_is_right = colon and host and (bracketed == (":" in host)) and not set(host) & set("/[] ")
    if not shape_is_right or not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f"{_shown(address)} is not host:port")
    if bracketed:
        _as_ip(host, address)
    return host, int(port)


def _as_ip(host: str, address: str) -> None:
    try:
        ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        raise ValueError(f"{_shown(address)} is not host:port") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_duration(text: str) -> float:
    """Seconds of "10s", "1.5s", "250ms", "5m", "1h" or "7d"."""
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is None or match[2] not in _DURATION_UNITS:
        raise ValueError(f"{_shown(text)} is not a duration such as 250ms, 10s, 5m, 1h or 7d")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def parse_byte_size(text: str) -> int:
    """Bytes of "512MiB", "8GiB" or a plain number."""
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is None and text.strip().isdecimal():
        return int(text)
    if match is None or match[2] not in _SIZE_UNITS:
        raise ValueError(f"{_shown(text)} is not a size such as 512MiB or 8GiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def _address(value: str) -> str:
    split_address(value)
    return value


def _target(value: str) -> str:
    if value.startswith(("dns:", "unix:", "ipv4:", "ipv6:", "unix-abstract:", "xds:")):
        return value
    try:
        split_address(value)
    except ValueError:
        raise ValueError(f"{_shown(value)} is not host:port nor a gRPC target such as dns:///host:port") from None
    return value


def _targets(value: object) -> object:
    if not isinstance(value, str):
        return value
    targets = tuple(_target(part.strip()) for part in value.split(","))
    if len(set(targets)) != len(targets):
        raise ValueError(f"{_shown(value)} names a target twice")
    return targets


def _endpoint(value: str) -> str:
    """What OpenTelemetry dials: a URL, or host:port."""
    try:
        urlsplit(value)
    except ValueError:
        raise ValueError(f"{_shown(value)} is not a URL such as http://host:4317") from None
    if not value.isascii() or not value.isprintable() or " " in value or value.endswith("//"):
        raise ValueError(f"{_shown(value)} is not a URL such as http://host:4317")
    return value


def _duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _byte_size(value: object) -> object:
    return parse_byte_size(value) if isinstance(value, str) else value


def _shown(value: object) -> str:
    text = redact(str(value))
    return repr(text if len(text) <= MAX_SHOWN_VALUE_CHARS else text[:MAX_SHOWN_VALUE_CHARS] + "...")


def _is_utf8(path: Path) -> bool:
    """Whether it is the same to SQLite and PostgreSQL, which take UTF-8, as to Python, which asks the locale."""
    try:
        text = str(path.absolute())
    except OSError:  # where we are is deleted: whoever uses the folder says so
        return True
    try:
        return text.encode() == os.fsencode(text)
    except UnicodeEncodeError:
        return False


Address = Annotated[str, AfterValidator(_address)]
"""Where a process listens: "host:port", port 0 for any free one."""
Target = Annotated[str, AfterValidator(_target)]
"""What a caller dials: "host:port" or a gRPC target ("dns:///name:port", "unix:/path")."""
Targets = Annotated[tuple[str, ...], BeforeValidator(_targets)]
"""Several of them, separated by commas, each once."""
Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds; written "250ms", "10s", "5m", "1h", "7d"."""
ByteSize = Annotated[int, BeforeValidator(_byte_size)]
"""Bytes; written "512MiB", "8GiB" or as a plain number."""


def setting(env_name: str, default: Any, description: str, **limits: Any) -> Any:
    """A field read from the environment variable `env_name`. `limits` are pydantic's (ge, le, min_length, ...)."""
    return Field(default=default, validation_alias=env_name, description=description, validate_default=True, **limits)


class CommonSettings(BaseSettings):
    """What every process can be told."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, case_sensitive=True)

    data_dir: Path = setting("DATA_DIR", Path("./data"), "Folder of everything kept; each process has its own in it.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("LOG_LEVEL", "INFO", "Least severe line logged.")
    tls_cert_file: Path | None = setting("TLS_CERT_FILE", None, "PEM certificate chain that servers present.")
    tls_key_file: Path | None = setting("TLS_KEY_FILE", None, "PEM private key of TLS_CERT_FILE.")
    tls_ca_file: Path | None = setting(
        "TLS_CA_FILE",
        None,
        "PEM certificates of the authority of inner services and their callers; with it both prove who they are.",
    )
    service_secret: SecretStr | None = setting(
        "SERVICE_SECRET", None, "Secret that inner services demand of callers; default: DATA_DIR/service-secret."
    )
    otel_exporter_otlp_endpoint: Annotated[str, AfterValidator(_endpoint)] | None = setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT", None, "Where traces and metrics go by OTLP gRPC; unset: nowhere."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  pydantic-settings' signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The settings of `environ` (default: the process's); SettingsError lists every bad one.

        A variable set to nothing counts as unset, since compose files pass unset variables that way.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {env: environ[env] for env in cls.env_names().values() if environ.get(env, "")}
        problems: list[str] = []
        try:
            settings = cls(**values)
        except ValidationError as error:
            problems = [_line(cls, values, dict(fault)) for fault in error.errors(include_url=False)]
            bad = {str(fault["loc"][0]) for fault in error.errors(include_url=False)}
            try:
                settings = cls(**{name: value for name, value in values.items() if name not in bad})
            except ValidationError:  # a required setting is missing: nothing to check the others against
                raise SettingsError(problems) from None
        problems += [line for line in settings.problems() if line not in problems]
        if problems:
            raise SettingsError(problems)
        return settings

    @classmethod
    def env_names(cls) -> dict[str, str]:
        """Field name -> environment variable."""
        return {name: str(field.validation_alias or name) for name, field in cls.model_fields.items()}

    def problems(self) -> Iterator[str]:
        """One line for each setting that is wrong beside the others. Subclasses add theirs to super()'s."""
        if not _is_utf8(self.data_dir):
            yield f"DATA_DIR: {_shown(self.data_dir)} is not UTF-8 with this locale: the files in it cannot be opened"
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            set_one, unset = ("TLS_CERT_FILE", "TLS_KEY_FILE")[:: 1 if self.tls_cert_file else -1]
            yield f"{unset}: must be set too, since {set_one} is"
        if self.tls_ca_file is not None and self.tls_cert_file is None:
            yield "TLS_CERT_FILE: must be set too, since TLS_CA_FILE is: inner services ask their callers for one"
        for env, path in (
            ("TLS_CERT_FILE", self.tls_cert_file),
            ("TLS_KEY_FILE", self.tls_key_file),
            ("TLS_CA_FILE", self.tls_ca_file),
        ):
            if path is not None and not os.access(path, os.R_OK):
                yield f"{env}: {_shown(path)} cannot be read"
        if self.service_secret is not None and len(self.service_secret.get_secret_value()) < 16:
            yield "SERVICE_SECRET: shorter than 16 characters"
        yield from bearer_problems("SERVICE_SECRET", self.service_secret)
        yield from self.exposure_problems()

    def exposure_problems(self) -> Iterator[str]:
        """One line for each address that would be open beyond this machine without TLS.

        The gateway, which has authentication and a trusted proxy to consider, overrides this.
        """
        if self.tls_cert_file is not None and self.tls_key_file is not None:
            return
        for env, address in self.listen_addresses().items():
            if not is_loopback(split_address(address)[0]):
                yield f"{env}: {_shown(address)} is not a loopback address: set TLS_CERT_FILE and TLS_KEY_FILE"

    def listen_addresses(self) -> dict[str, str]:
        """Environment variable -> address, of every set *_ADDRESS."""
        return {
            env: value
            for name, env in self.env_names().items()
            if env.endswith("_ADDRESS") and (value := getattr(self, name))
        }

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, redact(value) if isinstance(value, str) else value

    def __str__(self) -> str:
        return repr(self)


def bearer_problems(env: str, secret: SecretStr | None) -> Iterator[str]:
    """One line for a secret that no header can carry; the end of a line behind it is easily taken along from a file."""
    text = "" if secret is None else secret.get_secret_value()
    if text != text.strip():
        yield f"{env}: begins or ends with white space, such as a line's end, which no header carries"
    elif not (text.isascii() and text.isprintable()):
        yield f"{env}: has other characters than printable ASCII, which no header carries"


def load(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """`cls.load(environ)`, as a function."""
    return cls.load(environ)


def _line(cls: type[CommonSettings], values: Mapping[str, str], fault: Mapping[str, Any]) -> str:
    env = str(fault["loc"][0])
    cause = fault.get("ctx", {}).get("error")
    if fault["type"] == "missing":
        return f"{env}: is required"
    if isinstance(cause, ValueError):
        return f"{env}: {cause}"
    message = _message(str(values.get(env, "")), fault)
    field = next((field for name, field in cls.model_fields.items() if cls.env_names()[name] == env), None)
    secret = field is not None and any(
        kind in str(field.annotation) for kind in (SecretStr.__name__, SecretBytes.__name__)
    )
    if secret or env not in values:
        return f"{env}: {message}"
    return f"{env}: {_shown(values[env])} {message}"


def _message(value: str, fault: Mapping[str, Any]) -> str:
    """What pydantic says is wrong with a value, in the words that settings are written in."""
    context = fault.get("ctx", {})
    if fault["type"] == "bool_parsing":
        return "should be true or false"
    if fault["type"] == "too_short":
        return f"should have at least {context['min_length']} characters"
    message = str(fault["msg"]).removeprefix("Input ").removeprefix("Value ").removeprefix("String ")
    written = _NUMBER_AND_UNIT.fullmatch(value.strip())
    units = {} if written is None else next((u for u in (_DURATION_UNITS, _SIZE_UNITS) if written[2] in u), {})
    for limit in (context[bound] for bound in ("ge", "gt", "le", "lt") if bound in context):
        for unit, size in reversed(units.items()):
            if limit >= size and (limit / size).is_integer():
                return f"{message.rpartition(' ')[0]} {limit / size:g}{unit}"
    return message
