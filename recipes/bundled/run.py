"""The whole recipe in one go, within a given time: generate, train, save, evaluate.

usage: run.py OUT [--minutes 8.5] [--generate-seconds 60] [--text FILE] [--small]
OUT gets the weights in pieces below 16 MB (join with cat model.safetensors.*), log.jsonl, loss.png, eval.json and summary.json.
`--small` is a dry run of minutes on a CPU: a tiny model, little data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import evaluate
import generate
import torch
from chat import ASSETS, ROOT, Encoder

from miniinfer.kernels import REFERENCE
from miniinfer.train.trainer import OPS, Run, TrainConfig, held_out_loss
from miniinfer.utils import setup_logging

PIECE = 15_000_000  # bytes
RESERVE = 70.0  # seconds kept for saving and evaluating


def shape(folder: Path, small: bool) -> Path:
    """A copy of the checkpoint folder without weights; `small` shrinks the model."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in ASSETS.glob("*.json"):
        shutil.copy(path, folder / path.name)
    if small:
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def probe() -> None:
    """Proves in seconds that attention for training works on this GPU, forward and backward, before anything long begins."""
    generator = torch.Generator("cuda").manual_seed(0)
    bounds = torch.tensor([0, 5, 133, 133, 200, 256, 256], dtype=torch.int32, device="cuda")
    results = []
    q, k, v, g = (torch.randn(256, heads, 64, device="cuda", generator=generator) for heads in (4, 2, 2, 4))
    for ops, dtype in ((REFERENCE, torch.float32), (OPS, torch.bfloat16)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = ops.attention(*inputs, bounds, 0.125, 0, 128)
        out.backward(g.to(dtype))
        results.append([out.detach().float(), *(x.grad.float() for x in inputs if x.grad is not None)])
    for name, right, mine in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        error = ((right - mine).norm() / right.norm()).item()
        print(f"attention {name}: relative error {error:.1e}", flush=True)
        assert error < 0.02, name


def main() -> None:
    """Entry point."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.5, help="wall time of the whole command")
    parser.add_argument("--generate-seconds", type=float, default=60)
    parser.add_argument("--generate-tokens", type=int, default=300_000_000)
    parser.add_argument("--each", type=int, default=200, help="evaluated problems of each kind")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="checkpoint folder to start from instead of random weights")
    parser.add_argument("--text", type=Path, default=ROOT / ".data" / "text.json.gz")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--probe", action="store_true", help="only check the GPU's attention")
    args = parser.parse_args()
    if args.probe:
        return probe()
    setup_logging()
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = not args.small and torch.cuda.is_available()
    if gpu:  # in its own process: this one must not touch the GPU before it has forked
        subprocess.run([sys.executable, __file__, str(args.out), "--probe"], check=True)
    summary: dict[str, Any] = {"torch": torch.__version__}

    work = Path(tempfile.mkdtemp(prefix="bundled-"))
    aside = multiprocessing.get_context("fork").Pool(1)
    problems = aside.apply_async(evaluate.problems, (args.each,))
    text = args.text if args.text.exists() else None
    counts = generate.everything(work / "data", args.generate_tokens, args.generate_seconds, os.cpu_count() or 1, text)
    summary |= {"tokens": counts, "generate_s": time.monotonic() - began}
    print(json.dumps(summary), flush=True)

    size = 8192 if args.small else 131072
    config = TrainConfig(
        model=str(args.start or shape(work / "shape", args.small)), data=str(work / "data" / "train"), out=str(work / "run"),
        minutes=args.minutes, tokens_per_step=size, micro_tokens=size,
        lr=args.lr, matrix_lr=args.matrix_lr, compile=gpu, device="cuda" if gpu else "cpu", save_minutes=0, seed=args.seed,
    )  # fmt: skip
    run = Run(config)
    reserve = 20.0 if args.small else RESERVE
    left = max(30.0, args.minutes * 60 - (time.monotonic() - began) - reserve)
    run.config = dataclasses.replace(config, minutes=left / 60)
    summary |= {"train_s": left, "parameters": run.model.config.num_parameters}
    summary |= {"device": torch.cuda.get_device_name() if gpu else "cpu"}
    print(json.dumps(summary), flush=True)
    try:
        run.loop()
    finally:
        deliver(work / "run", args.out)
    summary |= {"steps": run.step, "trained_tokens": run.step * size, "epochs": run.epoch + 1}
    steps: list[tuple[str, Any]] = [
        ("held_out_loss", lambda: held_out_loss(run.model, work / "data" / "valid", size)),
        ("held_out_text_loss", lambda: held_out_loss(run.model, work / "data" / "valid_text", size)),
        ("eval", lambda: evaluate.evaluate(lambda prompts: evaluate.greedy(run.model, prompts), Encoder(), problems.get())),
    ]
    for name, step in steps:  # whatever goes wrong here must not cost the weights
        try:
            value = step()
            if name == "eval":
                (args.out / "eval.json").write_text(json.dumps(value, indent=1))
                print(evaluate.table(value))
                print("\n".join(f"{k!r} -> {v!r}" for k, v in value["probes"].items()))
            else:
                summary[name] = value
        except Exception:
            traceback.print_exc()
        summary["wall_s"] = time.monotonic() - began
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary), flush=True)


def deliver(run: Path, out: Path) -> None:
    """Weights in pieces, log and plot."""
    for name in ("log.jsonl", "loss.png"):
        if (run / name).exists():
            shutil.copy(run / name, out / name)
    path = run / "model.safetensors"
    if path.exists():
        data = path.read_bytes()
        for i in range(0, len(data), PIECE):
            (out / f"model.safetensors.{i // PIECE}").write_bytes(data[i : i + PIECE])


if __name__ == "__main__":
    main()
