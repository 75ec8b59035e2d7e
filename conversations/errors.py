"""The one table of errors: every code that any transport tells, and how HTTP tells it.

Codes of errors that are raised are in ``assistant.errors``; some more come from Django and DRF.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One kind of error: HTTP status, the type OpenAI's clients know, and what to do about it.

    ``also``: other statuses that HTTP has for it, with what each of them says.
    """

    status: int
    type: str
    means: str
    also: tuple[tuple[int, str], ...] = ()


#: By code.
ERRORS: dict[str, ErrorRow] = {
    "invalid_request": ErrorRow(
        400,
        "invalid_request_error",
        "The request is not one of ours: `param` names the field. Correct it.",
        (
            (405, "The address has other methods: the header `Allow` lists them."),
            (413, "The body is larger than 65,536 bytes. Send less."),
            (415, "The body is of another type. Send `application/json`."),
            (431, "The headers are larger than anybody needs. Send fewer."),
        ),
    ),
    "context_too_long": ErrorRow(
        400, "invalid_request_error", "The text alone does not fit what is read. Shorten it."
    ),
    "unauthenticated": ErrorRow(
        401, "authentication_error", "No token or login, or one that has ended. Get a new one."
    ),
    "permission_denied": ErrorRow(
        403,
        "permission_error",
        "The token lacks a scope, or a page's request its CSRF token. Use one that has it.",
    ),
    "not_found": ErrorRow(
        404, "not_found_error", "There is no such thing, or none of yours. Do not ask again."
    ),
    "conflict": ErrorRow(
        409,
        "conflict_error",
        "An answer is being written there. Wait for its end, or stop it.",
    ),
    "idempotency_conflict": ErrorRow(
        409,
        "conflict_error",
        "The answer to this very request is being written elsewhere. Send it again in a second.",
    ),
    "idempotency_mismatch": ErrorRow(
        422,
        "invalid_request_error",
        "The `Idempotency-Key` was used for another request. Send a new one.",
    ),
    "rate_limited": ErrorRow(
        429, "rate_limit_error", "You asked too much, or too much at once. Wait `Retry-After`."
    ),
    "overloaded": ErrorRow(
        503, "overloaded_error", "Too many people ask at once. Wait `Retry-After`."
    ),
    "model_unavailable": ErrorRow(
        503,
        "server_error",
        "The model's files are missing or altered. Staff find the cause with `doctor`.",
    ),
    "generation_failed": ErrorRow(
        503, "server_error", "The model broke while it was answering. Ask again."
    ),
    "interrupted": ErrorRow(
        503, "server_error", "The answer broke off, as when a server stops. Ask again."
    ),
    "internal": ErrorRow(
        500,
        "server_error",
        "Something broke here that should not. Tell staff the `request_id`.",
    ),
}


def errors_table() -> str:
    """The table as Markdown, for ``docs/errors.md``."""
    lines = ["| code | HTTP | `error.type` | what it means, and what to do |", "|---|---|---|---|"]
    for code, row in ERRORS.items():
        for status, means in ((row.status, row.means), *row.also):
            lines.append(f"| `{code}` | {status} | `{row.type}` | {means} |")
    return "\n".join(lines)
