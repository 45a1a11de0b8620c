"""What a value must be to be kept: the bounds of the columns, checked before the database sees anything.

What must stay true: whatever passes here, PostgreSQL can store unchanged; whatever does not is an InvalidArgument that
names the field.
"""

import math
import re
from collections.abc import Iterable, Sequence
from uuid import UUID

from fleet.model import ServerDescriptor
from fleet.validation import MAX_SERVER_ID_CHARACTERS, check_descriptors
from runtime.errors import InvalidArgument
from services.metadata.store import NewInteraction

MAX_ENVIRONMENT_CHARACTERS = 50
MAX_ROLE_CHARACTERS = 50
MAX_SESSION_ID_CHARACTERS = 255
MAX_TEXT_BYTES = 1 << 20
"""For each of an interaction's query, response and correction."""
MAX_MODEL_CHARACTERS = 100
MAX_PROMPT_HASH_CHARACTERS = 128
MAX_COMMENT_BYTES = 16_384
MAX_TAGS, MAX_TAG_CHARACTERS = 50, 64
MAX_LINKED_SERVERS = 100
MAX_LINKED_ANOMALIES, MAX_ANOMALY_ID_CHARACTERS = 100, 512
MAX_LATENCY_MS = 86_400_000
MAX_EMBEDDING = 2_000
"""Numbers; pgvector has no index for more."""
MAX_SEARCH_CHARACTERS = 1_000
_MANY_NOTS = re.compile(r"""(?<![^\s"!&|()])(?:-[\s!&|()]*){33,}""")
"""More minus signs in a row than PostgreSQL keeps open ("tsquery stack too small"), and what it passes over there."""
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


def check_session(session_id: str) -> str:
    """Returns the id of a session to erase: not nothing, which is what interactions without one have."""
    if not session_id:
        raise InvalidArgument("is empty", field="session_id")
    return check_text(session_id, "session_id", max_characters=MAX_SESSION_ID_CHARACTERS)


def check_feedback(rating: int, comment: str) -> None:
    """A rating of 1 to 5 and why."""
    check_rating(rating, "rating")
    check_text(comment, "comment", max_bytes=MAX_COMMENT_BYTES)


def check_correction(correction: str) -> str:
    """Returns what should have been answered: not nothing."""
    if not correction:
        raise InvalidArgument("is empty", field="correction")
    return check_text(correction, "correction", max_bytes=MAX_TEXT_BYTES)


def check_new_interaction(new: NewInteraction) -> None:
    """Everything of an interaction but its id."""
    check_text(new.session_id, "session_id", max_characters=MAX_SESSION_ID_CHARACTERS)
    check_text(new.query, "query", max_bytes=MAX_TEXT_BYTES)
    check_text(new.response, "response", max_bytes=MAX_TEXT_BYTES)
    check_confidence(new.confidence, "confidence")
    check_rating(new.user_rating, "user_rating")
    check_text(new.model, "model", max_characters=MAX_MODEL_CHARACTERS)
    check_text(new.prompt_hash, "prompt_hash", max_characters=MAX_PROMPT_HASH_CHARACTERS)
    for name in ("prompt_tokens", "response_tokens"):
        if (getattr(new, name) or 0) < 0:
            raise InvalidArgument("is negative", field=name)
    if not 0 <= (new.latency_ms or 0) <= MAX_LATENCY_MS:
        raise InvalidArgument("lies outside 0 to 24 h", field="latency")
    _check_texts(new.server_ids, "server_ids", MAX_LINKED_SERVERS, MAX_SERVER_ID_CHARACTERS)
    _check_texts(new.anomaly_ids, "anomaly_ids", MAX_LINKED_ANOMALIES, MAX_ANOMALY_ID_CHARACTERS)
    _check_texts(new.tags, "tags", MAX_TAGS, MAX_TAG_CHARACTERS)
    check_text(new.correction, "correction", max_bytes=MAX_TEXT_BYTES)
    check_text(new.rating_comment, "rating_comment", max_bytes=MAX_COMMENT_BYTES)
    if new.embedding:
        check_embedding(new.embedding)
    if new.rating_comment and new.user_rating is None:
        raise InvalidArgument("is given without a rating", field="rating_comment")


def _check_texts(texts: Sequence[str], field: str, most: int, max_characters: int) -> None:
    if len(texts) > most:
        raise InvalidArgument(f"more than {most}", field=field)
    for index, text in enumerate(texts):
        where = f"{field}[{index}]"
        if not text:
            raise InvalidArgument("is empty", field=where)
        check_text(text, where, max_characters=max_characters)
        if text in texts[:index]:
            raise InvalidArgument("is there twice", field=where)


def check_embedding(embedding: Sequence[float]) -> None:
    """Numbers that have a direction."""
    if not 1 <= len(embedding) <= MAX_EMBEDDING:
        raise InvalidArgument(f"has {len(embedding)} numbers, not 1 to {MAX_EMBEDDING}", field="embedding")
    if not all(map(math.isfinite, embedding)):
        raise InvalidArgument("has a number that is not finite", field="embedding")
    if not any(embedding):
        raise InvalidArgument("is all zeros, which has no direction", field="embedding")


def check_words(words: str) -> str:
    """Returns what to search for: not nothing. A rule of dashes in it is as many times "not", two of which are none."""
    if not words.strip():
        raise InvalidArgument("is empty", field="query")
    check_text(words, "query", max_characters=MAX_SEARCH_CHARACTERS)
    return _MANY_NOTS.sub(lambda nots: " -" if nots[0].count("-") % 2 else " ", words)
