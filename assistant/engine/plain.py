"""Runs a decoder as optimum exports it: slower than our own graphs, for models we cannot build.

Every step copies each row's keys and values in and out, and computes logits for every prompt token;
expect a fraction of the packed runner's speed. Knows slots and lengths, as ``runner`` does; knows
nothing of requests, queues or text.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assistant.engine.manifest import Architecture, ManifestError
from assistant.engine.runner import Batch, _session
from assistant.engine.sampling import Floats

_SIDES = ("key", "value")
_KNOWN_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})
#: Positions of the padded rectangle around one run: it bounds what a step copies. A run of this
#: size moves 0.4 GB for a model of 12 layers with 12 heads of 64.
_MOST_CELLS = 4096


class PlainRunner:
    """An exported decoder with its past as inputs. Not thread-safe: one thread steps it.

    Keys and values lie in one array per layer and side, a slot per row: their memory is bounded by
    ``slots`` times ``context_tokens``. Rows run together only with as many new tokens each; shorter
    pasts are padded on the left and masked.
    """

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
        """Raises: ManifestError when the graph is not the exported decoder that the manifest
        describes. ``step_tokens`` is part of every runner's signature; nothing here depends on
        it."""
        self.vocab_size = architecture.vocab_size
        self.width = 0
        self._session = _session(model, threads)
        self._inputs = {one.name for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]
        # An export without position_ids may count from the length of the past (Gemma's does), and
        # padding would move every position.
        self._padding = "position_ids" in self._inputs
        self._check(model, architecture)
        shape = (slots, architecture.num_key_value_heads, context_tokens, architecture.head_dim)
        self.token_bytes = 8 * architecture.num_hidden_layers * shape[1] * shape[3]
        # Zeros come from the kernel page by page: a slot costs memory once it is written.
        self._caches = {name: np.zeros(shape, np.float32) for name in self._inputs - _KNOWN_INPUTS}

    def step(self, batch: Batch) -> Floats:
        rows = np.empty((len(batch.slots), self.vocab_size), np.float32)
        ends = np.cumsum(batch.counts)
        for group in _groups(batch, padding=self._padding):
            count = int(batch.counts[group[0]])
            ids = np.stack([batch.ids[ends[row] - count : ends[row]] for row in group])
            rows[group] = self._run(batch.slots[group], batch.starts[group], ids)
        return _log_softmax(rows[batch.samples > 0])

    def pool(self, batch: Batch) -> Floats:
        raise NotImplementedError("an exported decoder gives logits only: it has no embeddings")

    def copy(self, source: int, target: int, tokens: int) -> None:
        for cache in self._caches.values():
            cache[target, :, :tokens] = cache[source, :, :tokens]

    def save(self, slot: int, start: int, stop: int) -> tuple[NDArray[Any], ...]:
        return tuple(cache[slot, :, start:stop].copy() for cache in self._caches.values())

    def load(self, slot: int, start: int, saved: tuple[NDArray[Any], ...], tokens: int) -> None:
        for cache, kept in zip(self._caches.values(), saved, strict=True):
            cache[slot, :, start : start + tokens] = kept[:, :tokens]

    def close(self) -> None:
        self._caches.clear()
        self._session = None

    def abandon(self) -> None:
        # As OnnxRunner does, and for its reasons.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
        libc = ctypes.CDLL(None)
        if hasattr(libc, "on_exit"):  # glibc
            libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)

    def _run(self, slots: NDArray[np.int64], starts: NDArray[np.int64], ids: Any) -> Floats:
        """Logits of each row's last token. *Shapes*: slots, starts (R,); ids (R, count)."""
        count, longest = ids.shape[1], int(starts.max())
        pads = longest - starts
        places = np.arange(longest + count)
        held = starts[:, None] + np.arange(count)
        feeds = {
            "input_ids": ids,
            "attention_mask": (places >= pads[:, None]).astype(np.int64),
            "position_ids": held,
        }
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        feeds |= {name: self._past(name, slots, starts, longest) for name in self._caches}
        found = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        for name, cache in self._caches.items():
            present = found[name.replace("past_key_values", "present")]
            cache[slots[:, None], :, held] = present[:, :, longest:].swapaxes(1, 2)
        logits: Floats = found["logits"][:, -1]
        return logits

    def _past(
        self, name: str, slots: NDArray[np.int64], starts: NDArray[np.int64], longest: int
    ) -> Floats:
        cache = self._caches[name]
        past = np.zeros((len(slots), cache.shape[1], longest, cache.shape[3]), np.float32)
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            past[row, :, longest - start :] = cache[slot, :, :start]
        return past

    def _check(self, model: Path, architecture: Architecture) -> None:
        """Raises: ManifestError."""
        odd = next(_oddities(self._session, architecture), None)
        if odd is not None:
            raise ManifestError(
                f"{model} is not the exported decoder that model.json describes ({odd}); "
                f"build it again with `manage.py build_model --via optimum`."
            )


def _oddities(session: Any, architecture: Architecture) -> Iterator[str]:
    """What differs from a decoder of this shape, as optimum exports it."""
    inputs = {one.name: one.shape for one in session.get_inputs()}
    outputs = {one.name: one.shape for one in session.get_outputs()}
    sides = [f"{at}.{side}" for at in range(architecture.num_hidden_layers) for side in _SIDES]
    pasts = {f"past_key_values.{side}" for side in sides}
    wanted = {"logits", *(f"present.{side}" for side in sides)}
    yield from sorted(inputs.keys() - _KNOWN_INPUTS - pasts)
    yield from sorted(({"input_ids", "attention_mask"} | pasts) - inputs.keys())
    yield from sorted(wanted - outputs.keys())
    heads = (architecture.num_key_value_heads, architecture.head_dim)
    for name in sorted(pasts & inputs.keys()):
        found = tuple(inputs[name])
        if len(found) != 4 or (found[1], found[3]) != heads:
            yield f"{name} has shape {found}, not [batch, {heads[0]}, tokens, {heads[1]}]"
    if outputs["logits"][-1] != architecture.vocab_size:
        yield f"a vocabulary of {outputs['logits'][-1]} instead of {architecture.vocab_size}"


def _groups(batch: Batch, *, padding: bool) -> Iterator[NDArray[np.int64]]:
    """Rows that run together: as many new tokens each, pasts of like length, few enough cells.

    A pure function of lengths, so that how rows are grouped never depends on what they say.
    """
    order = np.lexsort((batch.starts, batch.counts))
    group: list[int] = []
    for row in order.tolist():
        count = int(batch.counts[row])
        start = int(batch.starts[row])
        full = (len(group) + 1) * (start + count) > _MOST_CELLS
        same = group and count == batch.counts[group[0]]
        fits = padding or (group and start == batch.starts[group[0]])
        if group and (full or not same or not fits):
            yield np.array(group)
            group = []
        group.append(row)
    if group:
        yield np.array(group)


def _log_softmax(logits: Floats) -> Floats:
    """In place. Exponents are summed in 64 bits: 150,000 small ones lose digits in 32."""
    if logits.size:
        logits -= logits.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)
        logits -= np.log(total).astype(np.float32)
    return logits
