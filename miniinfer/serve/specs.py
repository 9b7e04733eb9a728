"""Which models a server has, as its command line, a folder or a client says it: NAME[:VERSION]=MODEL[,option=value ...].

Owns the reading of names and options into a `Spec` each. What becomes of them is fleet.py's. Imports neither FastAPI nor torch.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from miniinfer.config import ConfigError, EngineConfig, ServerConfig

NAME = r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?"  # as hub names are, perhaps with a version
_SERVED = ("chat_template", "tool_call_parser", "reasoning_parser")  # options of a server that are a model's own
_HINTS = {**{name: hint for name, hint in typing.get_type_hints(EngineConfig).items() if name != "model"}} | {
    name: typing.get_type_hints(ServerConfig)[name] for name in _SERVED
}


@dataclass(frozen=True)
class Spec:
    """A model under its name, with its version if it has one, and how it is to be run."""

    name: str
    engine: EngineConfig
    server: ServerConfig


def specs(engine: EngineConfig, server: ServerConfig) -> list[Spec]:
    """All models of a server, the one for requests that name none first. `engine`: the command line's, whose options hold for every model, and whose
    model is the first one, or empty. ConfigError for a name that is given twice or is none, for an unknown option, and if there is no model."""
    found = [Spec(model_name(engine.model, server.served_model_name), engine, server)] if engine.model else []
    found += [read_spec(text, engine, server) for text in server.models or []]
    if server.models_dir is not None:
        found += in_folder(Path(server.models_dir), engine, server)
    if not found:
        raise ConfigError(f"models_dir: {server.models_dir} has no folder with a config.json in it")
    names = [spec.name for spec in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"model: the name '{twice}' is given twice; name them apart with NAME=MODEL")
    return found


def read_spec(text: str, engine: EngineConfig, server: ServerConfig) -> Spec:
    """From NAME=MODEL[,option=value ...], or MODEL alone."""
    name, equals, rest = text.partition("=")
    if not equals:
        return make_spec(model_name(text, None), text, {}, engine, server)
    model, *parts = rest.split(",")
    options = dict(part.partition("=")[::2] for part in parts)
    return make_spec(name, model, options, engine, server)


def make_spec(name: str, model: str, options: dict[str, Any], engine: EngineConfig, server: ServerConfig) -> Spec:
    """A checked spec; values of `options` may be text."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"model: {name!r} is no name for a model; use letters, digits, '.', '_', '-', and perhaps ':VERSION'")
    if not model:
        raise ConfigError(f"model: {name}= needs a folder or a hub name after it")
    values = {key.replace("-", "_"): value for key, value in options.items()}
    for key, value in values.items():
        if key not in _HINTS:
            raise ConfigError(f"model: '{key}' of {name} is not an option of an engine or a model (see miniinfer serve --help)")
        try:
            values[key] = msgspec.convert(value, _HINTS[key], strict=False)
        except msgspec.ValidationError as e:
            raise ConfigError(f"{key}: {value!r} will not do for {name}: {e}") from None
    mine = {key: value for key, value in values.items() if key not in _SERVED}
    return Spec(
        name,
        dataclasses.replace(engine, model=model, **mine),
        dataclasses.replace(server, **{key: value for key, value in values.items() if key in _SERVED}),
    )


def in_folder(folder: Path, engine: EngineConfig, server: ServerConfig) -> list[Spec]:
    """Every checkpoint in a folder: NAME/config.json is a model, NAME/VERSION/config.json one of its versions, the latest of which comes first."""
    if not folder.is_dir():
        raise ConfigError(f"models_dir: there is no folder {folder}")
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (path / "config.json").exists():
            found.append(make_spec(path.name, str(path), {}, engine, server))
            continue
        versions = sorted((below for below in path.iterdir() if (below / "config.json").exists()), key=_natural, reverse=True)
        found += [make_spec(f"{path.name}:{below.name}", str(below), {}, engine, server) for below in versions]
    return found


def below(folder: str, path: str) -> str:
    """A path that a client named, which must lie in a folder. ConfigError if it does not."""
    whole = (Path(folder) / path).resolve()
    if not whole.is_relative_to(Path(folder).resolve()) or not (whole / "config.json").is_file():
        raise ConfigError(f"path: {path!r} is no checkpoint folder below the server's models_dir")
    return str(whole)


def model_name(model: str, served: str | None) -> str:
    """What clients call the model: as configured, else a folder's own name, else the hub name as it is."""
    return served or (Path(model).resolve().name if Path(model).is_dir() else model)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """10 after 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", path.name) if part]
