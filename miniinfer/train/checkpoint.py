"""Where a training run stands, on disk: the weights as an ordinary checkpoint folder, and beside them what is needed to go on exactly.

Owns the file `training.pt` and the copying of config and tokenizer. The weights' own format is models/weights.py's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miniinfer.config import ConfigError
from miniinfer.models import weights

STATE = "training.pt"


def save(folder: Path, model: nn.Module, source: Path, state: dict[str, Any] | None) -> None:
    """Writes model, config and tokenizer (copied from `source`), and `state` if there is one. A crash in between leaves the old state in place."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        if path.parent.resolve() != folder.resolve() and "safetensors" not in path.name:
            shutil.copy(path, folder / path.name)
    weights.save(model, folder)
    if state is not None:
        part = folder / (STATE + ".part")
        torch.save(state, part)
        os.replace(part, folder / STATE)


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """The state of `save`. ConfigError if there is none."""
    path = folder / STATE
    if not path.exists():
        raise ConfigError(f"resume: {path} does not exist; leave out --resume to start anew")
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state
