"""Runs one step of the model: packed token ids in, log-probabilities out.

The only file that touches onnxruntime. Owns the session and the KV cache (one NumPy buffer per
layer and side, a slot per row); knows slots and lengths, and nothing of requests, queues or text.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from assistant.engine.manifest import Architecture
from assistant.engine.sampling import Floats, Ints

#: What a run costs besides its tokens, in tokens' worth: measured on a 9 M parameter model. A cell
#: is one position of the padded [rows, longest chunk] square around attention.
RUN_COST = 13.0
CELL_COST = 0.01


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. *Shapes*: slots, starts, counts, samples (rows,); ids (sum of counts,)."""

    slots: Ints
    #: Tokens that each slot's cache holds before the step.
    starts: Ints
    counts: Ints
    #: Whether the row's last token asks for a next one.
    samples: NDArray[np.bool_]
    ids: Ints

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        starts: Sequence[int],
        samples: Sequence[bool],
        ids: Sequence[Sequence[int]],
    ) -> Batch:
        """From plain numbers, one entry a row."""
        return cls(
            slots=np.array(slots, np.int64),
            starts=np.array(starts, np.int64),
            counts=np.array([len(row) for row in ids], np.int64),
            samples=np.array(samples, np.bool_),
            ids=np.array([token for row in ids for token in row], np.int64),
        )


class Runner(Protocol):
    """What the engine asks of a model."""

    vocab_size: int

    def step(self, batch: Batch) -> Floats:
        """Log-probabilities of the sampling rows, in their order; valid until the next step.
        *Shapes*: (number of true ``samples``, vocab)."""

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
    ) -> None:
        self.vocab_size = architecture.vocab_size
        self._session = _session(model, threads)
        self._slots = slots
        # The operator wants room for a whole padded chunk behind every row, idle ones included.
        self._capacity = context_tokens + step_tokens
        shape = (
            slots,
            architecture.num_key_value_heads,
            self._capacity,
            architecture.head_dim,
        )
        # Zeros come from the kernel page by page: a slot costs memory once it is written.
        self._caches = {
            f"{side}_{layer}": np.zeros(shape, np.float32)
            for layer in range(architecture.num_hidden_layers)
            for side in ("k", "v")
        }
        # One more row for runs that sample nothing: the head never sees an empty tensor.
        self._logprobs = np.empty((slots + 1, self.vocab_size), np.float32)
        self._bindings: dict[tuple[int, int], _Binding] = {}

    def step(self, batch: Batch) -> Floats:
        done = 0
        firsts = np.cumsum(batch.counts) - batch.counts
        for rows, low, size in runs(batch, self._slots):
            token = int(firsts[rows.start])
            part = _part(batch, rows, token)
            wanted = int(part.samples.sum())
            out = self._logprobs[done : done + wanted] if wanted else self._logprobs[-1:]
            self._binding(low, size).run(part, out)
            done += wanted
        return self._logprobs[:done]

    def close(self) -> None:
        self._bindings.clear()
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

    def _binding(self, low: int, size: int) -> _Binding:
        """Caches are bound once per range of slots; there are few ranges, all powers of two."""
        binding = self._bindings.get((low, size))
        if binding is None:
            caches = {name: cache[low : low + size] for name, cache in self._caches.items()}
            binding = _Binding(
                self._session,
                caches,
                low=low,
                capacity=self._capacity,
                vocab_size=self.vocab_size,
            )
            self._bindings[low, size] = binding
        return binding


class _Binding:
    """The session bound to the slots ``low`` to ``low + size``.

    Small inputs keep their arrays while shapes stay the same (all of decoding) and are overwritten
    in place; a new shape binds new ones.
    """

    def __init__(
        self,
        session: Any,
        caches: dict[str, Floats],
        *,
        low: int,
        capacity: int,
        vocab_size: int,
    ) -> None:
        import onnxruntime

        self._session = session
        self._io = session.io_binding()
        self._low, self._size = low, len(next(iter(caches.values())))
        self._vocab_size = vocab_size
        self._keep = caches  # the bound values borrow this memory
        for name, cache in caches.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(cache)
            self._io.bind_ortvalue_input(f"past_{name}", value)
            self._io.bind_ortvalue_output(f"present_{name}", value)
        self._seqlens = np.zeros(self._size, np.int32)
        self._counts = np.zeros(self._size, np.int32)
        self._io.bind_cpu_input("seqlens_k", self._seqlens)
        self._io.bind_cpu_input("query_seqlens", self._counts)
        self._io.bind_cpu_input("total_length", np.array(capacity, np.int32))
        self._shape = (0, 0, 0, 0)
        self._layout = (b"", b"", b"")

    def run(self, batch: Batch, out: Floats) -> None:
        longest = int(batch.counts.max())
        shape = (len(batch.ids), longest, len(out), out.ctypes.data)
        if shape != self._shape:
            self._bind(*shape)
            self._shape, self._layout = shape, (b"", b"", b"")
        self._fill(batch, longest)
        self._session.run_with_iobinding(self._io)

    def _bind(self, total: int, longest: int, wanted: int, address: int) -> None:
        self._ids = np.empty(total, np.int64)
        self._unpack = np.empty(total, np.int64)
        self._pack = np.empty((self._size, longest), np.int64)
        self._sample = np.empty(wanted, np.int64)
        self._io.bind_cpu_input("input_ids", self._ids)
        self._io.bind_cpu_input("unpack", self._unpack)
        self._io.bind_cpu_input("pack", self._pack)
        self._io.bind_cpu_input("sample", self._sample)
        shape = (wanted, self._vocab_size)
        self._io.bind_output("logprobs", "cpu", 0, np.float32, shape, address)

    def _fill(self, batch: Batch, longest: int) -> None:
        """While the same rows decode, only ids and lengths change from step to step."""
        layout = (batch.slots.tobytes(), batch.counts.tobytes(), batch.samples.tobytes())
        if layout != self._layout:
            self._lay_out(batch, longest)
            self._layout = layout
        self._ids[:] = batch.ids
        self._seqlens[batch.slots - self._low] = batch.starts + batch.counts - 1

    def _lay_out(self, batch: Batch, longest: int) -> None:
        """Where each packed token stands in the padded square, and which are sampled."""
        total = len(batch.ids)
        local = batch.slots - self._low
        ends = np.cumsum(batch.counts)
        row = np.repeat(np.arange(len(local)), batch.counts)
        place = np.arange(total) - (ends - batch.counts)[row]
        np.add(local[row] * longest, place, out=self._unpack)
        self._pack.fill(0)
        self._pack.ravel()[self._unpack] = np.arange(total)
        self._counts.fill(0)
        self._counts[local] = batch.counts
        self._seqlens.fill(0)
        self._sample.fill(0)
        if batch.samples.any():
            self._sample[:] = (ends - 1)[batch.samples]


def runs(batch: Batch, slots: int) -> Iterator[tuple[slice, int, int]]:
    """How to split a step: (rows, lowest slot, number of slots) of each run.

    Decode rows run by themselves: the attention operator rounds a row of one token differently
    from the same row in a longer square, and an answer must not depend on who else is asking.
    Prompts share a run, or have one each where padding costs more. A pure function of the batch.
    """
    count = len(batch.slots)
    long = np.flatnonzero(batch.counts > 1)
    first = int(long[0]) if long.size else count
    split = [slice(0, first)] * (first > 0) + [slice(first, count)] * (first < count)
    alone = split[: first > 0] + [slice(row, row + 1) for row in range(first, count)]
    best = min((split, alone), key=lambda plan: sum(_cost(batch, rows, slots) for rows in plan))
    for rows in best:
        yield rows, *_range(batch.slots[rows], slots)


def _cost(batch: Batch, rows: slice, slots: int) -> float:
    _, size = _range(batch.slots[rows], slots)
    counts = batch.counts[rows]
    return RUN_COST + float(counts.sum()) + size * int(counts.max()) * CELL_COST


def _range(used: Ints, slots: int) -> tuple[int, int]:
    """The smallest aligned block of 1, 2, 4, 8, ... slots that holds all of ``used``."""
    low, high = int(used.min()), int(used.max())
    size = 1 << (low ^ high).bit_length()
    low -= low % size
    return low, min(size, slots - low)


def _part(batch: Batch, rows: slice, first: int) -> Batch:
    counts = batch.counts[rows]
    return Batch(
        slots=batch.slots[rows],
        starts=batch.starts[rows],
        counts=counts,
        samples=batch.samples[rows],
        ids=batch.ids[first : first + int(counts.sum())],
    )


def _session(model: Path, threads: int) -> Any:
    import onnxruntime  # here, so that importing the engine stays cheap

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # shapes vary: patterns only pile up memory
    options.log_severity_level = 4  # failures are raised; stderr belongs to the product
    for key, value in (
        ("session.force_spinning_stop", "1"),  # an idle engine must not burn a core
        ("session.set_denormal_as_zero", "1"),
    ):
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
