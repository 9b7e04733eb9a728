"""`miniinfer bench start`: where the time goes from a process's start to the first token.

Owns fresh processes and their clocks. One run has empty kernel caches (cold), the next finds them filled (warm), and a third is the server,
asked over HTTP. Stages are points in time, since some run side by side: weights are read while kernels compile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

from miniinfer.bench.offline import seconds_since_start
from miniinfer.config import ConfigError, EngineConfig, opt
from miniinfer.data import SamplingParams
from miniinfer.models.hub import resolve_folder
from miniinfer.utils import setup_logging, starting

PROMPT = list(range(16))


@dataclass(frozen=True, kw_only=True)
class StartBench:
    """What to print."""

    json: bool = opt(False, "print the JSON line only")


def main(config: EngineConfig, bench: StartBench) -> int:
    """Measures three starts and prints when each of their stages was done; the last line is one JSON object."""
    folder = resolve_folder(config.model, config.revision)
    files = {"tokenizer": (folder / "tokenizer.json").exists(), "weights": any(folder.glob("*.safetensors"))}
    config = dataclasses.replace(
        config,
        model=str(folder),
        skip_tokenizer_init=not (config.tokenizer or files["tokenizer"]),
        load_format=config.load_format if files["weights"] else "dummy",
    )
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TRITON_CACHE_DIR": f"{caches}/triton", "XDG_CACHE_HOME": caches}
        runs = {"cold": engine(config, environment), "warm": engine(config, environment), "server": server(config, environment)}
    if not bench.json:
        print(f"{folder.name}, {'weights from its files' if config.load_format == 'auto' else 'random weights'}: seconds since the process's start")
        print(f"{'':12}" + "".join(f"{name:>8}" for name in runs))
        for stage in runs["cold"]:
            print(f"{stage:12}" + "".join(f"{run[stage]:8.2f}" if stage in run else f"{'':8}" for run in runs.values()))
    print(json.dumps({"bench": "start", "model": folder.name, "load_format": config.load_format, **runs}))
    return 0


def engine(config: EngineConfig, environment: dict[str, str]) -> dict[str, float]:
    """The stages of an LLM in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "miniinfer.bench.start"],
        input=json.dumps(dataclasses.asdict(config)),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise ConfigError("start: the engine could not start; what it said stands above")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def server(config: EngineConfig, environment: dict[str, str]) -> dict[str, float]:
    """When `miniinfer serve` said that it was ready, and when it had answered a request for one token."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "miniinfer", "serve", "--port", "0", "--log-level", "warning", *arguments(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = next((word for word in process.stdout.readline().split() if word.startswith("http://")), None)
        if url is None:
            raise ConfigError("start: the server could not start; what it said stands above")
        ready = time.perf_counter() - begin
        models = json.load(urllib.request.urlopen(f"{url}/models"))
        body = {"model": models["data"][0]["id"], "prompt": PROMPT, "max_tokens": 1, "ignore_eos": True}
        request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        urllib.request.urlopen(request).read()
        return {"ready": round(ready, 3), "first token": round(time.perf_counter() - begin, 3)}
    finally:
        process.terminate()
        process.wait()


def arguments(config: EngineConfig) -> list[str]:
    """The options of a command line that say what differs from the defaults."""
    words = []
    for field in dataclasses.fields(EngineConfig):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if isinstance(value, bool) and value != field.default:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value != field.default:
            words += [str(value)] if field.name == "model" else [f"--{name}", str(value)]
    return words


def child(options: dict[str, Any]) -> dict[str, float]:
    """What a process measures of itself: seconds since its start at which each stage was done."""
    with starting(options["device"]):
        from miniinfer.engine.llm import LLM

        done = {"imports": seconds_since_start()}
        llm = LLM(**options)
    done |= {stage: done["imports"] + after for stage, after in llm.info["startup_seconds"].items()}
    llm.generate({"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    done["first token"] = seconds_since_start()
    return {stage: round(at, 3) for stage, at in done.items()}


if __name__ == "__main__":
    setup_logging("warning")
    print(json.dumps(child(json.load(sys.stdin))))
