"""Our own engine as one of the processes that are compared, under the same conditions."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assistant.benchmark import bounds, drive, reading, stack
from assistant.benchmark.figures import Fact, Figures, Measured
from assistant.benchmark.peers import base
from assistant.benchmark.situations import SITUATIONS
from assistant.benchmark.workloads import Job, Load
from assistant.engine import Manifest
from assistant.engine.manifest import MODEL

_READERS = {"readers": reading.readers, "stack-readers": stack.stack_readers}


class Ours(base.Engine):
    """``source`` is a built model folder."""

    def __init__(self, task: base.Task) -> None:
        self._folder = Path(task.source)
        self._threads = task.threads or _cores()
        self._machine: bounds.Machine | None = None

    def prepare(self) -> dict[str, str]:
        import onnxruntime

        manifest = Manifest.load(self._folder)
        self._model = describe(manifest)
        self._vocab = manifest.architecture.vocab_size
        return {
            "version": f"onnxruntime {onnxruntime.__version__}",
            "model": f"{manifest.name} {manifest.version}, {manifest.quant}",
            "parameters": str(self._model.parameters),
            "weight_bytes": str(self._model.weight_bytes),
        }

    def run(self, job: Job) -> dict[str, Any]:
        if job.load is not None:
            return self._closed_loop(job, job.load).wire()
        if job.workload in _READERS:
            readers = _READERS[job.workload]
            return readers(self._folder, self._threads, job.sizes, self.progress).wire()
        return SITUATIONS[job.workload](self._folder, self._threads, job.sizes).wire()

    def _closed_loop(self, job: Job, load: Load) -> Measured:
        if self._machine is None:
            self._machine = bounds.measure(self._model.weight_bytes, self._threads)
        with drive.opened(self._folder, self._threads, drive.Room(load.chats, load.room)) as engine:
            figures = drive.measured(engine, load)
        return Measured(figures, self._bound(job.workload, load, figures))

    def _bound(self, workload: str, load: Load, figures: Figures) -> tuple[Fact, ...]:
        """Achieved over possible: first token for a prompt, tokens a second otherwise."""
        assert self._machine is not None
        machine = asdict(self._machine)
        if workload == "ttft":
            least = bounds.first_token_s(self._machine, self._model, load) * 1000
            share = least / figures.ttft_ms_p50
            bound = Fact("bound_ttft_ms", round(least, 2), "ms", "least time to a first token")
        else:
            most = bounds.tokens_per_s(self._machine, self._model, load)
            share = figures.output_tokens_per_s / most if most else 0.0
            bound = Fact("bound_tokens_per_s", round(most, 1), "/s", "most tokens a second")
        facts = [Fact(key, round(value / 1e9, 2), "G/s", key) for key, value in machine.items()]
        if not share:
            return tuple(facts)
        return (*facts, bound, Fact("of_bound", round(share, 3), "x", "achieved over bound"))

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        room = drive.Room(len(prompts), longest + count)
        with drive.opened(self._folder, self._threads, room) as engine:
            going = [drive.submit(engine, prompt, count) for prompt in prompts]
            return [[token.id for some in one.tokens_sync() for token in some] for one in going]


def describe(manifest: Manifest) -> bounds.Model:
    """What a token costs; weights as they lie in the file, caches in fp32."""
    shape = manifest.architecture
    query, kv = (
        shape.num_attention_heads * shape.head_dim,
        shape.num_key_value_heads * shape.head_dim,
    )
    layer = (
        shape.hidden_size * (2 * query + 2 * kv) + 3 * shape.hidden_size * shape.intermediate_size
    )
    head = shape.vocab_size * shape.hidden_size
    return bounds.Model(
        weight_bytes=manifest.files[MODEL].bytes,
        parameters=shape.num_hidden_layers * layer + head,
        head=head,
        kv_bytes_per_token=shape.num_hidden_layers * 2 * kv * 4,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    base.serve(Ours)
