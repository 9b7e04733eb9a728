"""Decode attention as the engine uses it: whole and split sequences, mixed batches, windows, graphs, the chain with rope_qkv_cache."""

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
