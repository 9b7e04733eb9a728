"""Sampling on a GPU at a real vocabulary's size: inside graphs, and against probabilities computed in fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import same, triton_ops
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VOCAB = 151_936


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("entries", [1, 5, 40])
def test_a_graph_follows_its_inputs(entries: int, filtered: bool) -> None:
    """Logits, rows, positions and every row's settings may change between replays; each replay equals the eager draw, and leaves its counters
    ready for launches of other shapes in between."""
    torch.manual_seed(0)
    ops = triton_ops()
    logits = torch.empty(entries, VOCAB, dtype=torch.bfloat16, device="cuda")
    rows, positions = (torch.zeros(entries, dtype=torch.int32, device="cuda") for _ in range(2))
    tokens = torch.zeros(64, 50, dtype=torch.int32, device="cuda")
    temperature, top_p, min_p = (torch.ones(64, device="cuda") for _ in range(3))
    top_k, seeds = torch.zeros(64, dtype=torch.int32, device="cuda"), torch.zeros(64, dtype=torch.int64, device="cuda")
    args = (logits, rows, positions, tokens, temperature, top_k, top_p, min_p, seeds, filtered)

    def change() -> None:
        logits.normal_(std=4)
        rows.copy_(torch.randperm(64)[:entries])
        positions.random_(0, 50)
        for column, values in ((temperature, [0.0, 0.6, 1.0, 3.0]), (top_k, [0, 1, 50, 3000]), (top_p, [1.0, 0.9, 0.3]), (min_p, [0.0, 0.1])):
            column.copy_(torch.tensor(values)[torch.randint(len(values), (64,))])
        seeds.random_()

    change()
    ops.sample_rows(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sample_rows(*args)
    for _ in range(4):
        change()
        tokens.fill_(-1)
        graph.replay()
        replayed, written = out.clone(), tokens.clone()
        ops.sample_rows(logits[:1, :999], rows[:1], *args[2:])
        tokens.fill_(-1)
        same(replayed, ops.sample_rows(*args), "graph equals eager")
        same(written, tokens, "tokens in the rows")


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.02), (200, 0.9, 0.001), (3000, 0.97, 0.0)]
)
@pytest.mark.parametrize("peaks", [60, 4000])
def test_draws_follow_the_filtered_distribution(peaks: int, top_k: int, top_p: float, min_p: float) -> None:
    torch.manual_seed(1)
    draws = 20_000
    row = torch.randn(VOCAB, device="cuda") * 2
    row[torch.randperm(VOCAB, device="cuda")[:peaks]] += torch.linspace(19, 12, peaks, device="cuda")
    row = row.bfloat16()
    expected = _filtered(row, top_k, top_p, min_p) * draws
    one, each = torch.ones(draws, device="cuda"), torch.arange(draws, device="cuda")
    tokens = torch.zeros(draws, 1, dtype=torch.int32, device="cuda")
    settings = one, (one * top_k).int(), one * top_p, one * min_p, each * 7919
    counts = torch.zeros(VOCAB, dtype=torch.float64, device="cuda")
    for part in each.int().split(500):
        logits = row.expand(len(part), -1)
        chosen = triton_ops().sample_rows(logits, part, torch.zeros_like(part), tokens, *settings, True)
        counts += torch.bincount(chosen.long(), minlength=VOCAB)
    assert counts[expected == 0].sum() <= 2, "tokens drawn that the filters drop"  # the last token of a nucleus may differ by rounding
    often = expected >= 10
    got = torch.cat([counts[often], counts[~often].sum().view(1)])
    want = torch.cat([expected[often], expected[~often].sum().view(1) + 1e-9])
    cells = int((want > 1).sum())
    chi = float((((got - want) ** 2 / want)[want > 1]).sum())
    assert chi < cells + 4 * (2 * cells) ** 0.5 + 10, f"chi-square {chi:.0f} with {cells} cells"


def _filtered(row: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The probabilities that the filters leave, in fp64."""
    ordered, order = row.double().sort(descending=True, stable=True)
    probs = ordered.softmax(0)
    if top_k:
        probs[top_k:] = 0
    probs = probs / probs.sum()
    probs[(probs.cumsum(0) - probs >= top_p) | (probs < min_p * probs[0])] = 0
    return torch.empty_like(probs).scatter_(0, order, probs / probs.sum())
