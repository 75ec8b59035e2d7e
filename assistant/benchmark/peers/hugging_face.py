"""``generate`` of transformers, over ONNX Runtime (optimum) or torch: what most people write first.

Static batches: all chats ask together and wait for each other, which costs nothing when all answers
have one length, as here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from assistant.benchmark.figures import Figures, Measured, Times
from assistant.benchmark.meter import Meter
from assistant.benchmark.peers import base
from assistant.benchmark.workloads import Job, Load


class HuggingFace(base.Engine):
    """``variant``: "ORT fp32" or "torch fp32"."""

    def __init__(self, task: base.Task) -> None:
        import torch
        import transformers

        self._torch, self._transformers, self._task = torch, transformers, task
        if self._optimum:
            import optimum.onnxruntime  # noqa: F401  (missing: said before anything is built)
        torch.set_num_threads(task.threads)
        self._model: Any = None

    @property
    def _optimum(self) -> bool:
        return self._task.variant.startswith("ORT")

    def prepare(self) -> dict[str, str]:
        source = Path(self._task.source)
        self._model = self._exported(source) if self._optimum else self._plain(source)
        self._model.generation_config.eos_token_id = None  # answers end by length only
        versions = f"transformers {self._transformers.__version__}"
        if not self._optimum:
            return {"version": f"{versions}, torch {self._torch.__version__}"}
        import onnxruntime

        return {"version": f"{versions}, onnxruntime {onnxruntime.__version__}"}

    def _plain(self, source: Path) -> Any:
        kind = self._transformers.AutoModelForCausalLM
        return kind.from_pretrained(source, dtype=self._torch.float32)

    def _exported(self, source: Path) -> Any:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        folder = Path(self._task.folder) / "fp32"
        if not (folder / "config.json").exists():
            ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._task.threads
        return ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def run(self, job: Job) -> dict[str, Any]:
        assert job.load is not None
        prompts = job.load.prompts(self._model.config.vocab_size)
        warm_up = job.load.warm_up()
        self._answer(warm_up, warm_up.prompts(self._model.config.vocab_size), Times())
        meter, times = Meter(), Times()
        for _ in range(job.load.rounds):
            self._answer(job.load, prompts, times)
        usage = meter.stop()
        return Measured(
            Figures.of(times, usage),
            settings="static batches",
        ).wire()

    def _answer(self, load: Load, prompts: list[list[int]], times: Times) -> None:
        last, first = time.perf_counter(), True

        def seen(ids: Any, scores: Any, **_: Any) -> Any:
            """Called after every step: generate() has no other place to see a batch's tokens."""
            nonlocal last, first
            now = time.perf_counter()
            for _row in prompts:
                times.saw(now - last, 1, first=first)
            last, first = now, False
            return self._torch.zeros(len(prompts), dtype=self._torch.bool)

        self._generate(prompts, load.new_tokens, self._transformers.StoppingCriteriaList([seen]))

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        alone = [self._generate([prompt], count)[0, len(prompt) :] for prompt in prompts]
        return [ids.tolist() for ids in alone]

    def _generate(self, prompts: list[list[int]], count: int, stopping: Any = None) -> Any:
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            return self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=stopping,
            )


if __name__ == "__main__":
    base.serve(HuggingFace)
