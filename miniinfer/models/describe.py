"""What a checkpoint is and the memory it needs, from its small files alone: `miniinfer info`.

Owns the arithmetic and what is looked at; how it is printed is cli.py's. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniinfer.config import ConfigError, EngineConfig, ModelConfig, opt, read_json
from miniinfer.models.hub import resolve_folder

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """What to describe. A folder with only a config.json will do."""

    model: str = opt("bundled", "checkpoint folder, hub name, or 'bundled'")
    revision: str | None = opt(None, "branch, tag or commit of a hub name")
    length: int | None = opt(None, "tokens of each request, prompt plus output (the model's limit if not given)")
    requests: int = opt(1, "requests at once")
    dtype: str = opt("auto", "precision of weights and KV", ("auto", "bfloat16", "float16", "float32"))
    json: bool = opt(False, "print one JSON object")

    def __post_init__(self) -> None:
        for name in ("length", "requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, got {value}")


def describe(options: InfoOptions) -> dict[str, Any]:
    """What a checkpoint is and the memory it needs: bytes, tokens, counts. Reads only the folder's small files."""
    folder = resolve_folder(options.model, options.revision)
    shape = ModelConfig.from_folder(folder)
    dtype = shape.dtype if options.dtype == "auto" else options.dtype
    size = 4 if dtype == "float32" else 2
    length = options.length or shape.max_position
    weights = shape.num_parameters * size
    idle = sum(shape.moe_layers) * (shape.num_experts - shape.experts_per_token) * 3 * shape.hidden_size * shape.expert_intermediate_size
    kv = {device: kv_bytes(shape, options.requests, length, page, size) for device, page in (("cpu", 16), ("cuda", 64))}
    return {
        "model": options.model,
        "architecture": shape.family,
        "shape": _shape(shape),
        "parameters": shape.num_parameters,
        "active_parameters": shape.num_parameters - idle,
        "dtype": dtype,
        "weight_bytes": weights,
        "context": shape.max_position,
        "rope": shape.rope.kind if shape.rope.kind == "default" else f"{shape.rope.kind} x {shape.rope.factor:g}",
        "files": _files(folder),
        "kv_bytes_per_token": shape.kv_bytes_per_token(size),
        "length": length,
        "requests": options.requests,
        "kv_bytes": kv,
        "needs_bytes": {"cpu": weights + kv["cpu"], "cuda": round((weights + kv["cuda"]) / EngineConfig.gpu_memory_utilization)},
        "available_bytes": _available_bytes(),
    }


def kv_bytes(shape: ModelConfig, requests: int, length: int, page_size: int, element_bytes: int) -> int:
    """Bytes of the KV pages for `requests` of `length` tokens, counted as the engine makes them: one page of slack each and two of its own,
    as many for layers with a sliding window as for the others."""
    pages = 2 + requests * (math.ceil(length / page_size) + 1)
    return pages * page_size * shape.kv_bytes_per_token(element_bytes)


def _shape(shape: ModelConfig) -> str:
    parts = [
        f"{shape.num_layers} layers, hidden {shape.hidden_size}",
        f"{shape.num_heads} query and {shape.num_kv_heads} KV heads of {shape.head_dim}",
        f"{shape.num_experts} experts of {shape.expert_intermediate_size}, {shape.experts_per_token} used"
        if shape.num_experts
        else f"FFN {shape.intermediate_size}",
        f"vocabulary {shape.vocab_size}{' (tied)' if shape.tie_embeddings else ''}",
    ]
    if any(shape.windows):
        parts.append(f"sliding window {max(shape.windows)} in {sum(map(bool, shape.windows))} layers")
    return ", ".join(parts)


def _files(folder: Path) -> str:
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    settings = folder / "tokenizer_config.json"
    template = (folder / "chat_template.jinja").exists() or (settings.exists() and bool(read_json(settings).get("chat_template")))
    parts = [
        f"{len(sizes)} safetensors of {sum(sizes) / GIB:.2f} GiB" if sizes else "no weights (--load-format dummy makes some)",
        "tokenizer" if (folder / "tokenizer.json").exists() else "no tokenizer",
        "chat template" if template else "no chat template",
    ]
    return ", ".join(parts)


def _available_bytes() -> int | None:
    """Memory that Linux says a new process could use; None elsewhere."""
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
