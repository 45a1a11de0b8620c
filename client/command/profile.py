"""Which gateway: from the command line, else from the environment, of a profile where one is named.

    OPENMANAGER_ADDRESS, OPENMANAGER_TOKEN, OPENMANAGER_CA_FILE
    OPENMANAGER_PROFILE=prod    OPENMANAGER_PROD_ADDRESS, OPENMANAGER_PROD_TOKEN, OPENMANAGER_PROD_CA_FILE

What must stay true: a profile takes nothing from outside of it, so that the token of one gateway never reaches another.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from client.channel import DEFAULT_ADDRESS
from client.command.exits import UsageError

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to reach a gateway; the token is in no repr."""

    address: str
    token: str | None
    ca_file: str | None

    def __repr__(self) -> str:
        return f"Connection({self.address!r})"


def connection(options: argparse.Namespace, environ: Mapping[str, str]) -> Connection:
    """What the options and the environment say.

    Raises:
        UsageError: a profile that is not there, a token that cannot be one.
    """
    profile = getattr(options, "profile", None) or environ.get("OPENMANAGER_PROFILE") or ""
    prefix = "OPENMANAGER_"
    if profile:
        if not _NAME.fullmatch(profile):
            raise UsageError(f"{profile!r} is no name of a profile: use letters, digits, - and _")
        prefix += profile.upper().replace("-", "_") + "_"

    def value(option: str) -> str | None:
        return getattr(options, option, None) or environ.get(prefix + option.upper()) or None

    address = value("address")
    if address is None:
        if profile:
            raise UsageError(f"the profile {profile} has no address: set {prefix}ADDRESS")
        address = DEFAULT_ADDRESS
    token = value("token")
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError(f"the token ({prefix}TOKEN or --token) has blanks or characters that no token has")
    return Connection(address=address, token=token, ca_file=value("ca_file"))
