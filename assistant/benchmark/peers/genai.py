"""onnxruntime-genai, int4 as its own builder makes it: its batching Engine, or its Generator.

The Engine gets batches as large as there are chats (it takes four by default); the Generator runs
one static batch after another.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from assistant.benchmark.figures import Figures, Measured, Times
from assistant.benchmark.meter import Meter
from assistant.benchmark.peers import base
from assistant.benchmark.workloads import Job, Load

#: Names its builder imports from transformers 5 whatever it builds. optimum-onnx needs
#: transformers 4; a Llama needs none of them.
_NEWER = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")


class GenAI(base.Engine):
    """``variant``: "Engine" or "Generator"."""

    def __init__(self, task: base.Task) -> None:
        import onnxruntime_genai

        self._api, self._task = onnxruntime_genai, task
        self._folder = Path(task.folder) / "int4"

    def prepare(self) -> dict[str, str]:
        if not (self._folder / "genai_config.json").exists():
            _build(Path(self._task.source), self._folder)
        config = json.loads((self._folder / "genai_config.json").read_text())
        self._vocab = int(config["model"]["vocab_size"])
        return {"version": f"onnxruntime-genai {self._api.__version__}"}

    def run(self, job: Job) -> dict[str, Any]:
        assert job.load is not None
        load = job.load
        kind = _Engine if self._task.variant == "Engine" else _Generator
        runner = kind(self._api, self._model(load), load)
        warm_up = load.warm_up()
        runner.answer(warm_up, warm_up.prompts(self._vocab), Times())
        meter, times = Meter(), Times()
        runner.answer(load, load.prompts(self._vocab), times)
        usage = meter.stop()
        figures = Figures.of(times, usage)
        return Measured(figures, settings=runner.settings).wire()

    def _model(self, load: Load) -> Any:
        config = self._api.Config(str(self._folder))
        config.clear_providers()  # what is left is the CPU
        session = {"intra_op_num_threads": self._task.threads}
        overlay = {
            # An end token that no prompt or answer needs: lengths are forced.
            "model": {"eos_token_id": [self._vocab - 1], "decoder": {"session_options": session}},
            "search": {"max_length": load.room + 1},
        }
        if self._task.variant == "Engine":
            overlay["engine"] = {"static_batching": {"max_batch_size": load.chats}}
        config.overlay(json.dumps(overlay))
        return self._api.Model(config)


class _Generator:
    settings = "static batches"

    def __init__(self, api: Any, model: Any, load: Load) -> None:
        self._api, self._model = api, model

    def answer(self, load: Load, prompts: list[list[int]], times: Times) -> None:
        ids = np.array(prompts, np.int32)
        for _ in range(load.rounds):
            self._round(load, ids, times)

    def _round(self, load: Load, ids: Any, times: Times) -> None:
        last = time.perf_counter()
        parameters = self._api.GeneratorParams(self._model)
        parameters.set_search_options(
            batch_size=load.chats, max_length=load.room, min_length=load.room, do_sample=False
        )
        generator = self._api.Generator(self._model, parameters)
        generator.append_tokens(ids)
        for at in range(load.new_tokens):
            generator.generate_next_token()
            generator.get_next_tokens()
            now = time.perf_counter()
            for _ in range(load.chats):
                times.saw(now - last, 1, first=at == 0)
            last = now


class _Engine:
    def __init__(self, api: Any, model: Any, load: Load) -> None:
        self._api = api
        self._engine = api.Engine(model)
        self._events = self._engine.create_event_buffer(max(64, 2 * load.chats))
        batch = self._engine.get_capabilities().configured_max_batch_size
        self.settings = f"static batching, max_batch_size {batch}"

    def answer(self, load: Load, prompts: list[list[int]], times: Times) -> None:
        """Every chat asks again in the step after its answer ended."""
        flags = self._api.EngineEventFlags
        left = [load.rounds] * load.chats
        turns = [self._ask(load, prompt) for prompt in prompts]
        last, first = [time.perf_counter()] * load.chats, [True] * load.chats
        while any(left):
            events = self._engine.run(self._events)
            now = time.perf_counter()
            for event in events:
                if event.flags & flags.FAILED:
                    raise RuntimeError(f"its engine failed a request: {event.error_code}")
                chat = next(i for i, turn in enumerate(turns) if turn == event.request)
                if event.flags & flags.TOKEN:
                    times.saw(now - last[chat], 1, first=first[chat])
                    last[chat], first[chat] = now, False
                if event.flags & flags.TURN_FINISHED:
                    turns[chat].close()
                    left[chat] -= 1
                    if left[chat]:
                        turns[chat], first[chat] = self._ask(load, prompts[chat]), True
                        last[chat] = time.perf_counter()

    def _ask(self, load: Load, prompt: list[int]) -> Any:
        options = self._api.RequestOptions()
        options.set_max_session_tokens(load.room)
        request = self._engine.create_request(options=options)
        turn = self._api.TurnOptions(request)
        turn.set_do_sample(False)
        turn.set_max_generated_tokens(load.new_tokens)
        turn.set_min_generated_tokens(load.new_tokens)
        request.begin_turn(np.array(prompt, np.int32), turn)
        return request


def _build(source: Path, folder: Path) -> None:
    """Run its builder as its command line would."""
    import transformers

    for name in _NEWER:
        if not hasattr(transformers, name):
            setattr(transformers, name, None)
    given = sys.argv
    sys.argv = ["builder", "-i", str(source), "-o", str(folder), "-p", "int4", "-e", "cpu"]
    sys.argv += ["-c", str(folder.parent / "cache")]
    try:
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    finally:
        sys.argv = given


if __name__ == "__main__":
    base.serve(GenAI)
