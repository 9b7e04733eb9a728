"""The least time a machine needs for a batch: bytes over bandwidth and FLOPs over FLOP/s. What a benchmark's share is a share of.

Owns the formulas and the machines' figures. A floor assumes that all requests decode together, that nothing is read twice, and that
neither launches nor the host cost anything; no engine reaches it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from miniinfer.config import ModelConfig


@dataclass(frozen=True)
class Machine:
    """What one device can do at best, as measured: bytes/s read, FLOP/s of a large product, FLOP/s of causal attention."""

    name: str
    read: float
    matmul: float
    attention: float


H200 = Machine("NVIDIA H200", read=4.5e12, matmul=790e12, attention=640e12)


def machine_of(device: str, dtype: str) -> Machine:
    """The figures of this machine's device: constants for an H200 (bf16), else measured now, in a second or two."""
    import torch

    gpu = device == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    if "H200" in name and dtype == "bfloat16":
        return H200

    def best(run: Callable[[], object]) -> float:
        """Seconds of the quickest run within a second: other work on the machine slows most of them."""
        times: list[float] = []
        until = time.perf_counter() + 1
        while len(times) < 8 or time.perf_counter() < until:
            begin = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    def product(dtype: torch.dtype) -> float:
        side = 8192 if gpu else 1024
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / best(lambda: a @ b)

    big = torch.ones(2**30 if gpu else 2**27, device=device)  # 4 GiB or 512 MiB: more than any cache holds
    read = big.nbytes / best(big.sum)
    del big
    matmul = product(getattr(torch, dtype))
    if not gpu:  # bf16 weights can be widened on the way, which is faster on a CPU that has no bf16 products
        matmul = max(matmul, product(torch.float32))
    return Machine(name, read=read, matmul=matmul, attention=matmul)


def used_parameters(shape: ModelConfig, tokens: float = 1) -> float:
    """Matrix parameters that `tokens` tokens together touch: all but the input embedding; of the experts, as many different ones as
    uniform routing is expected to reach."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    dense = 3 * shape.hidden_size * shape.intermediate_size
    sparse = 0.0
    if shape.num_experts:
        missed = (1 - shape.experts_per_token / shape.num_experts) ** tokens
        sparse = shape.hidden_size * shape.num_experts * (1 + 3 * shape.expert_intermediate_size * (1 - missed))
    layers = sum(sparse if m else dense for m in shape.moe_layers) + shape.num_layers * attention
    return layers + shape.vocab_size * shape.hidden_size


def kv_bytes(shape: ModelConfig, context: int, element_bytes: int = 2) -> float:
    """Bytes of keys and values that one token at this context length attends to, over all layers and their windows."""
    tokens = sum(min(context, w) if w else context for w in shape.windows)
    return tokens * 2 * shape.num_kv_heads * shape.head_dim * element_bytes


def decode_bytes(shape: ModelConfig, batch: int, context: int, element_bytes: int = 2) -> float:
    """Bytes that one decode step must read: weights once, and each request's keys and values."""
    return used_parameters(shape, batch) * element_bytes + batch * kv_bytes(shape, context, element_bytes)


def batch_seconds(shape: ModelConfig, requests: Sequence[tuple[int, int]], machine: Machine, element_bytes: int = 2) -> float:
    """Floor of the time from handing in all `requests` (prompt length, output length) to the last token.

    Prompts: matrix FLOPs (the output head counted for every prompt token) or one read of the weights, whichever is more, plus causal
    attention. Then step by step for the requests not yet done: matrix FLOPs or the weights' read, plus the keys' and values' read."""
    per_token = 2 * used_parameters(shape)
    prompt_tokens = sum(prompt for prompt, _ in requests)
    pairs = sum(_causal_pairs(prompt, window) for prompt, _ in requests for window in shape.windows)
    seconds = max(prompt_tokens * per_token / machine.matmul, used_parameters(shape, prompt_tokens) * element_bytes / machine.read)
    seconds += pairs * 4 * shape.num_heads * shape.head_dim / machine.attention
    kinds = [(window, shape.windows.count(window)) for window in shape.state_kinds]
    token_layer_bytes = 2 * shape.num_kv_heads * shape.head_dim * element_bytes
    for step in range(1, max(output for _, output in requests)):
        contexts = [prompt + step for prompt, output in requests if output > step]
        weights = used_parameters(shape, len(contexts)) * element_bytes / machine.read
        cached = sum(layers * sum(min(c, window) if window else c for c in contexts) for window, layers in kinds)
        seconds += max(weights, len(contexts) * per_token / machine.matmul) + cached * token_layer_bytes / machine.read
    return seconds


def _causal_pairs(tokens: int, window: int) -> float:
    """Query-key pairs of causal attention over `tokens` tokens, each seeing at most `window` (0 = all)."""
    w = min(window, tokens) if window else tokens
    return tokens * w - w * w / 2
