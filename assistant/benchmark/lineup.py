"""Who runs: our builds and the peers, each with the model it reads and the interpreter it needs.

Knows the folders of a comparison and the catalogue; starts nothing but the check that all of them
run the same model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from assistant.benchmark import compare
from assistant.benchmark.compare import BenchError
from assistant.benchmark.materials import Materials
from assistant.benchmark.peers import CATALOGUE, OURS
from assistant.benchmark.peers.base import Task
from assistant.benchmark.sides import Side, SideError
from assistant.benchmark.workloads import Load

#: Our builds that are meant for few chats; the others are meant for many.
_LATENCY = ("int4",)
#: Unquantised variants, whose ids must be equal to those of our fp32 build.
_EXACT = {"llama.cpp": "F32", "optimum": "ORT fp32"}


@dataclass(frozen=True, slots=True)
class Lineup:
    """``random``: a shape, whose weights everybody runs; else ``model``, a built folder, is run by
    ours alone. ``pythons``: interpreter by peer, "" for those without one of their own."""

    model: Path
    random: str
    cache: Path
    schemes: Sequence[str]
    peers: Sequence[str]
    pythons: Mapping[str, str]
    threads: int
    progress: Callable[[str], None] = compare.to_stderr

    def sides(self) -> list[Side]:
        """Ours first, then the peers as the catalogue has them. Raises: BenchError."""
        if not self.random:
            return [self._ours("ours", self.model)]
        ours = [self._ours(f"ours {name}", self._built(name)) for name in self.schemes]
        return ours + [
            self._rival(name, variant)
            for name in self.peers
            for variant in CATALOGUE[name].variants
        ]

    def counted(self, profile: str) -> list[str]:
        """Names of our rows that ``profile`` stands for; none for all."""
        if not profile or not self.random:
            return []
        latency = profile == "latency"
        return [f"ours {name}" for name in self.schemes if (name in _LATENCY) == latency]

    def check(self, lengths: Sequence[int], count: int, timeout_s: float) -> dict[str, str]:
        """What came of comparing greedy ids of our fp32 build with each peer that has an exact
        variant. Raises: BenchError."""
        rivals = [self._rival(name, _EXACT[name]) for name in self.peers if name in _EXACT]
        if not rivals:
            return {}
        self.progress("checking that all run the same model ...")
        ours = self._ours("ours fp32", self._built("fp32"))
        found = compare.same_answers(
            [ours, *rivals],
            self._prompts(lengths),
            count,
            threads=self.threads,
            timeout_s=timeout_s,
        )
        own = found.pop(ours.name)
        if isinstance(own, SideError):
            raise BenchError(f"our fp32 build does not answer: {own}")
        return {name: agreement(own, theirs) for name, theirs in found.items()}

    def _prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        from assistant.modelkit.checkpoint import SHAPES

        vocab = SHAPES[self.random].vocab_size
        return [Load(1, length, 1, 1).prompts(vocab)[0] for length in lengths]

    def _ours(self, name: str, model: Path) -> Side:
        task = Task("", str(model), "", self.threads)
        return Side.of(name, "ours", sys.executable, OURS, task, ours=True)

    def _rival(self, name: str, variant: str) -> Side:
        python = self.pythons.get(name) or self.pythons.get("") or sys.executable
        materials = self._materials
        task = Task(variant, str(materials.checkpoint), str(materials.folder / name), self.threads)
        return Side.of(f"{name} {variant}", name, python, CATALOGUE[name].module, task)

    @property
    def _materials(self) -> Materials:
        return Materials(self.random, self.cache / self.random, self.progress)

    def _built(self, scheme: str) -> Path:
        try:
            return self._materials.ours(scheme)
        except (ValueError, RuntimeError, ModuleNotFoundError) as error:
            raise BenchError(f"our {scheme} model was not built: {error}") from error


def agreement(own: list[list[int]], theirs: list[list[int]] | SideError) -> str:
    """A line for the report."""
    if isinstance(theirs, SideError):
        return f"not checked, {theirs.trouble}: {theirs}"
    same = sum(one == other for one, other in zip(own, theirs, strict=True))
    word = "same model as ours" if same == len(own) else "NOT the same answers as ours"
    return f"{word}: {same} of {len(own)} greedy answers of {len(own[0])} tokens identical"
