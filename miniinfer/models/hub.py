"""From a model's name to a folder on this machine: a local folder, the bundled model, or a hub name. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from miniinfer.config import ConfigError

BUNDLED = Path(__file__).parent.parent / "assets" / "bundled"


def resolve_folder(model: str, revision: str | None = None, needed: str = "config.json") -> Path:
    """The checkpoint folder of `model`; a hub name is downloaded into huggingface_hub's cache. Raises ConfigError if there is none, or
    none with the file `needed` ("tokenizer.json" for a folder that holds only that)."""
    if model == "bundled":
        if not (BUNDLED / "config.json").exists():
            raise ConfigError("model: this installation carries no bundled model; name a folder or a hub model")
        return BUNDLED
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / needed).exists():
            raise ConfigError(f"model: the folder {folder} has no {needed}")
        return folder
    if folder.exists():
        raise ConfigError(f"model: {folder} is a file; name the folder that holds {needed}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model):
        raise ConfigError(f"model: there is no folder {folder}")
    return _download(model, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most starts need no hub

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],  # the vendors' own formats of the same weights
        )
    except Exception as e:  # not found, gated, no network, no space: the library's words say which
        reason = " ".join(str(e).split())
        raise ConfigError(f"model: '{name}' is neither a folder here nor could it be fetched from the hub: {reason}") from e
    return Path(folder)
