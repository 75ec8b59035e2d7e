"""A larger model that somebody else runs, asked only for those who agree and within a budget.

Each call, a second try included, is allowed first: by ``ASSISTANT["UPSTREAM"]["CONSENT"]``, then by
``budget``. Everything else (redaction, time-outs, bounds) is ``assistant.backends.openai``; whether
it is asked at all, and in which order, is the router's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar, cast

from django.conf import settings
from django.utils.module_loading import import_string

from assistant.backends.openai import OpenAIBackend
from assistant.errors import AssistantError, ModelUnavailable
from assistant.threads import in_thread
from assistant.types import Params
from fallback import budget

log = logging.getLogger(__name__)

Consent = Callable[[str], bool]


class NoConsent(AssistantError):
    """This user's questions stay in the house."""

    code = "permission_denied"
    permanent = True


def _signed_in(caller: str) -> bool:
    return caller.startswith("user:")


#: What settings may say instead of the dotted path of a function of the caller's key, which is
#: ``user:<id>``, ``visitor:<session>`` or empty for nobody in particular.
CONSENTS: dict[str, Consent] = {
    "all": lambda caller: True,
    "signed_in": _signed_in,
    "none": lambda caller: False,
}


class UpstreamBackend(OpenAIBackend):
    route: ClassVar[str] = "upstream"

    def check(self) -> None:
        super().check()
        _hook()

    async def _admit(self, params: Params) -> None:
        """Raises: NoConsent, BudgetSpent."""
        await in_thread(_allow, params.scope)


def consents(caller: str) -> bool:
    """Whether that caller's questions may leave. Sync: may touch the database.

    A hook that breaks or answers anything but True keeps them here.
    """
    try:
        return _hook()(caller) is True
    except Exception as error:
        log.error("the consent function broke: %s", type(error).__name__)
        return False


def _allow(caller: str) -> None:
    if not consents(caller):
        raise NoConsent("This question may not leave the house, so no other model was asked.")
    budget.take(caller)


def _hook() -> Consent:
    """Raises: ModelUnavailable if settings name no function."""
    named = settings.ASSISTANT["UPSTREAM"]["CONSENT"]
    if named in CONSENTS:
        return CONSENTS[named]
    try:
        return cast(Consent, import_string(named))
    except ImportError as error:
        raise ModelUnavailable(
            f"ASSISTANT_UPSTREAM_CONSENT={named!r} is neither {', '.join(CONSENTS)} nor a "
            "function that can be imported."
        ) from error
