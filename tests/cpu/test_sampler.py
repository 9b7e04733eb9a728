"""Sampling: the right distribution, the right support, and nothing but (logits, seed, position) deciding."""

from __future__ import annotations

import pytest
import torch

from miniinfer.engine.sampler import logprobs
from miniinfer.kernels.cpu import sample as cpu_sample
from miniinfer.kernels.reference import apply_penalties, sample, sample_rows, uniform

MANY = 20000


def draw(logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seeds=None, positions=None):
    """One draw per row of logits, the same settings for all."""
    n = len(logits)
    seeds = torch.arange(n, dtype=torch.int64) if seeds is None else seeds
    positions = torch.full((n,), 3, dtype=torch.int32) if positions is None else positions
    settings = torch.full((n,), temperature), torch.full((n,), top_k, dtype=torch.int32), torch.full((n,), top_p), torch.full((n,), min_p)
    return sample(logits, *settings, seeds, positions, top_k > 0 or top_p < 1 or min_p > 0)


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values).expand(MANY, -1)


def test_uniform_numbers_are_uniform_and_independent():
    u = uniform(torch.arange(64), torch.arange(64, dtype=torch.int32), 4096)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):  # along the vocabulary, and between neighbouring seeds
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    for other in (uniform(torch.arange(64) + (1 << 32), torch.arange(64, dtype=torch.int32), 4096), uniform(torch.arange(64), torch.ones(64), 4096)):
        assert (other == u).float().mean() < 0.05  # the seed's high word and the position count too


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_tempered_softmax(temperature: float):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    counts = torch.bincount(draw(logits.expand(MANY, -1), temperature=temperature).long(), minlength=5)
    expected = (logits / temperature).softmax(-1) * MANY
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_greedy_takes_the_largest_and_the_lower_id_of_equals():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [9.0, 1.0, 9.0, 9.0]])
    assert draw(logits, temperature=0.0).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),  # the first token alone has 0.64
        ({"top_p": 0.7}, {0, 1}),
        ({"min_p": 0.2}, {0, 1}),
        ({"top_k": 3, "top_p": 0.95}, {0, 1, 2}),  # of the three that top-k left: 0.67, 0.24, 0.09
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 1, "temperature": 100.0}, {0}),
    ],
)
def test_filters_keep_exactly_their_set(settings: dict[str, float], allowed: set[int]):
    assert set(draw(row(3.0, 2.0, 1.0, 0.0, -1.0), **settings).tolist()) == allowed  # type: ignore[arg-type]


def test_a_filter_renormalises_what_it_leaves():
    counts = torch.bincount(draw(row(3.0, 2.0, 1.0, 0.0), top_k=2).long(), minlength=4) / MANY
    assert abs(counts[0] - 1 / (1 + 2.718281828**-1)) < 0.01


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.arange(16) * 77 - 500, torch.arange(16, dtype=torch.int32)
    together = draw(logits, top_p=0.9, seeds=seeds, positions=positions)
    for i in range(16):
        assert draw(logits[i : i + 1], top_p=0.9, seeds=seeds[i : i + 1], positions=positions[i : i + 1]) == together[i]
    assert not torch.equal(draw(logits, seeds=seeds, positions=positions), draw(logits, seeds=seeds + 1, positions=positions))
    assert not torch.equal(draw(logits, seeds=seeds, positions=positions), draw(logits, seeds=seeds, positions=positions + 1))


def test_rows_are_read_and_written_in_place():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, positions = torch.tensor([4, 0, 2], dtype=torch.int32), torch.tensor([7, 1, 0], dtype=torch.int32)
    temperature, top_k = torch.tensor([0.0, 9.0, 0.5, 9.0, 2.0]), torch.tensor([0, 0, 3, 0, 0], dtype=torch.int32)
    top_p, min_p, seeds = torch.ones(5), torch.zeros(5), torch.arange(5) * 100
    tokens = torch.full((5, 8), -1, dtype=torch.int32)
    out = sample_rows(logits, rows, positions, tokens, temperature, top_k, top_p, min_p, seeds, True)
    at = rows.long()
    assert torch.equal(out, sample(logits.float(), temperature[at], top_k[at], top_p[at], min_p[at], seeds[at], positions, True))
    assert out[1] == logits[1].argmax() and torch.equal(tokens[at, positions.long()], out) and (tokens >= 0).sum() == 3


def test_what_is_no_number_is_never_drawn():
    logits = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = float("nan")
    for settings in ({}, {"top_k": 15}, {"top_p": 0.99}, {"temperature": 0.0}):
        assert (draw(logits, **settings) % 2 == 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("draw_rows", [sample, cpu_sample], ids=["reference", "cpu"])
def test_a_row_that_is_not_finite_is_told_and_no_other(value, draw_rows):
    """-1 comes back; the device row gets an id that the next step can look up."""
    count = 40  # greedy, plain and with filters, by turns
    logits = torch.randn(count, 50, generator=torch.Generator().manual_seed(1))
    if value > 0:
        logits[::5, 7] = value
    else:
        logits[::5] = value
    temperature = torch.tensor([0.0, 1.0, 9.0, 0.3]).repeat(count // 4)
    top_k, top_p = torch.tensor([0, 5]).repeat(count // 2).int(), torch.tensor([1.0, 0.8, 1.0, 1.0]).repeat(count // 4)
    rows, tokens = torch.arange(count).int(), torch.full((count, 4), 99, dtype=torch.int32)
    arguments = rows, rows % 4, tokens, temperature, top_k, top_p, torch.zeros(count), torch.arange(count)
    for filtered in (False, True):
        out = sample_rows(logits, *arguments, filtered, draw=draw_rows)
        assert [i for i, token in enumerate(out.tolist()) if token < 0] == list(range(0, count, 5))
        written = tokens[rows.long(), (rows % 4).long()]
        assert ((written >= 0) & (written < 50)).all() and torch.equal(written[out >= 0], out[out >= 0])


def test_penalties_count_what_they_should():
    tokens = torch.tensor([[1, 2, 2, 3, 3, 3, 9, 9], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)  # beyond the length: stale
    logits = torch.tensor([[1.0, 1.0, -1.0, 2.0, 0.5]])
    rows, prompt, length = torch.zeros(1, dtype=torch.int32), torch.tensor([3]), torch.tensor([6])
    out = apply_penalties(logits, tokens, rows, prompt, length, torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.1]), 8)
    # 1: prompt only, halved; 2: prompt only, negative, doubled; 3: halved, three times in the output; 0 and 4: unseen
    assert torch.allclose(out, torch.tensor([[1.0, 0.5, -2.0, 1.0 - 0.3 - 0.5, 0.5]]))


def test_logprobs_and_ranks():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    ids, values, ranks = logprobs(logits, torch.tensor([2]), 2)
    assert ids.tolist() == [[2, 1, 3]] and ranks.tolist() == [[3, 1, 2]]
    assert torch.allclose(values, logits.log_softmax(-1)[0, [2, 1, 3]])
    assert [t.shape[1] for t in logprobs(logits, torch.tensor([2]), 0)] == [1, 1, 1]
    narrow = torch.randn(2, 9).bfloat16()
    for ours, widened in zip(logprobs(narrow, torch.tensor([2, 0]), 3), logprobs(narrow.float(), torch.tensor([2, 0]), 3), strict=True):
        assert torch.equal(ours, widened)
