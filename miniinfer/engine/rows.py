"""Device-resident request rows, and the staging memory through which the host changes them.

Owns what the device knows of each running request between steps: its tokens, page-table rows and sampling parameters. For a step the host
writes only what is new (which rows run, new requests, new pages), and the step itself takes that over; everything else is already there.
The sampler writes its tokens back here, so the next step can start without the host. Row `dummy` belongs to nobody: batches are padded with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miniinfer.data import RowInit, StepPlan

# Columns of `params`, one int32 record per row; the first six hold the bits of an fp32.
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, TOP_K, PROMPT_LEN, SEED, MIN_TOTAL = 0, 1, 2, 3, 4, 5, 6, 7, 8, 10
RECORD = 12

COLDEST = 1e-5  # temperatures below count as 0: logits divided by them might not be finite
LEAST_PENALTY = 1e-5  # repetition penalties below count as this, for the same reason
ALIGN = 64  # entries; tables begin at whole cache lines
TURNS = 16  # counters that the stage op wants
MOST_CHANGES = 16384  # that a step takes over from the host's memory; those of longer prompts are copied

# What sampling must do for a row beyond temperature; the union over a batch decides which passes run.
FILTERED, PENALIZED, BIASED = 1, 2, 4


class Rows:
    """R = max_num_seqs + 1 rows of at most L tokens. All tensors live on `device` and never move, so graphs may hold their addresses.

    A step's entries stand in `batch_rows`, `starts`, `query_start` and, for its sampling, `sample_rows` (the dummy where an entry does not sample),
    `sample_positions` (where the new token goes) and `sample_at` (the token whose hidden state decides it), each [R]."""

    def __init__(self, max_num_seqs: int, max_model_len: int, page_size: int, num_kinds: int, device: torch.device) -> None:
        self.device, self.page_size = device, page_size
        self.capacity, self.dummy = max_num_seqs, max_num_seqs
        count, self.width = max_num_seqs + 1, max_model_len + 1
        self.pages_per_row = -(-self.width // page_size)
        # One allocation for everything that the host changes, so that all of a step's changes land in one scatter.
        sizes = [-(-n // ALIGN) * ALIGN for n in (count * RECORD, num_kinds * count * self.pages_per_row, count * self.width)]
        self._memory = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        assert len(self._memory) < 2**31, "changes are addressed by int32"
        self._tables_at, self._tokens_at = sizes[0], sizes[0] + sizes[1]
        self.params = self._memory[: count * RECORD].view(count, RECORD)
        self.page_tables = list(self._memory[self._tables_at :][: num_kinds * count * self.pages_per_row].view(num_kinds, count, self.pages_per_row))
        self.tokens = self._memory[self._tokens_at :][: count * self.width].view(count, self.width)
        self.floats = self.params[:, :6].view(torch.float32)
        self.seeds = self.params[:, SEED : SEED + 2].view(torch.int64).squeeze(1)
        # Logit bias, and the stop ids that min_tokens holds back; wide enough for the widest row seen.
        self.bias_ids = torch.zeros(count, 0, dtype=torch.int64, device=device)
        self.bias_values = torch.zeros(count, 0, device=device)
        self.held_ids = torch.zeros(count, 0, dtype=torch.int64, device=device)
        self.held_mask = torch.zeros(count, 0, dtype=torch.bool, device=device)
        self.bad_words = torch.full((count, 0, 0), -1, dtype=torch.int32, device=device)  # right-aligned token sequences, -1 before them
        # Host mirrors: what the host itself put there, read to choose passes without asking the device.
        self.flags = np.zeros(count, dtype=np.int32)
        self.prompt_logprobs = np.full(count, -1, dtype=np.int32)
        self.prompt_lens = np.zeros(count, dtype=np.int32)
        sizes = [count, count, count + 1, count, count, count]
        self._places = np.cumsum([0, *sizes]).tolist()
        fixed = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.batch_rows, self.starts, self.query_start, self.sample_rows, self.sample_positions, self.sample_at = fixed.split(sizes)
        # Where the host writes its part of a step, two steps by turns: what the stage op reads (see kernels/reference.py).
        self.turns = torch.zeros(TURNS, dtype=torch.int32, device=device)
        host = torch.zeros(2, sum(sizes) + 1 + 2 * MOST_CHANGES, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.staging = host, self.turns, fixed, self._memory
        self._host, self._turn = host.numpy(), 0
        self._ramp = np.arange(count + 1, dtype=np.int32)

    def write(self, plan: StepPlan, padded: int) -> int:
        """Writes a plan's changes to where the step will take them over, page copies excepted (they need the caches). The step before last must be
        over: its changes lay there.

        The batch is padded to `padded` entries of the dummy row, of one token each if all real ones are, else of none.
        Returns what these rows want of the sampler: the union of their flags."""
        real, size = len(plan.rows), padded
        host = self._host[self._turn]
        self._turn ^= 1
        rows, starts, _, sample_rows, positions, at = (host[place : place + size] for place in self._places[:-1])
        query_start = host[self._places[2] : self._places[2] + size + 1]
        rows[:real], rows[real:] = plan.rows, self.dummy
        starts[:real], starts[real:] = plan.starts, 0
        if plan.num_tokens == real:
            query_start[:] = self._ramp[: size + 1]
            np.add(starts, 1, out=positions)
            at[:] = self._ramp[:size]
        else:
            query_start[0] = 0
            np.cumsum(plan.counts, out=query_start[1 : real + 1])
            query_start[real + 1 :] = query_start[real]
            positions[:real], positions[real:] = starts[:real] + plan.counts, 0
            np.subtract(query_start[1:], 1, out=at)
        sample_rows[:] = rows
        if not all(plan.samples):
            sample_rows[:real][~np.array(plan.samples)] = self.dummy
        self._write_changes(host[self._places[-1] :], plan)
        return int(np.bitwise_or.reduce(self.flags[rows[:real]]))

    def _write_changes(self, host: np.ndarray, plan: StepPlan) -> None:
        """Their number, the indices in `_memory` and then the values. More than there is room for go to the device at once."""
        count = len(plan.page_entries) + sum(RECORD + len(i.tokens) for i in plan.inits)
        host[0] = count if count <= MOST_CHANGES else 0
        if not count:
            return
        changes = host[1 : 1 + 2 * count] if count <= MOST_CHANGES else np.empty(2 * count, dtype=np.int32)
        where, values = changes[:count], changes[count:]
        end = len(plan.page_entries)
        if end:
            kind, row, index, page = np.array(plan.page_entries, dtype=np.int32).T
            where[:end] = self._tables_at + (kind * (self.capacity + 1) + row) * self.pages_per_row + index
            values[:end] = page
        for init in plan.inits:
            begin, end = end, end + RECORD
            where[begin:end] = np.arange(init.row * RECORD, (init.row + 1) * RECORD)
            values[begin:end] = self._record(init)
            begin, end = end, end + len(init.tokens)
            first = self._tokens_at + init.row * self.width
            where[begin:end] = np.arange(first, first + len(init.tokens))
            values[begin:end] = init.tokens
        if count > MOST_CHANGES:
            index, value = to_device(torch.from_numpy(changes), self.device).view(2, -1)
            self._memory.index_put_((index,), value)

    def _record(self, init: RowInit) -> np.ndarray:
        """The row's parameter record; its rare parts (bias, held-back ids) go to their own tables."""
        p = init.params
        record = np.zeros(RECORD, dtype=np.int32)
        heat = p.temperature if p.temperature >= COLDEST else 0.0
        repetition = max(p.repetition_penalty, LEAST_PENALTY)
        record[:6] = np.array([heat, p.top_p, p.min_p, repetition, p.presence_penalty, p.frequency_penalty], dtype=np.float32).view(np.int32)
        record[TOP_K], record[PROMPT_LEN] = max(p.top_k, 0), init.prompt_len
        record[SEED : SEED + 2] = np.array([init.seed], dtype=np.int64).view(np.int32)
        record[MIN_TOTAL] = init.prompt_len + p.min_tokens
        filtered = heat > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        held = init.stop_ids if p.min_tokens and p.structured_outputs is None else []  # else masks hold them back (grammar.py)
        bad = p.bad_words_token_ids or []
        biased = bool(p.logit_bias or held or bad)
        before, self.flags[init.row] = self.flags[init.row], FILTERED * filtered | PENALIZED * penalized | BIASED * biased
        self.prompt_logprobs[init.row] = -1 if p.prompt_logprobs is None else p.prompt_logprobs
        self.prompt_lens[init.row] = init.prompt_len
        if biased or before & BIASED:  # the row's last request leaves nothing to this one: its batch may have others with a bias
            self._write_bias(init.row, p.logit_bias or {}, held)
            self._write_bad_words(init.row, bad)
        return record

    def _write_bias(self, row: int, bias: dict[int, float], held: list[int]) -> None:
        self.bias_ids = _widen(self.bias_ids, len(bias))
        self.bias_values = _widen(self.bias_values, len(bias))
        self.held_ids = _widen(self.held_ids, len(held))
        self.held_mask = _widen(self.held_mask, len(held))
        for table, values in (
            (self.bias_ids, list(bias)),
            (self.bias_values, list(bias.values())),
            (self.held_ids, held),
            (self.held_mask, [True] * len(held)),
        ):
            table[row].zero_()
            if values:
                table[row, : len(values)] = to_device(torch.tensor(values, dtype=table.dtype), self.device)

    def _write_bad_words(self, row: int, bad: list[list[int]]) -> None:
        count, longest = len(bad), max(map(len, bad), default=0)
        rows, most, size = self.bad_words.shape
        if count > most or longest > size:
            wider = self.bad_words.new_full((rows, _grown(max(count, most)), _grown(max(longest, size))), -1)
            wider[:, :most, wider.shape[2] - size :] = self.bad_words
            self.bad_words = wider
        self.bad_words[row] = -1
        if bad:
            table = torch.tensor([[-1] * (longest - len(ids)) + ids for ids in bad], dtype=torch.int32)
            self.bad_words[row, :count, self.bad_words.shape[2] - longest :] = to_device(table, self.device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device for which the host does not wait; a GPU's goes through pinned memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _widen(table: Tensor, width: int) -> Tensor:
    """A table with at least `width` columns, the new ones zero."""
    if width <= table.shape[1]:
        return table
    wider = table.new_zeros(table.shape[0], _grown(width))
    wider[:, : table.shape[1]] = table
    return wider


def _grown(width: int) -> int:
    """A size with some room to spare, so that tables seldom grow."""
    return max(8, 1 << (width - 1).bit_length())
