"""Copies what others know into the gauges: the engine's figures, breakers, budget, results.

``read`` is called when somebody looks at ``/metrics``. With several processes the one that is asked
sees only itself, so there each also copies its own figures every ``EVERY_S``, from the first
request on. A source that breaks is counted and skipped. Knows no HTTP, loads no model.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from django.core.signals import request_started
from prometheus_client import Gauge, Metric

from assistant import backends
from conversations.running import running
from conversations.turn import turn_finished
from fallback import breaker, budget
from monitoring import metrics

if TYPE_CHECKING:  # the engine is loaded with its first question
    from assistant.engine import Engine
    from assistant.engine.worker import EngineStats

log = logging.getLogger(__name__)

#: How often a process copies its own figures, where several have one page.
EVERY_S = 1.0

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Reading:
    """A result that is kept in the database: of which gauge, with which labels."""

    gauge: Gauge
    labels: Mapping[str, str]
    value: float


#: What else is read, by name: results of evaluations, shadows, drift, jobs. Each returns what it
#: knows now; it may touch the database.
SOURCES: dict[str, Callable[[], Iterable[Reading]]] = {}


def read() -> None:
    """Copy everything. Sync: cache and database. Never raises."""
    parts: dict[str, Callable[[], None]] = {
        "engines": _read_engines,
        "breakers": _read_breakers,
        "budget": _read_budget,
        **{name: partial(_read_results, name, source) for name, source in SOURCES.items()},
    }
    with _lock:
        for name, part in parts.items():
            _try(name, part)


def _try(name: str, part: Callable[[], None]) -> None:
    try:
        part()
    except Exception as error:
        metrics.READ_ERRORS.labels(name).inc()
        log.warning("the figures of %s could not be read: %s", name, type(error).__name__)


# --- Engines and running answers -----------------------------------------------------------------

#: What each engine had counted when it was last read, by alias and model.
_before: dict[tuple[str, str], EngineStats] = {}
#: Labels of the models that were loaded then.
_loaded: set[tuple[str, ...]] = set()
_TOKEN_KINDS = {
    "read": "prompt_tokens",
    "reused": "reused_tokens",
    "written": "generated_tokens",
    "embedded": "embedded_tokens",
    "guessed": "drafted_tokens",
    "guessed_right": "accepted_tokens",
}
#: Models that were shown with a running answer.
_shown: set[str] = set()


def _read_engines() -> None:
    counted = _turns_elsewhere()
    loaded: set[tuple[str, ...]] = set()
    for alias, backend in backends.built().items():
        metrics.MODEL_PROBLEM.labels(alias).set(bool(backend.problem()))
        for engine in backend.engines():
            if engine.manifest is None:
                continue
            model = metrics.model_label(_name(engine))
            stats = engine.stats()
            loaded.add(_show(engine, model, stats))
            _add(model, stats, _before.get((alias, model)))
            _before[alias, model] = stats
            counted[model] = stats.running
    for gone in _loaded - loaded:
        metrics.MODEL_INFO.labels(*gone).set(0)
    _loaded.clear()
    _loaded.update(loaded)
    for model in _shown.union(counted):
        metrics.RUNNING.labels(model).set(counted[model])
        if model not in _shown:
            metrics.WAITING.labels(model)  # of a backend without a queue: none
    _shown.update(counted)


def _turns_elsewhere() -> Counter[str]:
    """Answers of models that are not engines of this process; an engine's own count replaces it."""
    models = (turn.source.model for turn in running.all())
    return Counter(metrics.model_label(model) for model in models if model)


def _name(engine: Engine) -> str:
    assert engine.manifest is not None
    return f"{engine.manifest.name}@{engine.manifest.version}"


def _show(engine: Engine, model: str, stats: EngineStats) -> tuple[str, ...]:
    """Its labels in ``MODEL_INFO``."""
    manifest = engine.manifest
    assert manifest is not None
    metrics.WAITING.labels(model).set(stats.waiting)
    metrics.RUNNING_LIMIT.labels(model).set(stats.slots)
    metrics.WAITING_LIMIT.labels(model).set(engine.config.max_queue)
    metrics.KV_USAGE.labels(model).set(stats.kv_usage)
    metrics.KV_BYTES.labels(model).set(stats.kv_bytes)
    metrics.PREFIX_BYTES.labels(model).set(stats.kept_bytes)
    metrics.STEP_TIME.labels(model).set(stats.step_s)
    metrics.PREFILL_RATE.labels(model).set(stats.prefill_per_s)
    runtime = "onnxruntime" if manifest.runner == "packed" else f"onnxruntime-{manifest.runner}"
    loaded = stats.state == "running"
    labels = (model, manifest.version, manifest.quant, runtime)
    metrics.MODEL_INFO.labels(*labels).set(loaded)
    return labels


def _add(model: str, now: EngineStats, before: EngineStats | None) -> None:
    """Count what is new; after a crash the engine's own counting starts from nothing."""
    if before is not None and now.steps < before.steps:
        before = None
    old_batches = before.batches if before else ()

    def new(name: str) -> float:
        earlier = getattr(before, name) if before else 0
        return float(max(0, getattr(now, name) - earlier))

    metrics.STEPS.labels(model).inc(new("steps"))
    metrics.BUSY.labels(model).inc(new("busy_s"))
    for kind, name in _TOKEN_KINDS.items():
        metrics.ENGINE_TOKENS.labels(model, kind).inc(new(name))
    batches = metrics.BATCH_SIZE.labels(model)
    for size, times in enumerate(now.batches):
        earlier = old_batches[size] if size < len(old_batches) else 0
        if times > earlier:
            batches.observe_many(size, times - earlier)


# --- Breakers, budget, results -------------------------------------------------------------------


def _read_breakers() -> None:
    for target, state in breaker.states().items():
        metrics.CIRCUIT.labels(target).set(state)


def _read_budget() -> None:
    metrics.UPSTREAM_LEFT.set(budget.left_for_all())


#: Gauges that show what is kept in the database.
_RESULTS = {
    gauge._name
    for gauge in (metrics.EVALUATION, metrics.SHADOW, metrics.DRIFT, metrics.LAST_SUCCESS)
}
#: What each source has told when it was last read: a gauge and its labels.
_told: dict[str, set[tuple[Gauge, tuple[tuple[str, str], ...]]]] = {}


def _read_results(name: str, source: Callable[[], Iterable[Reading]]) -> None:
    """What a source tells no more has no value any longer: the last one would stand for ever."""
    told = set()
    for reading in source():
        reading.gauge.labels(**reading.labels).set(reading.value)
        told.add((reading.gauge, tuple(sorted(reading.labels.items()))))
    for gauge, labels in _told.get(name, set()) - told:
        gauge.labels(**dict(labels)).set(math.nan)
    _told[name] = told


def still_holds(family: Metric) -> bool:
    """Takes from a result's samples what was not told when the sources were last read here;
    whether any is left. Of several processes another may have told what is no longer so."""
    if family.name in _RESULTS:
        told = {(gauge._name, labels) for every in _told.values() for gauge, labels in every}
        family.samples = [
            sample
            for sample in family.samples
            if (sample.name, tuple(sorted(sample.labels.items()))) in told
        ]
    return bool(family.samples)


# --- Several processes ---------------------------------------------------------------------------


class _Copier:
    """The thread of one process that copies its own figures."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, **_: object) -> None:
        """Any number of times; a signal's receiver."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._live, name="metrics-copier", daemon=True
                )
                self._thread.start()

    def _live(self) -> None:
        while True:
            with _lock:
                _try("engines", _read_engines)
                _try("breakers", _read_breakers)
            time.sleep(EVERY_S)


copier = _Copier()


def copy_from_now_on() -> None:
    """Start the copying with the first sign that this process serves."""
    request_started.connect(copier.start, dispatch_uid="metrics-copier-request")
    turn_finished.connect(copier.start, dispatch_uid="metrics-copier-turn")
