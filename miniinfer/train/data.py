"""Training data: shards of tokenized documents on disk, and packed batches of a fixed shape made from them.

Owns the shard format (safetensors: tokens uint16 [N], learned uint8 [N], starts int64 [D + 1]) and the order of documents, a pure function of
(seed, epoch), so that resuming needs two numbers. Does not tokenize: recipes do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from miniinfer.batch import Batch
from miniinfer.config import ConfigError
from miniinfer.kernels import Ops

Document = tuple[Sequence[int], Sequence[int | bool]]  # token ids, and which of them the model shall learn to predict


def write_shard(path: Path, documents: Sequence[Document], repeat: int = 1) -> None:
    """Writes documents to one file; `repeat`: how often an epoch shows them."""
    sizes = torch.tensor([0] + [len(ids) for ids, _ in documents], dtype=torch.int64)
    flat = torch.tensor([i for ids, _ in documents for i in ids], dtype=torch.int32)
    learned = torch.tensor([int(x) for _, marks in documents for x in marks], dtype=torch.uint8)
    if flat.numel() != learned.numel() or (flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**16):
        raise ValueError("documents: token ids must be below 65536, with one mark each")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": flat.to(torch.uint16), "learned": learned, "starts": sizes.cumsum(0)}, path, metadata={"repeat": str(repeat)})


class Documents:
    """All documents of a folder's shards, in memory: tokens int32 [N], learned bool [N], starts int64 [D + 1], and which to show in an epoch."""

    def __init__(self, folder: str | Path):
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise ConfigError(f"{folder}: no *.safetensors shards of training data")
        tokens, learned, starts, shown, count, offset = [], [], [torch.zeros(1, dtype=torch.int64)], [], 0, 0
        for path in paths:
            with safe_open(path, framework="pt") as file:
                tokens.append(file.get_tensor("tokens").to(torch.int32))
                learned.append(file.get_tensor("learned").bool())
                starts.append(file.get_tensor("starts")[1:] + offset)
                repeat = int((file.metadata() or {}).get("repeat", "1"))
            shown.append(torch.arange(count, count + len(starts[-1])).repeat(repeat))
            count, offset = count + len(starts[-1]), offset + len(tokens[-1])
        self.tokens, self.learned, self.starts, self.shown = (torch.cat(x) for x in (tokens, learned, starts, shown))
        self.lengths = self.starts[1:] - self.starts[:-1]
        predicted = torch.zeros(offset + 1, dtype=torch.int64)
        torch.cumsum(self.learned, 0, out=predicted[1:])
        first = self.learned[self.starts[:-1].clamp(max=max(offset - 1, 0))] & (self.lengths > 0)
        self.targets = predicted[self.starts[1:]] - predicted[self.starts[:-1]] - first.long()  # a document's first token is predicted by nothing

    @property
    def tokens_per_epoch(self) -> int:
        return int(self.lengths[self.shown].sum())


@dataclass(slots=True)
class Packed:
    """One micro-batch: whole documents, end to end. Every tensor's shape is the same for all batches of a run."""

    ids: Tensor  # [T] int32; the tail after the last document is one more document of zeros
    positions: Tensor  # [T] int32, counted within each document
    query_start: Tensor  # [B + 1] int32, ends in repeated T
    at: Tensor  # [K] int64: places whose next token is learned; padded with 0
    targets: Tensor  # [K] int64: that next token
    weights: Tensor  # [K] fp32: 1, or 0 for padding

    def to(self, device: torch.device) -> Packed:
        """A copy on the device, not waited for."""
        return Packed(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(Packed)))

    def pin(self) -> Packed:
        """A copy in page-locked memory, from which transfers overlap with computing."""
        return Packed(*(getattr(self, f.name).pin_memory() for f in fields(Packed)))


def as_batch(ids: Tensor, positions: Tensor, query_start: Tensor, max_query: int, ops: Ops) -> Batch:
    """The forward pass's input without caches; `max_query` bounds the length of a document."""
    return Batch(
        ids=ids, positions=positions, query_start=query_start, lengths=query_start[1:] - query_start[:-1], rows=query_start[:-1],
        max_query=max_query, max_length=max_query, ops=ops,
    )  # fmt: skip


@dataclass(frozen=True)
class Epoch:
    """The documents of one epoch in order, cut into batches: batch i is order[cuts[i] : cuts[i + 1]]."""

    order: Tensor
    cuts: list[int]


class Packer:
    """Cuts epochs into batches of at most `tokens` tokens. Batch (epoch, index) is the same whenever it is asked for."""

    def __init__(self, documents: Documents, tokens: int, seed: int):
        longest = int(documents.lengths.max())
        if longest > tokens:
            raise ConfigError(f"micro_tokens: {tokens} cannot hold the longest document, {longest} tokens")
        self.documents, self.tokens, self.seed, self.longest = documents, tokens, seed, longest
        self._epochs: dict[int, Epoch] = {}
        self.max_documents, self.max_targets = 0, 0
        for epoch in range(2):  # later epochs are cut elsewhere, with counts much the same: the margin covers them
            plan = self.epoch(epoch)
            totals = torch.zeros(len(plan.order) + 1, dtype=torch.int64)
            totals[1:] = documents.targets[plan.order].cumsum(0)
            cuts = torch.tensor(plan.cuts)
            self.max_documents = max(self.max_documents, int(cuts.diff().max()))
            self.max_targets = max(self.max_targets, int(totals[cuts].diff().max()))
        self.max_documents = -(-(self.max_documents * 21 // 20 + tokens // longest + 2) // 64) * 64
        self.max_targets = -(-(self.max_targets * 21 // 20 + 2) // 256) * 256

    def epoch(self, number: int) -> Epoch:
        """The order and cuts of an epoch; the last two are remembered."""
        if number not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            shown = self.documents.shown
            order = shown[torch.randperm(len(shown), generator=generator)]
            ends = self.documents.lengths[order].cumsum(0)
            cuts, filled = [0], 0
            while cuts[-1] < len(order):
                cut = int(torch.searchsorted(ends, filled + self.tokens, right=True))
                cuts.append(cut)
                filled = int(ends[cut - 1])
            self._epochs = {**{n: e for n, e in self._epochs.items() if n == number - 1}, number: Epoch(order, cuts)}
        return self._epochs[number]

    def batch(self, plan: Epoch, index: int) -> Packed:
        """Batch `index` of an epoch."""
        data = self.documents
        chosen = plan.order[plan.cuts[index] : plan.cuts[index + 1]]
        if self.max_documents and len(chosen) > self.max_documents - 1:
            chosen = chosen[: self.max_documents - 1]
        sizes = data.lengths[chosen]
        bounds = torch.zeros(len(chosen) + 1, dtype=torch.int64)
        bounds[1:] = sizes.cumsum(0)
        used = int(bounds[-1])
        within = torch.arange(used) - torch.repeat_interleave(bounds[:-1], sizes)
        source = torch.repeat_interleave(data.starts[chosen], sizes) + within
        ids, positions = torch.zeros(self.tokens, dtype=torch.int32), torch.zeros(self.tokens, dtype=torch.int32)
        ids[:used], positions[:used] = data.tokens[source], within.int()
        positions[used:] = torch.arange(self.tokens - used, dtype=torch.int32) % self.longest
        query_start = torch.full((self.max_documents + 1,), self.tokens, dtype=torch.int32)
        query_start[: len(bounds)] = bounds.int()
        if self.tokens - used > self.longest:  # an epoch's last batch: its empty tail must keep to the longest sequence, too
            tail = torch.arange(used, self.tokens, self.longest, dtype=torch.int32)[: self.max_documents + 1 - len(bounds)]
            query_start[len(bounds) : len(bounds) + len(tail)] = tail
        learned = data.learned[source]
        learned[bounds[:-1][sizes > 0]] = False
        at = learned.nonzero().squeeze(1)[: self.max_targets] - 1
        padded = torch.zeros(2, self.max_targets, dtype=torch.int64)
        padded[0, : len(at)], padded[1, : len(at)] = at, ids[at + 1].long()
        weights = torch.zeros(self.max_targets)
        weights[: len(at)] = 1
        return Packed(ids, positions, query_start, padded[0], padded[1], weights)

    def batches(self, epoch: int, index: int) -> Iterator[tuple[int, int, Packed]]:
        """(epoch, index, batch) without end, from a given one on. An epoch's last batch, which is mostly empty, is left out if there are others."""
        while True:
            plan = self.epoch(epoch)
            count = max(1, len(plan.cuts) - 2)
            for i in range(index, count):
                yield epoch, i, self.batch(plan, i)
            epoch, index = epoch + 1, 0


def ahead(items: Iterator[tuple[int, int, Packed]], device: torch.device, depth: int = 4) -> Iterator[tuple[int, int, Packed]]:
    """The same batches on the device, made by a thread that runs up to `depth` ahead."""
    ready: queue.Queue[tuple[int, int, Packed] | Exception] = queue.Queue(depth)

    def make() -> None:
        try:
            for epoch, index, packed in items:
                ready.put((epoch, index, packed.pin() if device.type == "cuda" else packed))
        except Exception as e:  # raised again where the batch is asked for
            ready.put(e)

    threading.Thread(target=make, daemon=True).start()
    while True:
        item = ready.get()
        if isinstance(item, Exception):
            raise item
        yield item[0], item[1], item[2].to(device)
