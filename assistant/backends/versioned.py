"""The models of this process: the active one, perhaps a canary, and the way from one to the next.

The registry says who should answer; a thread of this process looks there every ``LOOK_EVERY_S`` and
loads the new model beside the old. New turns get the new one, turns that run end on the old one,
which is closed behind the last of them. A model that cannot be loaded changes nothing but what
``problem`` tells. Without an active version, or a database, the model of the settings answers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from django.db import connection

from assistant import registry
from assistant.backends.base import Backend, Vector
from assistant.backends.onnx import OnnxBackend, Options
from assistant.engine.machine import give_back_memory, keep_large_blocks_apart
from assistant.engine.manifest import Manifest
from assistant.errors import AssistantError, ModelUnavailable
from assistant.models import ModelVersion
from assistant.types import Event, Message, Params, Started, Waiting

if TYPE_CHECKING:
    from assistant.engine import Engine

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How soon this process hears of a move in another.
LOOK_EVERY_S = 1.0
#: How long the first question waits for the registry; without it the model of the settings answers.
FIRST_LOOK_S = 4.0
#: A model that could not be loaded is tried again after so long: its files are hashed each time.
RETRY_S = 15.0
#: How long a third model waits for one that still writes its last answers: two fit the memory.
MOST_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A model folder, and the digest it was registered with; empty for that of the settings."""

    name: str
    folder: str
    sha256: str = ""


class _Model:
    """A loaded version and how many use it."""

    def __init__(self, backend: OnnxBackend, folder: str, manifest: Manifest) -> None:
        self.backend = backend
        self.name = f"{manifest.name}@{manifest.version}"
        self.folder, self.sha256 = folder, manifest.digest
        self.users = 0
        self.left_at = 0.0

    def is_(self, wanted: _Wanted) -> bool:
        if wanted.sha256:
            return self.sha256 == wanted.sha256
        return self.folder == wanted.folder


@dataclass(frozen=True, slots=True)
class _Now:
    """Who answers; replaced as a whole, never changed."""

    active: _Model | None = None
    canary: _Model | None = None
    percent: int = 0

    def chosen(self, params: Params | None) -> _Model | None:
        canary = self.canary
        if canary is None or params is None:
            return self.active
        mine = registry.gets_canary(params.sticky, canary.sha256, self.percent)
        return canary if mine else self.active

    def models(self) -> tuple[_Model, ...]:
        return tuple(model for model in (self.active, self.canary) if model is not None)


class VersionedBackend(Backend):
    """As ``OnnxBackend``, of whichever version the registry names; ``model_dir`` without one."""

    options_class: ClassVar[type[Any]] = Options
    in_process = True

    def __init__(self, alias: str, options: Options) -> None:
        super().__init__(alias, options)
        self._lock = threading.Lock()  # of the four below; held for moments
        self._now = _Now()
        self._gone: list[_Model] = []
        self._watcher: threading.Thread | None = None
        self._stop = threading.Event()
        self._changing = threading.RLock()  # one change at a time; held while a model loads
        self._plan = registry.Plan()
        self._looked, self._woken = threading.Event(), threading.Event()
        self._failed: dict[_Wanted, tuple[str, float]] = {}
        self._registry_away = False

    # -- what a backend does -----------------------------------------------------------------

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        """The canary's answer where it is its turn and it can; else the active version's."""
        if self._now.active is None:
            await asyncio.to_thread(self._ready)
        canary = self._now.canary
        if canary is not None and self._now.chosen(params) is canary:
            shown = False
            try:
                async with aclosing(cast(Any, _held(self._written(messages, params)))) as events:
                    async for event in events:
                        shown = shown or not isinstance(event, Waiting)
                        yield event
                return
            except Exception as error:
                if shown:
                    raise
                log.warning("canary %s could not answer: %r", canary.name, error)
        async with aclosing(cast(Any, self._written(messages, replace(params, sticky="")))) as rest:
            async for event in rest:
                yield event

    async def _written(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        with self._using(params) as backend:
            async with aclosing(cast(Any, backend.stream(messages, params))) as events:
                async for event in events:
                    yield event

    async def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        if self._now.active is None:
            await asyncio.to_thread(self._ready)
        with self._using() as backend:
            return await backend.embed(texts)

    def embedding_width(self) -> int:
        return self._ask(lambda backend: backend.embedding_width())

    def text_of(self, ids: Sequence[int]) -> str:
        return self._ask(lambda backend: backend.text_of(ids))

    def count_tokens(self, text: str) -> int:
        return self._ask(lambda backend: backend.count_tokens(text))

    def context_tokens(self) -> int:
        return self._ask(lambda backend: backend.context_tokens())

    def reads_system(self) -> bool:
        return self._ask(lambda backend: backend.reads_system())

    def check(self) -> None:
        self._ask(lambda backend: backend.check())

    def version(self, params: Params | None = None) -> str:
        chosen = self._now.chosen(params)
        return chosen.backend.version() if chosen is not None else ""

    def expected_wait_s(self) -> float:
        active = self._now.active
        return active.backend.expected_wait_s() if active is not None else 0.0

    def loaded(self) -> Engine | None:
        active = self._now.active
        return active.backend.loaded() if active is not None else None

    def engines(self) -> tuple[Engine, ...]:
        found = (model.backend.loaded() for model in self._now.models())
        return tuple(engine for engine in found if engine is not None)

    def problem(self) -> str:
        """Of the versions that should answer now, those that could not be loaded."""
        told = [self._failed.get(wanted) for wanted in self._wanted() if wanted is not None]
        return " ".join(f"{problem[0]}" for problem in told if problem is not None)

    def close(self) -> None:
        with self._lock:
            watcher, self._watcher = self._watcher, None
            self._stop.set()
            self._woken.set()
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(MOST_WAIT_S)
        with self._changing:
            with self._lock:
                models = [*self._now.models(), *self._gone]
                self._now, self._gone = _Now(), []
            self._failed.clear()
            self._looked.clear()
            for model in models:
                model.backend.close()

    # -- who is used, and by how many ----------------------------------------------------------

    def _ask(self, question: Callable[[OnnxBackend], T]) -> T:
        """Raises: ModelUnavailable."""
        if self._now.active is None:
            self._ready()
        with self._using() as backend:
            return question(backend)

    @contextmanager
    def _using(self, params: Params | None = None) -> Iterator[OnnxBackend]:
        """The version that answers ``params``, kept open as long as this is. Raises:
        ModelUnavailable."""
        with self._lock:
            model = self._now.chosen(params)
            if model is None:
                raise ModelUnavailable("The model was closed just now. Please try again.")
            model.users += 1
        try:
            yield model.backend
        finally:
            with self._lock:
                model.users -= 1
                last = not model.users and model in self._gone
            if last:
                self._woken.set()  # the watcher closes it: that takes too long for a loop

    def _put(self, now: _Now) -> None:
        """From here on these answer; whoever is not among them closes behind its last answer."""
        with self._lock:
            gone = [model for model in self._now.models() if model not in now.models()]
            for model in gone:
                model.left_at = time.monotonic()
            self._gone += gone
            self._now = now

    def _sweep(self) -> None:
        with self._lock:
            idle = [model for model in self._gone if not model.users]
            self._gone = [model for model in self._gone if model.users]
        for model in idle:
            model.backend.close()
            log.info("model %s was closed behind its last answer", model.name)
        if idle:
            give_back_memory()

    # -- following the registry ----------------------------------------------------------------

    def _ready(self) -> None:
        """Have somebody who answers, loaded now if need be. Raises: ModelUnavailable."""
        keep_large_blocks_apart()
        self._watch()
        self._looked.wait(FIRST_LOOK_S)
        with self._changing:
            if self._now.active is None:
                self._put(_Now(self._first()))
                self._follow()  # the canary too, before its conversations are answered by another

    def _first(self) -> _Model:
        """The active version, else that of the settings. Raises: ModelUnavailable."""
        wanted, _ = self._wanted()
        if wanted.sha256 and (found := self._tried(wanted)) is not None:
            return found
        return self._load(self._of_settings())

    def _watch(self) -> None:
        """Start the thread that follows the registry; nothing if it lives."""
        with self._lock:
            if self._watcher is None or not self._watcher.is_alive():
                self._stop = threading.Event()
                self._watcher = threading.Thread(
                    target=self._live, args=(self._stop,), name="model-versions", daemon=True
                )
                self._watcher.start()

    def _live(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._look()
                self._looked.set()
                with self._changing:
                    if self._now.active is not None and not stop.is_set():
                        self._follow()
            except Exception:
                log.exception("the model's versions could not be followed")
            self._woken.wait(LOOK_EVERY_S)
            self._woken.clear()

    def _look(self) -> None:
        """Keep what the registry says; what it said before while it does not answer."""
        try:
            self._plan, away = registry.plan(), False
        except Exception as error:
            away = True
            if not self._registry_away:
                # Before its first word it may not be there yet: a command ahead of any migration.
                level = logging.WARNING if self._looked.is_set() else logging.DEBUG
                log.log(level, "the registry of models does not answer: %s", type(error).__name__)
        finally:
            connection.close()
        self._registry_away = away

    def _follow(self) -> None:
        """One step towards what the registry says; at most one model is loaded in it."""
        self._sweep()
        now, (active, canary) = self._now, self._wanted()
        assert now.active is not None
        if now.active.is_(active):
            self._follow_canary(now, canary)
        elif now.canary is not None and now.canary.is_(active):
            self._put(_Now(now.canary))
            self._failed.clear()
        else:
            self._put(_Now(now.active))  # without its canary, to have room for the new one
            if self._room() and (found := self._tried(active)) is not None:
                self._put(_Now(found))
                log.warning("model %s answers from now on", found.name)
        self._sweep()

    def _follow_canary(self, now: _Now, wanted: _Wanted | None) -> None:
        assert now.active is not None
        if wanted is None or now.active.is_(wanted):
            self._put(_Now(now.active))
            return
        percent = self._plan.canary.canary_percent if self._plan.canary is not None else 0
        if now.canary is not None and now.canary.is_(wanted):
            self._put(_Now(now.active, now.canary, percent))
            return
        self._put(_Now(now.active))
        if self._room() and (found := self._tried(wanted)) is not None:
            self._put(_Now(now.active, found, percent))
            log.warning("canary %s answers %d %% of conversations", found.name, percent)

    def _room(self) -> bool:
        """Whether a model may be loaded beside those there are, or those that go took too long."""
        self._sweep()
        with self._lock:
            return all(time.monotonic() - gone.left_at > MOST_WAIT_S for gone in self._gone)

    # -- loading -------------------------------------------------------------------------------

    def _wanted(self) -> tuple[_Wanted, _Wanted | None]:
        plan = self._plan
        active = _of_row(plan.active) if plan.active is not None else self._of_settings()
        return active, _of_row(plan.canary) if plan.canary is not None else None

    def _of_settings(self) -> _Wanted:
        return _Wanted("of the settings", str(Path(self.options.model_dir)))

    def _tried(self, wanted: _Wanted) -> _Model | None:
        """The model, loaded; None if it cannot be, which is told once and tried again later."""
        known = self._failed.get(wanted)
        if known is not None and time.monotonic() - known[1] < RETRY_S:
            return None
        try:
            found = self._load(wanted)
        except AssistantError as error:
            told = f"Model {wanted.name} cannot be loaded: {error.message}"
            if known is None or known[0] != told:
                log.error("%s", told)
            self._failed[wanted] = told, time.monotonic()
            return None
        self._failed.pop(wanted, None)
        return found

    def _load(self, wanted: _Wanted) -> _Model:
        """Loaded, its files and its arithmetic checked. Raises: ModelUnavailable."""
        begun = time.monotonic()
        backend = OnnxBackend(self.alias, replace(self.options, model_dir=wanted.folder))
        backend.check()
        manifest = backend.engine.manifest
        assert manifest is not None  # it has started
        found = _Model(backend, wanted.folder, manifest)
        if not found.is_(wanted):
            backend.close()
            raise ModelUnavailable(
                f"{wanted.folder} holds another model than the one that was registered. Put that "
                "one back, or register this one as a version of its own."
            )
        took_ms = round((time.monotonic() - begun) * 1000)
        log.info("model_loaded", extra={"model": found.name, "duration_ms": took_ms})
        return found


def _of_row(row: ModelVersion) -> _Wanted:
    return _Wanted(row.label, row.folder, row.sha256)


async def _held(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events, the first only with the second: until then another version can still begin."""
    first: Started | None = None
    async with aclosing(cast(Any, events)) as stream:
        async for event in stream:
            if isinstance(event, Started):
                first = event
                continue
            if first is not None:
                yield first
                first = None
            yield event
