"""Whether this process should be sent users: the model loaded, room in its queue, a database.

Degraded is not dead: without its model the product still answers by rules, so it is ready and says
what is missing. Loading is slow, so the first question about it starts it and nobody waits; the
rules learn with it.
Knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from django.db import DatabaseError, connection

from assistant import backends
from assistant.backends.base import Backend
from assistant.errors import AssistantError
from fallback import answers
from monitoring.draining import drain

log = logging.getLogger(__name__)

#: A model that could not be loaded is tried again after so long: its files are hashed each time.
RETRY_S = 15.0
#: A verdict is given again for so long: anybody may ask, and asking costs a query.
KEPT_S = 0.5

Status = Literal["ready", "degraded", "unavailable"]


@dataclass(frozen=True, slots=True)
class Health:
    """``problems``: for staff, a sentence each by what it is about; empty when all is well."""

    status: Status
    problems: dict[str, str]


class _Loader:
    """Loads the answering model beside the requests that ask for it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._loading: threading.Thread | None = None
        self._failed_at = float("-inf")
        self._problem = ""
        self._alias: str | None = None
        self._checked: Backend | None = None

    def problem(self, alias: str) -> str | None:
        """Why that model cannot answer, "" if it can, None while it is not known yet."""
        with self._lock:
            if alias != self._alias:
                self._alias, self._failed_at, self._problem = alias, float("-inf"), ""
            if self._loading is not None and self._loading.is_alive():
                return self._problem or None
            if self._problem and self._clock() - self._failed_at < RETRY_S:
                return self._problem
            if self._answers(alias):
                return ""
            self._loading = threading.Thread(
                target=self._load, args=(alias,), name="model-loader", daemon=True
            )
            self._loading.start()
            return self._problem or None

    def _answers(self, alias: str) -> bool:
        """Whoever loaded it: a question may have, before anybody looked."""
        backend = backends.built().get(alias)
        if backend is None:
            return False
        engine = backend.loaded()
        if engine is None:
            return backend is self._checked
        return engine.stats().state == "running"

    def _load(self, alias: str) -> None:
        _learn_rules()
        try:
            backend = backends.get(alias)
            backend.check()
            self._checked, self._problem = backend, ""
        except AssistantError as error:
            self._problem, self._failed_at = error.message, self._clock()
        except Exception as error:
            log.exception("loading %s broke", alias)
            self._problem, self._failed_at = type(error).__name__, self._clock()


class Checker:
    """What is known of this process' health, asked at most once in ``KEPT_S``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._loader = _Loader(clock)
        self._known: tuple[float, Health] | None = None

    def look(self) -> Health:
        """Sync: up to one query, as long as the database's time-outs allow."""
        with self._lock:
            if self._known is None or self._clock() - self._known[0] >= KEPT_S:
                health = self._health()
                self._known = self._clock(), health
            return self._known[1]

    def _health(self) -> Health:
        fatal = {"draining": _draining(), "database": _database(), "queue": _queue()}
        problems = {about: told for about, told in fatal.items() if told}
        missing: str | None = ""
        alias = backends.answering()
        if alias is not None:
            missing = self._loader.problem(alias)
        if missing is None:
            problems["model"] = "The model is being loaded."
        if problems:
            return Health("unavailable", problems)
        if missing:
            return Health("degraded", {"model": f"{missing} Rules answer meanwhile."})
        if version := _version():
            return Health("degraded", {"version": f"{version} The one before answers meanwhile."})
        return Health("ready", {})


checker = Checker()


# --- What may be wrong ---------------------------------------------------------------------------


def _learn_rules() -> None:
    """They learn from their sentences for a second or two: before a first question, not at it."""
    try:
        answers.known()
    except Exception as error:  # such as a database that is away; a question will try again
        log.warning("the rules have not learned yet: %s", type(error).__name__)
    finally:
        connection.close()  # this thread's own


def _draining() -> str:
    return "This process is about to stop; others take over." if drain.begun else ""


def _database() -> str:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError as error:
        return f"The database does not answer ({type(error).__name__})."
    return ""


def _version() -> str:
    """A version that should answer, but cannot be loaded here."""
    return " ".join(filter(None, (backend.problem() for backend in backends.built().values())))


def _queue() -> str:
    for backend in backends.built().values():
        engine = backend.loaded()
        if engine is None:
            continue
        waiting, most = engine.stats().waiting, engine.config.max_queue
        if waiting >= most:
            return f"{waiting} questions wait, as many as the queue holds."
    return ""
