"""Linear layers of few tokens: against fp64, the gated epilogue against silu_mul, the order of sums, and chains of launches that overlap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_checks import close, poison, same
from torch import Tensor

from miniinfer.kernels import REFERENCE as ref

linear_hopper = pytest.importorskip("miniinfer.kernels.triton.linear_hopper", reason="needs Triton with Gluon")
linear = pytest.importorskip("miniinfer.kernels.triton.linear")
hopper = torch.cuda.is_available() and linear_hopper.multiprocessors(torch.device("cuda:0")) > 0
pytestmark = pytest.mark.skipif(not hopper, reason="needs a Hopper GPU")

SHAPES = [(1024, 2048), (6144, 1024), (1040, 1096), (30_016, 520), (72, 4104), (8208, 64)]  # outputs, inputs: ragged sides, one tile, many waves
TOKENS = [1, 2, 7, 8, 9, 16, 31, 32, 50, 64, 65, 100, 128]


def case(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n)
    return tuple(t.to(dtype) for t in (torch.randn(300, k, device="cuda"), torch.randn(n, k, device="cuda") * k**-0.5, torch.randn(n, device="cuda")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = case(*shape, dtype)
    assert linear_hopper.takes(weight)
    for b in (None, bias):
        product, want = linear_hopper.pack(weight, b), x.double() @ weight.double().T + (0 if b is None else b.double())
        for tokens in TOKENS if dtype == torch.bfloat16 else (5, 65):
            poison("cuda", (tokens, shape[0]))
            close(product(x[:tokens]), want[:tokens], f"T={tokens}", dtype, bf16=2.5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_product_rounds_like_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = case(*shape, dtype)
    if not linear_hopper.takes(weight, gated=True):
        assert shape[0] % 16
        return
    for b in (None, bias):
        plain, gated = linear_hopper.pack(weight, b), linear_hopper.pack(weight, b, gated=True)
        for tokens in TOKENS if dtype == torch.bfloat16 else (5, 65):
            poison("cuda", (tokens, shape[0] // 2))
            close(gated(x[:tokens]), ref.silu_mul(plain(x[:tokens])), f"T={tokens}", dtype, bf16=1e-4)  # the last bit of an exponential


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 1024), (1000, 512), (128, 2048), (512, 100)], ids=str)
def test_packed_gated(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Whichever kernel takes it, for any number of tokens, with and without a bias, and after new values in the weight."""
    x, weight, bias = case(*shape, dtype)
    for b in (None, bias):
        gated = linear.pack_gated(weight, b)
        for tokens in (0, 1, 3, 100, 130, 300):
            want = ref.silu_mul(torch.nn.functional.linear(x[:tokens].float(), weight.float(), None if b is None else b.float()))
            close(gated(x[:tokens]), want, f"T={tokens}", dtype, bf16=1e-2)
        assert gated(x[None]).shape == (1, 300, shape[0] // 2)
    before = gated(x[:1])
    weight.neg_()
    assert (gated(x[:1]) != before).any()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_fixed_order(shape: tuple[int, int]) -> None:
    """A token's bits, whatever the number of tokens, its place among them, and the kernel that takes them."""
    x, weight, _ = case(*shape)
    for product in (linear.pack_linear_fixed(weight, None), linear.pack_gated_fixed(weight, None)):
        whole = product(x)
        for tokens in TOKENS + [129, 256]:
            same(product(x[:tokens]), whole[:tokens], f"T={tokens}")
            same(product(x[300 - tokens :]), whole[300 - tokens :], f"the last {tokens}")
    with pytest.raises(RuntimeError, match="do not depend on the batch"):
        linear.pack_linear_fixed(weight.float(), None)


@pytest.mark.parametrize("tokens", [1, 5, 32, 64, 128])
def test_launches_that_overlap_wait_for_each_other(tokens: int) -> None:
    """Layers in a graph, where a kernel starts before the one ahead of it ends, against the same with a halt after every kernel."""
    from miniinfer.kernels import triton as ops

    hidden, inner, layers = 2048, 8192, 6
    torch.manual_seed(tokens)

    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5

    norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    blocks = []
    for _ in range(layers):
        attention, down = (linear.pack_linear(weight(hidden, k), None) for k in (hidden, inner))
        blocks.append((attention, linear.pack_gated(weight(2 * inner, hidden), None), down))

    def step(x: Tensor, halt: Callable[[], None]) -> Tensor:
        residual = x.clone()
        for attention, gate_up, down in blocks:
            x, residual = ops.add_rms_norm(x, residual, norm, 1e-6)
            halt()
            x = attention(x)
            halt()
            x, residual = ops.add_rms_norm(x, residual, norm, 1e-6)
            halt()
            x = gate_up(x)
            halt()
            x = down(x)
            halt()
        return torch.cat([x, residual])

    inputs = torch.randn(4, tokens, hidden, device="cuda", dtype=torch.bfloat16)
    want = [step(x, torch.cuda.synchronize) for x in inputs]
    static, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [step(static, lambda: None) for _ in range(3)]
    for x, right in zip(inputs, want, strict=True):
        static.copy_(x)
        graph.replay()
        for out in outputs:
            same(out, right, "replay")
        same(step(x, lambda: None), right, "eager")
