"""Loading, saving and random weights: both ways against transformers, in one file and in shards, and every way a checkpoint can be wrong."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_folder, tiny_model
from torch import Tensor

from miniinfer.batch import Batch
from miniinfer.config import ConfigError, ModelConfig
from miniinfer.kernels import REFERENCE
from miniinfer.layers.layout import layouts
from miniinfer.models import weights
from miniinfer.models.decoder import Decoder
from miniinfer.models.hub import resolve_folder
from miniinfer.models.registry import build, parameter_bytes
from miniinfer.models.weights import init_dummy, load, save

torch.set_num_threads(1)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = build(ModelConfig.from_folder(folder), dtype, "cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(torch.nan)  # what loading leaves out must show
    load(model, folder)
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The folder's single weights file after `change` of its tensors."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_round_trip_both_ways(family: str, sharded: bool, tmp_path: Path) -> None:
    model = tiny_model(family)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size="100KB" if sharded else "5GB")
    assert (theirs / "model.safetensors.index.json").exists() == sharded
    seen: list[tuple[int, int]] = []
    first = build(ModelConfig.from_folder(theirs), torch.float32, "cpu")
    load(first, theirs, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (parameter_bytes(first),) * 2 and seen == sorted(seen)

    save(first, ours, **({"shard_bytes": 100_000} if sharded else {}))
    model.config.save_pretrained(ours)
    written, wanted = tensors(ours), tensors(theirs)
    assert sorted(written) == sorted(wanted)
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    sizes = [file.stat().st_size for file in ours.glob("*.safetensors")]
    assert (len(sizes) > 3 and max(sizes) < 110_000) if sharded else len(sizes) == 1

    back, info = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loaded(ours).parameters(), first.parameters(), strict=True))


def test_saving_replaces_the_other_form(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    model = loaded(folder)
    for shard_bytes in (100_000, 10**9, 100_000):
        with torch.no_grad():
            model.norm.weight.add_(1)
        save(model, folder, shard_bytes)
        assert torch.equal(loaded(folder).norm.weight, model.norm.weight)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_stacked_experts(family: str, tmp_path: Path) -> None:
    """Transformers 5 holds experts stacked; a checkpoint saved from its modules as they are has those names."""
    model = tiny_model(family)
    folder = tiny_folder(family, tmp_path)
    wanted = loaded(folder)

    def stack(held: dict[str, Tensor]) -> None:
        for name in [name for name in held if ".experts." in name]:
            del held[name]
        name = "block_sparse_moe" if family == "mixtral" else "mlp"
        for i, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "experts"):
                held[f"model.layers.{i}.{name}.experts.gate_up_proj"] = layer.mlp.experts.gate_up_proj.detach()
                held[f"model.layers.{i}.{name}.experts.down_proj"] = layer.mlp.experts.down_proj.detach()

    got = loaded(rewrite(folder, stack))
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), wanted.parameters(), strict=True))


def test_precision_is_cast(tmp_path: Path) -> None:
    folder = tiny_folder("qwen3", tmp_path)
    exact, cast = loaded(folder), loaded(folder, torch.bfloat16)
    for a, b in zip(exact.parameters(), cast.parameters(), strict=True):
        assert b.dtype == torch.bfloat16 and torch.equal(a.bfloat16(), b)


def test_harmless_surplus_is_ignored(tmp_path: Path) -> None:
    folder = tiny_folder("qwen3", tmp_path)  # tied: the head again under its own name, and an old checkpoint's frequencies
    head = tensors(folder)["model.embed_tokens.weight"].clone()
    surplus = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    wanted = loaded(folder)
    got = loaded(rewrite(folder, lambda held: held.update(surplus)))
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), wanted.parameters(), strict=True))


def test_tied_head_alone_serves_as_the_embedding(tmp_path: Path) -> None:
    folder = tiny_folder("qwen3", tmp_path)
    wanted = loaded(folder).embed.weight
    got = loaded(rewrite(folder, lambda held: held.update({"lm_head.weight": held.pop("model.embed_tokens.weight")})))
    assert torch.equal(got.embed.weight, wanted) and got.head.weight is got.embed.weight


def test_missing_unknown_and_misshapen_are_named_at_once(tmp_path: Path) -> None:
    def spoil(held: dict[str, Tensor]) -> None:
        del held["model.layers.1.self_attn.k_proj.weight"]
        del held["lm_head.weight"]
        held["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        held["model.layers.2.mlp.up_proj.weight"] = torch.zeros(95, 64)
        held["model.norm.weight"] = torch.zeros(64, dtype=torch.float8_e4m3fn)

    folder = rewrite(tiny_folder("llama", tmp_path), spoil)
    with pytest.raises(ConfigError) as error:
        loaded(folder)
    message = str(error.value)
    assert message.startswith(str(folder)) and "\n" not in message
    assert "2 missing: model.layers.1.self_attn.k_proj.weight, lm_head.weight;" in message
    assert "1 unknown: model.layers.0.self_attn.q_proj.bias;" in message
    assert "2 unfit: model.layers.2.mlp.up_proj.weight is F32 [95, 64], expected [96, 64]" in message
    assert "model.norm.weight is F8_E4M3 [64]" in message


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    with pytest.raises(ConfigError, match=f"1 missing: {name}$"):
        loaded(rewrite(tiny_folder("mixtral", tmp_path), lambda held: held.pop(name)))


def test_long_lists_are_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"30 missing: .* and 24 more; 1 unknown: other"):
        loaded(rewrite(tiny_folder("llama", tmp_path), lambda held: (held.clear(), held.update(other=torch.zeros(1)))))


def test_unreadable_folders(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a whole safetensors file"):
        loaded(folder)
    weights.rename(folder / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors", "b": "model-1.safetensors"}}))
    with pytest.raises(ConfigError, match=r"1 of 2 shards are not there: gone\.safetensors"):
        loaded(folder)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ConfigError, match="names no shards"):
        loaded(folder)
    index.unlink()
    (folder / "model-1.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="convert them to safetensors"):
        loaded(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_are_read_in_pieces_by_several_threads(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("mixtral", tmp_path)
    wanted = tensors(folder)
    monkeypatch.setattr("miniinfer.models.weights._PIECE", 1000)  # no tensor's size is a multiple of it
    model = build(ModelConfig.from_folder(folder), dtype, "cpu")
    seen: list[int] = []
    load(model, folder, lambda done, total: seen.append(done))
    assert len(seen) > 10 * len(wanted) and seen == sorted(seen) and seen[-1] == parameter_bytes(model)
    for _, param, layout in layouts(model):
        for part in layout.parts:
            assert torch.equal(part.view(param), wanted[part.name].to(dtype)), part.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_that_shrinks_while_it_is_read(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama", tmp_path)
    monkeypatch.setattr("miniinfer.models.weights._PIECE", 1000)
    model, file = build(ModelConfig.from_folder(folder), dtype, "cpu"), folder / "model.safetensors"
    reader = weights._Reader

    def cut(*args: Any) -> Any:  # after the headers were checked
        os.truncate(file, 50_000)
        return reader(*args)

    monkeypatch.setattr(weights, "_Reader", cut)
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a whole safetensors file \(it ends at byte 50000\); download it again"):
        load(model, folder)


def test_a_model_without_storage_is_neither_filled_nor_saved(tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path)
    model = build(ModelConfig.from_folder(folder), torch.float32, "meta")
    for use in (load, save):
        with pytest.raises(ValueError, match=r"embed\.weight was built on meta"):
            use(model, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_cover_every_parameter(family: str) -> None:
    model = build(ModelConfig.from_hf(tiny_model(family).config.to_dict()), torch.float32, "cpu")
    names = []
    for (name, param, layout), (other, same) in zip(layouts(model), model.named_parameters(), strict=True):
        assert name == other and param is same
        for choice in (layout.parts, *layout.alternatives):
            counted = torch.zeros_like(param)
            for part in choice:
                part.view(counted).add_(1)
            assert torch.all(counted == 1), name
        names += [part.name for part in layout.parts]
    assert len(names) == len(set(names))


def test_a_deep_copy_keeps_its_layouts(tmp_path: Path) -> None:
    model = loaded(tiny_folder("qwen3", tmp_path))
    save(copy.deepcopy(model), tmp_path / "copy")
    assert sorted(tensors(tmp_path / "copy")) == sorted(tensors(tmp_path / "tiny-qwen3"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dummy_weights(family: str, dtype: torch.dtype) -> None:
    config = ModelConfig.from_hf(tiny_model(family).config.to_dict())

    def made(seed: int) -> Decoder:
        model = build(config, dtype, "cpu")
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(torch.nan)
        init_dummy(model, seed)
        return model

    model, again, other = made(1), made(1), made(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for (name, param, layout), unequal in zip(layouts(model), other.parameters(), strict=True):
        values = param.detach().float()
        if layout.ones:
            assert "norm" in name and torch.all(values == 1)
        else:
            assert abs(values.std().item() / 0.02 - 1) < 0.35 and not torch.equal(param, unequal)
    with torch.no_grad():
        logits = model.logits(model(Batch.packed([[1, 2, 3, 4]], REFERENCE)))
    assert torch.isfinite(logits).all() and logits.std() > 1e-3


def test_dummy_weights_go_round_a_block_that_never_repeats_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniinfer.models.weights._BLOCK", 997)
    model = build(ModelConfig.from_hf(tiny_model("llama").config.to_dict()), torch.float32, "cpu")
    init_dummy(model, 0)
    for _, param, layout in layouts(model):
        if not layout.ones:
            assert len(param.detach().unique(dim=0)) == len(param)


def test_resolve_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama", tmp_path)
    assert resolve_folder(str(folder)) == folder
    for name, message in (
        (str(tmp_path), "no config.json"),
        (str(folder / "config.json"), "is a file"),
        (str(tmp_path / "nowhere"), "there is no folder"),
        ("./nowhere", "there is no folder"),
        ("a/b/c", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_folder(name)

    asked: list[tuple[str, str | None]] = []

    def fake(name: str, revision: str | None = None, **patterns: Any) -> str:
        asked.append((name, revision))
        if name == "no/such":
            raise FileNotFoundError("404, no repository of that name")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert resolve_folder("someone/some-model", "v2") == folder
    assert asked == [("someone/some-model", "v2")]
    with pytest.raises(ConfigError, match=r"'no/such' is neither a folder here nor .* 404"):
        resolve_folder("no/such")
