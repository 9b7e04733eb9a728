"""Training: data packing, the optimizer, overfitting, exact resume, and the training ops against the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from miniinfer.config import ConfigError, ModelConfig
from miniinfer.kernels import REFERENCE
from miniinfer.models import registry, weights
from miniinfer.train.data import Documents, Packer, write_shard
from miniinfer.train.optim import Optimizer, orthogonalize, schedule
from miniinfer.train.trainer import OPS, TrainConfig, eager_loss_sum, held_out_loss, train

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights, and 24 random documents, half of whose tokens are learned."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(24):
        size = int(torch.randint(3, 20, (1,), generator=generator))
        documents.append((torch.randint(0, 64, (size,), generator=generator).tolist(), [0] * (size // 2) + [1] * (size - size // 2)))
    write_shard(tmp_path / "data" / "a.safetensors", documents[:16])
    write_shard(tmp_path / "data" / "b.safetensors", documents[16:], repeat=2)
    return tmp_path


def config(folder: Path, **options) -> TrainConfig:
    defaults = {"steps": 4, "tokens_per_step": 128, "micro_tokens": 64, "device": "cpu", "log_every": 1, "save_minutes": 60.0}
    return TrainConfig(model=str(folder / "model"), data=str(folder / "data"), out=str(folder / "out"), **(defaults | options))


def test_batches_hold_whole_documents_and_their_targets(folder: Path):
    documents = Documents(folder / "data")
    packer = Packer(documents, tokens=64, seed=3)
    plan = packer.epoch(0)
    assert sorted(plan.order.tolist()) == sorted([*range(16), *list(range(16, 24)) * 2])
    seen = 0
    for i in range(len(plan.cuts) - 1):
        packed = packer.batch(plan, i)
        bounds = packed.query_start.tolist()
        assert bounds[0] == 0 and bounds[-1] == 64 and bounds == sorted(bounds)
        learned = set()
        for b, d in enumerate(plan.order[plan.cuts[i] : plan.cuts[i + 1]].tolist()):
            lo, hi = int(documents.starts[d]), int(documents.starts[d + 1])
            assert packed.ids[bounds[b] : bounds[b + 1]].tolist() == documents.tokens[lo:hi].tolist()
            assert packed.positions[bounds[b] : bounds[b + 1]].tolist() == list(range(hi - lo))
            learned |= {(bounds[b] + j - 1, int(documents.tokens[lo + j])) for j in range(1, hi - lo) if documents.learned[lo + j]}
            seen += hi - lo
        used = packed.weights > 0
        assert set(zip(packed.at[used].tolist(), packed.targets[used].tolist(), strict=True)) == learned
    assert seen == documents.tokens_per_epoch


def test_batches_have_one_shape_and_depend_on_seed_and_place_only(folder: Path):
    documents = Documents(folder / "data")
    stream = Packer(documents, 64, 5).batches(0, 0)
    first = [next(stream) for _ in range(12)]
    assert len({tuple(tuple(getattr(p, n).shape) for n in ("ids", "query_start", "at", "weights")) for _, _, p in first}) == 1
    epoch, index, packed = first[7]
    again = next(Packer(documents, 64, 5).batches(epoch, index))
    assert again[:2] == (epoch, index) and torch.equal(again[2].ids, packed.ids) and torch.equal(again[2].at, packed.at)
    assert not torch.equal(next(Packer(documents, 64, 6).batches(epoch, index))[2].ids, packed.ids)


@pytest.mark.parametrize("window", [0, 5])
def test_training_attention_agrees_with_the_reference(window: int):
    generator = torch.Generator().manual_seed(1)
    bounds = torch.tensor([0, 7, 14, 14, 30, 31, 31], dtype=torch.int32)
    results = []
    for ops in (OPS, REFERENCE):
        q, k, v = (torch.randn(31, heads, 16, generator=generator.manual_seed(heads)).requires_grad_() for heads in (4, 2, 2))
        out = ops.attention(q, k, v, bounds, 0.3, window, 16)
        out.backward(torch.randn(31, 4, 16, generator=generator.manual_seed(9)))
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-4)


def test_documents_do_not_see_each_other(folder: Path):
    """A document's loss is the same alone and packed among others."""
    model = registry.build(ModelConfig.from_hf(SHAPE), torch.float32, "cpu")
    weights.init_dummy(model, 0)
    documents = Documents(folder / "data")
    packer = Packer(documents, 64, 0)
    plan = packer.epoch(0)
    together = eager_loss_sum(model, packer.batch(plan, 0), packer.longest).item()
    alone = 0.0
    for d in plan.order[plan.cuts[0] : plan.cuts[1]].tolist():
        lo, hi = int(documents.starts[d]), int(documents.starts[d + 1])
        write_shard(folder / "one" / "x.safetensors", [(documents.tokens[lo:hi].tolist(), documents.learned[lo:hi].tolist())])
        single = Packer(Documents(folder / "one"), 64, 0)
        alone += eager_loss_sum(model, single.batch(single.epoch(0), 0), single.longest).item()
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_small_set_is_learned_by_heart(folder: Path, optimizer: str):
    assert train(config(folder, steps=60, optimizer=optimizer, lr=1e-2, valid=str(folder / "data"))) == 0
    entries = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert entries[0]["loss"] > 3.5 and entries[-1]["held_out_loss"] < 0.5
    loaded = registry.build(ModelConfig.from_folder(folder / "out"), torch.float32, "cpu")
    weights.load(loaded, folder / "out")
    assert held_out_loss(loaded, folder / "data", 64) == pytest.approx(entries[-1]["held_out_loss"], rel=1e-5)


def test_a_resumed_run_equals_an_unbroken_one(folder: Path):
    def parameters() -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(folder / "out" / "model.safetensors")

    constant = {"warmup": 0.0, "decay": 0.0, "dtype": "bfloat16"}  # the rate must not depend on where the first run meant to end
    train(config(folder, steps=9, **constant))
    whole = parameters()
    train(config(folder, steps=5, **constant))
    broken = parameters()
    train(config(folder, steps=9, resume=True, **constant))
    resumed = parameters()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], broken[name]) for name in whole)
    with pytest.raises(ConfigError, match="seed"):
        train(config(folder, steps=9, resume=True, seed=1, **constant))


def test_orthogonalized_matrices_have_singular_values_near_one():
    x = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.3 and values.max() < 1.4
    torch.testing.assert_close(orthogonalize(x.mT), orthogonalize(x).mT, atol=1e-4, rtol=1e-3)


def test_adamw_agrees_with_torch(folder: Path):
    model = registry.build(ModelConfig.from_hf(SHAPE), torch.float32, "cpu")
    weights.init_dummy(model, 0)
    mine = Optimizer(model, lr=1e-2, matrix_lr=0.0, weight_decay=0.1, muon=False)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    groups = [{"params": [c], "weight_decay": 0.1 if c.ndim > 1 else 0.0} for c in copies]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=mine.betas, eps=mine.eps)
    for step in range(3):
        for i, (p, c) in enumerate(zip(model.parameters(), copies, strict=True)):
            c.grad = torch.randn(c.shape, generator=torch.Generator().manual_seed(100 * step + i)) * 1e-3
            p.grad = c.grad.clone()
        mine.step(1.0, clip=1e9)
        theirs.step()
    for p, c in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(p, c, atol=1e-6, rtol=1e-5)


def test_schedule_rises_holds_and_falls():
    values = [schedule(p, warmup=0.1, decay=0.5) for p in (0.0, 0.05, 0.1, 0.4, 0.75, 1.0)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": None}, "steps"),
        ({"micro_tokens": 48}, "micro_tokens"),
        ({"micro_tokens": 16, "tokens_per_step": 16}, "longest document"),
        ({"resume": True}, "resume"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_bad_options_are_named(folder: Path, options: dict, message: str):
    if message == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        train(config(folder, **options))


def test_bad_data_is_named(folder: Path):
    with pytest.raises(ConfigError, match="shards"):
        Documents(folder / "nowhere")
    write_shard(folder / "data" / "c.safetensors", [([1, 64, 2], [1, 1, 1])])
    with pytest.raises(ConfigError, match="vocabulary"):
        train(config(folder))
