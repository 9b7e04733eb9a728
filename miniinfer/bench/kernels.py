"""`miniinfer bench kernels`: each GPU kernel against its ceiling and against plain torch on the same shapes.

A figure is the median of CUDA-graph replays over calls whose inputs rotate past the L2 cache, on random data. Ceilings are what an H200
was measured to reach (docs/performance.md), not its data sheet; options set others.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miniinfer.bench.floors import H200
from miniinfer.config import ConfigError, opt
from miniinfer.kernels import REFERENCE, Ops, select

ROTATE = 256 * 2**20  # bytes of inputs to go through before any is seen again; an H200's L2 holds 50 MB
VOCAB = 151_936


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. `make` builds fresh inputs and returns (our call, plain torch's call or None)."""

    name: str
    bytes: float  # that must be moved
    flops: float  # that must be done
    make: Callable[[], tuple[Callable[[], object], Callable[[], object] | None]]


@dataclass(frozen=True)
class Result:
    name: str
    us: float
    gb_per_s: float
    tflop_per_s: float
    share: float  # of the ceiling, whichever of bytes and flops takes longer there
    torch_us: float | None


def measure(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Microseconds a call: median over replays of one graph that makes all calls, at least 20."""
    calls = calls * max(1, -(-20 // len(calls)))
    torch.cuda.synchronize()  # the inputs are made on another stream
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def run(case: Case, bandwidth: float, flops: float) -> Result:
    """Measures one case; bandwidth in bytes/s, flops in 1/s."""
    copies = min(64, max(2, int(ROTATE // max(case.bytes, 1))))
    made = [case.make() for _ in range(copies)]
    us = measure([m[0] for m in made])
    plain = [m[1] for m in made if m[1] is not None]
    torch_us = measure(plain) if plain else None
    floor = max(case.bytes / bandwidth, case.flops / flops) * 1e6
    return Result(case.name, us, case.bytes / us / 1e3, case.flops / us / 1e6, floor / us, torch_us)


# ------------------------------------------------------------------------------------------------------------- cases


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ints(values: list[int] | range) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cuda")


def norm_cases(ops: Ops) -> Iterator[Case]:
    for rows, size in ((1, 4096), (256, 4096), (8192, 4096)):

        def rms(rows: int = rows, size: int = size) -> tuple[Callable[[], object], Callable[[], object]]:
            x, weight = rand(rows, size), rand(size)
            return lambda: ops.rms_norm(x, weight, 1e-6), lambda: F.rms_norm(x, (size,), weight, 1e-6)

        def add(rows: int = rows, size: int = size) -> tuple[Callable[[], object], Callable[[], object]]:
            x, residual, weight = rand(rows, size), rand(rows, size), rand(size)
            return lambda: ops.add_rms_norm(x, residual, weight, 1e-6), lambda: F.rms_norm(residual.add_(x), (size,), weight, 1e-6)

        def silu(rows: int = rows, size: int = size) -> tuple[Callable[[], object], Callable[[], object]]:
            x = rand(rows, 6 * size)
            return lambda: ops.silu_mul(x), lambda: REFERENCE.silu_mul(x)

        yield Case(f"rms_norm {rows}x{size}", rows * size * 4, 0, rms)
        yield Case(f"add_rms_norm {rows}x{size}", rows * size * 8, 0, add)
        yield Case(f"silu_mul {rows}x{3 * size}", rows * size * 18, 0, silu)


def linear_cases(ops: Ops) -> Iterator[Case]:
    """Projections of 8B and 0.6B models; gate and up with silu(gate) * up. Beside them cuBLAS, for those followed by our silu_mul."""
    weights = {
        "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate, up": (24_576, 4096), "8B down": (4096, 12_288), "8B head": (VOCAB, 4096),
        "0.6B qkv": (4096, 1024), "0.6B o": (1024, 2048), "0.6B gate, up": (6144, 1024), "0.6B down": (1024, 3072),
    }  # fmt: skip
    for name, (n, k) in weights.items():
        for tokens in (1, 8, 32, 128):

            def make(name: str = name, n: int = n, k: int = k, tokens: int = tokens) -> tuple[Callable[[], object], Callable[[], object]]:
                x, weight, gated = rand(tokens, k), rand(n, k) * k**-0.5, "gate" in name
                pack = ops.pack_gated if gated else ops.pack_linear
                assert pack is not None
                product = pack(weight, None)
                return lambda: product(x), lambda: ops.silu_mul(F.linear(x, weight)) if gated else F.linear(x, weight)

            yield Case(f"{name} {n}x{k} T={tokens}", (n * k + tokens * (k + n)) * 2, 2 * n * k * tokens, make)


def rope_cases(ops: Ops, heads: int = 32, kv_heads: int = 8, dim: int = 128, size: int = 64) -> Iterator[Case]:
    for tokens in (1, 256, 8192):

        def make(tokens: int = tokens) -> tuple[Callable[[], object], Callable[[], object]]:
            pages = -(-tokens // size) + 1
            k, v = rand(pages, kv_heads, size, dim), rand(pages, kv_heads, size, dim)
            weight, cos_sin = rand(dim), torch.randn(40_960, dim, device="cuda")
            head = (rand(tokens, (heads + 2 * kv_heads) * dim), heads, kv_heads, cos_sin, ints(range(tokens)), weight, weight, 1e-6)
            args = (*head, k, v, ints(range(size, size + tokens)))
            return lambda: ops.rope_qkv_cache(*args), lambda: REFERENCE.rope_qkv_cache(*args)

        yield Case(f"rope_qkv_cache T={tokens}", tokens * (heads + 2 * kv_heads) * dim * 4 + tokens * dim * 4, 0, make)


def paged(ops: Ops, counts: list[int], lengths: list[int], heads: int, kv_heads: int, dim: int, size: int = 64) -> Case:
    """Paged attention; beside it torch's attention over contiguous keys and values, if all sequences are alike and none a later chunk."""
    moved = 2 * sum(lengths) * kv_heads * dim * 2 + 2 * sum(counts) * heads * dim * 2
    flops = sum(4 * heads * dim * (c * (n - c) + c * (c + 1) / 2) for c, n in zip(counts, lengths, strict=True))

    def make() -> tuple[Callable[[], object], Callable[[], object] | None]:
        batch, width = len(counts), -(-max(lengths) // size)
        table = (torch.randperm(batch * width, device="cuda").int() + 1).view(batch, width)
        k, v = rand(batch * width + 1, kv_heads, size, dim), rand(batch * width + 1, kv_heads, size, dim)
        start = ints([0, *torch.tensor(counts).cumsum(0).tolist()])
        args = (rand(sum(counts), heads, dim), k, v, table, ints(range(batch)), start, ints(lengths), dim**-0.5, 0, max(counts), max(lengths))
        if len({*zip(counts, lengths, strict=True)}) > 1 or 1 < counts[0] < lengths[0]:
            return lambda: ops.paged_attention(*args), None
        q = args[0].view(batch, counts[0], heads, dim).transpose(1, 2)
        flat_k, flat_v = (c[1:].view(batch, kv_heads, -1, dim)[:, :, : lengths[0]] for c in (k, v))
        causal = counts[0] > 1
        return lambda: ops.paged_attention(*args), lambda: F.scaled_dot_product_attention(q, flat_k, flat_v, is_causal=causal, enable_gqa=True)

    kind = "decode" if max(counts) == 1 else "prefill"
    alike = f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} x {min(lengths)}..{max(lengths)}"
    return Case(f"{kind} {alike}, {heads}/{kv_heads} heads of {dim}", moved, flops, make)


def attention_cases(ops: Ops) -> Iterator[Case]:
    for batch, length in ((1, 1024), (1, 32_768), (8, 1024), (32, 1024), (128, 1024), (256, 1024)):
        yield paged(ops, [1] * batch, [length] * batch, 32, 8, 128)
    yield paged(ops, [1] * 256, [1024] * 256, 16, 8, 128)
    yield paged(ops, [1] * 256, list(range(100, 2148, 8)), 16, 8, 128)
    for long in (1, 4):
        yield paged(ops, [1] * 64, [500] * (64 - long) + [30_000] * long, 32, 8, 128)
    yield paged(ops, [1] * 32, [1024] * 32, 32, 4, 128)
    yield paged(ops, [1] * 32, [1024] * 32, 32, 8, 64)
    for length in (1024, 2048, 8192, 32_768):
        yield paged(ops, [length], [length], 32, 8, 128)
    yield paged(ops, [1024] * 8, [1024] * 8, 32, 8, 128)
    yield paged(ops, [2048], [8192], 32, 8, 128)
    yield paged(ops, [2048] + [1] * 128, [8192] + [1024] * 128, 32, 8, 128)


def rope_decode_cases(ops: Ops, heads: int = 32, kv_heads: int = 8, dim: int = 128, size: int = 64, length: int = 1024) -> Iterator[Case]:
    """Attention of a decode step with all that is between it and qkv's product; beside it the two kernels apart."""
    for batch in (1, 8, 32, 128, 256):

        def make(batch: int = batch) -> tuple[Callable[[], object], Callable[[], object]]:
            width = length // size
            table = torch.randperm(batch * width, device="cuda").int().view(batch, width)
            k, v = rand(batch * width, kv_heads, size, dim), rand(batch * width, kv_heads, size, dim)
            weight, at = rand(dim), ints([length - 1] * batch)
            head = (rand(batch, (heads + 2 * kv_heads) * dim), heads, kv_heads, torch.randn(length, dim, device="cuda"), at, weight, weight, 1e-6)
            place = (table, ints(range(batch)), ints(range(batch + 1)), ints([length] * batch), dim**-0.5, 0, 1, length)
            args = (*head, k, v, table[:, -1] * size + size - 1)
            fused = ops.rope_paged_attention
            assert fused is not None
            return lambda: fused(*args, *place), lambda: ops.paged_attention(ops.rope_qkv_cache(*args), k, v, *place)

        moved = batch * 2 * (length * 2 * kv_heads + 2 * heads + 2 * kv_heads) * dim
        yield Case(f"rope and decode {batch} x {length}, {heads}/{kv_heads} heads of {dim}", moved, 0, make)


def grouped_moe(x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """What torch has for a mixture of experts on the GPU: its grouped product over tokens gathered by expert."""
    weights, experts = torch.topk(logits.float().softmax(-1), top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    ends = (experts.flatten() == torch.arange(len(w2), device=x.device).unsqueeze(1)).sum(1).cumsum(0, dtype=torch.int32)
    inner = REFERENCE.silu_mul(F.grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends))
    parts = F.grouped_mm(inner, w2.transpose(1, 2), offs=ends)
    return (parts[order.argsort()].unflatten(0, (-1, top_k)).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def moe_cases(ops: Ops, hidden: int = 2048, inner: int = 768, experts: int = 128, top_k: int = 8) -> Iterator[Case]:
    weights = [(rand(experts, 2 * inner, hidden) * hidden**-0.5, rand(experts, hidden, inner) * inner**-0.5) for _ in range(2)]
    turn = iter(range(1 << 30))
    for tokens in (1, 8, 32, 128, 2048, 8192):

        def make(tokens: int = tokens) -> tuple[Callable[[], object], Callable[[], object]]:
            w13, w2 = weights[next(turn) % 2]
            x, logits = rand(tokens, hidden), rand(tokens, experts)
            return lambda: ops.moe(x, logits, w13, w2, top_k, True), lambda: grouped_moe(x, logits, w13, w2, top_k)

        touched = experts * (1 - (1 - top_k / experts) ** tokens)  # of random choices, on average
        yield Case(f"moe T={tokens}", touched * 3 * inner * hidden * 2 + tokens * hidden * 4, tokens * top_k * 6 * inner * hidden, make)


def sample_cases(ops: Ops) -> Iterator[Case]:
    for rows in (1, 32, 256):
        for filtered in (False, True):

            def make(rows: int = rows, filtered: bool = filtered) -> tuple[Callable[[], object], Callable[[], object]]:
                one, each, tokens = torch.ones(rows, device="cuda"), ints(range(rows)), torch.zeros(rows, rows, dtype=torch.int32, device="cuda")
                logits = (torch.randn(rows, VOCAB, device="cuda") * 4).bfloat16()
                settings = one * 0.6, (one * 50 * filtered).int(), one - 0.1 * filtered, one * 0, each.long()
                args = (logits, each, each, tokens, *settings, filtered)
                return lambda: ops.sample_rows(*args), lambda: REFERENCE.sample_rows(*args)

            yield Case(f"sample {rows}x{VOCAB}{', top-k and top-p' if filtered else ''}", rows * VOCAB * 2, 0, make)


def step_cases(ops: Ops) -> Iterator[Case]:
    for batch in (1, 256):

        def make(batch: int = batch) -> tuple[Callable[[], object], None]:
            tokens = torch.randint(0, VOCAB, (batch, 4096), dtype=torch.int32, device="cuda")
            table = torch.randint(1, 999, (batch, 64), dtype=torch.int32, device="cuda")
            ids, positions, lengths, slots = (ints([0] * batch) for _ in range(4))
            rows, start = ints(range(batch)), ints(range(batch + 1))
            return lambda: ops.step_inputs(tokens, rows, rows, start, batch, [table], 64, ids, positions, lengths, [slots]), None

        yield Case(f"step_inputs B={batch}", batch * 44, 0, make)


GROUPS: dict[str, Callable[[Ops], Iterator[Case]]] = {
    "norm": norm_cases,
    "linear": linear_cases,
    "rope": rope_cases,
    "rope-decode": rope_decode_cases,
    "attention": attention_cases,
    "moe": moe_cases,
    "sample": sample_cases,
    "step": step_cases,
}


@dataclass(frozen=True, kw_only=True)
class KernelBench:
    """What to time, and the ceilings to compare with."""

    only: str | None = opt(None, f"comma list of {', '.join(GROUPS)} (all)")
    bandwidth: float = opt(H200.read / 1e12, "TB/s that reading reaches at best")
    tflops: float = opt(H200.matmul / 1e12, "TFLOP/s that a large bf16 product reaches at best")

    @property
    def groups(self) -> list[str]:
        names = self.only.split(",") if self.only else list(GROUPS)
        if unknown := [n for n in names if n not in GROUPS]:
            raise ConfigError(f"only: {', '.join(unknown)}: not among {', '.join(GROUPS)}")
        return names


def main(options: KernelBench) -> int:
    """Prints a table, then one JSON object as the last line. ConfigError without a GPU."""
    groups = options.groups
    if not torch.cuda.is_available():
        raise ConfigError("timing kernels needs a CUDA device, and torch sees none here")
    ops = select("triton", "cuda")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ceilings {options.bandwidth:g} TB/s and {options.tflops:g} TFLOP/s")
    print(f"{'kernel':52} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'share':>6} {'torch us':>10}")
    results: list[Result] = []
    for group in groups:
        for case in GROUPS[group](ops):
            r = run(case, options.bandwidth * 1e12, options.tflops * 1e12)
            beside = f"{r.torch_us:10.1f}" if r.torch_us is not None else f"{'-':>10}"
            print(f"{r.name:52} {r.us:10.1f} {r.gb_per_s:8.0f} {r.tflop_per_s:8.1f} {r.share:6.0%} {beside}", flush=True)
            results.append(r)
            torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "kernels": [asdict(r) for r in results]}))
    return 0
