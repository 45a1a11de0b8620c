"""What the metadata service can be told."""

from typing import Annotated, Final

from pydantic import AfterValidator, SecretStr

from runtime.settings import Address, ByteSize, CommonSettings, Duration, setting
from services.metadata.target import target_of_url

MAX_SPAN_S: Final = 36_500 * 86_400
"""A time that is further away than a century or so is none that dates can say."""


def _database_url(value: SecretStr) -> SecretStr:
    target_of_url(value.get_secret_value())
    return value


class MetadataSettings(CommonSettings):
    """Settings of ``python -m services.metadata``."""

    metadata_address: Address = setting("METADATA_ADDRESS", "127.0.0.1:50053", "Where the service listens.")
    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = setting(
        "DATABASE_URL",
        None,
        "The PostgreSQL (15 to 18) that keeps the record, postgresql://user:password@host:port/database; of several "
        "hosts, separated by commas, the first that takes writes. Unset: one of our own under DATA_DIR/metadata.",
    )
    ai_retention: Duration | None = setting(
        "METADATA_AI_RETENTION",
        None,
        "AI interactions are deleted when they are older, with their ratings, corrections and embeddings; looked for "
        "every hour. Unset: they are kept for ever.",
        ge=3_600.0,
        le=MAX_SPAN_S,
    )
    metadata_journal_limit: ByteSize = setting(
        "METADATA_JOURNAL_LIMIT",
        "1GiB",
        "Size of the journal of facts (AI interactions) at which new ones are refused while PostgreSQL is away. What "
        "PostgreSQL has goes first, before its 24 hours are over.",
        ge=1 << 20,
    )
    session_lifetime: Duration = setting(
        "METADATA_SESSION_LIFETIME",
        "12h",
        "Who has logged in is asked for his password again after this.",
        ge=60.0,
        le=MAX_SPAN_S,
    )
    audit_journal_limit: ByteSize = setting(
        "AUDIT_JOURNAL_LIMIT",
        "256MiB",
        "Size of a process's own journal of audit events at which changes are refused while metadata does not take "
        "them; refused calls have an eighth of it besides.",
        ge=1 << 20,
    )
    audit_retention: Duration = setting(
        "AUDIT_RETENTION",
        "365d",
        "Months of the audit log that ended longer ago are dropped, after a signed checkpoint of their end.",
        ge=86_400,
        le=MAX_SPAN_S,
    )
    audit_legal_hold: bool = setting("AUDIT_LEGAL_HOLD", False, "No month of the audit log is dropped, however old.")
