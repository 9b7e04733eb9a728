"""Device-resident request rows, and the one staging buffer through which the host changes them.

Owns what the device knows of each running request between steps: its tokens, page-table rows and sampling parameters. A step sends
only what is new (which rows run, new requests, new pages) in one copy; everything else is already there. The sampler writes its tokens
back here, so the next step can start without the host. Row `dummy` belongs to nobody: graphs pad their batches with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miniinfer.data import RowInit, StepPlan

# Columns of `params`, one int32 record per row; the first six hold the bits of an fp32.
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY, TOP_K, PROMPT_LEN, SEED, MIN_TOTAL = 0, 1, 2, 3, 4, 5, 6, 7, 8, 10
RECORD = 12

# What sampling must do for a row beyond temperature; the union over a batch decides which passes run.
FILTERED, PENALIZED, BIASED = 1, 2, 4


class Rows:
    """R = max_num_seqs + 1 rows of at most L tokens. All tensors live on `device` and never move, so graphs may hold their addresses."""

    def __init__(self, max_num_seqs: int, max_model_len: int, page_size: int, num_kinds: int, device: torch.device) -> None:
        self.device, self.page_size = device, page_size
        self.capacity, self.dummy = max_num_seqs, max_num_seqs
        count, self.width = max_num_seqs + 1, max_model_len + 1
        self.tokens = torch.zeros(count, self.width, dtype=torch.int32, device=device)
        self.pages_per_row = -(-self.width // page_size)
        # One allocation for all kinds, so that the entries of a step land in one scatter.
        self._tables = torch.zeros(num_kinds, count, self.pages_per_row, dtype=torch.int32, device=device)
        self.page_tables = list(self._tables)
        self.params = torch.zeros(count, RECORD, dtype=torch.int32, device=device)
        self.floats = self.params[:, :6].view(torch.float32)
        self.seeds = self.params[:, SEED : SEED + 2].view(torch.int64).squeeze(1)
        # Logit bias, and the stop ids that min_tokens holds back; wide enough for the widest row seen.
        self.bias_ids = torch.zeros(count, 0, dtype=torch.int64, device=device)
        self.bias_values = torch.zeros(count, 0, device=device)
        self.held_ids = torch.zeros(count, 0, dtype=torch.int64, device=device)
        self.held_mask = torch.zeros(count, 0, dtype=torch.bool, device=device)
        # Host mirrors: what the host itself put there, read to choose passes without asking the device.
        self.flags = np.zeros(count, dtype=np.int32)
        self.prompt_logprobs = np.full(count, -1, dtype=np.int32)
        self.prompt_lens = np.zeros(count, dtype=np.int32)
        self._staging = _Staging(4 * count + 1, device)
        fixed = self._staging.device_buffer
        self.batch_rows, self.starts = fixed[:count], fixed[count : 2 * count]
        self.sampled, self.query_start = fixed[2 * count : 3 * count], fixed[3 * count : 4 * count + 1]

    def upload(self, plan: StepPlan, batch_size: int) -> int:
        """Sends a plan's changes to the device and applies them, page copies excepted (they need the caches).

        The batch is padded to `batch_size` with one-token entries of the dummy row. Returns how many entries sample; their batch indices stand
        in `sampled`. Nothing here waits for the device."""
        count, real = self.capacity + 1, len(plan.rows)
        host = self._staging.begin(2 * sum(len(i.tokens) for i in plan.inits) + (RECORD + 1) * len(plan.inits) + 2 * len(plan.page_entries))
        host[:real], host[real:batch_size] = plan.rows, self.dummy
        host[count : count + real], host[count + real : count + batch_size] = plan.starts, 0
        samples = np.flatnonzero(plan.samples)
        host[2 * count : 2 * count + len(samples)] = samples
        ends = 3 * count + 1
        host[3 * count] = 0
        np.cumsum(plan.counts, out=host[ends : ends + real])
        host[ends + real : ends + batch_size] = host[ends + real - 1] + np.arange(1, batch_size - real + 1)
        cursor = 4 * count + 1
        sections: list[tuple[Tensor, int]] = []  # (flat destination, entries): indices first, then values, in the staging buffer
        if plan.page_entries:
            entries = np.array(plan.page_entries, dtype=np.int64)
            flat = (entries[:, 0] * count + entries[:, 1]) * self.pages_per_row + entries[:, 2]
            cursor = _put(host, cursor, flat, entries[:, 3])
            sections.append((self._tables.view(-1), len(entries)))
        if plan.inits:
            flat = np.concatenate([np.arange(i.row * self.width, i.row * self.width + len(i.tokens)) for i in plan.inits])
            values = np.concatenate([np.asarray(i.tokens, dtype=np.int32) for i in plan.inits])
            cursor = _put(host, cursor, flat, values)
            sections.append((self.tokens.view(-1), len(flat)))
        records_at = cursor
        for init in plan.inits:
            host[cursor] = init.row
            host[cursor + 1 : cursor + 1 + RECORD] = self._record(init)
            cursor += 1 + RECORD
        sent = self._staging.send(cursor)
        cursor = 4 * count + 1
        for destination, entries_count in sections:
            index, value = sent[cursor : cursor + entries_count], sent[cursor + entries_count : cursor + 2 * entries_count]
            destination.index_put_((index,), value)
            cursor += 2 * entries_count
        if plan.inits:
            records = sent[records_at : records_at + len(plan.inits) * (1 + RECORD)].view(-1, 1 + RECORD)
            self.params.index_put_((records[:, 0],), records[:, 1:])
        return len(samples)

    def _record(self, init: RowInit) -> np.ndarray:
        """The row's parameter record; its rare parts (bias, held-back ids) go to their own tables."""
        p = init.params
        record = np.zeros(RECORD, dtype=np.int32)
        record[:6] = np.array(
            [p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty], dtype=np.float32
        ).view(np.int32)
        record[TOP_K], record[PROMPT_LEN] = max(p.top_k, 0), init.prompt_len
        record[SEED : SEED + 2] = np.array([init.seed], dtype=np.int64).view(np.int32)
        record[MIN_TOTAL] = init.prompt_len + p.min_tokens
        filtered = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        held = init.stop_ids if p.min_tokens else []
        biased = bool(p.logit_bias or held)
        self.flags[init.row] = FILTERED * filtered | PENALIZED * penalized | BIASED * biased
        self.prompt_logprobs[init.row] = -1 if p.prompt_logprobs is None else p.prompt_logprobs
        self.prompt_lens[init.row] = init.prompt_len
        if biased:
            self._write_bias(init.row, p.logit_bias or {}, held)
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
                table[row, : len(values)] = torch.tensor(values, dtype=table.dtype).to(self.device)

    def union_flags(self, rows: list[int]) -> int:
        """What any of these rows needs of the sampler."""
        return int(np.bitwise_or.reduce(self.flags[rows])) if rows else 0


def _put(host: np.ndarray, cursor: int, index: np.ndarray, value: np.ndarray) -> int:
    host[cursor : cursor + len(index)] = index
    host[cursor + len(index) : cursor + 2 * len(index)] = value
    return cursor + 2 * len(index)


def _widen(table: Tensor, width: int) -> Tensor:
    """A table with at least `width` columns, the new ones zero."""
    if width <= table.shape[1]:
        return table
    wider = table.new_zeros(table.shape[0], max(8, 1 << (width - 1).bit_length()))
    wider[:, : table.shape[1]] = table
    return wider


class _Staging:
    """Two pinned host buffers in turn, one device buffer: the host fills one while the copy from the other may still be under way."""

    def __init__(self, fixed: int, device: torch.device) -> None:
        self.fixed, self.device, self.turn = fixed, device, 0
        self.pinned = device.type == "cuda"
        self.device_buffer = torch.zeros(fixed, dtype=torch.int32, device=device)  # the fixed part keeps its address
        self.host = [self._new(fixed + 4096) for _ in range(2)]
        self.copied: list[torch.cuda.Event | None] = [None, None]

    def _new(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self.pinned)

    def begin(self, variable: int) -> np.ndarray:
        """The host buffer to fill: `fixed` entries, then room for `variable` more."""
        self.turn ^= 1
        event = self.copied[self.turn]
        if event is not None:
            event.synchronize()  # recorded two steps ago: done long since, unless the device lags by two steps
        if len(self.host[self.turn]) < self.fixed + variable:
            self.host[self.turn] = self._new(2 * (self.fixed + variable))
        return self.host[self.turn].numpy()

    def send(self, used: int) -> Tensor:
        """Copies the first `used` entries to the device; returns a tensor over all of them (the fixed part also lands in its fixed place)."""
        host = self.host[self.turn]
        if not self.pinned:
            self.device_buffer.copy_(host[: self.fixed])
            return host
        sent = host[:used].to(self.device, non_blocking=True)
        self.device_buffer.copy_(sent[: self.fixed])
        event = self.copied[self.turn] or torch.cuda.Event()
        event.record()
        self.copied[self.turn] = event
        return sent
