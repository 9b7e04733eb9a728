"""Linear layers of few tokens: against fp64, the gated epilogue against silu_mul, the order of sums, and chains of launches that overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


@pytest.mark.parametrize("shape", [(1024, 2048), (1040, 1096), (4096, 520)], ids=str)
def test_a_norm_between_two_products(shape: tuple[int, int]) -> None:
    """Folded into them, against fp64 and, for the sum, against the kernels of its own to the bit; from one product to a plain and a gated one."""
    hidden = shape[0]
    for bias in (False, True):
        x, weight, b = case(*shape)
        b = b if bias else None
        norm = torch.rand(hidden, device="cuda", dtype=torch.bfloat16) + 0.5
        after = torch.randn(2048, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5
        into = linear.pack_into_norm(weight, b, norm, 1e-5, after)
        plain, gated, product = linear.pack_linear(after, None), linear.pack_gated(after, None), linear.pack_linear(weight, b)
        assert into is not None
        for tokens in (*TOKENS, 130, 200, 300):
            poison("cuda", (tokens, hidden))
            start = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) * 3
            residual = start.clone()
            normed, total = into(x[:tokens], residual)
            assert total is residual and isinstance(normed, Tensor) == (tokens == 1 or tokens > linear_hopper.MORE_TOKENS)
            if tokens <= linear.MANY_TOKENS:
                same(total, (product(x[:tokens]).float() + start.float()).bfloat16(), f"T={tokens} sum")
            close(total, product(x[:tokens]).double() + start.double(), f"T={tokens} sum", torch.bfloat16)
            exact = total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-5) * norm.double()
            close(plain(normed), exact @ after.double().T, f"T={tokens} product", torch.bfloat16, bf16=1e-2)
            close(gated(normed), ref.silu_mul(exact @ after.double().T), f"T={tokens} gated", torch.bfloat16, bf16=1.5e-2)
    for w, behind in ((weight, None), (weight, after.float()), (weight.half(), after)):  # there is no half-done norm for these
        into = linear.pack_into_norm(w, None, norm.to(w.dtype), 1e-5, behind)
        assert into is not None and isinstance(into(x[:5].to(w.dtype), torch.zeros(5, hidden, device="cuda", dtype=w.dtype))[0], Tensor)
    assert linear.pack_into_norm(weight.float(), None, norm, 1e-5, after) is None


CHAINS = [(1024, 2048, 3072, 4096), (2560, 4096, 9728, 6144), (1040, 520, 2096, 1096)]  # hidden, heads, inner, qkv: of models, and ragged


@pytest.mark.parametrize("shape", CHAINS, ids=str)
def test_a_chain_of_products(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From one attention to the next in one launch: the bits of separate launches that fold the norms, and near fp64; whatever programs do first."""
    from miniinfer.kernels.triton import chain_hopper

    hidden, heads, inner, size = shape
    monkeypatch.setattr(linear_hopper, "SMALL", 1 << 40)
    monkeypatch.setattr(chain_hopper, "LEAST", 0)
    torch.manual_seed(hidden)

    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5

    o, gate_up, down, qkv = weight(hidden, heads), weight(2 * inner, hidden), weight(hidden, inner), weight(size, hidden)
    bias = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    norms = [torch.rand(hidden, device="cuda", dtype=torch.bfloat16) + 0.5 for _ in range(2)]
    chain = linear.pack_chain(o, gate_up, down, qkv, bias, *norms, 1e-5)
    into_mid, into_next = linear.pack_into_norm(o, None, norms[0], 1e-5, gate_up), linear.pack_into_norm(down, None, norms[1], 1e-5, qkv)
    gated, plain = linear_hopper.pack(gate_up, None, gated=True), linear_hopper.pack(qkv, bias)
    assert chain is not None and into_mid is not None and into_next is not None
    x, start = torch.randn(17, heads, device="cuda", dtype=torch.bfloat16), torch.randn(17, hidden, device="cuda", dtype=torch.bfloat16) * 3
    assert chain(x[:1], start[:1]) is None and chain(x, start) is None
    for tokens in (2, 3, 7, 8, 9, 16):
        residual, expected = start[:tokens].clone(), start[:tokens].clone()
        normed, expected = into_mid(x[:tokens], expected)
        normed, expected = into_next(gated(normed), expected)
        want = plain(normed)
        for turn in range(20):
            poison("cuda", (tokens, size), (tokens, inner), (tokens, hidden))
            residual.copy_(start[:tokens])
            ready, total = chain(x[:tokens], residual)
            assert total is residual
            same(total, expected, f"T={tokens} turn {turn} sum")
            same(ready.values, want, f"T={tokens} turn {turn} product")
        exact = start[:tokens].double() + x[:tokens].double() @ o.double().T
        exact = exact + ref.silu_mul(ref.rms_norm(exact, norms[0].double(), 1e-5) @ gate_up.double().T) @ down.double().T
        close(residual, exact, f"T={tokens} sum", torch.bfloat16, bf16=1e-2)
        close(ready.values, ref.rms_norm(exact, norms[1].double(), 1e-5) @ qkv.double().T + bias.double(), f"T={tokens}", torch.bfloat16, bf16=2e-2)


def test_chains_on_two_streams() -> None:
    """Launches whose programs wait for each other, of two engines at a time: neither may get half of the GPU and keep it."""
    from miniinfer.kernels.triton import chain_hopper

    hidden = 2048
    o, gate_up, down, qkv = (torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for n, k in
                             ((hidden, hidden), (4 * hidden, hidden), (hidden, 2 * hidden), (2 * hidden, hidden)))  # fmt: skip
    norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    chains = [chain_hopper.pack(o, gate_up, down, qkv, None, norm, norm, 1e-5) for _ in range(2)]
    x = torch.randn(16, hidden, device="cuda", dtype=torch.bfloat16)
    residuals, streams, outs = [torch.zeros_like(x) for _ in chains], [torch.cuda.Stream() for _ in chains], [[], []]
    want = chains[0](x, torch.zeros_like(x))
    torch.cuda.synchronize()
    for _ in range(300):
        for chain, stream, residual, out in zip(chains, streams, residuals, outs, strict=True):
            with torch.cuda.stream(stream):
                residual.zero_()
                out[:] = [chain(x, residual)]
    torch.cuda.synchronize()
    for (out,) in outs:
        same(out, want, "two streams")


@pytest.mark.parametrize("folded", [False, True], ids=["norms", "folded"])
@pytest.mark.parametrize("tokens", [1, 5, 24, 32, 64, 96, 128])
def test_launches_that_overlap_wait_for_each_other(tokens: int, folded: bool) -> None:
    """Layers in a graph, where a kernel starts before the one ahead of it ends, against the same with a halt after every kernel."""
    from miniinfer.kernels import triton as ops

    hidden, inner, layers = (1024, 3072, 6) if folded else (2048, 8192, 6)
    torch.manual_seed(tokens)

    def weight(n: int, k: int) -> Tensor:
        return torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5

    norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)

    def into(matrix: Tensor, after: Tensor) -> Callable[[Tensor, Tensor], Any]:
        product = linear.pack_linear(matrix, None)
        return linear.pack_into_norm(matrix, None, norm, 1e-6, after) if folded else lambda x, r: ops.add_rms_norm(product(x), r, norm, 1e-6)

    weights = [(weight(hidden, hidden), weight(hidden, hidden), weight(2 * inner, hidden), weight(hidden, inner)) for _ in range(layers)]
    blocks = []
    for (mix, o, gate_up, down), (after, *_) in zip(weights, [*weights[1:], weights[0]], strict=True):
        blocks.append((linear.pack_linear(mix, None), into(o, gate_up), linear.pack_gated(gate_up, None), into(down, after)))
    last = linear.pack_linear(weights[0][0], None)

    def step(x: Tensor, halt: Callable[[], None]) -> Tensor:
        residual = x.clone()
        for mix, attention, gate_up, down in blocks:
            x = mix(x)
            halt()
            x, residual = attention(x, residual)
            halt()
            x = gate_up(x)
            halt()
            x, residual = down(x, residual)
            halt()
        return torch.cat([last(x), residual])

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
