"""Products of many tokens on Hopper: against fp64, the gated epilogue against silu_mul, and every token's result whatever its neighbours."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import close, same

from miniinfer.kernels import REFERENCE as ref

matmul = pytest.importorskip("miniinfer.kernels.triton.matmul_hopper", reason="needs Triton with Gluon")
hopper = torch.cuda.is_available() and matmul.multiprocessors(torch.device("cuda:0")) > 0
pytestmark = pytest.mark.skipif(not hopper, reason="needs a Hopper GPU")

SHAPES = [  # tokens, inputs, outputs: a tile, ragged sides, few and many tiles, a tail of inputs
    (1, 64, 16), (64, 1024, 256), (129, 1000, 1040), (300, 4096, 640), (777, 128, 6144), (1000, 3072, 1024), (4097, 512, 8208),
]  # fmt: skip


def case(tokens: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(tokens, k, device="cuda").to(dtype), (torch.randn(n, k, device="cuda") * k**-0.5).to(dtype)


def poison(tokens: int, n: int, dtype: torch.dtype) -> None:
    """Leaves NaNs where the allocator will place a result of this size."""
    torch.full((tokens, n), float("nan"), dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = case(*shape, dtype)
    bias = torch.randn(shape[2], device="cuda").to(dtype)
    assert matmul.takes(weight)
    for b in (None, bias):
        poison(shape[0], shape[2], dtype)
        want = x.double() @ weight.double().T + (0 if b is None else b.double())
        close(matmul.pack(weight, b)(x), want, "product", dtype, bf16=2.5e-3)  # what rounding to bf16 alone costs: 1.7e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_product_rounds_like_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = case(*shape, dtype)
    assert matmul.takes(weight, gated=True)
    poison(shape[0], shape[2] // 2, dtype)
    out = matmul.pack(weight, None, gated=True)(x)
    close(out, ref.silu_mul(matmul.pack(weight, None)(x)), "gated", dtype, bf16=1e-4)  # the same but for the last bit of an exponential


@pytest.mark.parametrize("gated", [False, True])
def test_a_tokens_result_depends_on_itself_alone(gated: bool) -> None:
    """Bit by bit, over all tile shapes, and with rows of a wider matrix as inputs."""
    x, weight = case(3000, 1536, 1280, torch.bfloat16)
    product = matmul.pack(weight, None, gated)
    whole = product(x)
    used = set()
    for first, count in ((0, 1), (7, 64), (100, 200), (64, 700), (0, 2048), (500, 2500)):
        used.add(matmul.plan(count, len(whole[0]), gated, matmul.multiprocessors(x.device)).tile)
        same(product(x[first : first + count]), whole[first : first + count], f"tokens {first} to {first + count}")
    assert len(used) > 1
    wide = torch.randn(3000, 2048, dtype=x.dtype, device="cuda")
    for first in (64, 63):
        wide[:, first : first + 1536] = x
        same(product(wide[:, first : first + 1536]), whole, "rows of a wider matrix")


def test_swapped_operands_give_the_same_bits() -> None:
    """What lets a kernel with the weights as the product's rows serve few tokens in --deterministic."""
    x, weight = case(256, 4096, 1024, torch.bfloat16)
    same(matmul.pack(x, None)(weight).T, matmul.pack(weight, None)(x), "swapped")


def test_graph_follows_its_inputs() -> None:
    x, weight = case(500, 512, 768, torch.bfloat16)
    product = matmul.pack(weight, None)
    product(x)
    static, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(static)
    static.copy_(x.flip(0))
    graph.replay()
    same(out, product(x).flip(0), "replay")


def test_weights_it_leaves_to_others() -> None:
    def weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(n, k, dtype=dtype, device="cuda")

    assert not matmul.takes(weight(64, 64, torch.float32)) and not matmul.takes(weight(64, 68)) and not matmul.takes(weight(4, 64))
    assert not matmul.takes(weight(72, 64), gated=True) and not matmul.takes(weight(64, 128)[:, :64])
    assert not matmul.takes(torch.empty(64, 64, dtype=torch.bfloat16))
