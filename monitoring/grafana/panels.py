"""What the dashboards show: rows of panels, each a sentence and its queries.

``core`` panels show something on any server that has just answered; the others need a special
event, a larger model elsewhere, or results in the database. Knows nothing of Grafana's JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "heatmap", "table", "bargauge"]


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """*Units*: ``unit`` as Grafana names them; ``width`` of 24 columns, ``height`` in its rows."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 7
    core: bool = False
    stacked: bool = False
    mappings: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    def panels(self) -> Iterator[Panel]:
        for _, panels in self.rows:
            yield from panels


def share(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


def quantile(q: float, name: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({name}_bucket[$__rate_interval])))"


def percentiles(name: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(q, name), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99))


def per_second(name: str, by: str, where: str = "") -> str:
    return f"sum by ({by}) (rate({name}{where}[$__rate_interval]))"


def _all(name: str, where: str = "") -> str:
    return f"sum(rate({name}{where}[$__rate_interval]))"


# --- What is shown -------------------------------------------------------------------------------

_ASKED = "assistant_requests_total"
_ANSWERED = _all(_ASKED, '{outcome=~"ok|error"}')

OVERVIEW = Dashboard(
    "assistant-overview",
    "Assistant: overview",
    "Is it there, does it answer, who answers, how fast.",
    (
        (
            "Now",
            (
                Panel(
                    "Processes",
                    "Processes that answer Prometheus. AssistantDown fires below what you run.",
                    "none",
                    (Query('sum(up{job="assistant"})', "up"),),
                    "stat", 4, 4, core=True,
                ),
                Panel(
                    "Questions",
                    "Questions a second, refused ones included.",
                    "reqps",
                    (Query(_all(_ASKED), "questions"),),
                    "stat", 4, 4, core=True,
                ),
                Panel(
                    "Errors",
                    "Share of answers that ended in an error. Rules' answers are none.",
                    "percentunit",
                    (Query(share(_all(_ASKED, '{outcome="error"}'), _ANSWERED), "errors"),),
                    "stat", 4, 4, core=True,
                ),
                Panel(
                    "Handed on",
                    "Share of answers that somebody else gave than the first on the route.",
                    "percentunit",
                    (Query(share(_all("assistant_fallbacks_total"), _ANSWERED), "handed on"),),
                    "stat", 4, 4, core=True,
                ),
                Panel(
                    "First words, p95",
                    "One reader in twenty waits longer than this for the first words.",
                    "s",
                    (Query(quantile(0.95, "assistant_time_to_first_token_seconds"), "p95"),),
                    "stat", 4, 4, core=True,
                ),
                Panel(
                    "Tokens",
                    "Tokens written a second, by all models.",
                    "none",
                    (Query(_all("assistant_tokens_total", '{token_type="output"}'), "tokens/s"),),
                    "stat", 4, 4, core=True,
                ),
            ),
        ),
        (
            "Answers",
            (
                Panel(
                    "Who answers",
                    "Answers a second by route: reviewed, cache, model, upstream, rules, human.",
                    "reqps",
                    (Query(per_second(_ASKED, "route", '{outcome!="rejected"}'), "{{route}}"),),
                    core=True, stacked=True,
                ),
                Panel(
                    "How they end",
                    "Questions a second by outcome; cancelled: stopped by its reader, or left.",
                    "reqps",
                    (Query(per_second(_ASKED, "outcome"), "{{outcome}}"),),
                    core=True, stacked=True,
                ),
                Panel(
                    "How they come",
                    "Questions a second by transport.",
                    "reqps",
                    (Query(per_second(_ASKED, "transport"), "{{transport}}"),),
                    core=True, stacked=True,
                ),
                Panel(
                    "First words",
                    "From the question to the first words, over all routes.",
                    "s",
                    percentiles("assistant_time_to_first_token_seconds"),
                    core=True,
                ),
                Panel(
                    "Whole answer",
                    "From the question to the stored answer.",
                    "s",
                    percentiles("assistant_request_duration_seconds"),
                    core=True,
                ),
                Panel(
                    "Why handed on",
                    "Answers a second by somebody else than the first on the route, and why.",
                    "reqps",
                    (
                        Query(
                            per_second("assistant_fallbacks_total", "reason, to_route"),
                            "{{reason}} to {{to_route}}",
                        ),
                    ),
                    core=True,
                ),
            ),
        ),
        (
            "Around it",
            (
                Panel(
                    "Breakers",
                    "Whether each backend is asked, tried, or left alone.",
                    "none",
                    (Query("max by (target) (assistant_circuit_state)", "{{target}}"),),
                    core=True,
                    mappings=((0, "asked", "green"), (1, "tried", "orange"),
                              (2, "left alone", "red")),
                ),
                Panel(
                    "Refusals",
                    "Questions, sign-ins and sockets refused a second, by the limit reached.",
                    "reqps",
                    (Query(per_second("assistant_ratelimited_total", "scope"), "{{scope}}"),),
                    core=True,
                ),
                Panel(
                    "Calls left of the larger model",
                    "What today's budget still allows; nothing is asked where none is set.",
                    "none",
                    (Query("min(assistant_upstream_calls_left)", "calls"),),
                ),
                Panel(
                    "HTTP errors",
                    "Replies of 500 and above a second, by view. Streams fail inside a 200: see "
                    "How they end.",
                    "reqps",
                    (
                        Query(
                            per_second("assistant_http_requests_total", "view",
                                       '{status=~"5.."}'),
                            "{{view}}",
                        ),
                    ),
                ),
                Panel(
                    "HTTP, p95",
                    "Until the head of the reply, by view.",
                    "s",
                    (
                        Query(
                            quantile(0.95, "assistant_http_request_duration_seconds", "view"),
                            "{{view}}",
                        ),
                    ),
                    core=True,
                ),
                Panel(
                    "Figures that could not be read",
                    "A source of this page's figures that broke; users do not notice.",
                    "none",
                    (
                        Query(
                            "sum by (source) "
                            "(increase(assistant_metrics_errors_total[$__rate_interval]))",
                            "{{source}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)  # fmt: skip

MODEL = Dashboard(
    "assistant-model",
    "Assistant: model and engine",
    "What the engine does with its time and memory.",
    (
        (
            "Load",
            (
                Panel(
                    "Loaded models",
                    "Name, version, precision and runtime of each process' model.",
                    "none",
                    (Query("assistant_model_info == 1", "{{model}} {{precision}} {{runtime}}"),),
                    "table", 8, 6, core=True,
                ),
                Panel(
                    "Being written",
                    "Answers in the engine, and how many fit.",
                    "none",
                    (
                        Query("sum by (model) (assistant_requests_running)", "{{model}}"),
                        Query("sum by (model) (assistant_requests_running_limit)",
                              "{{model}}, most"),
                    ),
                    height=6, core=True,
                ),
                Panel(
                    "In the queue",
                    "Questions that wait, and how many may. AssistantQueueSaturated fires at 80 %.",
                    "none",
                    (
                        Query("sum by (model) (assistant_requests_waiting)", "{{model}}"),
                        Query("sum by (model) (assistant_requests_waiting_limit)",
                              "{{model}}, most"),
                    ),
                    height=6, core=True,
                ),
            ),
        ),
        (
            "Speed",
            (
                Panel(
                    "Tokens",
                    "Tokens of answers a second, read and written.",
                    "none",
                    (
                        Query(per_second("assistant_tokens_total", "model, token_type"),
                              "{{model}} {{token_type}}"),
                    ),
                    core=True,
                ),
                Panel(
                    "Tokens in the engine",
                    "Read, reused from earlier turns, written, read for embeddings, a second.",
                    "none",
                    (Query(per_second("assistant_engine_tokens_total", "kind"), "{{kind}}"),),
                    core=True, stacked=True,
                ),
                Panel(
                    "Between two tokens",
                    "Mean of each answer. A reader takes about 0.1 s for one.",
                    "s",
                    percentiles("assistant_time_per_output_token_seconds"),
                    core=True,
                ),
                Panel(
                    "In the queue for",
                    "From the question to its place in a batch.",
                    "s",
                    percentiles("assistant_queue_time_seconds"),
                    core=True,
                ),
                Panel(
                    "Reading the question",
                    "From the place in a batch to the first token.",
                    "s",
                    percentiles("assistant_prefill_time_seconds"),
                    core=True,
                ),
                Panel(
                    "First words by model",
                    "From the question to the first words, p95.",
                    "s",
                    (
                        Query(
                            quantile(0.95, "assistant_time_to_first_token_seconds",
                                     "model, route"),
                            "{{route}} {{model}}",
                        ),
                    ),
                    core=True,
                ),
            ),
        ),
        (
            "Engine",
            (
                Panel(
                    "Batch",
                    "Answers that ran together in one step.",
                    "none",
                    (
                        Query(
                            share(_all("assistant_batch_size_sum"),
                                  _all("assistant_batch_size_count")),
                            "mean",
                        ),
                        Query(quantile(0.95, "assistant_batch_size"), "p95"),
                    ),
                    core=True,
                ),
                Panel(
                    "Busy",
                    "Share of its time that the engine's thread spent in steps.",
                    "percentunit",
                    (
                        Query(per_second("assistant_engine_busy_seconds_total",
                                         "instance, model"), "{{instance}} {{model}}"),
                    ),
                    core=True,
                ),
                Panel(
                    "A step",
                    "Moving mean of a step without a prompt.",
                    "s",
                    (Query("assistant_engine_step_seconds", "{{instance}} {{model}}"),),
                    core=True,
                ),
                Panel(
                    "Memory of running answers",
                    "Share of the room for keys and values that is used.",
                    "percentunit",
                    (Query("assistant_kv_cache_usage_ratio", "{{instance}} {{model}}"),),
                    core=True,
                ),
                Panel(
                    "Memory kept for next turns",
                    "Keys and values of finished answers, and those of running ones.",
                    "bytes",
                    (
                        Query("sum(assistant_prefix_cache_bytes)", "finished"),
                        Query("sum(assistant_kv_cache_bytes)", "running"),
                    ),
                    core=True,
                ),
                Panel(
                    "Memory of the process",
                    "Resident memory; absent where several processes share one page.",
                    "bytes",
                    (Query('process_resident_memory_bytes{job="assistant"}', "{{instance}}"),),
                    core=True,
                ),
            ),
        ),
    ),
)  # fmt: skip

QUALITY = Dashboard(
    "assistant-quality",
    "Assistant: conversations and quality",
    "How good the answers are, as far as users, evaluations and the model itself can tell.",
    (
        (
            "Users",
            (
                Panel(
                    "Feedback",
                    "Judgements a day, by what they say.",
                    "none",
                    (
                        Query("sum by (value) (increase(assistant_feedback_total[1d]))",
                              "{{value}}"),
                    ),
                    core=True,
                ),
                Panel(
                    "Thumbs down",
                    "Share of a day's judgements.",
                    "percentunit",
                    (
                        Query(
                            share('sum(increase(assistant_feedback_total{value="down"}[1d]))',
                                  "sum(increase(assistant_feedback_total[1d]))"),
                            "down",
                        ),
                    ),
                    core=True,
                ),
                Panel(
                    "Stopped answers",
                    "Share of answers whose reader stopped them or left.",
                    "percentunit",
                    (
                        Query(
                            share(_all(_ASKED, '{outcome="cancelled"}'),
                                  _all(_ASKED, '{outcome!="rejected"}')),
                            "cancelled",
                        ),
                    ),
                    core=True,
                ),
            ),
        ),
        (
            "Answers",
            (
                Panel(
                    "How sure",
                    "Answers by how sure the model was of what is asked.",
                    "none",
                    (
                        Query(
                            "sum by (le) "
                            "(increase(assistant_confidence_ratio_bucket[$__rate_interval]))",
                            "{{le}}",
                        ),
                    ),
                    "heatmap", core=True,
                ),
                Panel(
                    "Sure, the lower half",
                    "Half and one in ten of the questions are less sure than this.",
                    "percentunit",
                    tuple(
                        Query(quantile(q, "assistant_confidence_ratio"), f"p{q * 100:g}")
                        for q in (0.1, 0.5)
                    ),
                    core=True,
                ),
                Panel(
                    "Not the model's best",
                    "Answers a second with a reason why not, by reason.",
                    "reqps",
                    (Query(per_second("assistant_degraded_total", "reason"), "{{reason}}"),),
                    stacked=True,
                ),
                Panel(
                    "Kept answers",
                    "Share of looks that found one: to the same question, or one that means it.",
                    "percentunit",
                    (
                        Query(
                            share(per_second("assistant_cache_requests_total", "kind",
                                             '{result="hit"}'),
                                  per_second("assistant_cache_requests_total", "kind")),
                            "{{kind}}",
                        ),
                    ),
                    core=True,
                ),
                Panel(
                    "Answers by people's words",
                    "Share of answers from reviewed answers and rules.",
                    "percentunit",
                    (
                        Query(
                            share(_all(_ASKED, '{route=~"reviewed|rules"}'), _ANSWERED),
                            "written by people",
                        ),
                    ),
                    core=True,
                ),
                Panel(
                    "To a person",
                    "Share of answers that only tell the way to a person.",
                    "percentunit",
                    (Query(share(_all(_ASKED, '{route="human"}'), _ANSWERED), "human"),),
                    core=True,
                ),
            ),
        ),
        (
            "The model's life",
            (
                Panel(
                    "Evaluation",
                    "Latest score of each suite. AssistantEvaluationRegressed fires 5 % below the "
                    "best of 30 days.",
                    "none",
                    (Query("assistant_evaluation_score", "{{suite}} {{metric}} {{model}}"),),
                ),
                Panel(
                    "Shadow",
                    "Share of turns in which a candidate and the active model agree.",
                    "percentunit",
                    (Query("assistant_shadow_agreement_ratio", "{{model}}"),),
                ),
                Panel(
                    "Drift",
                    "Distance from the reference, in thresholds; AssistantDriftHigh fires above 1.",
                    "none",
                    (Query("assistant_drift_score", "{{feature}}"),),
                ),
                Panel(
                    "Jobs",
                    "Time since each last came to its end.",
                    "s",
                    (
                        Query("time() - assistant_last_success_timestamp_seconds",
                              "{{exported_job}}"),
                    ),
                    "bargauge",
                ),
                Panel(
                    "Background jobs",
                    "Jobs that ended, by outcome; needs PROMETHEUS_MULTIPROC_DIR in the worker.",
                    "none",
                    (
                        Query(
                            "sum by (task, outcome) "
                            "(increase(assistant_tasks_total[$__rate_interval]))",
                            "{{task}} {{outcome}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)  # fmt: skip

DASHBOARDS = (OVERVIEW, MODEL, QUALITY)
