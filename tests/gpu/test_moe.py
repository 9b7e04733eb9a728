"""The mixture of experts on the GPU: against fp64, whatever the routing; the same bits alone, in company, and in a graph."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close, poison, same, triton_ops

from miniinfer.kernels import reference

experts = pytest.importorskip("miniinfer.kernels.triton.experts")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# hidden, inner, experts, top k: Qwen3-30B-A3B, Mixtral narrowed, and shapes that no tile divides
SHAPES = [(2048, 768, 128, 8), (1024, 1792, 8, 2), (512, 352, 60, 6), (2056, 776, 20, 3)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def case(shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, routing: str) -> tuple[torch.Tensor, ...]:
    """Arguments of moe up to the weights. Logits are distinct: which of two equal ones comes first is tested elsewhere."""
    hidden, inner, count, _ = shape
    x = torch.randn(tokens, hidden, device="cuda").to(dtype)
    w13 = (torch.randn(count, 2 * inner, hidden, device="cuda") * hidden**-0.5).to(dtype)
    w2 = (torch.randn(count, hidden, inner, device="cuda") * inner**-0.5).to(dtype)
    logits = torch.stack([torch.randperm(count, device="cuda") for _ in range(tokens)]) / 16
    if routing == "alike":  # every token takes the same experts
        logits = logits[:1].expand(tokens, -1)
    elif routing == "skewed":
        logits = (logits * 16 + torch.arange(count, device="cuda").flip(0) * 4).argsort(1).argsort(1) / 16
    return x, logits.contiguous().to(dtype), w13, w2


def run(args: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    poison("cuda", (len(args[0]) * top_k * args[0].shape[1] // 2,), (len(args[0]), args[0].shape[1]))
    return triton_ops().moe(*args, top_k, True)


@pytest.mark.parametrize("routing", ["uniform", "skewed", "alike"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_fp64(dtype: torch.dtype, shape: tuple[int, int, int, int], routing: str) -> None:
    for tokens in (1, 2, 7, 33, 130, 700) + (3000,) * (routing == "uniform"):
        args = case(shape, tokens, dtype, routing)
        out = run(args, shape[3])
        want = reference.moe(*(a.double() for a in args), shape[3], True)
        close(out, want, f"T={tokens}", dtype, bf16=6e-3)
        worst = float(((out.double() - want).norm(dim=1) / want.norm(dim=1)).max())  # a token lost among thousands must show
        assert worst < 2e-2, f"T={tokens}: a token is off by {worst:.1e}"
        same(run(args, shape[3]), out, f"T={tokens}: again")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_does_not_depend_on_the_others(shape: tuple[int, int, int, int]) -> None:
    """Across every choice of tiles, in any company, in any order; with few=0 alone, too."""
    x, logits, w13, w2 = case(shape, 3000, torch.bfloat16, "uniform")
    whole = run((x, logits, w13, w2), shape[3])
    for some in (slice(0, 3), slice(5, 38), slice(100, 229), slice(1000, 1700), torch.randperm(3000, device="cuda")[:2500]):
        same(run((x[some], logits[some], w13, w2), shape[3]), whole[some], f"tokens {some}")
    for some in (slice(7, 8), slice(0, 2), slice(30, 46)):
        same(experts.moe(x[some], logits[some], w13, w2, shape[3], True, few=0), whole[some], f"tokens {some}, few=0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_behind_changes_no_bit(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Taken with the sum of a token's parts, against the kernels of its own."""
    norm = torch.rand(shape[0], device="cuda").to(dtype) + 0.5
    for tokens in (1, 2, 3, 32, 200, 1000):
        args = case(shape, tokens, dtype, "uniform")
        start = torch.randn(tokens, shape[0], device="cuda").to(dtype) * 3
        for few in (0, experts.FEW):
            want, total = triton_ops().add_rms_norm(experts.moe(*args, shape[3], True, few=few), start.clone(), norm, 1e-5)
            residual = start.clone()
            poison("cuda", (tokens * shape[3] * shape[0],), (tokens, shape[0]))
            normed, summed = experts.moe_into_norm(*args, shape[3], True, residual, norm, 1e-5, few=few)
            assert summed is residual
            same(summed, total, f"T={tokens} few={few}: sum")
            same(normed, want, f"T={tokens} few={few}: normed")


@pytest.mark.parametrize("tokens", [1, 8, 200, 2048])
def test_a_graph_follows_its_inputs(tokens: int) -> None:
    shape = SHAPES[0]
    args = case(shape, tokens, torch.bfloat16, "uniform")
    run(args, shape[3])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_ops().moe(*args, shape[3], True)
    for routing in ("skewed", "alike", "uniform"):
        x, logits, _, _ = case(shape, tokens, torch.bfloat16, routing)
        args[0].copy_(x)
        args[1].copy_(logits)
        graph.replay()
        same(out, run(args, shape[3]), f"{routing}: graph equals eager")


def test_logits_that_are_not_finite() -> None:
    """NaN may spoil its own token only; an expert at -inf has no weight."""
    for tokens in (1, 3, 90):
        x, logits, w13, w2 = case(SHAPES[0], tokens, torch.bfloat16, "uniform")
        logits[-1, 5:] = float("-inf")
        want = run((x, logits, w13, w2), 8)
        close(want, reference.moe(x.double(), logits.double(), w13.double(), w2.double(), 8, True), f"T={tokens}", torch.bfloat16)
        logits[0] = float("nan")
        same(run((x, logits, w13, w2), 8)[1:], want[1:], f"T={tokens}")
