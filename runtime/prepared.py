"""An answer that is made once and given to everybody who asks while it holds.

A servicer returns one in the place of a message. What must stay true: it never changes; what a transport makes of it
(its JSON, say) is kept with it, so that it goes when the answer goes.
"""

from typing import Any, Final


class Prepared:
    """A serialized message. `forms` holds what transports made of it, each under a key of its own."""

    __slots__ = ("data", "etag", "forms")

    def __init__(self, data: bytes, *, etag: str = "") -> None:
        """Takes the message.

        Args:
            data: serialized.
            etag: what tells this answer to a question from another answer to it; empty: nothing does.
        """
        self.data: Final = data
        self.etag: Final = etag
        self.forms: Final[dict[object, Any]] = {}
