"""What a value must be to be kept: the bounds of the columns, checked before the database sees anything.

What must stay true: whatever passes here, PostgreSQL can store unchanged; whatever does not is an InvalidArgument that
names the field.
"""

import math
from collections.abc import Iterable
from uuid import UUID

from fleet.model import ServerDescriptor
from fleet.validation import MAX_SERVER_ID_CHARACTERS, check_descriptors
from runtime.errors import InvalidArgument

MAX_ENVIRONMENT_CHARACTERS = 50
MAX_ROLE_CHARACTERS = 50
MAX_SESSION_ID_CHARACTERS = 255
MAX_TEXT_BYTES = 1 << 20
"""For each of an interaction's query and response."""
MAX_REGISTERED_SERVERS = 20_000
MAX_FILTER_IDS = 1_000
MIN_RATING, MAX_RATING = 1, 5
MAX_LABELS = 64
"""Of one server."""
MAX_LABEL_KEY_BYTES = 63
MAX_LABEL_VALUE_BYTES = 63
MAX_FILTER_LABELS = 16
MAX_REVISION_DIGITS = 18
MAX_NOTES_BYTES = 64 << 10


def check_text(text: str, field: str, *, max_characters: int | None = None, max_bytes: int | None = None) -> str:
    """Returns ``text`` if PostgreSQL can keep it: valid Unicode without NUL, within the bounds."""
    if max_characters is not None and len(text) > max_characters:
        raise InvalidArgument(f"longer than {max_characters} characters", field=field)
    if "\0" in text:
        raise InvalidArgument("has a NUL character", field=field)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidArgument("is not valid Unicode", field=field) from None
    if max_bytes is not None and size > max_bytes:
        raise InvalidArgument(f"longer than {max_bytes} bytes", field=field)
    return text


def check_server_id(server_id: str, field: str = "server_id") -> str:
    """Returns an id to look up. One that no server can have is simply not found later."""
    if not server_id:
        raise InvalidArgument("is empty", field=field)
    return check_text(server_id, field, max_characters=MAX_SERVER_ID_CHARACTERS)


def check_descriptor(descriptor: ServerDescriptor, field: str) -> ServerDescriptor:
    """Returns the description of a server that may be kept; ``field`` names it in errors."""
    try:
        check_descriptors((descriptor,), field)
    except InvalidArgument as error:
        raise InvalidArgument(error.message, field=(error.field or field).replace("[0]", "", 1)) from None
    return descriptor


def check_labels(labels: Iterable[tuple[str, str]], field: str = "labels") -> tuple[tuple[str, str], ...]:
    """Returns a server's labels in order of their keys."""
    pairs = tuple(sorted(labels))
    if len(pairs) > MAX_LABELS:
        raise InvalidArgument(f"more than {MAX_LABELS} labels (MAX_LABELS)", field=field)
    for key, value in pairs:
        check_label(key, value, field)
    return pairs


def check_label(key: str, value: str, field: str) -> None:
    """Refuses a key or value that no server's label can have."""
    if not key:
        raise InvalidArgument("a label has no key", field=field)
    if ":" in key:
        raise InvalidArgument("a label's key has a colon", field=field)
    check_text(key, field, max_bytes=MAX_LABEL_KEY_BYTES)
    check_text(value, field, max_bytes=MAX_LABEL_VALUE_BYTES)
    if not key.isprintable() or not value.isprintable():
        raise InvalidArgument("a label has a control character", field=field)


def check_notes(notes: str, field: str = "notes") -> str:
    """Returns notes that PostgreSQL can keep."""
    return check_text(notes, field, max_bytes=MAX_NOTES_BYTES)


def revision_of(etag: str) -> int | None:
    """The inverse of `fleet.model.etag_of`; None: none was given; -1, which no record has, for what was never a tag."""
    if not etag:
        return None
    digits = etag[1:]
    is_ours = etag[0] == "r" and digits.isascii() and digits.isdecimal() and len(digits) <= MAX_REVISION_DIGITS
    return int(digits) if is_ours else -1


def check_interaction_id(text: str, field: str = "id") -> UUID:
    """Parses the usual written form of a UUID: 36 characters."""
    try:
        parsed = UUID(text)
    except ValueError:
        parsed = None
    if parsed is None or str(parsed) != text.lower():
        raise InvalidArgument("is not a UUID such as 3f2b7c1e-8c1d-4f0e-9a53-0a4b6f0c2d11", field=field)
    return parsed


def check_rating(rating: int | None, field: str) -> int | None:
    """Returns a rating of 1 to 5, or None for no rating."""
    if rating is not None and not MIN_RATING <= rating <= MAX_RATING:
        raise InvalidArgument(f"lies outside {MIN_RATING} to {MAX_RATING}", field=field)
    return rating


def check_confidence(confidence: float | None, field: str) -> float | None:
    """Returns a confidence of 0 to 1, or None when none was given; NaN is none of them."""
    if confidence is not None and (math.isnan(confidence) or not 0 <= confidence <= 1):
        raise InvalidArgument("lies outside 0 to 1", field=field)
    return confidence
