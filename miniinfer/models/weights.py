"""Checkpoints to parameters and back: one loader, one exporter and one random init over the layouts that layers declare.

Owns file names, shards and the checking of tensors. Which tensors there are, and what they are called, the layers say (layers/layout.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from miniinfer.config import ConfigError, read_json
from miniinfer.layers.layout import Layout, Part, layouts

Progress = Callable[[int, int], None]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DERIVED = ".rotary_emb.inv_freq"  # old checkpoints carry it; config.json says the same


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a safetensors file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    start: int  # its first byte in the file


def load(model: nn.Module, folder: str | Path, progress: Progress | None = None) -> None:
    """Fills every parameter from the folder's safetensors, cast to the parameter's dtype. All is on the parameters' device when it returns.

    `progress(done, total)` is called with bytes of parameters filled. Raises ConfigError naming the missing, unknown and misshapen
    tensors, before any is read."""
    headers = {path: _header(path) for path in _files(Path(folder))}
    found = {name: entry for header in headers.values() for name, entry in header.items()}
    targets = _targets(model, found, str(folder))
    total, done = sum(view.numel() * view.element_size() for view in targets.values()), 0
    with ExitStack() as stack:
        pieces: list[_Piece] = []
        for path, header in headers.items():
            file = stack.enter_context(open(path, "rb", buffering=0))
            for name in sorted(header.keys() & targets.keys(), key=lambda name: header[name].start):
                pieces += _pieces(file, header[name], targets[name].detach().view(-1))
        reader = stack.enter_context(_Reader(next(iter(targets.values())).device, min(len(pieces), 2 * _THREADS)))
        for size in stack.enter_context(ThreadPoolExecutor(_THREADS, "weights")).map(reader.copy, pieces):
            done += size
            if progress:
                progress(done, total)


def _files(folder: Path) -> list[Path]:
    """The folder's weights; the single file comes first where there are both forms, as in transformers."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if not (folder / _INDEX).exists():
        hint = "; it has .bin files: convert them to safetensors" if any(folder.glob("*.bin")) else ""
        raise ConfigError(f"{folder}: no {_SINGLE} and no {_INDEX}{hint} (--load-format dummy needs none)")
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / _INDEX}: 'weight_map' names no shards")
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (folder / name).exists()]:
        raise ConfigError(f"{folder / _INDEX}: {len(absent)} of {len(names)} shards are not there: {_few(absent)}")
    return [folder / name for name in names]


def _header(path: Path) -> dict[str, _Entry]:
    """Every tensor of a file, without reading them."""
    try:
        with safe_open(path, framework="pt"):
            pass  # it has checked that the header is sound and the file as long as it says
    except SafetensorError as e:
        raise ConfigError(f"{path}: not a whole safetensors file ({e}); download it again") from None
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: _Entry(tuple(t["shape"]), t["dtype"], 8 + size + t["data_offsets"][0]) for name, t in header.items()}


def _targets(model: nn.Module, found: dict[str, _Entry], source: str) -> dict[str, Tensor]:
    """Which region of which parameter each tensor fills; ConfigError unless they match one to one."""
    targets: dict[str, Tensor] = {}
    known: set[str] = set()
    missing: list[str] = []
    for name, param, layout in layouts(model):
        if param.is_meta:
            raise ValueError(f"{name} was built on meta: it has no storage to load into")
        parts = _present(layout, found)
        known.update(part.name for choice in (layout.parts, *layout.alternatives) for part in choice)
        missing += [part.name for part in parts if part.name not in found]
        targets.update({part.name: part.view(param) for part in parts})
    wrong = [
        f"{name} is {found[name].dtype} {list(found[name].shape)}, expected {list(view.shape)} in {', '.join(_DTYPES)}"
        for name, view in targets.items()
        if name in found and (found[name].shape != tuple(view.shape) or found[name].dtype not in _DTYPES)
    ]
    extra = [name for name in found if name not in known and not name.endswith(_DERIVED)]
    problems = [f"{len(names)} {what}: {_few(names)}" for what, names in (("missing", missing), ("unknown", extra), ("unfit", wrong)) if names]
    if problems:
        raise ConfigError(f"{source}: the tensors do not fit the model that config.json describes; {'; '.join(problems)}")
    return targets


def _present(layout: Layout, found: dict[str, _Entry]) -> tuple[Part, ...]:
    """The set of parts that the checkpoint holds: the first of which it has any tensor."""
    choices = (layout.parts, *layout.alternatives)
    return next((parts for parts in choices if any(part.name in found for part in parts)), layout.parts)


def _few(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


_THREADS = 8  # one thread copies 6 GB/s out of the page cache, eight about 40; a GPU's link takes 50
_PIECE = 8 << 20  # bytes of a file that a thread reads at a time


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of numbers in a file, and the flat region of a parameter that it fills."""

    file: FileIO
    start: int
    dtype: torch.dtype
    target: Tensor


def _pieces(file: FileIO, entry: _Entry, target: Tensor) -> list[_Piece]:
    dtype = _DTYPES[entry.dtype]
    step = _PIECE // dtype.itemsize
    return [_Piece(file, entry.start + at * dtype.itemsize, dtype, target[at : at + step]) for at in range(0, target.numel(), step)]


class _Reader:
    """Copies pieces to their parameters, from several threads at once. On the CPU a file is read straight into the parameter; on the way to a GPU,
    or to another precision, through buffers that go round, pinned so that a copy runs while the next buffers fill."""

    def __init__(self, device: torch.device, buffers: int) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.free: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = SimpleQueue()
        for buffer in torch.empty(buffers, _PIECE, dtype=torch.uint8, pin_memory=self.gpu):
            self.free.put((buffer, torch.cuda.Event() if self.gpu else None))

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def copy(self, piece: _Piece) -> int:
        """Returns the bytes of the parameter that are filled, on a GPU once its stream gets there. ConfigError if the file has become shorter."""
        if not self.gpu and piece.dtype == piece.target.dtype:
            _read(piece, piece.target.view(torch.uint8))
            return piece.target.nbytes
        buffer, copied = self.free.get()
        try:
            if copied is not None:
                copied.synchronize()  # the copy that last left this buffer
            numbers = buffer[: piece.target.numel() * piece.dtype.itemsize]
            _read(piece, numbers)
            values = numbers.view(piece.dtype)
            if piece.dtype != piece.target.dtype:
                values = values.to(self.device, non_blocking=True)  # cast there
            piece.target.copy_(values, non_blocking=True)
            if copied is not None:
                copied.record(torch.cuda.current_stream(self.device))
        finally:
            self.free.put((buffer, copied))
        return piece.target.nbytes


def _read(piece: _Piece, into: Tensor) -> None:
    """Fills bytes on the CPU from the piece's place in its file."""
    rest, at = into.numpy().data, piece.start
    while rest:
        count = os.preadv(piece.file.fileno(), [rest], at)
        if not count:
            raise ConfigError(f"{piece.file.name}: not a whole safetensors file (it ends at byte {at}); download it again")
        rest, at = rest[count:], at + count


def save(model: nn.Module, folder: str | Path, shard_bytes: int = 5 * 10**9) -> None:
    """Writes every parameter under its checkpoint names, in its own precision: one file, or shards of at most `shard_bytes` and their index.

    transformers reads it too, given a config.json (not written here). Replaces weights that the folder has."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(model, shard_bytes)
    if len(shards) == 1:
        _write(shards[0], folder / _SINGLE)
        (folder / _INDEX).unlink(missing_ok=True)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    size = sum(view.numel() * view.element_size() for shard in shards for view in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / _SINGLE).unlink(missing_ok=True)  # else it would be read in place of the shards


def _shards(model: nn.Module, shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, param, layout in layouts(model):
        if param.is_meta:
            raise ValueError(f"{name} was built on meta: there is nothing to save")
        for part in layout.parts:
            view = part.view(param.detach())
            size += view.numel() * view.element_size()
            if shards[-1] and size > shard_bytes:
                shards.append({})
                size = view.numel() * view.element_size()
            shards[-1][part.name] = view
    return shards


def _write(shard: dict[str, Tensor], path: Path) -> None:
    """Copies first: parts of a fused parameter share memory, which the format's writer refuses."""
    save_file({name: view.to("cpu", copy=True) for name, view in shard.items()}, path, metadata={"format": "pt"})


_BLOCK = 2**24 - 3  # a prime, so that no row of a matrix repeats another


def init_dummy(model: nn.Module, seed: int) -> None:
    """Random weights straight on the parameters' device: norms 1, all else normal with deviation 0.02, so that activations stay finite.

    The values come from one block of 16.8 million, read round and round: a small model's are all independent, and a large one is filled
    at the speed of memory. Equal for equal seeds on one kind of device."""
    everything = [(param, layout) for _, param, layout in layouts(model)]
    first = everything[0][0]
    size = min(_BLOCK, sum(param.numel() for param, _ in everything))
    generator = torch.Generator(first.device).manual_seed(seed)
    block = torch.empty(size, dtype=torch.float32, device=first.device).normal_(0, 0.02, generator=generator).to(first.dtype)
    cursor = 0
    for param, layout in everything:
        flat = param.detach().view(-1)
        if layout.ones:
            flat.fill_(1)
            continue
        done = 0
        while done < flat.numel():
            count = min(flat.numel() - done, size - cursor)
            flat[done : done + count] = block[cursor : cursor + count]
            done, cursor = done + count, (cursor + count) % size
