"""llama.cpp through llama-cpp-python's low-level API, batched continuously as its server does.

One context with a sequence per chat; each step one ``llama_batch`` for all of them. Its server
would add HTTP, JSON and sampling on top, so these figures favour it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assistant.benchmark.figures import Figures, Measured
from assistant.benchmark.meter import Meter
from assistant.benchmark.peers import base
from assistant.benchmark.peers.closed_loop import Chats
from assistant.benchmark.peers.gguf_file import write_gguf
from assistant.benchmark.workloads import Job, Load

#: llama_ftype; F32 is for comparing ids only.
_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7}
#: What its server takes at once.
_BATCH = 2048


@dataclass(frozen=True, slots=True)
class Settings:
    """What is tuned for each load."""

    flash: bool = True
    ubatch: int = 512
    unified: bool = False

    def __str__(self) -> str:
        flash, unified = ("on" if one else "off" for one in (self.flash, self.unified))
        return f"flash attention {flash}, n_ubatch {self.ubatch}, kv_unified {unified}"


_USUAL = Settings()
_OTHERS = (Settings(unified=True), Settings(ubatch=128), Settings(flash=False))


class Llama(base.Engine):
    def __init__(self, task: base.Task) -> None:
        import gguf  # noqa: F401  (missing: said before anything is built)
        import llama_cpp

        self._api, self._task = llama_cpp, task
        # A reference is kept: the library calls it whenever it likes.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model: Any = None
        self._tuned: dict[tuple[int, int, int], Settings] = {}

    def prepare(self) -> dict[str, str]:
        api, folder = self._api, Path(self._task.folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole, path = folder / "F32.gguf", folder / f"{self._task.variant}.gguf"
        if not whole.exists():
            write_gguf(Path(self._task.source), whole)
        if not path.exists():
            self._quantise(whole, path)
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}; delete it to build it anew")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        built = api.llama_print_system_info().decode().strip(" |")
        # Its AMX kernels have crashed on some machines: whoever reads a ratio must know.
        without = "" if "AMX" in built else "; without AMX"
        return {"version": f"llama-cpp-python {api.__version__}", "built": built + without}

    def _quantise(self, whole: Path, path: Path) -> None:
        parameters = self._api.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = _TYPES[self._task.variant], self._task.threads
        draft = path.with_suffix(".part")
        failed = self._api.llama_model_quantize(
            str(whole).encode(), str(draft).encode(), ctypes.byref(parameters)
        )
        if failed:
            raise RuntimeError(f"llama_model_quantize to {self._task.variant} returned {failed}")
        draft.replace(path)

    def run(self, job: Job) -> dict[str, Any]:
        assert job.load is not None
        load = job.load
        shape = (load.chats, load.prompt_tokens, load.new_tokens)
        if shape not in self._tuned:
            self._tuned[shape] = self._tune(load)
        settings = self._tuned[shape]
        with _Context(self._api, self._model, load, settings, self._task.threads) as context:
            context.answer(Chats(load.warm_up(), self._vocab))
            meter, chats = Meter(), Chats(load, self._vocab)
            context.answer(chats)
            usage = meter.stop()
        figures = Figures.of(chats.times, usage)
        return Measured(figures, settings=str(settings)).wire()

    def _tune(self, load: Load) -> Settings:
        """The best of its settings for ``load``: the usual ones unless others are clearly faster.

        Tried in turns and judged by each one's best time, which noise touches least.
        """
        tried = (_USUAL, *_OTHERS)
        best = dict.fromkeys(tried, float("inf"))
        for _ in range(2):
            for settings in tried:
                best[settings] = min(best[settings], self._brief(settings, load))
        fastest = min(tried, key=lambda settings: best[settings])
        return fastest if best[fastest] < 0.95 * best[_USUAL] else _USUAL

    def _brief(self, settings: Settings, load: Load) -> float:
        """Seconds."""
        with _Context(self._api, self._model, load, settings, self._task.threads) as context:
            meter = Meter()
            context.answer(Chats(load.warm_up(), self._vocab))
        return meter.stop().wall_s

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        load = Load(len(prompts), longest, count, 1)
        settings = Settings(flash=False)
        with _Context(self._api, self._model, load, settings, self._task.threads, 0) as context:
            chats = Chats(load, self._vocab, prompts)
            context.answer(chats)
        return chats.written


class _Context:
    """A llama_context with room for every chat, and one llama_batch that is filled in place."""

    def __init__(
        self,
        api: Any,
        model: Any,
        load: Load,
        settings: Settings,
        threads: int,
        cache_type: int | None = None,
    ) -> None:
        self._api = api
        parameters = api.llama_context_default_params()
        # Attention works on multiples of 256 cells.
        parameters.n_ctx = load.chats * (-(-(load.room + 1) // 256) * 256)
        parameters.n_batch, parameters.n_ubatch = _BATCH, settings.ubatch
        parameters.n_seq_max = load.chats
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = int(settings.flash)
        parameters.kv_unified = settings.unified
        if cache_type is not None:
            parameters.type_k = parameters.type_v = cache_type
        self._context = api.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp opened no context for {load.chats} chats")
        self._memory = api.llama_get_memory(self._context)
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = self._borrowed_batch()

    def _borrowed_batch(self) -> Any:
        """A llama_batch over our own arrays, so that a step is a few slice assignments."""
        self._tokens, self._places, self._chats = np.zeros((3, _BATCH), np.int32)
        self._wanted = np.zeros(_BATCH, np.int8)
        self._sequences = np.ones(_BATCH, np.int32)  # each token belongs to one chat
        self._pointers = self._chats.ctypes.data + 4 * np.arange(_BATCH, dtype=np.uint64)
        batch = self._api.llama_batch()
        batch.token = _pointer(self._tokens, ctypes.c_int32)
        batch.pos = _pointer(self._places, ctypes.c_int32)
        batch.n_seq_id = _pointer(self._sequences, ctypes.c_int32)
        batch.seq_id = _pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))
        batch.logits = _pointer(self._wanted, ctypes.c_int8)
        return batch

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.llama_free(self._context)

    def answer(self, chats: Chats) -> None:
        """Decode until every chat has had its answers."""
        chats.begin()
        while rows := chats.plan(_BATCH):
            wanted = self._fill(rows)
            failed = self._api.llama_decode(self._context, self._batch)
            if failed:
                raise RuntimeError(f"llama_decode returned {failed}")
            for chat in chats.accept(self._likeliest(wanted)):
                self._api.llama_memory_seq_rm(self._memory, chat, -1, -1)

    def _likeliest(self, wanted: int) -> list[int]:
        """The next token of each row that asked; in the middle of a long prompt none does."""
        if not wanted:
            return []
        logits = self._api.llama_get_logits(self._context)
        scores = np.ctypeslib.as_array(logits, (wanted, self._vocab))
        found: list[int] = scores.argmax(axis=1).tolist()
        return found

    def _fill(self, rows: list[tuple[int, int, list[int], bool]]) -> int:
        """Write ``rows`` into the batch; how many of them ask for logits."""
        used = 0
        for chat, place, tokens, wanted in rows:
            end = used + len(tokens)
            self._tokens[used:end] = tokens
            self._places[used:end] = np.arange(place, place + len(tokens))
            self._chats[used:end] = chat
            self._wanted[used:end] = 0
            self._wanted[end - 1] = wanted
            used = end
        self._batch.n_tokens = used
        return sum(wanted for *_, wanted in rows)


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


if __name__ == "__main__":
    base.serve(Llama)
