"""Runs one step of the model: token ids of some rows in, log-probabilities out.

The only file that touches onnxruntime. Owns the session and the KV cache (one NumPy buffer per
layer and side, a slot per row); knows slots and lengths, and nothing of requests, queues or text.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from assistant.engine.machine import cores, exact_products
from assistant.engine.manifest import Architecture, ManifestError
from assistant.engine.sampling import Floats, Ints
from assistant.engine.scheduler import DRAFTED_ROWS, RUN_COST

#: Bound shapes that are kept; more only cost the time to bind them again.
_MOST_BINDINGS = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. *Shapes*: slots, starts, counts, samples (rows,); ids (sum of counts,).

    The first ``decoding`` rows go on with answers, at one token each or with guesses behind it."""

    slots: Ints
    #: Tokens that each slot's cache holds before the step.
    starts: Ints
    counts: Ints
    #: How many of the row's last tokens ask for a next one.
    samples: Ints
    ids: Ints
    decoding: int

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        starts: Sequence[int],
        samples: Sequence[int],
        ids: Sequence[Sequence[int]],
        decoding: int = 0,
    ) -> Batch:
        """From plain numbers, one entry a row. A row of one token always counts as decoding."""
        counts = [len(row) for row in ids]
        while decoding < len(counts) and counts[decoding] == 1:
            decoding += 1
        return cls(
            slots=np.array(slots, np.int64),
            starts=np.array(starts, np.int64),
            counts=np.array(counts, np.int64),
            samples=np.array(samples, np.int64),
            ids=np.array([token for row in ids for token in row], np.int64),
            decoding=decoding,
        )


Saved = tuple[NDArray[Any], ...]
#: Rows of a batch, their lowest slot, and how many slots up to the highest.
Run = tuple[range, int, int]


class Runner(Protocol):
    """What the engine asks of a model."""

    vocab_size: int
    #: Memory that one token's keys and values take.
    token_bytes: int
    #: Values of an embedding; 0 for a model that has none.
    width: int

    def step(self, batch: Batch) -> Floats:
        """Log-probabilities behind the tokens that ask, in their order; valid until the next step.
        *Shapes*: (sum of ``samples``, vocab). What a slot held behind ``starts`` is gone.
        """

    def pool(self, batch: Batch) -> Floats:
        """What the model makes of all up to the last token of each sampling row, instead of what
        comes next. *Shapes*: (sum of ``samples``, width). Otherwise as ``step``."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Keys and values of the first ``tokens`` of slot ``source``, into slot ``target``."""

    def save(self, slot: int, start: int, stop: int) -> Saved:
        """A copy of the keys and values of the tokens from ``start`` to ``stop``."""

    def load(self, slot: int, start: int, saved: Saved, tokens: int) -> None:
        """Put the first ``tokens`` of ``saved`` into ``slot`` from ``start`` on."""

    def close(self) -> None:
        """Free the session; no step may follow."""

    def abandon(self) -> None:
        """In a forked child: never free the session, whose threads exist in the parent only."""


class OnnxRunner:
    """A graph of ``modelkit.graph`` on the CPU. Not thread-safe: one thread steps it."""

    def __init__(
        self,
        model: Path,
        architecture: Architecture,
        *,
        slots: int,
        step_tokens: int,
        context_tokens: int,
        threads: int,
        drafting: bool = False,
    ) -> None:
        """``drafting``: answers may go on by several tokens at once. Then no row ever runs at one
        token, which is rounded differently: what was guessed must not show in an answer."""
        self.vocab_size = architecture.vocab_size
        self._narrowest = 2 if drafting else 1
        self.width = architecture.hidden_size
        self._session = _session(model, threads)
        _check_inputs(self._session, model)
        self._slots = slots
        # The operator wants room for a whole padded chunk behind every row, idle ones included.
        self._capacity = context_tokens + step_tokens
        heads, width = architecture.num_key_value_heads, architecture.head_dim
        shape = (slots, heads, self._capacity, width)
        self.token_bytes = token_bytes(architecture)
        self._caches = {
            f"{side}_{layer}": _zeros(shape)
            for layer in range(architecture.num_hidden_layers)
            for side in ("k", "v")
        }
        # One more row for runs that sample nothing: the head never sees an empty tensor.
        rows = slots + 1 + (max(2 * slots, DRAFTED_ROWS) if drafting else 0)
        self._logprobs = np.empty((rows, self.vocab_size), np.float32)
        self._states = np.empty((slots + 1, self.width), np.float32)
        #: By output: embeddings come in many shapes, which must not push out those of answers.
        self._bindings: dict[str, dict[tuple[int, int, int], _Binding]]
        self._bindings = {"logprobs": {}, "pooled": {}}
        self._layout = (b"", b"")
        self._plan: list[Run] = []

    def step(self, batch: Batch) -> Floats:
        return self._compute(batch, self._runs(batch), "logprobs", self._logprobs)

    def pool(self, batch: Batch) -> Floats:
        return self._compute(batch, runs(batch), "pooled", self._states)

    def _compute(self, batch: Batch, plan: Iterable[Run], output: str, into: Floats) -> Floats:
        done = 0
        for rows, low, size in plan:
            part = batch if len(rows) == len(batch.slots) else _part(batch, rows)
            wanted = int(part.samples.sum())
            out = into[done : done + wanted] if wanted else into[-1:]
            self._binding(output, low, size, self._width(part)).run(part, out)
            done += wanted
        return into[:done]

    def _width(self, part: Batch) -> int:
        """New tokens of the rectangle for these rows. Those that decode know few widths, so that
        few shapes are bound."""
        widest = max(self._narrowest, int(part.counts.max()))
        return 1 << (widest - 1).bit_length() if part.decoding else widest

    def _runs(self, batch: Batch) -> list[Run]:
        """While the same rows decode, a step is split as the one before."""
        layout = (batch.slots.tobytes(), batch.counts.tobytes())
        if layout != self._layout:
            self._layout, self._plan = layout, list(runs(batch))
        return self._plan

    def copy(self, source: int, target: int, tokens: int) -> None:
        for cache in self._caches.values():
            cache[target, :, :tokens] = cache[source, :, :tokens]

    def save(self, slot: int, start: int, stop: int) -> Saved:
        return tuple(cache[slot, :, start:stop].copy() for cache in self._caches.values())

    def load(self, slot: int, start: int, saved: Saved, tokens: int) -> None:
        for cache, kept in zip(self._caches.values(), saved, strict=True):
            cache[slot, :, start : start + tokens] = kept[:, :tokens]

    def close(self) -> None:
        for bindings in self._bindings.values():
            bindings.clear()
        self._caches.clear()
        self._session = None

    def abandon(self) -> None:
        # Destructors here wait for threads that only the parent has (onnxruntime #9800). A
        # reference never given back outlives Python's clean-up; the library's own exit handler
        # hangs a child even without a session, so the child leaves before it, after Python has.
        for owned in (self._session, self._bindings):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(owned))
        libc = ctypes.CDLL(None)
        if hasattr(libc, "on_exit"):  # glibc
            libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)

    def _binding(self, output: str, low: int, size: int, width: int) -> _Binding:
        """One a rectangle of slots and new tokens; the oldest goes where there are too many."""
        bindings, key = self._bindings[output], (low, size, width)
        binding = bindings.get(key)
        if binding is None:
            if len(bindings) >= _MOST_BINDINGS:
                del bindings[next(iter(bindings))]
            caches = {name: cache[low : low + size] for name, cache in self._caches.items()}
            binding = _Binding(self._session, caches, low, width, self._capacity, output)
            bindings[key] = binding
        return binding


class _Binding:
    """The session bound to some neighbouring slots, at ``width`` new tokens each.

    Its small inputs are arrays of its own, overwritten in place: a decode step allocates nothing.
    """

    def __init__(
        self,
        session: Any,
        caches: dict[str, Floats],
        low: int,
        width: int,
        capacity: int,
        output: str,
    ) -> None:
        import onnxruntime

        self._session = session
        self._io = session.io_binding()
        size = len(next(iter(caches.values())))
        self._low, self._width, self._output = low, width, output
        self._keep = caches  # the bound values borrow this memory
        for name, cache in caches.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(cache)
            self._io.bind_ortvalue_input(f"past_{name}", value)
            self._io.bind_ortvalue_output(f"present_{name}", value)
        self._ids = np.zeros((size, width), np.int64)
        self._seqlens = np.zeros(size, np.int32)
        self._counts = np.zeros(size, np.int32)
        self._sample = np.zeros(0, np.int64)
        self._io.bind_cpu_input("input_ids", self._ids)
        self._io.bind_cpu_input("seqlens_k", self._seqlens)
        self._io.bind_cpu_input("query_seqlens", self._counts)
        self._io.bind_cpu_input("total_length", np.array(capacity, np.int32))
        self._out = (0, 0)
        self._layout = (b"", b"", b"")

    def run(self, batch: Batch, out: Floats) -> None:
        """Raises: whatever onnxruntime raises; the caches' rows are then undefined."""
        if (len(out), out.ctypes.data) != self._out:
            self._bind(out)
        layout = (batch.slots.tobytes(), batch.counts.tobytes(), batch.samples.tobytes())
        if layout != self._layout:
            self._lay_out(batch)
            self._layout = layout
        self._seqlens[self._rows] = batch.starts + batch.counts - 1
        self._ids.ravel()[self._places] = batch.ids
        self._session.run_with_iobinding(self._io)

    def _bind(self, out: Floats) -> None:
        self._sample = np.zeros(len(out), np.int64)
        self._io.bind_cpu_input("sample", self._sample)
        self._io.bind_output(self._output, "cpu", 0, np.float32, out.shape, out.ctypes.data)
        self._out = (len(out), out.ctypes.data)
        self._layout = (b"", b"", b"")

    def _lay_out(self, batch: Batch) -> None:
        """Where each new token stands in the rectangle, and which are sampled; while the same rows
        decode, this stays as it is."""
        self._rows = batch.slots - self._low
        firsts = np.cumsum(batch.counts) - batch.counts
        within = np.arange(len(batch.ids)) - np.repeat(firsts, batch.counts)
        self._places = np.repeat(self._rows, batch.counts) * self._width + within
        self._ids.fill(0)
        self._seqlens.fill(0)
        self._counts.fill(0)
        self._counts[self._rows] = batch.counts
        self._sample[: batch.samples.sum()] = _lasts(self._places, batch)


def _zeros(shape: tuple[int, ...]) -> Floats:
    """Zeros that cost memory and time page by page, as tokens are written to them.

    NumPy asks for huge pages, with which a slot's first token commits and clears all of the slot:
    10 MB and 5-20 ms (15.7 M shape, 1,024 tokens of context) where 0.5 MB are needed.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # not Linux
        return np.zeros(shape, np.float32)
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


def token_bytes(architecture: Architecture) -> int:
    """Memory of one token's keys and values."""
    heads, width = architecture.num_key_value_heads, architecture.head_dim
    return 2 * architecture.num_hidden_layers * heads * width * np.dtype(np.float32).itemsize


def runs(batch: Batch) -> Iterator[Run]:
    """How to split a step: (rows, lowest slot, number of slots) of each run.

    Decode rows run by themselves: the attention operator rounds a row of one token differently
    from the same row in a longer square, and an answer must not depend on who else is asking.
    Prompts share a run, or have one each where padding costs more. A pure function of the batch.
    A run computes every slot between its lowest and highest row.
    """
    count, first = len(batch.slots), batch.decoding
    together = [range(first, count)] * (first < count)
    alone = [range(row, row + 1) for row in range(first, count)]
    best = min((together, alone), key=lambda plan: sum(_cost(batch, rows) for rows in plan))
    for rows in [*_neighbours(batch.slots[:first]), *best]:
        yield rows, *_range(batch.slots[rows.start : rows.stop])


def _lasts(places: Ints, batch: Batch) -> Ints:
    """Of the places of all tokens, those that ask for a next one."""
    ends = np.cumsum(batch.counts)
    firsts = np.cumsum(batch.samples) - batch.samples
    nth = np.arange(int(batch.samples.sum())) - np.repeat(firsts, batch.samples)
    found: Ints = places[np.repeat(ends - batch.samples, batch.samples) + nth]
    return found


def _neighbours(slots: Ints) -> list[range]:
    """Decode rows cut where more idle slots lie between two than a run of their own costs."""
    if not len(slots):
        return []
    cuts = np.flatnonzero(np.abs(np.diff(slots)) > RUN_COST) + 1
    edges = [0, *cuts.tolist(), len(slots)]
    return [range(*pair) for pair in itertools.pairwise(edges)]


def _cost(batch: Batch, rows: range) -> float:
    part = slice(rows.start, rows.stop)
    _, size = _range(batch.slots[part])
    return RUN_COST + size * float(batch.counts[part].max())


def _range(used: Ints) -> tuple[int, int]:
    """The lowest of the slots, and how many there are up to the highest."""
    low = int(used.min())
    return low, int(used.max()) - low + 1


def _part(batch: Batch, rows: range) -> Batch:
    part = slice(rows.start, rows.stop)
    first = int(batch.counts[: rows.start].sum())
    counts = batch.counts[part]
    return Batch(
        slots=batch.slots[part],
        starts=batch.starts[part],
        counts=counts,
        samples=batch.samples[part],
        ids=batch.ids[first : first + int(counts.sum())],
        decoding=max(0, min(rows.stop, batch.decoding) - rows.start),
    )


def _check_inputs(session: Any, model: Path) -> None:
    """Raises: ManifestError for a graph of another version."""
    names = {one.name: len(one.shape) for one in session.get_inputs()}
    if names.get("input_ids") != 2 or "query_seqlens" not in names or "pack" in names:
        raise ManifestError(
            f"{model} was built by another version of Inhouse; build it again with "
            f"`manage.py build_model`."
        )


def _session(model: Path, threads: int) -> Any:
    import onnxruntime  # here, so that importing the engine stays cheap

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # shapes vary: patterns only pile up memory
    options.log_severity_level = 4  # failures are raised; stderr belongs to the product
    for key, value in (
        ("session.force_spinning_stop", "1"),  # an idle engine must not burn a core
        ("session.set_denormal_as_zero", "1"),
    ):
        options.add_session_config_entry(key, value)
    exact_products(options)
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own kinds, with pages of its source in their texts
        raise ManifestError(
            f"{model} cannot be loaded ({type(error).__name__}). Build it again with "
            f"`manage.py build_model`."
        ) from error


def batching_error(runner: Runner, slots: int) -> float:
    """Largest difference of log-probabilities between two prompts run alone and whole, and run
    together in pieces; infinite when they are not log-probabilities at all.

    Leaves the caches dirty, which harms nobody: lengths say what is read.
    """
    prompts = [[(7 * i + 3 * row + 1) % runner.vocab_size for i in range(6)] for row in (0, 1)]
    alone = np.stack([runner.step(Batch.of([0], [0], [True], [ids]))[0].copy() for ids in prompts])
    if not np.allclose(np.exp(alone.astype(np.float64)).sum(axis=1), 1, atol=1e-2):
        return float("inf")
    rows = list(range(min(2, slots)))
    cuts, wanted = [4 + row for row in rows], [True] * len(rows)
    heads = [prompts[row][: cuts[row]] for row in rows]
    tails = [prompts[row][cuts[row] :] for row in rows]
    runner.step(Batch.of(rows, [0] * len(rows), wanted, heads))
    together = runner.step(Batch.of(rows, cuts, wanted, tails))
    return float(np.abs(together - alone[: len(rows)]).max())
