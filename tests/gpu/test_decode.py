"""Decode attention as the engine uses it: whole and split sequences, mixed batches, windows, graphs, rope_qkv_cache before it and in it."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_paged, close, paged_case, same, triton_ops

from miniinfer.kernels import REFERENCE as ref

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (32, 8), (28, 4), (32, 4), (32, 2), (32, 1)], ids=str)
def test_groups(heads: tuple[int, int], dim: int) -> None:
    for window in (0, 130):
        check_paged("cuda", BF16, f"{heads} {dim} window={window}", triton_ops(), [1] * 5, [1, 64, 65, 700, 5000], *heads, dim, 64, window)


@pytest.mark.parametrize("batch", [1, 7, 33, 130, 300, 600])
def test_batches(batch: int) -> None:
    """Below and above the 256 sequences that are looked at in one go; lengths of nought and padding tokens among them."""
    lengths = torch.randint(1, 1200, (batch,))
    lengths[torch.rand(batch) < 0.1] = 0
    check_paged("cuda", BF16, f"B={batch}", triton_ops(), [1] * batch, lengths.tolist(), 16, 8, 128, 64, 0, padding=3)


@pytest.mark.parametrize("count", [1, 4])
def test_skewed(count: int) -> None:
    lengths = [500] * 60
    for i in range(count):
        lengths[7 * i + 3] = 30_000
    check_paged("cuda", BF16, f"{count} long of 60", triton_ops(), [1] * 60, lengths, 16, 4, 128, 64, 0)


def test_among_prompts() -> None:
    counts, lengths = [1, 300, 1, 1, 0, 65, 1], [2000, 700, 30, 9000, 0, 65, 1]
    check_paged("cuda", BF16, "mixed", triton_ops(), counts, lengths, 32, 8, 128, 64, 0, padding=9)


@pytest.mark.parametrize(("heads", "dim"), [((16, 8), 128), ((32, 8), 128), ((32, 4), 128), ((32, 8), 64)], ids=str)
@pytest.mark.parametrize("window", [0, 900])
def test_result_does_not_depend_on_the_batch(heads: tuple[int, int], dim: int, window: int) -> None:
    """In a large batch sequences are computed whole, alone they are split over programs: the same to the last bit."""
    batch = 150
    lengths = torch.randint(1, 1000, (batch,)).tolist()
    lengths[5], lengths[120] = 9000, 3000
    (q, k, v, table, rows, start, lens, scale, _, _, longest), _ = paged_case("cuda", BF16, [1] * batch, lengths, *heads, dim, 64, window)
    ops = triton_ops()
    whole = ops.paged_attention(q, k, v, table, rows, start, lens, scale, window, 1, longest)
    again = ops.paged_attention(q, k, v, table, rows, start, lens, scale, window, 1, 40_960)
    same(again, whole, "twice")
    for n in (1, 3, 40):
        for b in (0, 4, 110):
            part = ops.paged_attention(
                q[b : b + n], k, v, table, rows[b : b + n], start[: n + 1], lens[b : b + n], scale, window, 1, max(lengths[b : b + n])
            )
            same(part, whole[b : b + n], f"{n} sequences from {b}")


def test_graph_follows_its_inputs() -> None:
    """One capture with the model's limit for a bound serves any lengths, and leaves its counters ready for the next replay."""
    limit = 6000
    (q, k, v, table, rows, start, lengths, *_), _ = paged_case("cuda", BF16, [1] * 8, [limit] * 8, 32, 8, 128, 64, 0)
    ops = triton_ops()

    def attend() -> torch.Tensor:
        return ops.paged_attention(q, k, v, table, rows, start, lengths, 0.1, 0, 1, limit)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = [attend() for _ in range(3)]
    for lens in ([1] * 8, [limit] + [3] * 7, list(range(0, 6000, 750)), [700] * 8):
        lengths.copy_(torch.tensor(lens, dtype=torch.int32))
        torch.cuda.synchronize()
        eager = attend()
        graph.replay()
        for out in layers:
            same(out, eager, f"replay with {lens[:4]}")
        close(eager, ref.paged_attention(q.float(), k.float(), v.float(), table, rows, start, lengths, 0.1, 0, 1, limit), f"{lens[:4]}", BF16)


def test_last_key_comes_from_the_kernel_before() -> None:
    """Decoding starts to read while rope_qkv_cache still writes the queries and the last key and value: a chain of steps, against the reference."""
    heads, kv_heads, dim, size = 16, 8, 128, 64
    ops = triton_ops()
    for batch in (1, 8, 48):
        first = torch.randint(1, 1000, (batch,))
        first[0] = 63  # its second step begins a page
        width = 20
        table = (torch.randperm(batch * width) + 1).int().view(batch, width).cuda()
        caches = [torch.randn(batch * width + 1, kv_heads, size, dim, dtype=BF16, device="cuda") for _ in range(2)]
        mirror = [x.clone() for x in caches]
        cos_sin, weight = torch.randn(2000, dim, device="cuda"), torch.randn(dim, dtype=BF16, device="cuda")
        rows, start = (torch.arange(n, dtype=torch.int32, device="cuda") for n in (batch, batch + 1))
        steps = []
        for step in range(4):
            at = (first + step).cuda()
            slots = (table[rows.long(), at // size].long() * size + at % size).int()
            steps.append((torch.randn(batch, (heads + 2 * kv_heads) * dim, dtype=BF16, device="cuda"), at.int(), slots, (at + 1).int()))
        torch.cuda.synchronize()

        def run(table_of_ops, k_cache, v_cache, steps=steps, table=table, rows=rows, start=start, cos_sin=cos_sin, weight=weight):  # type: ignore[no-untyped-def]
            outs = []
            for qkv, positions, slots, lengths in steps:
                q = table_of_ops.rope_qkv_cache(qkv, heads, kv_heads, cos_sin, positions, weight, weight, 1e-6, k_cache, v_cache, slots)
                outs.append(table_of_ops.paged_attention(q, k_cache, v_cache, table, rows, start, lengths, 0.09, 0, 1, 1280))
            return outs

        for got, want in zip(run(ops, *caches), run(ref, *mirror), strict=True):
            close(got, want, f"B={batch}", BF16, bf16=1.5e-2)


def rope_case(dtype: torch.dtype, lengths: list[int], heads: int, kv_heads: int, dim: int, window: int, norm: bool, padding: int = 0) -> tuple:
    """(arguments of rope_qkv_cache before the caches, caches, slots, arguments of paged_attention behind them): each sequence's last token is
    new, NaN lies in its place, and neither a sequence of length 0 nor a padding token has one."""
    batch = len(lengths)
    (_, k, v, *place), _ = paged_case("cuda", dtype, [1] * batch, lengths, heads, kv_heads, dim, 64, window, padding)
    table, rows, _, lens = place[:4]
    live, at = lens > 0, (lens - 1).clamp(min=0)
    pages = table[rows.long(), (at // 64).long()]
    slots = torch.zeros(batch + padding, dtype=torch.int32, device="cuda")
    positions = slots.clone()
    slots[:batch] = torch.where(live, pages * 64 + at % 64, 0)
    positions[:batch] = at
    for cache in (k, v):
        cache[pages[live].long(), :, (at % 64)[live].long()] = float("nan")
    angle = torch.rand(max(lengths) + 1, dim // 2, device="cuda") * 6.3
    weights = [torch.randn(dim, device="cuda").to(dtype) if norm else None for _ in range(2)]
    qkv = torch.randn(batch + padding, (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
    return (qkv, heads, kv_heads, torch.cat([angle.cos(), angle.sin()], -1), positions, *weights, 1e-6), (k, v), slots, place


def check_rope_decode(what: str, dtype: torch.dtype, *case, **options) -> None:  # type: ignore[no-untyped-def]
    """One kernel against the two, to the bit, and against the reference."""
    ops = triton_ops()
    rope, caches, slots, place = rope_case(dtype, *case, **options)
    apart, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
    torch.cuda.synchronize()
    out = ops.rope_paged_attention(*rope, *caches, slots, *place)
    torch.cuda.synchronize()
    same(out, ops.paged_attention(ops.rope_qkv_cache(*rope, *apart, slots), *apart, *place), what)
    for name, mine, other in zip("KV", caches, apart, strict=True):  # of page 0 only the two kernels have written something: padding
        same(mine[1:].nan_to_num(9.0), other[1:].nan_to_num(9.0), f"{name}, {what}")
    q = ref.rope_qkv_cache(*rope, *theirs, slots)
    wide = [c.float().nan_to_num() for c in theirs]
    close(out, ref.paged_attention(q.float(), *wide, *place), what, dtype, bf16=1e-2)


ROPE_CASES = [  # heads, kv heads, dim, window, norm, type: each compiles two kernels of its own
    *((*heads, 128, 0, True, BF16) for heads in ((8, 8), (16, 8), (32, 8), (28, 4), (32, 4), (12, 1), (16, 1))),
    *((*heads, 64, 0, norm, BF16) for heads, norm in (((8, 8), True), ((32, 8), False), ((28, 4), True), ((16, 1), False))),
    *((32, 8, 128, window, False, BF16) for window in (0, 64, 130)),
    (16, 4, 64, 130, True, BF16),
    (16, 8, 128, 0, True, torch.float16),
    (32, 4, 64, 0, False, torch.float16),
]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window", "norm", "dtype"), ROPE_CASES)
def test_rope_in_decode(heads: int, kv_heads: int, dim: int, window: int, norm: bool, dtype: torch.dtype) -> None:
    shape = heads, kv_heads, dim, window, norm
    check_rope_decode("mixed lengths", dtype, [1, 63, 64, 65, 0, 128, 129, 192, 193, 1000, 0, 5000, 2], *shape, padding=3)
    for length in (1, 64, 65, 500, 4096, 9001):
        check_rope_decode(f"alone, length={length}", dtype, [length], *shape)


@pytest.mark.parametrize("batch", [7, 33, 130, 300, 600])
def test_rope_in_decode_of_batches(batch: int) -> None:
    lengths = torch.randint(1, 1200, (batch,))
    lengths[torch.rand(batch) < 0.1] = 0
    check_rope_decode(f"B={batch}", BF16, lengths.tolist(), 16, 8, 128, 0, True, padding=5)


def test_every_place_in_a_page() -> None:
    """A new row lies elsewhere in the swizzle of each."""
    for dim in (64, 128):
        check_rope_decode(f"D={dim}", BF16, [*range(1, 65), *range(300, 365)], 8, 4, dim, 0, True)


def test_rope_does_not_depend_on_the_batch() -> None:
    """However many tokens a launch has, and with them other tiles: the same to the last bit."""
    ops, heads, kv_heads, tokens = triton_ops(), 16, 8, 3000
    for dim in (64, 128):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device="cuda").to(BF16)
        cos_sin, weight = torch.randn(tokens, dim, device="cuda"), torch.randn(dim, device="cuda").to(BF16)
        at = torch.arange(tokens, dtype=torch.int32, device="cuda")
        caches = torch.zeros(2, -(-tokens // 64), kv_heads, 64, dim, dtype=BF16, device="cuda")
        whole = ops.rope_qkv_cache(qkv, heads, kv_heads, cos_sin, at, weight, weight, 1e-6, *caches, at)
        for n in (1, 32, 33, 1024, 1025):
            mine = torch.zeros_like(caches)
            q = ops.rope_qkv_cache(qkv[:n], heads, kv_heads, cos_sin, at[:n], weight, weight, 1e-6, *mine, at[:n])
            same(q, whole[:n], f"q, {n} tokens")
            rows, wanted = (c.transpose(2, 3).flatten(1, 2)[:, :n] for c in (mine, caches))
            same(rows, wanted, f"K and V, {n} tokens")


@pytest.mark.parametrize(("heads", "batch"), [((16, 8), 1), ((16, 8), 8), ((32, 8), 48), ((32, 4), 128)], ids=str)
def test_rope_in_decode_between_overlapping_kernels(heads: tuple[int, int], batch: int) -> None:
    """Steps of 20 layers in a graph, where each kernel starts before the one ahead of it is over: qkv's product, attention, the output's product
    and its norm. The kernels apart, one step after the other, are what they must equal to the bit."""
    (num_heads, kv_heads), dim, hidden, width, layers = heads, 128, 512, 10, 20
    ops = triton_ops()
    first = torch.randint(1, 600, (batch,), device="cuda")
    first[0] = 63  # its second step begins a page
    table = (torch.randperm(batch * width, device="cuda") + 1).int().view(batch, width)
    old = (torch.arange(width * 64, device="cuda").view(1, width, 1, 64, 1) < first.view(-1, 1, 1, 1, 1)).expand(-1, -1, kv_heads, -1, dim)
    caches = torch.full((layers, 2, batch * width + 1, kv_heads, 64, dim), float("nan"), dtype=BF16, device="cuda")
    for cache in caches.flatten(0, 1):
        cache[table.long()] = torch.randn(old.shape, device="cuda").to(BF16).where(old, float("nan"))
    mirror = caches.clone()
    cos_sin, weight = torch.randn(640, dim, device="cuda"), torch.randn(dim, device="cuda").to(BF16)
    w_qkv = (torch.randn((num_heads + 2 * kv_heads) * dim, hidden, device="cuda") * hidden**-0.5).to(BF16)
    w_out = (torch.randn(hidden, num_heads * dim, device="cuda") * (num_heads * dim) ** -0.5).to(BF16)
    product, output = ops.pack_linear(w_qkv, None), ops.pack_linear(w_out, None)
    ones = torch.ones(hidden, dtype=BF16, device="cuda")
    rows, start = (torch.arange(n, dtype=torch.int32, device="cuda") for n in (batch, batch + 1))
    positions, slots, lengths = (torch.zeros(batch, dtype=torch.int32, device="cuda") for _ in range(3))
    x = torch.randn(batch, hidden, device="cuda").to(BF16)

    def step(memory: torch.Tensor, fused: bool) -> torch.Tensor:
        y = ops.rms_norm(x, ones, 1e-6)
        for k, v in memory:
            rope = (product(y), num_heads, kv_heads, cos_sin, positions, weight, weight, 1e-6, k, v, slots)
            place = (table, rows, start, lengths, 0.09, 0, 1, 640)
            out = ops.rope_paged_attention(*rope, *place) if fused else ops.paged_attention(ops.rope_qkv_cache(*rope), k, v, *place)
            y = ops.rms_norm(output(out.flatten(1)), ones, 1e-6)
        return y

    def begin(n: int) -> None:
        at = first + n
        positions.copy_(at)
        slots.copy_(table.gather(1, (at // 64).unsqueeze(1)).squeeze(1) * 64 + at % 64)
        lengths.copy_(at + 1)
        torch.cuda.synchronize()

    begin(0)
    step(caches, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(caches, True)
    for n in range(20):
        begin(n)
        graph.replay()
        torch.cuda.synchronize()
        want = step(mirror, False)
        same(result, want, f"B={batch}, step {n}")
        same(caches.nan_to_num(9.0), mirror.nan_to_num(9.0), f"K and V, B={batch}, step {n}")
        x.copy_(result)
