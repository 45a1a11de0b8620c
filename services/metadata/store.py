"""The contract of the record: what every store of servers and AI interactions promises, whatever it is made of.

Common to all methods: every change is durable when the method returns and visible to every later call; arguments are
checked before anything is kept (``InvalidArgument`` names the field); lost races raise ``Aborted``. All times are UTC
with microseconds.

While the database is away: changes of servers raise ``Unavailable``, the first callers within 16 s (their deadline is
usually nearer), later ones at once; interactions are recorded all the same; what is read says so by ``stale_since``,
and what cannot be answered at all raises ``Unavailable``.
"""

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from fleet.model import NO_DETAILS, ServerDescriptor, ServerDetails

T = TypeVar("T")

UPDATABLE_FIELDS = ("hostname", "environment", "role", "location", "report_interval", "labels", "notes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """A server as recorded.

    Attributes:
        delete_time: None unless it is deleted.
        details: revision, labels, maintenance windows that had not ended when it was read.
        stale_since: when this was known to be the record; None: it is.
    """

    descriptor: ServerDescriptor
    create_time: datetime
    update_time: datetime
    delete_time: datetime | None = None
    details: ServerDetails = NO_DETAILS
    notes: str = ""
    stale_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Remarks:
    """What people say of a server: labels as sorted pairs, and notes."""

    labels: tuple[tuple[str, str], ...] = ()
    notes: str = ""


NO_REMARKS = Remarks()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFilter:
    """Which servers: all conditions hold together; an empty one does not restrict.

    Attributes:
        labels: (key, value) pairs; an empty value is any.
        after_id: only ids after it in the listing's order.
    """

    environment: str = ""
    role: str = ""
    ids: tuple[str, ...] = ()
    show_deleted: bool = False
    only_deleted: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    after_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewInteraction:
    """An interaction to record.

    Attributes:
        id: UUID in its usual form, or empty: the store chooses.
        confidence: 0 to 1, or None.
        user_rating: 1 to 5, or None; the latest one, of an interaction that is recorded.
        prompt_tokens, response_tokens: None: nobody counted.
        latency_ms: how long the answer took; None: nobody measured.
        correction: what should have been answered; empty: nobody corrected it.
        embedding: to find similar ones by; empty: none, as in everything that is read.
    """

    id: str = ""
    session_id: str = ""
    query: str = ""
    response: str = ""
    confidence: float | None = None
    user_rating: int | None = None
    model: str = ""
    prompt_hash: str = ""
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    latency_ms: int | None = None
    server_ids: tuple[str, ...] = ()
    anomaly_ids: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    correction: str = ""
    rating_comment: str = ""
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction(NewInteraction):
    """An interaction as recorded, with the latest rating and correction.

    Attributes:
        rate_time, correct_time: when it was rated and corrected last; None: never, or by an older version.
    """

    create_time: datetime
    rate_time: datetime | None = None
    correct_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractionFilter:
    """Which interactions: all conditions hold together; an empty text, a rating of 0 and None do not restrict.

    Attributes:
        start_time, end_time: recorded in [start, end).
    """

    session_id: str = ""
    min_rating: int = 0
    max_rating: int = 0
    min_confidence: float | None = None
    max_confidence: float | None = None
    model: str = ""
    tag: str = ""
    server_id: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Of the interactions with confidences in [low, high): how many, their means, and the share that was right."""

    low: float
    high: float
    count: int
    mean_confidence: float
    accuracy: float
    mean_rating: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How well confidences agree with ratings: `calibration` says how that is measured.

    Attributes:
        expected_error, maximum_error: None when no interaction has both.
        count, unrated, without_confidence: interactions with both, and with only one of them.
    """

    bins: tuple[CalibrationBin, ...]
    expected_error: float | None
    maximum_error: float | None
    count: int
    unrated: int
    without_confidence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """What an erasure came to.

    Attributes:
        interactions: how many there were; when `pending` only those that the database did not have yet.
        pending: the database does not answer; what it has goes as soon as it does.
    """

    interactions: int
    pending: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question and what should be answered."""

    query: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Some rows of a listing.

    Attributes:
        next_page_token: where it goes on; empty: nowhere.
        total_size: how many rows match in all.
        stale_since: None: it is the record. Else the database is away since about then, or was never there; servers are
            as of that time; of interactions there are only those recorded here that are still in the journal (24 hours
            at least), and ``total_size`` counts only these.
    """

    items: tuple[T, ...]
    next_page_token: str
    total_size: int
    stale_since: datetime | None = None


class MetadataStore(Protocol):
    """The record of servers and AI interactions."""

    async def list_servers(
        self, filters: ServerFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[ServerRecord]:
        """Lists servers in the byte order of their UTF-8 ids.

        A server that exists during the whole listing is on exactly one page, whatever is added or deleted meanwhile.
        ``page_size`` 0 means 100; more than 1,000 means 1,000. The total is that of the moment of this page.

        Raises:
            InvalidArgument: a bad filter, a negative ``page_size``, a ``page_token`` of another listing.
        """
        ...

    async def get_server(self, server_id: str) -> ServerRecord:
        """Returns a server.

        Raises:
            NotFound: it is unknown or deleted.
        """
        ...

    async def create_server(self, descriptor: ServerDescriptor, remarks: Remarks = NO_REMARKS) -> ServerRecord:
        """Adds a server; an empty host name becomes the id.

        Raises:
            AlreadyExists: the id is taken, also by a deleted server.
        """
        ...

    async def update_server(
        self,
        descriptor: ServerDescriptor,
        fields: Collection[str] = (),
        *,
        remarks: Remarks = NO_REMARKS,
        etag: str = "",
    ) -> ServerRecord:
        """Sets the named ones of UPDATABLE_FIELDS, all of them when none is named; an empty text clears a field.

        ``update_time`` and the revision move even when the values are the same. An empty host name becomes the id.

        Raises:
            Aborted: with ETAG_MISMATCH, when `etag` is given and not the record's.
            InvalidArgument: for ``update_mask``, a name that is not one of them.
            NotFound: the server is unknown or deleted.
        """
        ...

    async def register_servers(self, descriptors: Sequence[ServerDescriptor]) -> int:
        """Adds or updates what senders say of their servers; all or nothing. Returns how many records changed.

        What a sender leaves empty keeps its recorded value. Rows that would not differ are neither written nor locked.
        A deleted server stays deleted (its fields follow, so that it is right when undeleted). The last of several
        descriptors of one server counts.

        Raises:
            InvalidArgument: naming ``servers[i].field``; more than 20,000 descriptors.
        """
        ...

    async def delete_server(self, server_id: str, *, etag: str = "") -> ServerRecord:
        """Marks a server deleted; nothing of it is removed.

        Raises:
            Aborted: with ETAG_MISMATCH, when `etag` is given and not the record's.
            NotFound: it is unknown or deleted already.
        """
        ...

    async def undelete_server(self, server_id: str, *, etag: str = "") -> ServerRecord:
        """Takes that mark away.

        Raises:
            Aborted: with ETAG_MISMATCH, when `etag` is given and not the record's.
            NotFound: it is unknown.
            AlreadyExists: it is not deleted.
        """
        ...

    def watch_servers(self) -> AsyncGenerator[Sequence[ServerRecord], None]:
        """Yields records that changed since the watching began, whoever changed them, some seconds later.

        A watcher that is slow is told of a record once, as it was lately.
        """
        ...

    async def record_interaction(self, interaction: NewInteraction) -> Interaction:
        """Records an interaction, once: one that is there under this id is returned unchanged.

        While the database is away only those of the last 24 hours are known; an older one stays as it is all the same.

        Raises:
            ResourceExhausted: so many wait for the database that the journal, or the disk, is full.
        """
        ...

    async def get_interaction(self, interaction_id: str) -> Interaction:
        """Returns an interaction.

        Raises:
            NotFound: there is none under this id.
        """
        ...

    async def list_interactions(
        self, filters: InteractionFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[Interaction]:
        """Lists interactions, newest first, those of one instant in descending order of id; paged as servers are.

        Limits of ratings and confidences leave out interactions that have none. While the database is away the page
        after the last one that is local raises ``Unavailable``, with OLDER_UNAVAILABLE.

        Raises:
            InvalidArgument: a bad filter, or as ``list_servers``.
        """
        ...

    async def rate_interaction(self, interaction_id: str, rating: int, comment: str = "") -> Interaction:
        """Adds a rating of 1 to 5; the latest counts, all are kept. Returns the interaction with it.

        Raises:
            NotFound: there is no such interaction.
            Unavailable: OLDER_UNAVAILABLE: the database is away, and the interaction is there only, if anywhere.
            ResourceExhausted: as ``record_interaction``.
        """
        ...

    async def correct_interaction(self, interaction_id: str, correction: str) -> Interaction:
        """Adds what should have been answered, otherwise as ``rate_interaction``."""
        ...

    def export_interactions(self, filters: InteractionFilter, *, redact: bool = True) -> AsyncGenerator[Example, None]:
        """Gives what can be learned from, oldest first, as it was at one moment: the correction is the answer, or else
        the response; what lacks a question or an answer is left out. With `redact` without personal data (`personal`).

        Raises:
            InvalidArgument: a bad filter.
            ResourceExhausted: TOO_MANY_EXPORTS at once.
            Aborted: EXPORT_TOO_SLOW; it was not read for a while.
            Unavailable: the database is away, or lacks what was recorded before (CATCHING_UP).
        """
        ...

    async def search_interactions(
        self, words: str, filters: InteractionFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[Interaction]:
        """Finds interactions by words as web searches do, newest first; ``total_size`` is not counted.

        Raises:
            InvalidArgument: for ``query``, nothing or more than 1,000 characters; else as ``list_interactions``.
            Unavailable: as ``export_interactions``.
        """
        ...

    async def similar_interactions(
        self, embedding: Sequence[float], limit: int = 0
    ) -> Sequence[tuple[Interaction, float]]:
        """The interactions recorded with embeddings nearest to one, and their cosine distances, nearest first.

        ``limit`` 0 means 10; more than 100 means 100.

        Raises:
            InvalidArgument: it has another number of numbers than the recorded ones.
            FailedPrecondition: PGVECTOR_MISSING.
            Unavailable: as ``export_interactions``.
        """
        ...

    async def calibration(self, filters: InteractionFilter, *, bins: int = 0, right_rating: int = 0) -> Calibration:
        """Compares confidences with ratings, in 10 bins unless told otherwise, at most 100; 4 and 5 are right.

        Raises:
            InvalidArgument: a bad filter, number of bins or rating.
            Unavailable: as ``export_interactions``.
        """
        ...

    async def erase_session(self, session_id: str) -> Erased:
        """Erases the interactions of a session and all that was said of them, for good: also from what waits for the
        database, and again from one that takes over within a day. What is recorded later under the same id stays.

        Raises:
            InvalidArgument: for ``session_id``, nothing or too long.
        """
        ...
