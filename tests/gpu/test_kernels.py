"""Every Triton kernel against the reference on the GPU, and all of them inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import CHECKS, close, paged_case, same, sampling_case, triton_ops

from miniinfer.kernels import REFERENCE as ref

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(name: str, dtype: torch.dtype) -> None:
    CHECKS[name]("cuda", dtype, True)


@pytest.mark.parametrize("name", ["norms", "silu_mul", "linear", "pack_linear", "rope", "decode", "prefill", "moe"])
def test_kernel_float16(name: str) -> None:
    CHECKS[name]("cuda", torch.float16, False)


def test_no_kernel_waits_for_the_device() -> None:
    """Every op of a decode step goes into one graph, whose replay follows the contents of its inputs."""
    ops, device = triton_ops(), "cuda"
    batch, heads, kv_heads, dim, size, experts, inner = 6, 8, 2, 64, 16, 8, 96
    hidden = heads * dim
    tokens = torch.randint(0, 500, (9, 600), dtype=torch.int32, device=device)
    rows = torch.tensor([3, 1, 0, 8, 5, 2], dtype=torch.int32, device=device)
    starts = torch.tensor([100, 0, 599, 17, 300, 64], dtype=torch.int32, device=device)
    query_start = torch.arange(batch + 1, dtype=torch.int32, device=device)
    table = (torch.randperm(9 * 38, device=device).view(9, 38) + 1).int()
    caches = [torch.randn(9 * 38 + 1, kv_heads, size, dim, device=device) for _ in range(2)]
    cos_sin, weight = torch.randn(600, dim, device=device), torch.randn(hidden, device=device)
    qkv = torch.randn(1000, (heads + 2 * kv_heads) * dim, device=device)
    router, w13, w2 = (torch.randn(*s, device=device) * 0.05 for s in ((hidden, experts), (experts, 2 * inner, hidden), (experts, hidden, inner)))
    _, temperature, top_k, top_p, min_p, seeds, _ = sampling_case(device, batch, hidden, True)
    drawn = torch.zeros(batch, 600, dtype=torch.int32, device=device)
    buffers = [torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(4)]

    def step(table_of_ops) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, positions, lengths, slots = buffers
        table_of_ops.step_inputs(tokens, rows, starts, query_start, batch, [table], size, ids, positions, lengths, [slots])
        q = table_of_ops.rope_qkv_cache(qkv[ids.long()], heads, kv_heads, cos_sin, positions, None, None, 1e-6, *caches, slots)
        x = table_of_ops.paged_attention(q, *caches, table, rows, query_start, lengths, 0.125, 0, 1, 600).flatten(1)
        x, residual = table_of_ops.add_rms_norm(x, qkv[ids.long(), :hidden].contiguous(), weight, 1e-6)
        x = table_of_ops.moe(x, x @ router, w13, w2, 2, True) + residual
        logits = table_of_ops.apply_penalties(x, tokens, rows, starts, lengths, temperature + 1, temperature, temperature, 600)
        places = torch.arange(batch, dtype=torch.int32, device=device), positions, drawn
        plain = table_of_ops.sample_rows(logits, *places, temperature, top_k, top_p, min_p, seeds, False)
        return logits, plain, table_of_ops.sample_rows(logits, *places, temperature, top_k, top_p, min_p, seeds, True)

    step(ops)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(ops)
    for round in range(3):
        tokens.random_(0, 500)
        starts.copy_(torch.randint(0, 599, (batch,), dtype=torch.int32))
        query_start[-2:] = batch if round < 2 else batch - 1  # the last round is padded
        query_start[-2] = batch - 1
        graph.replay()
        mine = [x.clone() for x in outputs]
        want = step(ref)
        live = int(query_start[-1])
        close(mine[0][:live], want[0][:live], f"round {round}", torch.float32, fp32=1e-4)
        again = step(ops)
        for replayed, eager in zip(mine, again, strict=True):
            same(replayed[:live], eager[:live], f"graph equals eager, round {round}")


def test_graph_of_a_longer_limit_serves_short_sequences() -> None:
    """max_length in a capture is the model's limit; the splits that it allows must not change a short sequence's result."""
    args, _ = paged_case("cuda", torch.bfloat16, [1, 1], [300, 40], 16, 8, 128, 64, 0)
    short = triton_ops().paged_attention(*args)
    same(triton_ops().paged_attention(*args[:-1], 40_960), short, "max_length is only a bound")
