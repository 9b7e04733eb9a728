"""Every op in plain torch: the specification, the oracle in tests, the fallback on any device, and the autograd path in training.

Owns meaning, not speed. Overlays (triton/, cpu/) define the same names with the same arguments and results.
Reductions, norms, softmax and logits are fp32 whatever the input precision; results return to the input's dtype.
Letters as in batch.py: T tokens, B sequences, R device rows, N pages, H kv heads, Hq query heads, S page size, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------- norms, activations


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension [Zhang & Sennrich 2019]. The product with the weight is taken in x's dtype, as HF does."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); an overlay may write the sum into `residual`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of [T, 2 I] holding gate then up -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_each(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of every token alone: [..., K] -> [..., N] with sums that do not depend on how many tokens there are. Slow."""
    rows = x.reshape(-1, x.shape[-1])
    out = [F.linear(rows[i : i + 1].clone(), weight, bias) for i in range(len(rows))]  # a clone: libraries look at alignment
    return torch.cat([x.new_empty(0, len(weight)), *out]).view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------------------ rotary


def rope_qkv(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cos_sin: Tensor, positions: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Splits a fused projection, norms q and k per head if weights are given, and rotates them.

    qkv [T, (Hq + 2 H) D]; cos_sin [max position, D] fp32, the first D/2 columns cos, the rest sin; rotation in half-split ("neox") form.
    Returns q [T, Hq, D], k and v [T, H, D]."""
    dim = cos_sin.shape[-1]
    q, k, v = qkv.view(qkv.shape[0], -1, dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rope_qkv_cache(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cos_sin: Tensor, positions: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """rope_qkv, then k and v written to their slots of the caches [N, H, S, D] (slots [T] int32 = page * S + offset). Returns q."""
    q, k, v = rope_qkv(qkv, num_heads, num_kv_heads, cos_sin, positions, q_weight, k_weight, eps)
    size = k_cache.shape[2]
    page, offset = slots.long() // size, slots.long() % size
    k_cache[page, :, offset] = k.to(k_cache.dtype)
    v_cache[page, :, offset] = v.to(v_cache.dtype)
    return q


# --------------------------------------------------------------------------------------------------------- attention


def attention(q: Tensor, k: Tensor, v: Tensor, query_start: Tensor, scale: float, window: int, max_query: int) -> Tensor:
    """Causal attention within packed sequences, without a cache. q [T, Hq, D], k and v [T, H, D], query_start [B + 1] -> [T, Hq, D].

    `window` > 0: a token sees itself and the window - 1 tokens before it."""
    out = torch.empty_like(q)
    bounds = query_start.tolist()
    for lo, hi in zip(bounds, bounds[1:], strict=False):
        if hi > lo:
            out[lo:hi] = _attend(q[lo:hi], k[lo:hi].transpose(0, 1), v[lo:hi].transpose(0, 1), scale, window)
    return out


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor,
    scale: float, window: int, max_query: int, max_length: int,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's new tokens over its cached ones, which already include the new (rope_qkv_cache ran before).

    q [T, Hq, D]; caches [N, H, S, D]; page_table [R, P] int32; rows [B]: sequence b's pages are page_table[rows[b]]; its queries are
    q[query_start[b] : query_start[b + 1]], the last of its lengths[b] tokens. Pages wholly before a window are not read (the table
    may hold 0 there). max_query and max_length bound the two from above. Returns [T, Hq, D]. A sequence with lengths[b] <= 0 is padding:
    its output is unspecified but finite."""
    out = torch.zeros_like(q)
    size = k_cache.shape[2]
    bounds = query_start.tolist()
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        lo, hi = bounds[b], bounds[b + 1]
        if hi == lo or length <= 0:
            continue
        first = max(0, length - (hi - lo) - window + 1) // size if window else 0
        pages = page_table[row, first : -(-length // size)].long()
        skip = first * size
        k = k_cache[pages].transpose(0, 1).flatten(1, 2)[:, : length - skip]
        v = v_cache[pages].transpose(0, 1).flatten(1, 2)[:, : length - skip]
        out[lo:hi] = _attend(q[lo:hi], k, v, scale, window)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """q [n, Hq, D] are the last n positions of k, v [H, m, D]; causal, fp32 inside -> [n, Hq, D]."""
    n, heads, dim = q.shape
    groups, m = k.shape[0], k.shape[1]
    grouped = q.float().view(n, groups, heads // groups, dim).permute(1, 2, 0, 3)  # [H, g, n, D]
    scores = grouped @ k.float().unsqueeze(1).transpose(-1, -2) * scale  # [H, g, n, m]
    ahead = torch.arange(m, device=q.device) - torch.arange(m - n, m, device=q.device).unsqueeze(1)  # key minus query position
    hidden = ahead > 0
    if window:
        hidden = hidden | (ahead <= -window)
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (probs @ v.float().unsqueeze(1)).permute(2, 0, 1, 3).reshape(n, heads, dim).to(q.dtype)


# --------------------------------------------------------------------------------------------------- mixture of experts


def moe(x: Tensor, router_logits: Tensor, w13: Tensor, w2: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """Each token through its top_k experts' gated MLPs, weighted by the router's softmax.

    x [T, h]; router_logits [T, E]; w13 [E, 2 I, h] (gate rows, then up rows); w2 [E, h, I] -> [T, h]. `renormalize`: weights of the
    chosen experts sum to 1. Ties go to the lower expert index."""
    weights, experts = torch.topk(router_logits.float().softmax(-1), top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in experts.unique().tolist():
        token, choice = (experts == e).nonzero(as_tuple=True)
        hidden = silu_mul(F.linear(x[token], w13[e]))
        out.index_add_(0, token, F.linear(hidden, w2[e]).float() * weights[token, choice].unsqueeze(-1))
    return out.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------- sampling

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """murmur3's 32-bit finalizer on the low 32 bits of an int64 tensor."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def uniform(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Counter-based uniform numbers in (0, 1): entry [b, v] is a pure function of (seeds[b], positions[b], v).

    seeds [B] int64, positions [B] int32. With 32-bit lanes: key = mix(mix(mix(low) ^ high) ^ position), bits = mix(mix(v * 0x9E3779B1 ^ key) + key),
    u = ((bits >> 9) + 0.5) / 2^23: 23 bits, because with 24 the largest rounds to 1 in fp32 and its noise is infinite. Returns [B, size] fp32."""
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    key = _mix(_mix(_mix(low) ^ high) ^ positions.long()).unsqueeze(1)
    lane = torch.arange(size, device=seeds.device, dtype=torch.int64) * 0x9E3779B1 & _MASK
    bits = _mix((_mix(lane ^ key) + key) & _MASK)
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def sample_rows(
    logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    seeds: Tensor, filtered: bool, draw: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Draws entry s's token by the settings of device row rows[s] and writes it to tokens[rows[s], positions[s]].

    logits [S, V] of any float dtype, widened to fp32; rows, positions [S] int32; tokens [R, L] int32. The settings are columns of the device rows:
    temperature, top_p, min_p [R] fp32, top_k [R] int32, seeds [R] int64. `draw`: see `sample`, which is the default. Returns [S] int32: -1
    for a row whose largest logit is not finite (its place gets some id, for the step that may already have begun)."""
    index = rows.long()
    settings = (t[index] for t in (temperature, top_k, top_p, min_p, seeds))
    choose: Callable[..., Tensor] = draw or sample
    chosen = choose(logits.float(), *settings, positions, filtered)
    tokens[index, positions.long()] = chosen.clamp(min=0)
    return chosen


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor, filtered: bool
) -> Tensor:
    """One token per row by the Gumbel-max rule, so that it is a pure function of (logits, seed, position).

    logits [S, V] fp32; temperature, top_p, min_p [S] fp32; top_k [S] int32 (<= 0: off); seeds [S] int64; positions [S] int32, the position
    of the token being sampled. Temperature 0 is greedy, ties to the lower id. Filters act on the tempered distribution in the order top-k, top-p
    (the smallest set with at least that mass), min-p; the likeliest token always stays. `filtered` False promises that no row has a filter.
    NaN counts as -inf. Returns [S] int32, -1 for a row whose largest logit is not finite."""
    logits = logits.masked_fill(logits.isnan(), float("-inf"))
    greedy = temperature <= 0
    scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    if filtered:
        scaled = _filter(scaled, top_k, top_p, min_p)
    noise = -torch.log(-torch.log(uniform(seeds, positions, logits.shape[1])))
    chosen = torch.where(greedy, logits.argmax(-1), (scaled + noise).argmax(-1))
    return torch.where(logits.amax(-1).isfinite(), chosen, -1).int()


def _filter(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    limit = torch.where(top_k > 0, top_k, scaled.shape[1]).unsqueeze(1)
    ordered = ordered.masked_fill(rank >= limit, float("-inf"))
    probs = ordered.softmax(-1)
    drop = (probs.cumsum(-1) - probs) >= top_p.unsqueeze(1)  # mass before this token already suffices
    drop |= probs < min_p.unsqueeze(1) * probs[:, :1]
    drop[:, 0] = False
    ordered = ordered.masked_fill(drop, float("-inf"))
    return torch.empty_like(scaled).scatter_(1, order, ordered)


def apply_penalties(
    logits: Tensor, tokens: Tensor, rows: Tensor, prompt_lens: Tensor, lengths: Tensor,
    repetition: Tensor, presence: Tensor, frequency: Tensor, max_length: int,
) -> Tensor:  # fmt: skip
    """Repetition [Keskar 2019], presence and frequency penalties, from the tokens themselves: no counts are kept, so resume needs nothing.

    logits [B, V] of any float dtype; tokens [R, L] int32 device rows; rows, prompt_lens, lengths [B] int32: row b has lengths[b] tokens,
    prompt_lens[b] of them prompt. Repetition counts prompt and output tokens, the other two output tokens only. Returns new logits [B, V] fp32."""
    logits = logits.float()
    batch, vocab = logits.shape
    known = tokens[rows.long(), :max_length].long()
    at = torch.arange(known.shape[1], device=logits.device)
    present = at < lengths.unsqueeze(1)
    output = present & (at >= prompt_lens.unsqueeze(1))
    spill = torch.full_like(known, vocab)  # a column past the vocabulary takes what does not count
    seen = torch.zeros(batch, vocab + 1, device=logits.device)
    seen.scatter_(1, torch.where(present, known, spill), 1.0)
    count = torch.zeros(batch, vocab + 1, device=logits.device)
    count.scatter_add_(1, torch.where(output, known, spill), torch.ones_like(known, dtype=torch.float32))
    seen, count = seen[:, :vocab], count[:, :vocab]
    rep = torch.where(seen > 0, repetition.unsqueeze(1), 1.0)
    logits = torch.where(logits > 0, logits / rep, logits * rep)
    return logits - count * frequency.unsqueeze(1) - (count > 0) * presence.unsqueeze(1)


def apply_bitmask(logits: Tensor, masks: Tensor, which: Tensor) -> Tensor:
    """Takes tokens that a grammar does not allow out of a row's choice.

    logits [S, V] of any float dtype; masks [M, W] int32 with W = ceil(V / 32): bit v % 32 of word v // 32 allows token v; which [S] int32: entry s's
    mask, or -1 for none. Returns new logits [S, V], -inf where not allowed."""
    bits = masks.contiguous().view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=masks.device)
    allowed = (bits & 1).bool().view(len(masks), masks.shape[1] * 32)[:, : logits.shape[1]]
    bound = which >= 0
    out = logits.clone()
    out[bound] = logits[bound].masked_fill(~allowed[which[bound].long()], float("-inf"))
    return out


# -------------------------------------------------------------------------------------------------------- step inputs


def step_inputs(
    tokens: Tensor, rows: Tensor, starts: Tensor, query_start: Tensor, num_tokens: int,
    page_tables: list[Tensor], page_size: int, ids: Tensor, positions: Tensor, lengths: Tensor, slots: list[Tensor],
) -> None:  # fmt: skip
    """Builds a forward pass's inputs from device-resident rows, on the device, into fixed buffers.

    Reads tokens [R, L] int32, rows and starts [B] int32, query_start [B + 1] int32, page_tables (one [R, P] int32 per state kind).
    Writes, for token t of sequence b at position p = starts[b] + t - query_start[b]: ids[t] = tokens[rows[b], p], positions[t] = p,
    slots[kind][t] = page * page_size + p % page_size; and lengths[b] = starts[b] + its tokens. Entries of [T] buffers from
    query_start[B] up to num_tokens are padding: id 0, position 0, slot 0 (page 0 belongs to nobody)."""
    counts = (query_start[1:] - query_start[:-1]).long()
    lengths.copy_(starts + counts.int())
    used = int(query_start[-1])
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=used)
    place = starts[owner] + torch.arange(used, device=counts.device, dtype=torch.int32) - query_start[owner]
    row = rows[owner].long()
    ids[:used] = tokens[row, place.long()]
    positions[:used] = place
    ids[used:num_tokens].zero_()
    positions[used:num_tokens].zero_()
    for table, out in zip(page_tables, slots, strict=True):
        out[:used] = table[row, (place // page_size).long()] * page_size + place % page_size
        out[used:num_tokens].zero_()


def stage(host: Tensor, turns: Tensor, fixed: Tensor, memory: Tensor) -> None:
    """Takes over what the host has written for this step: the first thing on the device in every step.

    host [2, H] int32, in pinned memory, holds two steps' worth by turns: F entries for `fixed` [F], a number n, n indices into `memory` [M] and the
    n values that go there (all int32, no index twice). turns [P] int32 counts the calls in each entry and so tells whose turn it is."""
    source, size = host[int(turns[0]) & 1], len(fixed)
    fixed.copy_(source[:size])
    if count := int(source[size]):
        where, values = source[size + 1 : size + 1 + 2 * count].to(memory.device).view(2, -1)
        memory[where.long()] = values
    turns.add_(1)


def deliver(tokens: Tensor, host: Tensor, turns: Tensor) -> None:
    """Writes a step's tokens [S] int32 to the host's buffer of its turn: host [2, S or more] int32, pinned. Later in the step than `stage`."""
    host[(int(turns[0]) - 1) & 1, : len(tokens)] = tokens.to(host.device)


def copy_pages(caches: list[tuple[Tensor, Tensor]], source: Tensor, destination: Tensor) -> None:
    """Copies whole pages of every given layer's K and V [N, H, S, D]: page source[i] to destination[i] (int32, no page is both)."""
    source, destination = source.long(), destination.long()
    for k, v in caches:
        k[destination] = k[source]
        v[destination] = v[source]
