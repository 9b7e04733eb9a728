"""The training loop: next-token prediction over packed documents, on one device.

Owns TrainConfig, the step, progress, logs and plot. Model, ops, data, optimizer and files come from elsewhere; nothing here knows a family.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from miniinfer.config import ConfigError, ModelConfig, opt
from miniinfer.kernels import Ops, training
from miniinfer.layers.layout import layouts
from miniinfer.models import registry, weights
from miniinfer.models.decoder import Decoder
from miniinfer.train import checkpoint
from miniinfer.train.data import Documents, Packed, Packer, ahead, as_batch
from miniinfer.train.loss import cross_entropy
from miniinfer.train.optim import Optimizer, schedule
from miniinfer.utils import get_logger

log = get_logger(__name__)
OPS = Ops.overlay("training", training)
LossSum = Callable[[Packed], Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train a model from scratch or to go on with one. The run ends at `steps` or after `minutes`, whichever is first."""

    model: str = opt("", "folder with config.json and tokenizer: the shape to train; weights in it are where training starts")
    data: str = opt("", "folder of training shards (safetensors, see train/data.py)")
    out: str = opt("runs/train", "folder for the trained checkpoint, log.jsonl and loss.png")
    valid: str | None = opt(None, "folder of shards to measure the held-out loss on")
    steps: int | None = opt(None, "optimizer steps")
    minutes: float | None = opt(None, "wall time for training; the learning rate still decays to zero")
    tokens_per_step: int = opt(131072, "tokens between two optimizer steps")
    micro_tokens: int = opt(131072, "tokens of one forward and backward pass; must divide tokens_per_step")
    optimizer: str = opt("muon", "muon: Muon for matrices, AdamW for the rest", ("muon", "adamw"))
    lr: float = opt(3e-3, "peak learning rate of AdamW")
    matrix_lr: float = opt(0.02, "peak learning rate of Muon")
    weight_decay: float = opt(0.01, "decoupled weight decay of matrices")
    warmup: float = opt(0.02, "share of the run in which the learning rate rises")
    decay: float = opt(0.5, "share of the run in which the learning rate falls")
    clip: float = opt(1.0, "largest gradient norm")
    dtype: str = opt("auto", "precision of weights and activations; masters are fp32", ("auto", "bfloat16", "float32"))
    device: str = opt("auto", "auto takes a GPU where there is one", ("auto", "cuda", "cpu"))
    compile: bool = opt(False, "compile the model with torch.compile; falls back to eager if that fails")
    seed: int = opt(0, "seed of the first weights and of the order of documents")
    log_every: int = opt(10, "steps between two lines of the log")
    save_minutes: float = opt(10.0, "minutes between two checkpoints to resume from; 0: none")
    resume: bool = opt(False, "go on from the checkpoint in the output folder")

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: a folder is needed")
        if self.steps is None and self.minutes is None:
            raise ConfigError("steps: say how long to train, by --steps or --minutes")
        if self.tokens_per_step % self.micro_tokens:
            raise ConfigError(f"micro_tokens: {self.micro_tokens} does not divide tokens_per_step={self.tokens_per_step}")
        if self.optimizer not in ("muon", "adamw"):
            raise ConfigError(f"optimizer: {self.optimizer!r} is not one of muon, adamw")


def train(config: TrainConfig) -> int:
    """Runs to the end, saves the checkpoint into `config.out` and returns 0. Raises ConfigError for input that cannot work."""
    Run(config).loop()
    return 0


class Run:
    """One training run: the model, its optimizer, the data and where it stands."""

    def __init__(self, config: TrainConfig):
        self.config = config
        gpu = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
        if gpu and not torch.cuda.is_available():
            raise ConfigError("device: cuda was asked for, but torch sees no GPU here; use --device cpu")
        self.device = torch.device("cuda" if gpu else "cpu")
        self.source, self.out = Path(config.model), Path(config.out)
        shape = ModelConfig.from_folder(self.source)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" or (config.dtype == "auto" and gpu) else torch.float32
        documents = Documents(config.data)
        if int(documents.tokens.max()) >= shape.vocab_size:
            raise ConfigError(f"data: token {int(documents.tokens.max())} is outside the model's vocabulary of {shape.vocab_size}")
        self.packer = Packer(documents, config.micro_tokens, config.seed)
        if self.packer.longest > shape.max_position:
            raise ConfigError(f"data: a document of {self.packer.longest} tokens is longer than the model's {shape.max_position} positions")
        self.model = _initial(shape, dtype, self.device, self.source, config.seed)
        self.optimizer = Optimizer(self.model, config.lr, config.matrix_lr, config.weight_decay, config.optimizer == "muon")
        self.step, self.elapsed, self.epoch, self.index = 0, 0.0, 0, 0
        if config.resume:
            self._restore()
        self.loss_sum = self._loss_sum()
        log.info(
            "%.2f M parameters in %s on %s, %.1f M tokens an epoch, %d documents and %d targets at most in a pass",
            shape.num_parameters / 1e6, str(dtype)[6:], self.device, documents.tokens_per_epoch / 1e6,
            self.packer.max_documents, self.packer.max_targets,
        )  # fmt: skip

    def loop(self) -> None:
        """Trains, logs, saves."""
        config = self.config
        batches = ahead(self.packer.batches(self.epoch, self.index), self.device)
        self.out.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic() - self.elapsed
        saved, mark, marked = time.monotonic(), self.step, time.monotonic()
        with open(self.out / "log.jsonl", "a" if config.resume else "w", encoding="utf-8") as lines:
            bar = Progress()
            while (progress := self._progress()) < 1:
                factor = schedule(progress, config.warmup, config.decay)
                loss, norm = self._step(batches, factor)
                self.step += 1
                if self.step % config.log_every == 0 or self.step == 1:
                    entry: dict[str, Any] = {"step": self.step, "loss": loss.item(), "norm": norm.item(), "factor": factor}
                    now = time.monotonic()  # .item() has waited for the device
                    rate = (self.step - mark) * config.tokens_per_step / (now - marked)
                    entry |= {"elapsed": now - begin, "epoch": self.epoch, "tokens_per_s": rate}
                    mark, marked = self.step, now
                    _write_line(lines, entry)
                    bar.show(progress, entry)
                    if not math.isfinite(entry["loss"]):
                        raise FloatingPointError(f"the loss is {entry['loss']} at step {self.step}; lower lr and matrix_lr")
                self.elapsed = time.monotonic() - begin
                if config.save_minutes and time.monotonic() - saved > 60 * config.save_minutes:
                    self.save()
                    saved = time.monotonic()
            bar.close()
            checkpoint.save(self.out, self.model, self.source, self._state() if config.save_minutes else None)
            if config.valid:
                held_out = held_out_loss(self.model, config.valid, config.micro_tokens)
                _write_line(lines, {"step": self.step, "held_out_loss": held_out})
                log.info("held-out loss %.4f nats a token", held_out)
        plot(self.out)

    def save(self) -> None:
        """A checkpoint from which `resume` goes on."""
        checkpoint.save(self.out, self.model, self.source, self._state())

    def _state(self) -> dict[str, Any]:
        place = {"step": self.step, "elapsed": self.elapsed, "epoch": self.epoch, "index": self.index}
        return {"optimizer": self.optimizer.state_dict(), "place": place, "config": {k: str(v) for k, v in asdict(self.config).items()}}

    def _restore(self) -> None:
        state = checkpoint.load_state(self.out, self.device)
        for name in ("micro_tokens", "tokens_per_step", "seed", "optimizer"):
            was, now = state["config"][name], str(getattr(self.config, name))
            if was != now:
                raise ConfigError(f"{name}: the run to resume had {was}, not {now}; it would not go on exactly")
        self.optimizer.load_state_dict(state["optimizer"])
        place = state["place"]
        self.step, self.elapsed, self.epoch, self.index = place["step"], place["elapsed"], place["epoch"], place["index"]

    def _progress(self) -> float:
        by_steps = self.step / self.config.steps if self.config.steps else 0.0
        by_time = self.elapsed / (60 * self.config.minutes) if self.config.minutes else 0.0
        return max(by_steps, by_time)

    def _step(self, batches: Iterator[tuple[int, int, Packed]], factor: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; (mean loss, gradient norm), both still on the device."""
        parts = []
        for _ in range(self.config.tokens_per_step // self.config.micro_tokens):
            epoch, index, packed = next(batches)
            self.epoch, self.index = epoch, index + 1
            parts.append(packed)
        total = torch.stack([p.weights.sum() for p in parts]).sum().clamp(min=1)
        loss = torch.zeros((), device=self.device)
        for packed in parts:
            part = self.loss_sum(packed) / total
            part.backward()
            loss += part.detach()
        return loss, self.optimizer.step(factor, self.config.clip)

    def _loss_sum(self) -> LossSum:
        """The loss of a micro-batch, compiled if that was asked for and works."""
        longest = self.packer.longest

        def eager(packed: Packed) -> Tensor:
            return eager_loss_sum(self.model, packed, longest)

        if not self.config.compile:
            return eager
        compiled = torch.compile(_forward, dynamic=False)

        def fast(packed: Packed) -> Tensor:
            tensors = (packed.ids, packed.positions, packed.query_start, packed.at, packed.targets, packed.weights)
            return compiled(self.model, *tensors, longest)

        try:
            began = time.monotonic()
            fast(self.packer.batch(self.packer.epoch(0), 0).to(self.device)).backward()
            for param in self.model.parameters():
                param.grad = None
            log.info("compiled in %.0f s", time.monotonic() - began)
        except Exception as e:  # whatever the compiler stumbles over: training can go on without it
            log.warning("torch.compile failed (%s: %s): eager instead, slower", type(e).__name__, str(e).strip().split("\n")[0])
            return eager
        return fast


def _forward(
    model: Decoder, ids: Tensor, positions: Tensor, query_start: Tensor, at: Tensor, targets: Tensor, weights: Tensor, longest: int
) -> Tensor:
    hidden = model(as_batch(ids, positions, query_start, longest, OPS))
    return cross_entropy(model.logits(hidden[at]), targets, weights)


def eager_loss_sum(model: Decoder, packed: Packed, longest: int) -> Tensor:
    """Sum of weighted losses of a micro-batch. Logits are computed only where a token is learned."""
    return _forward(model, packed.ids, packed.positions, packed.query_start, packed.at, packed.targets, packed.weights, longest)


@torch.no_grad()
def held_out_loss(model: Decoder, folder: str | Path, micro_tokens: int) -> float:
    """Mean -log p in nats over the learned tokens of a folder's documents, each taken once."""
    packer = Packer(Documents(folder), micro_tokens, 0)
    plan, device = packer.epoch(0), next(model.parameters()).device
    total, count = 0.0, 0.0
    for i in range(len(plan.cuts) - 1):
        packed = packer.batch(plan, i).to(device)
        total += eager_loss_sum(model, packed, packer.longest).item()
        count += packed.weights.sum().item()
    return total / max(count, 1.0)


def _initial(config: ModelConfig, dtype: torch.dtype, device: torch.device, source: Path, seed: int) -> Decoder:
    """The folder's weights, else random ones: normal with deviation 0.02, what writes to the residual scaled down by depth [GPT-2]."""
    model = registry.build(config, dtype, device)
    if any(source.glob("*.safetensors")):
        weights.load(model, source)
        return model
    weights.init_dummy(model, seed)
    with torch.no_grad():
        for _, param, layout in layouts(model):
            if layout.parts[0].name.endswith(("o_proj.weight", "down_proj.weight")):
                param.mul_((2 * config.num_layers) ** -0.5)
    return model


class Progress:
    """One line on the terminal, rewritten; plain lines every half minute where there is no terminal."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.shown = 0.0

    def show(self, progress: float, entry: dict[str, Any]) -> None:
        """Draws the state of the run."""
        width = 24
        filled = int(progress * width)
        drawn = "#" * filled + "." * (width - filled)
        text = f"[{drawn}] {progress:4.0%} step {entry['step']} loss {entry['loss']:.4f} {entry['tokens_per_s'] / 1e3:.0f} k tok/s"
        if self.terminal:
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.shown > 15:
            self.shown = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self.terminal:
            print(file=sys.stderr)


def _write_line(lines: TextIO, entry: dict[str, Any]) -> None:
    lines.write(json.dumps(entry) + "\n")
    lines.flush()


def plot(folder: Path) -> None:
    """loss.png from log.jsonl, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no loss plot: matplotlib is not installed")
        return
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    entries = [e for e in entries if "loss" in e]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([e["step"] for e in entries], [e["loss"] for e in entries], linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=120)
