"""The CPU kernels against their reference, over odd sizes and poisoned caches, as built for this machine and for lesser ones."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miniinfer.kernels import cpu, onednn, reference, select
from miniinfer.kernels.cpu import build

try:
    cpu.load()
except RuntimeError as e:
    pytest.skip(f"CPU kernels cannot be built here: {e}", allow_module_level=True)

QUICK = ("-O1",)
BUILDS = {"native": (), "emulated_bf16_dot": (*QUICK, "-DMINIINFER_EMULATE_BF16_DOT")}
if platform.machine() == "x86_64":
    BUILDS |= {"avx2": (*QUICK, "-march=x86-64-v3"), "sse2": (*QUICK, "-march=x86-64")}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(params=BUILDS)
def every_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test on each variant of the kernels: vector widths, and the pair layout of processors with a bf16 dot product."""
    if BUILDS[request.param]:
        library = cpu.typed(build.library(BUILDS[request.param]))
        monkeypatch.setattr(cpu, "_library", lambda: library)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ linear


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 8, 12, 13, 25, 40, 300])
def test_linear(every_build: None, tokens: int) -> None:
    for n, k in [(1, 1), (7, 33), (64, 64), (100, 1000), (129, 130), (257, 515)]:
        weight, x, bias = (torch.randn(shape).bfloat16() for shape in ((n, k), (tokens, k), (n,)))
        for b in (None, bias):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            actual = cpu.pack_linear(weight, b)(x)
            assert actual.dtype == torch.bfloat16
            error = (actual.double() - expected).abs() / (expected.abs() + k**0.5)
            assert error.max() < 2**-8, (n, k)  # one rounding to bf16


def test_linear_keeps_what_it_needs_and_reads_no_more() -> None:
    weight = torch.full((70, 200), float("nan")).bfloat16()
    view = weight[3:40]
    view[:] = torch.randn(37, 200).bfloat16()
    expected = F.linear(torch.ones(2, 200), view.float())
    packed = cpu.pack_linear(view, None)
    weight.fill_(float("nan"))  # a packed weight is a copy
    close(packed(torch.ones(2, 200).bfloat16()), expected, 2e-2)


def test_linear_shapes_strides_and_other_dtypes() -> None:
    weight = torch.randn(48, 32)
    packed = cpu.pack_linear(weight.bfloat16(), None)
    x = torch.randn(32, 10).bfloat16().t()  # not contiguous
    close(packed(x), F.linear(x, weight.bfloat16()), 2e-2)
    assert packed(torch.randn(2, 3, 32).bfloat16()).shape == (2, 3, 48)
    assert packed(torch.randn(0, 32).bfloat16()).shape == (0, 48)
    x32 = torch.randn(4, 32)
    assert torch.equal(cpu.pack_linear(weight, None)(x32), F.linear(x32, weight))
    with pytest.raises(TypeError, match="float32"):
        packed(x32)


# ------------------------------------------------------------------------------------------------- norms, activations


@DTYPES
@pytest.mark.parametrize(("tokens", "n"), [(1, 64), (5, 1024), (300, 33), (3, 7)])
def test_norms_and_silu(every_build: None, dtype: torch.dtype, tokens: int, n: int) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((tokens, n), (tokens, n), (n,)))
    close(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), TOLERANCE[dtype])
    for actual, expected in zip(cpu.add_rms_norm(x, residual, weight, 1e-6), reference.add_rms_norm(x, residual, weight, 1e-6), strict=True):
        close(actual, expected, TOLERANCE[dtype])
    gate_up = (torch.randn(tokens, 2 * n) * 30).to(dtype)  # far into both tails
    close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up), TOLERANCE[dtype])


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    half, weight = torch.randn(4, 16).half(), torch.randn(16).half()
    assert torch.equal(cpu.rms_norm(half, weight, 1e-6), reference.rms_norm(half, weight, 1e-6))
    strided = torch.randn(4, 64)[:, ::2]
    assert torch.equal(cpu.silu_mul(strided), reference.silu_mul(strided))


# --------------------------------------------------------------------------------------------------------- attention


def paged(counts: list[int], before: list[int], groups: int, size: int, dim: int, dtype: torch.dtype) -> SimpleNamespace:
    """Sequences of counts[b] new tokens after before[b] cached ones, in scattered pages; whatever they do not own is NaN. before -1: padding."""
    lengths = [0 if b < 0 else b + c for c, b in zip(counts, before, strict=True)]
    need = [-(-n // size) for n in lengths]
    width, pages = max(need) + 2, sum(need) + 3
    free = (torch.randperm(pages - 1) + 1).tolist()
    table = torch.zeros(len(counts) + 2, width, dtype=torch.int32)
    rows = torch.randperm(len(counts) + 2)[: len(counts)].int()
    k, v = (torch.full((pages, groups, size, dim), float("nan"), dtype=dtype) for _ in range(2))
    for row, n, length in zip(rows.tolist(), need, lengths, strict=True):
        for i in range(n):
            page = table[row, i] = free.pop()
            used = min(size, length - i * size)
            k[page, :, :used], v[page, :, :used] = torch.randn(groups, used, dim).to(dtype), torch.randn(groups, used, dim).to(dtype)
    start = torch.tensor([0, *counts]).cumsum(0).int()
    return SimpleNamespace(k=k, v=v, table=table, rows=rows, start=start, lengths=torch.tensor(lengths).int(), tokens=int(start[-1]))


def both_attentions(p: SimpleNamespace, q: Tensor, window: int) -> tuple[Tensor, Tensor]:
    arguments: tuple[Any, ...] = (p.table, p.rows, p.start, p.lengths, q.shape[-1] ** -0.5, window, 1 << 20, 1 << 20)
    actual = cpu.paged_attention(q, p.k, p.v, *arguments)
    return actual, reference.paged_attention(q, p.k.nan_to_num(), p.v.nan_to_num(), *arguments)


@DTYPES
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (7, 1)])
@pytest.mark.parametrize("window", [0, 37])
def test_paged_attention(every_build: None, dtype: torch.dtype, heads: int, groups: int, window: int) -> None:
    counts, before = [1, 5, 1, 40, 1, 1, 150], [0, 3, 300, 70, -1, 511, 0]  # decode, short and long prompts, padding
    for dim, size in [(16, 8), (64, 16), (80, 16), (128, 16)]:
        p = paged(counts, before, groups, size, dim, dtype)
        actual, expected = both_attentions(p, torch.randn(p.tokens, heads, dim).to(dtype), window)
        close(actual, expected, TOLERANCE[dtype])


def test_paged_attention_is_independent_of_neighbours() -> None:
    p = paged([1, 1, 30], [700, 20, 100], 2, 16, 64, torch.bfloat16)
    q = torch.randn(p.tokens, 4, 64).bfloat16()
    together, _ = both_attentions(p, q, 0)
    alone = SimpleNamespace(**{**vars(p), "rows": p.rows[:1], "start": p.start[:2], "lengths": p.lengths[:1]})
    assert torch.equal(both_attentions(alone, q[:1], 0)[0], together[:1])


def test_paged_attention_with_large_scores() -> None:
    p = paged([1, 40], [100, 60], 1, 16, 64, torch.float32)
    actual, expected = both_attentions(p, torch.randn(p.tokens, 2, 64) * 300, 0)  # softmax of scores in the hundreds
    close(actual, expected, 1e-3)


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
def test_rope_qkv_cache(every_build: None, dtype: torch.dtype, normed: bool) -> None:
    for tokens, heads, groups, dim, size in [(1, 4, 2, 16, 8), (7, 3, 1, 80, 16), (130, 8, 4, 128, 16)]:
        qkv, cos_sin = torch.randn(tokens, (heads + 2 * groups) * dim).to(dtype), torch.randn(600, dim)
        positions, slots = torch.randint(0, 600, (tokens,)).int(), torch.randperm(40 * size)[:tokens].int()
        weights = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)) if normed else (None, None)
        caches = [torch.full((40, groups, size, dim), 7.0, dtype=dtype) for _ in range(4)]
        arguments: tuple[Any, ...] = (qkv, heads, groups, cos_sin, positions, *weights, 1e-6)
        actual = cpu.rope_qkv_cache(*arguments, caches[0], caches[1], slots)
        expected = reference.rope_qkv_cache(*arguments, caches[2], caches[3], slots)
        for a, b in ((actual, expected), (caches[0], caches[2]), (caches[1], caches[3])):
            close(a, b, TOLERANCE[dtype])


# --------------------------------------------------------------------------------------------------- mixture of experts


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("renormalize", [False, True])
def test_moe(every_build: None, tokens: int, renormalize: bool) -> None:
    for experts, top_k, hidden, inner in [(4, 2, 64, 48), (8, 3, 100, 33), (16, 8, 128, 96)]:
        x, logits = torch.randn(tokens, hidden).bfloat16(), torch.randn(tokens, experts)
        w13, w2 = (torch.randn(experts, 2 * inner, hidden) * 0.1).bfloat16(), (torch.randn(experts, hidden, inner) * 0.1).bfloat16()
        expected = reference.moe(x.double(), logits, w13.double(), w2.double(), top_k, renormalize)
        close(cpu.moe(x, logits, w13, w2, top_k, renormalize), expected, 2e-2)


def test_moe_ties_go_to_the_lower_expert() -> None:
    x, w13, w2 = torch.randn(1, 64).bfloat16(), torch.randn(4, 64, 64).bfloat16(), torch.randn(4, 64, 32).bfloat16()
    tied, clear = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert torch.equal(cpu.moe(x, tied, w13, w2, 2, True), cpu.moe(x, clear, w13, w2, 2, True))


# -------------------------------------------------------------------------------------------------- sampling, inputs


@pytest.mark.parametrize("filtered", [False, True])
def test_sample(every_build: None, filtered: bool) -> None:
    """The very tokens of the reference: filters, temperatures, 64-bit seeds, sizes that no vector divides."""
    for vocab in (5, 1003, 5003):
        batch = 32
        logits = torch.randn(batch, vocab) * 3
        temperature, top_p, min_p = torch.rand(batch) * 1.5 + 0.1, torch.rand(batch) * 0.9 + 0.1, torch.rand(batch) * 0.2
        top_k = torch.randint(0, 60, (batch,)).int()
        temperature[::5], top_k[::3], top_p[::4], min_p[::2] = 0, 0, 1, 0
        seeds, positions = torch.randint(-(2**62), 2**62, (batch,)), torch.randint(0, 10000, (batch,)).int()
        arguments = (logits, temperature, top_k, top_p, min_p, seeds, positions, filtered)
        assert torch.equal(cpu.sample(*arguments), reference.sample(*arguments))


def test_sample_takes_banned_and_tied_tokens_as_the_reference_does() -> None:
    logits = torch.full((3, 100), float("-inf"))
    logits[:, 40:43] = 1.0
    temperature, ones, zeros = torch.tensor([0.0, 1.0, 1.0]), torch.ones(3), torch.zeros(3)
    arguments = (logits, temperature, torch.tensor([0, 2, 0]).int(), ones, zeros, torch.arange(3), torch.arange(3).int(), True)
    assert torch.equal(cpu.sample(*arguments), reference.sample(*arguments))
    assert cpu.sample(*arguments)[0] == 40


def test_apply_bitmask() -> None:
    logits, which = torch.randn(5, 131), torch.tensor([1, -1, 0, 1, -1]).int()
    masks = torch.randint(-(2**31), 2**31, (2, 5)).int()
    assert torch.equal(cpu.apply_bitmask(logits, masks, which), reference.apply_bitmask(logits, masks, which))
    assert torch.equal(cpu.apply_bitmask(logits, masks[:0], torch.full((5,), -1).int()), logits)


def test_step_inputs() -> None:
    rows, starts, counts, width = torch.tensor([2, 0, 3]).int(), torch.tensor([5, 0, 30]).int(), [1, 7, 1], 40
    start = torch.tensor([0, *counts]).cumsum(0).int()
    tokens = torch.randint(0, 99, (5, width)).int()
    tables = [torch.randint(0, 50, (5, 6)).int() for _ in range(2)]
    results = []
    for module in (cpu, reference):
        ids, positions, *slots = (torch.full((12,), -1, dtype=torch.int32) for _ in range(4))
        lengths = torch.full((3,), -1, dtype=torch.int32)
        module.step_inputs(tokens, rows, starts, start, 11, tables, 8, ids, positions, lengths, slots)
        results.append([ids, positions, lengths, *slots])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------------------------------------- build


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    cpu._library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
            select("cpu", "cpu")
        with caplog.at_level("WARNING", logger="miniinfer"):
            ops = select("auto", "cpu")
        assert ops.name == "torch" and ops.pack_linear is onednn.pack_linear and "install g++" in caplog.text
    finally:
        cpu._library.cache_clear()


def test_library_is_built_once_and_shares_the_openmp_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library(QUICK)
    (made,) = (tmp_path / "miniinfer").iterdir()
    stamp = made.stat().st_mtime_ns
    build.library(QUICK)
    assert made.stat().st_mtime_ns == stamp
    if platform.system() == "Linux":
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert len({line.split(maxsplit=5)[5] for line in maps if "libgomp" in line}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_compiler_linears_go_through_onednn(dtype: torch.dtype) -> None:
    weight, bias, x = (torch.randn(*shape).to(dtype) for shape in ((37, 50), (37,), (3, 50)))
    for b in (bias, None):
        torch.testing.assert_close(onednn.pack_linear(weight, b)(x), F.linear(x, weight, b), rtol=2e-2, atol=2e-2)
