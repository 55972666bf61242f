"""The bounds that keep a server answering: sizes, waits, queues and caches."""

import dataclasses

from grape_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a server. A request beyond one is refused; times are in seconds.

    Raises:
      UserError: a number is not positive.
    """

    body_bytes: int = 8 << 20  # of a request
    text_length: int = 1000  # characters of a query
    pixels: int = 40_000_000  # of an uploaded picture
    top: int = 100  # matches in an answer
    batch: int = 32  # queries rewritten together
    rewrite_wait: float = 0.02  # for further queries before a batch is rewritten
    search_wait: float = 0.002  # the same before a batch is searched
    queue: int = 128  # queries waiting for a batch
    rewrite_timeout: float = 10.0  # after which the query itself is searched
    body_timeout: float = 10.0  # for reading a request
    request_timeout: float = 30.0  # for answering it
    cache: int = 10_000  # rewrites kept

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(f"{field.name} must be above 0.")
