"""Every error this product raises on purpose.

::

    AssistantError                  code               permanent
    ├── InvalidRequest              invalid_request    yes        the caller's mistake
    │   └── ContextTooLong          context_too_long   yes        the question alone does not fit
    ├── NotFound                    not_found          yes        absent, or not the caller's
    ├── Conflict                    conflict           no         an answer is being written already
    ├── RateLimited                 rate_limited       no         too many requests by one caller
    ├── Overloaded                  overloaded         no         the queue is full
    ├── ModelUnavailable            model_unavailable  yes        files missing or altered
    └── GenerationFailed            generation_failed  no         the engine broke
        └── UpstreamFailed          generation_failed  no         another server did; ``cause``

A message says what happened, why, and what to do next; it never holds a user's text.
"""

from __future__ import annotations

from typing import ClassVar


class AssistantError(Exception):
    """Base of the tree. ``retry_after_s`` is set where trying again later makes sense."""

    code: ClassVar[str] = "internal"
    permanent: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(AssistantError):
    code = "invalid_request"
    permanent = True


class ContextTooLong(InvalidRequest):
    code = "context_too_long"


class NotFound(AssistantError):
    code = "not_found"
    permanent = True


class Conflict(AssistantError):
    code = "conflict"


class RateLimited(AssistantError):
    code = "rate_limited"


class Overloaded(AssistantError):
    code = "overloaded"


class ModelUnavailable(AssistantError):
    code = "model_unavailable"
    permanent = True


class GenerationFailed(AssistantError):
    code = "generation_failed"


class UpstreamFailed(GenerationFailed):
    """Another server gave no good answer. ``cause`` is from a closed set, for logs and tests."""

    def __init__(self, cause: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.cause = cause
