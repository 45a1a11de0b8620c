"""Secrets kept out of everything that is written down.

What must stay true: a text that goes to a log line, an error, a repr or an exported span's exception has passed
`redact`; the process's own secrets are made known with `remember_secret` as soon as they are read.
"""

import re
from typing import Final

MASK: Final = "***"

# user:password@ inside a URL, and a bearer or basic credential as it stands in a header.
_URL_PASSWORD: Final = re.compile(r"(://[^/\s:@]*):[^/\s@]*@")
_CREDENTIAL: Final = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
# What this product gives out itself (services.metadata.access.secrets), for somebody who takes it for a token's id.
_GIVEN_OUT: Final = re.compile(r"(?<![A-Za-z0-9])om(?:-setup|-session)?_[\w-]{43}")
# PostgreSQL quotes the whole row that it refuses: what a user said, and the hash of a password.
_ROW: Final = re.compile(r"\nDETAIL:  .*?(?=\nHINT:|\n\nThe above exception|\n\nDuring handling|\Z)", re.DOTALL)
_SECRET_NAME: Final = re.compile(r"secret|password|passwd|token|authorization|api_?key", re.IGNORECASE)
MIN_REMEMBERED_CHARS: Final = 8  # a shorter one would blank out ordinary words

_remembered: set[str] = set()


def remember_secret(secret: str) -> None:
    """From now on `redact` masks this very text wherever it turns up."""
    if len(secret) >= MIN_REMEMBERED_CHARS:
        _remembered.add(secret)


def redact(text: str) -> str:
    """`text` without passwords of URLs, bearer credentials, tokens of ours, rows that PostgreSQL quotes, and what is
    remembered."""
    if "@" in text:
        text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
    text = _CREDENTIAL.sub(rf"\1 {MASK}", text)
    if "om" in text:
        text = _GIVEN_OUT.sub(MASK, text)
    if "\nDETAIL:" in text:
        text = _ROW.sub(f"\nDETAIL:  {MASK}", text)
    for secret in _remembered:
        if secret in text:
            text = text.replace(secret, MASK)
    return text


def is_secret_name(name: str) -> bool:
    """Whether a field of this name is never to be written down."""
    return _SECRET_NAME.search(name) is not None
