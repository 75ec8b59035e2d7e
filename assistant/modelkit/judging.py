"""What a built model makes of corrections and of the golden set, before and after a revision.

Asks the real engine, so that the figures are those of the file that ships. Knows cases and folders;
knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assistant.engine import ChatTurn, Engine, EngineConfig, Generation
from assistant.modelkit import labels, scoring
from assistant.modelkit.corrections import Case
from assistant.modelkit.tokens import Mask

#: What a revision must reach: corrections learned, and what the golden set may lose for them.
LEAST_RIGHT, MOST_LOST = 0.90, 0.005
_AT_ONCE = 64
_ANSWER_TOKENS = 160


@dataclass(frozen=True, slots=True)
class Judged:
    """Shares, 0..1, of one built model.

    ``right``: corrections taken for what they are. ``golden``: intents of the golden set, scope
    left aside. ``golden_scope``: its questions on the right side of the threshold.
    ``development``: intents of the project's unseen wordings. ``answers_alike``: likeness of
    answers to those that corrections give, None where none does. ``wrong``: ids of corrections.
    """

    right: float
    golden: float
    golden_scope: float
    development: float
    answers_alike: float | None
    wrong: tuple[str, ...]

    def line(self, cases: int) -> str:
        return (
            f"{round(self.right * cases)} of {cases} corrections right, golden set "
            f"{self.golden:.1%} (scope {self.golden_scope:.1%}), development rows "
            f"{self.development:.1%}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished revision; ``folder`` holds the model, whether it ``passed`` or not."""

    folder: Path
    before: Judged
    after: Judged
    cases: int
    steps: int
    minutes: float

    @property
    def passed(self) -> bool:
        return not self.faults()

    def faults(self) -> list[str]:
        """What fell short, in words."""
        found = []
        if self.after.right < LEAST_RIGHT:
            found.append(
                f"only {self.after.right:.1%} of the corrections are right afterwards "
                f"(at least {LEAST_RIGHT:.0%})"
            )
        lost = self.before.golden - self.after.golden
        if lost > MOST_LOST + 1e-9:
            found.append(
                f"the golden set lost {100 * lost:.1f} points (at most {100 * MOST_LOST:.1f})"
            )
        return found

    def verdict(self) -> str:
        """One sentence: whether it passed, and why not."""
        if self.passed:
            return f"All held: {self.cases} corrections, {self.minutes:.1f} minutes."
        return f"NOT PASSED, do not use it: {'; '.join(self.faults())}."

    def figures(self) -> dict[str, Any]:
        """For ``model.json``."""
        return {
            "passed": self.passed,
            "rows": self.cases,
            "before": _rounded(self.before),
            "after": _rounded(self.after),
            "steps": self.steps,
            "minutes": round(self.minutes, 2),
        }

    def table(self) -> str:
        """Rows of a Markdown table: measure, before, after."""
        before, after = _rounded(self.before), _rounded(self.after)
        return "\n".join(
            f"| {_MEASURES[name]} | {before[name]} | {after[name]} |"
            for name in _MEASURES
            if after[name] is not None
        )


_MEASURES = {
    "right": "corrections taken for what they are",
    "golden": "golden set, intent",
    "golden_scope": "golden set, side of the scope threshold",
    "development": "the project's unseen wordings, intent",
    "answers_alike": "likeness to the answers given (trigram Jaccard)",
}


def _rounded(judged: Judged) -> dict[str, Any]:
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(judged).items()
    }


def judge(
    folder: Path,
    cases: Sequence[Case],
    golden: Sequence[Case],
    development: Sequence[Case],
    mask: Mask,
) -> Judged:
    """Raises: ManifestError."""
    engine = Engine(EngineConfig(folder))
    engine.start()
    try:
        asker = _Asker(engine, mask)
        corrected = asker.verdicts(cases)
        known, unseen = asker.verdicts(golden), asker.verdicts(development)
        alike = asker.likeness([case for case in cases if case.answer])
    finally:
        engine.close()
    wrong = tuple(
        case.id for case, (_, taken) in zip(cases, corrected, strict=True) if taken != case.intent
    )
    out = labels.OUT_OF_SCOPE
    side = [
        (taken == out) == (case.intent == out)
        for case, (_, taken) in zip(golden, known, strict=True)
    ]
    return Judged(
        right=1 - len(wrong) / len(cases),
        golden=_intents_right(golden, known),
        golden_scope=sum(side) / max(1, len(side)),
        development=_intents_right(development, unseen),
        answers_alike=alike,
        wrong=wrong,
    )


def _intents_right(cases: Sequence[Case], found: Sequence[tuple[str, str]]) -> float:
    """Share of right intents among the rows that have one, as ``evaluate`` counts it."""
    pairs = [
        (best, case.intent)
        for case, (best, _) in zip(cases, found, strict=True)
        if case.intent != labels.OUT_OF_SCOPE
    ]
    return scoring.accuracy([best for best, _ in pairs], [wanted for _, wanted in pairs])


class _Asker:
    """Puts cases to a running engine."""

    def __init__(self, engine: Engine, mask: Mask) -> None:
        assert engine.codec is not None and engine.manifest is not None
        self._engine, self._mask, self._codec = engine, mask, engine.codec
        self._names = {id_: name for name, id_ in engine.manifest.intents.items()}

    def verdicts(self, cases: Sequence[Case]) -> list[tuple[str, str]]:
        """Of each case the best intent, and what it is taken for once its scope is judged."""
        found = []
        for generation in self._answers(cases, 1):
            for _ in generation.tokens_sync():
                pass
            verdict = generation.verdict
            assert verdict is not None
            found.append((self._names[verdict.intent_id], self._names[verdict.token_id]))
        return found

    def likeness(self, cases: Sequence[Case]) -> float | None:
        """Mean likeness of the greedy answers to the cases' own."""
        alike = []
        for case, generation in zip(cases, self._answers(cases, _ANSWER_TOKENS), strict=True):
            stream = self._codec.stream()
            ids = (token.id for tokens in generation.tokens_sync() for token in tokens)
            text = "".join(map(stream.push, ids)) + stream.flush()
            alike.append(scoring.similarity(text, case.answer or ""))
        return sum(alike) / len(alike) if alike else None

    def _answers(self, cases: Sequence[Case], tokens: int) -> Iterator[Generation]:
        for start in range(0, len(cases), _AT_ONCE):
            yield from [
                self._ask([self._turn(*said) for said in case.turns], tokens)
                for case in cases[start : start + _AT_ONCE]
            ]

    def _ask(self, turns: Sequence[ChatTurn], tokens: int) -> Generation:
        return self._engine.submit(
            self._codec.encode_chat(turns),
            max_new_tokens=tokens,
            stop_ids=self._codec.end_ids,
            first=self._engine.first_token_rule(turns),
        )

    def _turn(self, role: str, text: str) -> ChatTurn:
        return ChatTurn(role, tuple(self._mask(text).parts))
