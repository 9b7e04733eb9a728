"""Start-up: kernels and weights at the same time, and how long a process takes to its first token."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder

from miniinfer import kernels
from miniinfer.bench.start import arguments
from miniinfer.cli import COMMANDS, Parser, take
from miniinfer.config import ConfigError, DeviceInfo, EngineConfig, ModelConfig, resolve
from miniinfer.engine import start
from miniinfer.engine.runner import Runner, plan_pages, workspace_bytes

CPU = torch.device("cpu")


def started(folder: Path, ops: kernels.Ops) -> tuple[Runner, dict[str, float]]:
    shape = ModelConfig.from_folder(folder)
    config = resolve(EngineConfig(model=str(folder), device="cpu", num_pages=64, max_num_seqs=4), shape, DeviceInfo("cpu", 1))
    return start.start(folder, shape, config, ops, CPU, None, time.perf_counter())


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])  # two kinds of windows; dense and sparse layers
def test_kernels_are_rehearsed_while_weights_are_read(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but plain torch stands for the kernels and does run, after which the rows are of no use to a first step."""
    monkeypatch.setattr(start, "first_steps", lambda runner: None)
    folder = tiny_folder(family, tmp_path)
    wanted, _ = started(folder, kernels.REFERENCE)
    runner, seconds = started(folder, dataclasses.replace(kernels.REFERENCE, name="triton"))
    assert all(torch.equal(a, b) for a, b in zip(runner.model.parameters(), wanted.model.parameters(), strict=True))
    assert list(seconds) == sorted(seconds, key=lambda stage: seconds[stage]) and {"weights", "kernels", "ready"} <= seconds.keys()


def test_rehearsal_takes_two_layers_of_each_kind(tmp_path: Path) -> None:
    runner, _ = started(tiny_folder("qwen2", tmp_path), kernels.REFERENCE)
    whole = list(runner.model.layers)
    excerpt = start._excerpt(runner.model)
    kept = [whole.index(layer) for layer in excerpt.layers]
    windows = [layer.attention.window for layer in whole]
    assert {windows[i] for i in kept} == set(windows) and len(kept) <= 2 * len(set(windows))
    assert list(runner.model.layers) == whole and excerpt.embed is runner.model.embed


def test_in_a_rehearsal_this_threads_launches_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from miniinfer.kernels.triton.rehearsal import rehearsal

    runs: list[bool] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup: runs.append(not warmup))
    before = JITFunction.run

    def launch() -> None:
        JITFunction.run(None, grid=(1,), warmup=False)

    with ThreadPoolExecutor(1) as other:
        with pytest.raises(KeyError), rehearsal():
            launch()
            other.submit(launch).result()
            raise KeyError
        launch()
    assert runs == [False, True, True] and JITFunction.run is before


def test_a_wrong_checkpoint_ends_a_start_with_its_own_error(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(ConfigError, match=r"missing: model\.layers"):
        started(folder, dataclasses.replace(kernels.REFERENCE, name="triton"))


def test_options_for_the_server_are_those_that_differ() -> None:
    config = EngineConfig(model="some/where", load_format="dummy", enable_prefix_caching=False, skip_tokenizer_init=True, num_pages=7)
    parser = Parser("serve", "")
    COMMANDS["serve"].options(parser)
    assert take(EngineConfig, parser.parse(arguments(config))) == config


def test_bundled_model_answers_soon_after_its_process_starts() -> None:
    """The bound is for slow machines; docs/performance.md has figures. The second run finds the compiled kernels."""
    options = json.dumps({"model": "bundled", "device": "cpu"})
    runs = [
        subprocess.run([sys.executable, "-m", "miniinfer.bench.start"], input=options, capture_output=True, text=True, timeout=240) for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    seconds = json.loads(runs[1].stdout.splitlines()[-1])
    assert list(seconds)[0] == "imports" and list(seconds)[-2:] == ["ready", "first token"]
    assert list(seconds.values()) == sorted(seconds.values()) and seconds["first token"] < 60


def test_models_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets its share of the memory whatever the others have, but never more than is free."""
    gib, gpu = 1 << 30, torch.device("cuda")
    shape = ModelConfig.from_folder(tiny_folder("qwen3", tmp_path))

    def bytes_of_pages(share: float, others: int, own: int) -> float:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * gib - others - own, 100 * gib))
        config = EngineConfig(device="cuda", gpu_memory_utilization=share, max_model_len=64, max_num_seqs=4)
        resolved = resolve(config, shape, DeviceInfo("cuda", 1))
        (pages,) = plan_pages(resolved, shape, gpu, others)
        page = 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * getattr(torch, resolved.dtype).itemsize * resolved.page_size
        return (pages * page + workspace_bytes(resolved, shape)) / gib

    assert bytes_of_pages(0.9, 0, 10 * gib) == pytest.approx(80, rel=1e-3)
    assert bytes_of_pages(0.4, 50 * gib, 10 * gib) == pytest.approx(30, rel=1e-3)
    assert bytes_of_pages(0.9, 50 * gib, 10 * gib) == pytest.approx(38, rel=1e-3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * gib, 100 * gib))
    assert start._in_use(gpu) == 39 * gib and start._in_use(CPU) == 0


@pytest.mark.parametrize(
    ("rows", "inputs"), [(6144, 4096), (4096, 12_288), (24_576, 4096), (6144, 1024), (1024, 2048), (1024, 3072), (2048, 4096), (151_936, 2048)]
)
def test_a_rehearsal_meets_the_tiles_of_every_batch(rows: int, inputs: int) -> None:
    """Else the first step of a batch size would wait seconds for its kernels."""
    linear = pytest.importorskip("miniinfer.kernels.triton.linear_hopper", reason="needs Triton with Gluon")
    weight = torch.empty(rows, inputs, device="meta")
    for limit in (256, 300):
        met = {linear.tile_for(n, rows, inputs, 132) for n in start._sizes(limit) if n > 1 and linear.pays(n, weight)}
        assert {linear.tile_for(n, rows, inputs, 132) for n in range(2, limit) if linear.pays(n, weight)} == met
