"""Every Prometheus name of the product, and the signals that feed those which are counted.

What is read instead of counted (engine, breakers, results in the database) is copied into its gauge
by ``reading`` when somebody looks. Labels are from closed sets, never a user's text or id: series
do not grow with users. Observes only; an error in here reaches no answer, for signals are sent
robustly. Knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from typing import Any

from celery.signals import task_postrun
from django.db.models.signals import post_save
from django.http import HttpRequest
from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from assistant import backends
from assistant.errors import AssistantError
from conversations import limits, turn
from conversations.models import Feedback, Message
from conversations.turn import TurnRecord
from fallback import router, shared

log = logging.getLogger(__name__)

# Half of all series, and nothing reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# --- Closed sets ---------------------------------------------------------------------------------

#: What a label shows instead of a value that is none of its own, and for "there is none".
OTHER, NONE = "other", "none"
ROUTES = (*Message.Route.values, NONE)
TRANSPORTS = ("ws", "sse", "rest", "openai")
OUTCOMES = ("ok", "error", "cancelled", "rejected")
#: Why somebody else answered than the first on the route.
FALLBACK_REASONS = ("low_confidence", "overload", "timeout", "breaker_open", "error", "hurry")
REASONS = (*FALLBACK_REASONS, "caution", "out_of_scope")
LIMITS = (
    *("chat", "conversations", "tokens-minute", "tokens-day"),
    *("login", "turns", "sockets", "requests"),
)
#: Different names of models in labels; more are shown as ``other``.
MOST_MODELS = 30

_OUTCOME = {"complete": "ok", "failed": "error", "stopped": "cancelled", "interrupted": "cancelled"}


def known(value: str, allowed: Collection[str]) -> str:
    """``value`` as a label: itself, ``none`` if empty, ``other`` if it is not of the set."""
    if not value:
        return NONE
    return value if value in allowed else OTHER


def view_of(request: HttpRequest) -> str:
    """The name of what answered, which is from a closed set; ``none`` if nothing was found."""
    match = request.resolver_match
    if match is None:
        return NONE
    return "admin" if "admin" in match.app_names else match.view_name or OTHER


class _Models:
    """Names of models as labels: the first ``MOST_MODELS`` of this process, then ``other``."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, name: str) -> str:
        with self._lock:
            if name and name not in self._seen and len(self._seen) < MOST_MODELS:
                self._seen.add(name[:100])
            return known(name[:100], self._seen)


model_label = _Models()


class Distribution(Histogram):
    """A histogram that can be told the same value many times at once."""

    def observe_many(self, value: float, times: int) -> None:
        self._sum.inc(value * times)
        fitting = next(at for at, bound in enumerate(self._upper_bounds) if value <= bound)
        self._buckets[fitting].inc(times)


# --- Names: answers ------------------------------------------------------------------------------

#: OpenTelemetry's buckets, in seconds. A small model writes faster than its fastest: hence three
#: below for output tokens.
_DURATION_S = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12),
    *(10.24, 20.48, 40.96, 81.92),
)
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_OUTPUT_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)

REQUESTS = Counter(
    "assistant_requests",
    "Questions by who answered, how it ended and how they came.",
    ["route", "outcome", "transport"],
)
DURATION = Histogram(
    "assistant_request_duration_seconds",
    "From the question to the stored answer.",
    ["route"],
    buckets=_DURATION_S,
)
FIRST_TOKEN = Histogram(
    "assistant_time_to_first_token_seconds",
    "From the question to the first words of its answer.",
    ["route", "model"],
    buckets=_FIRST_TOKEN_S,
)
OUTPUT_TOKEN = Histogram(
    "assistant_time_per_output_token_seconds",
    "Mean time between two tokens of one answer.",
    ["model"],
    buckets=_OUTPUT_TOKEN_S,
)
QUEUE_TIME = Histogram(
    "assistant_queue_time_seconds",
    "From the question to its place in a batch.",
    ["model"],
    buckets=_FIRST_TOKEN_S,
)
PREFILL_TIME = Histogram(
    "assistant_prefill_time_seconds",
    "From the place in a batch to the first token.",
    ["model"],
    buckets=_FIRST_TOKEN_S,
)
TOKENS = Counter(
    "assistant_tokens", "Tokens read and written for answers.", ["model", "token_type"]
)
CONFIDENCE = Histogram(
    "assistant_confidence_ratio",
    "How sure the model was of what is asked, 0 to 1.",
    ["model"],
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
)
#: Positive, as Prometheus wants it. 0.7 nats: every second token was a toss-up between two.
ANSWER_NLL = Histogram(
    "assistant_answer_nll_nats",
    "Mean negative log-probability of the tokens of an answer: how unsure the model wrote it.",
    ["model"],
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0),
)
FALLBACKS = Counter(
    "assistant_fallbacks",
    "Answers by somebody else than the first on the route, and why.",
    ["from_route", "to_route", "reason"],
)
DEGRADED = Counter(
    "assistant_degraded",
    "Answers that are not the model's best, and why.",
    ["route", "reason"],
)
CACHE = Counter(
    "assistant_cache_requests",
    "Looks for an answer that is kept: to the same question, or to one that means the same.",
    ["kind", "result"],
)
CACHE_ERRORS = Counter(
    "assistant_cache_errors",
    "Calls of the shared cache that failed; each is followed by seconds in which nobody asks it.",
)
LIMITED = Counter("assistant_ratelimited", "Refusals, by the limit that was reached.", ["scope"])
FEEDBACK = Counter("assistant_feedback", "Judgements of answers by their readers.", ["value"])

# --- Names: the engine, as of the last look ------------------------------------------------------

RUNNING = Gauge(
    "assistant_requests_running",
    "Answers that are being written.",
    ["model"],
    multiprocess_mode="livesum",
)
WAITING = Gauge(
    "assistant_requests_waiting",
    "Questions in the queue.",
    ["model"],
    multiprocess_mode="livesum",
)
RUNNING_LIMIT = Gauge(
    "assistant_requests_running_limit",
    "Answers that can be written at once.",
    ["model"],
    multiprocess_mode="livesum",
)
WAITING_LIMIT = Gauge(
    "assistant_requests_waiting_limit",
    "Questions the queue holds before more are refused.",
    ["model"],
    multiprocess_mode="livesum",
)
BATCH_SIZE = Distribution(
    "assistant_batch_size",
    "Answers that ran together in one step of the engine.",
    ["model"],
    buckets=(1, 2, 4, 8, 16, 32, 64),
)
KV_USAGE = Gauge(
    "assistant_kv_cache_usage_ratio",
    "Share of the memory of running answers that is used, 0 to 1.",
    ["model"],
    multiprocess_mode="livemax",
)
KV_BYTES = Gauge(
    "assistant_kv_cache_bytes",
    "Memory of running answers.",
    ["model"],
    multiprocess_mode="livesum",
)
PREFIX_BYTES = Gauge(
    "assistant_prefix_cache_bytes",
    "Memory of finished answers, kept for their chats' next turns.",
    ["model"],
    multiprocess_mode="livesum",
)
STEPS = Counter("assistant_engine_steps", "Steps of the engine.", ["model"])
BUSY = Counter("assistant_engine_busy_seconds", "Time the engine spent in its steps.", ["model"])
ENGINE_TOKENS = Counter(
    "assistant_engine_tokens",
    "Tokens in the engine: read, reused from an earlier turn, written, read for embeddings, and "
    "guesses of the next ones, all and those that were right.",
    ["model", "kind"],
)
STEP_TIME = Gauge(
    "assistant_engine_step_seconds",
    "Moving mean of a step without a prompt.",
    ["model"],
    multiprocess_mode="livemax",
)
PREFILL_RATE = Gauge(
    "assistant_engine_prefill_tokens_per_second",
    "Moving mean of how fast prompts are read.",
    ["model"],
    multiprocess_mode="livesum",
)
MODEL_INFO = Gauge(
    "assistant_model_info",
    "1 for each model that is loaded.",
    ["model", "version", "precision", "runtime"],
    multiprocess_mode="livemax",
)

# --- Names: what stands around it, as of the last look -------------------------------------------

CIRCUIT = Gauge(
    "assistant_circuit_state",
    "0: the backend is asked, 1: it is tried, 2: it is left alone.",
    ["target"],
    multiprocess_mode="livemax",
)
UPSTREAM_LEFT = Gauge(
    "assistant_upstream_calls_left",
    "Calls of the larger model that today's budget still allows.",
    multiprocess_mode="livemostrecent",
)
EVALUATION = Gauge(
    "assistant_evaluation_score",
    "Latest result of an evaluation.",
    ["suite", "metric", "model"],
    multiprocess_mode="livemostrecent",
)
SHADOW = Gauge(
    "assistant_shadow_agreement_ratio",
    "Share of turns in which a candidate and the active model agree, 0 to 1.",
    ["model"],
    multiprocess_mode="livemostrecent",
)
SHADOWED = Counter(
    "assistant_shadow_turns",
    "Turns that were sampled for the candidate in shadow, by what became of them.",
    ["result"],
)
ROLLED_BACK = Counter(
    "assistant_canary_rollbacks",
    "Canaries that were taken back by themselves, being worse than the active model.",
)
DRIFT = Gauge(
    "assistant_drift_score",
    "How far today's questions are from those of the reference window; 1: as far as the threshold.",
    ["feature"],
    multiprocess_mode="livemostrecent",
)
LAST_SUCCESS = Gauge(
    "assistant_last_success_timestamp_seconds",
    "When the job last came to its end; if it never did, when it could first have begun.",
    ["job"],
    multiprocess_mode="livemostrecent",
)
MODEL_PROBLEM = Gauge(
    "assistant_model_problem",
    "1 for a backend with a version that should answer but cannot be loaded here.",
    ["backend"],
    multiprocess_mode="livemax",
)
READ_ERRORS = Counter(
    "assistant_metrics_errors", "Figures that could not be read for this page.", ["source"]
)

# --- Names: the product around it ----------------------------------------------------------------

HTTP_REQUESTS = Counter(
    "assistant_http_requests", "Requests over HTTP.", ["view", "method", "status"]
)
HTTP_DURATION = Histogram(
    "assistant_http_request_duration_seconds",
    "Until the reply's head; a stream's body follows.",
    ["view"],
    buckets=_DURATION_S,
)
TASKS = Counter("assistant_tasks", "Background jobs that came to an end.", ["task", "outcome"])


def first_values() -> None:
    """Every series that can be foreseen, at zero: a counter that appears at 1 hides its first
    increase from ``rate()``."""
    for route in ROUTES:
        for transport in TRANSPORTS:
            for outcome in ("rejected",) if route == NONE else ("ok", "error", "cancelled"):
                REQUESTS.labels(route, outcome, transport)
    for to_route in ("cache", "upstream", "rules", "human"):
        for reason in FALLBACK_REASONS:
            FALLBACKS.labels("model", to_route, reason)
    for kind in ("exact", "semantic"):
        for result in ("hit", "miss"):
            CACHE.labels(kind, result)
    for scope in LIMITS:
        LIMITED.labels(scope)
    for value in Feedback.Value.values:
        FEEDBACK.labels(value)
    for result in ("pair", "skipped", "disturbed", "dropped", "error"):
        SHADOWED.labels(result)


# --- What feeds them -----------------------------------------------------------------------------


def count_turn(*, record: TurnRecord, **_: Any) -> None:
    route, model = known(record.route, ROUTES), model_label(record.model)
    outcome = _OUTCOME[record.status]
    REQUESTS.labels(route, outcome, known(record.transport, TRANSPORTS)).inc()
    DURATION.labels(route).observe(record.duration_ms / 1000)
    _count_speed(record, route, model)
    if record.model and record.route != "cache":
        TOKENS.labels(model, "input").inc(record.input_tokens)
        TOKENS.labels(model, "output").inc(record.output_tokens)
    if record.confidence is not None:
        CONFIDENCE.labels(model).observe(record.confidence)
    if record.logprob is not None:
        ANSWER_NLL.labels(model).observe(max(0.0, -record.logprob))
    if record.reason:
        DEGRADED.labels(route, known(record.reason, REASONS)).inc()
        _count_fallback(record.reason, route)


def _count_speed(record: TurnRecord, route: str, model: str) -> None:
    if record.ttft_ms is None:
        return
    FIRST_TOKEN.labels(route, model).observe(record.ttft_ms / 1000)
    if record.queue_ms is not None:
        QUEUE_TIME.labels(model).observe(record.queue_ms / 1000)
    if record.prefill_ms is not None:
        PREFILL_TIME.labels(model).observe(record.prefill_ms / 1000)
    if record.model and record.output_tokens > 1:
        writing_s = (record.duration_ms - record.ttft_ms) / 1000
        OUTPUT_TOKEN.labels(model).observe(max(0.0, writing_s) / (record.output_tokens - 1))


def _count_fallback(reason: str, route: str) -> None:
    first = _first_route()
    if reason in FALLBACK_REASONS and route != first:
        FALLBACKS.labels(first, route, reason).inc()


def _first_route() -> str:
    """What answers of the first backend on the route are called."""
    alias = backends.answering()
    try:
        return backends.get(alias).route if alias else NONE
    except AssistantError:  # it cannot even be built, which is why somebody else answered
        return "model"


def count_refused_turn(*, transport: str, **_: Any) -> None:
    REQUESTS.labels(NONE, "rejected", known(transport, TRANSPORTS)).inc()


def count_refusal(*, scope: str, **_: Any) -> None:
    LIMITED.labels(known(scope, LIMITS)).inc()


def count_lookup(*, kind: str, hit: bool, **_: Any) -> None:
    CACHE.labels(kind, "hit" if hit else "miss").inc()


def count_feedback(*, instance: Feedback, raw: bool = False, **_: Any) -> None:
    if raw:  # a fixture is nobody's judgement
        return
    try:  # Django's own signal is not robust, and this one is sent while a user waits
        FEEDBACK.labels(known(instance.value, Feedback.Value.values)).inc()
    except Exception as error:
        log.error("a judgement was not counted: %s", type(error).__name__)


def count_task(*, sender: Any, state: str | None, **_: Any) -> None:
    """Celery's ``task_postrun``. The worker shows its page only in several-process mode."""
    TASKS.labels(sender.name, "ok" if state == "SUCCESS" else "error").inc()


def count_cache_error(**_: Any) -> None:
    CACHE_ERRORS.inc()


def connect() -> None:
    """Listen, from now on; any number of times."""
    first_values()
    for signal, receiver in (
        (turn.turn_finished, count_turn),
        (turn.turn_refused, count_refused_turn),
        (limits.refused, count_refusal),
        (router.looked_up, count_lookup),
        (shared.failed, count_cache_error),
    ):
        signal.connect(receiver, dispatch_uid=f"metrics-{receiver.__name__}")
    post_save.connect(count_feedback, sender=Feedback, dispatch_uid="metrics-count_feedback")
    task_postrun.connect(count_task, dispatch_uid="metrics-count_task")
