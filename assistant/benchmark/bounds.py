"""What the machine could do at most: memory bandwidth, 8-bit products, and what follows for a load.

Measured in the same run and with the same threads as the engines; a bound is a ceiling nobody
reaches, there to tell a slow engine from a slow machine.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assistant.benchmark.workloads import Load
from assistant.engine.machine import exact_products

_SIDE = 1024
_PATIENCE_S = 0.4


@dataclass(frozen=True, slots=True)
class Machine:
    """*Units*: bytes and 8-bit multiply-adds times two, a second. ``operations`` is 0 where onnx,
    which builds the one-node graph, is not installed."""

    cached_bandwidth: float
    bandwidth: float
    operations: float


@dataclass(frozen=True, slots=True)
class Model:
    """What one token costs. ``head`` is part of ``parameters``, and needed by sampled rows only."""

    weight_bytes: int
    parameters: int
    head: int
    kv_bytes_per_token: int


def measure(weight_bytes: int, threads: int) -> Machine:
    """``cached_bandwidth`` is that of an array as large as the weights, which may fit a cache."""
    return Machine(
        cached_bandwidth=_bandwidth(max(weight_bytes, 2**20), threads),
        bandwidth=_bandwidth(2**28, threads),
        operations=_operations(threads),
    )


def tokens_per_s(machine: Machine, model: Model, load: Load) -> float:
    """Most output tokens a second of a closed loop: all of its products at the 8-bit rate, or all
    of its weights and cached keys and values at the bandwidth, whichever takes longer. 0: unknown.

    Source: the roofline argument; the single stream's bound is bandwidth / weight bytes.
    """
    if not machine.operations:
        return 0.0
    prompt = load.prompt_tokens / load.new_tokens  # prompt tokens read per token written
    products = 2 * (model.parameters + prompt * (model.parameters - model.head))
    context = load.prompt_tokens + load.new_tokens / 2
    read = model.weight_bytes / load.chats / machine.cached_bandwidth
    read += context * model.kv_bytes_per_token / machine.bandwidth
    return 1 / max(products / machine.operations, read)


def first_token_s(machine: Machine, model: Model, load: Load) -> float:
    """Least time to the first token of one prompt. 0: unknown."""
    if not machine.operations:
        return 0.0
    products = 2 * (load.prompt_tokens * (model.parameters - model.head) + model.head)
    return max(products / machine.operations, model.weight_bytes / machine.cached_bandwidth)


def _bandwidth(size: int, threads: int) -> float:
    """The better of reading (a sum) and of copying, which reads and writes."""
    parts = [np.ones(size // 4 // threads, np.float32) for _ in range(threads)]
    copies = [np.empty_like(part) for part in parts]
    moved = sum(part.nbytes for part in parts)
    with ThreadPoolExecutor(threads) as pool:
        read = _best_s(lambda: list(pool.map(np.sum, parts)))
        copied = _best_s(lambda: list(pool.map(_copy, copies, parts)))
    return max(moved / read, 2 * moved / copied)


def _copy(target: NDArray[np.float32], source: NDArray[np.float32]) -> None:
    np.copyto(target, source)


def _operations(threads: int) -> float:
    """Rate of MatMulIntegerToFloat, u8 x s8, the kernel behind every 8-bit matrix here."""
    try:
        session = _product(threads)
    except ModuleNotFoundError:
        return 0.0
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (_SIDE, _SIDE)).astype(np.uint8)
    return 2 * _SIDE**3 / _best_s(lambda: session.run(None, {"x": x}))


def _product(threads: int) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(1).integers(-127, 128, (_SIDE, _SIDE)).astype(np.int8)
    constants: dict[str, NDArray[Any]] = {
        "w": weights,
        "one": np.array(1, np.float32),
        "middle": np.array(128, np.uint8),
    }
    node = helper.make_node(
        "MatMulIntegerToFloat", ["x", "w", "one", "one", "middle"], ["y"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [_SIDE, _SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [_SIDE, _SIDE])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    exact_products(options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _best_s(run: Any) -> float:
    """The fastest of as many runs as fit a short while: noise only ever slows."""
    best, until = float("inf"), time.perf_counter() + _PATIENCE_S
    while time.perf_counter() < until:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
