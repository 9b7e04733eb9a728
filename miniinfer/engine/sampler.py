"""From logits to tokens on the device: bias, penalties, filters, the draw, and log-probabilities.

Owns the order of the passes and skips those that no row of the batch needs. A row's token is a pure function of its own logits, seed and
position, whoever shares the batch. Host code here never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miniinfer.engine import rows as layout
from miniinfer.engine.rows import BIASED, FILTERED, PENALIZED, Rows
from miniinfer.kernels import Ops

BAD = -1e6  # added to the logit of a token that must not come


def sample(logits: Tensor, rows: Rows, batch_rows: Tensor, positions: Tensor, flags: int, max_length: int, ops: Ops) -> Tensor:
    """Draws one token per entry and writes it to its row, where the next step will read it.

    logits [S, V] of any float dtype; batch_rows [S] int32; positions [S] int32: where the new token goes (= tokens computed so far); flags: union
    of FILTERED, PENALIZED and BIASED over the entries; max_length bounds positions. Returns tokens [S] int32, -1 where the logits were not finite."""
    floats, params = rows.floats, rows.params
    if flags & BIASED:
        logits = _bias(logits.float(), rows, batch_rows.long(), positions)
    if flags & PENALIZED:
        index = batch_rows.long()
        penalties = [floats[index, column] for column in (layout.REPETITION, layout.PRESENCE, layout.FREQUENCY)]
        logits = ops.apply_penalties(logits, rows.tokens, batch_rows, params[index, layout.PROMPT_LEN], positions, *penalties, max_length)
    settings = floats[:, layout.TEMPERATURE], params[:, layout.TOP_K], floats[:, layout.TOP_P], floats[:, layout.MIN_P], rows.seeds
    return ops.sample_rows(logits, batch_rows, positions, rows.tokens, *settings, bool(flags & FILTERED))


def _bias(logits: Tensor, rows: Rows, index: Tensor, positions: Tensor) -> Tensor:
    """Adds the logit bias; takes the held-back stop ids out of rows that are still shorter than min_tokens. Unused columns add 0 to id 0."""
    held = rows.held_mask[index] & (positions < rows.params[index, layout.MIN_TOTAL]).unsqueeze(1)
    suppress = torch.zeros(held.shape, device=logits.device).masked_fill_(held, float("-inf"))
    logits = logits.scatter_add(1, rows.bias_ids[index], rows.bias_values[index])
    logits = logits.scatter_add_(1, rows.held_ids[index], suppress)
    return _without_bad_words(logits, rows, index, positions.long()) if rows.bad_words.numel() else logits


def _without_bad_words(logits: Tensor, rows: Rows, index: Tensor, positions: Tensor) -> Tensor:
    """Takes out tokens that would complete a bad word in the output. Not quite to -inf: where a grammar allows nothing else, they come."""
    bad = rows.bad_words[index]
    begins, lasts = bad[:, :, :-1], bad[:, :, -1]
    at = positions.unsqueeze(1) + torch.arange(-begins.shape[2], 0, device=logits.device)
    before = rows.tokens[index.unsqueeze(1), at.clamp(min=0)].masked_fill(at < rows.params[index, layout.PROMPT_LEN].unsqueeze(1), -1)
    complete = ((begins < 0) | (begins == before.unsqueeze(1))).all(2) & (lasts >= 0)
    taken = torch.zeros(lasts.shape, device=logits.device).masked_fill_(complete, BAD)
    return logits.scatter_add_(1, lasts.clamp(min=0).long(), taken)


def logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under the model's own distribution (no bias, penalty, temperature or filter, as vLLM's default).

    logits [S, V] of any float dtype, tokens [S]; count >= 0 alternatives. Returns ids [S, 1 + count] int32 (the token itself, then the likeliest),
    values fp32 and ranks int32 of the same shape (1 = likeliest)."""
    values = logits.log_softmax(-1, dtype=torch.float32)
    index = tokens.clamp(min=0).long().unsqueeze(1)  # those of a row that has failed interest nobody
    own = values.gather(1, index)
    rank = (values > own).sum(1, keepdim=True, dtype=torch.int32) + 1
    if not count:
        return index.int(), own, rank
    best, ids = values.topk(min(count, values.shape[1]), dim=-1)
    order = torch.arange(1, best.shape[1] + 1, dtype=torch.int32, device=logits.device).expand_as(ids)
    return torch.cat([index, ids], 1).int(), torch.cat([own, best], 1), torch.cat([rank, order], 1)
