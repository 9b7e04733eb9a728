"""Every family against transformers on tiny random models: logits packed and paged, greedy tokens, gradients, rotary tables."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import FAMILIES, tiny_folder, tiny_model
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from miniinfer.batch import Batch, StateView
from miniinfer.config import ModelConfig
from miniinfer.kernels import REFERENCE
from miniinfer.layers.layout import layouts
from miniinfer.layers.rotary import cos_sin_table
from miniinfer.models.decoder import Decoder
from miniinfer.models.registry import build, parameter_bytes
from miniinfer.models.weights import load

torch.set_num_threads(1)

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "llama3": LLAMA3,
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn-factor": {**YARN, "attention_factor": 0.8},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"llama-{kind}": ("llama", {"rope_parameters": rope}) for kind, rope in ROPES.items() if kind != "default"},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 48}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "mistral-window-1": ("mistral", {"sliding_window": 1}),
    "qwen2-full": ("qwen2", {"use_sliding_window": False}),
    "qwen2-layer-types": ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3-biases-window": ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen3_moe-raw-weights": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
    "qwen3_moe-sparse-step-window": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "mlp_only_layers": [], "use_sliding_window": True, "sliding_window": 12, "attention_bias": True},
    ),
    "mixtral-window": ("mixtral", {"sliding_window": 20}),
}


def load_pair(variant: str, tmp_path: Path) -> tuple[Decoder, Any]:
    """(ours, read from the folder that transformers wrote; theirs, read back by transformers)."""
    family, overrides = VARIANTS[variant]
    folder = tiny_folder(family, tmp_path, **overrides)
    ours = build(ModelConfig.from_folder(folder), torch.float32, "cpu")
    load(ours, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return ours, theirs.eval()


def prompts(*sizes: int) -> list[list[int]]:
    numbers = random.Random(5)
    return [[numbers.randrange(320) for _ in range(size)] for size in sizes]


@torch.no_grad()
def their_logits(model: Any, sequences: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < tolerance, f"relative error {error:.2e}"


class Paged:
    """The smallest runner of cached passes: pages in shuffled order and poisoned with NaN, so that a read of what was not written shows;
    pages before a window are dropped from the table and given away, as an engine may."""

    def __init__(self, model: Decoder, sequences: int, limit: int, page_size: int = 4):
        config = model.config
        self.model, self.size, self.computed = model, page_size, [0] * sequences
        self.windows = config.state_kinds
        width = -(-limit // page_size)
        pages = 1 + sequences * width
        shape = (pages, config.num_kv_heads, page_size, config.head_dim)
        self.caches = [(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(config.num_layers)]
        order = random.Random(7)
        self.free = [order.sample(range(1, pages), pages - 1) for _ in self.windows]
        self.tables = [torch.zeros(sequences, width, dtype=torch.int32) for _ in self.windows]

    def _allocate(self, row: int, end: int) -> None:
        for window, table, free in zip(self.windows, self.tables, self.free, strict=True):
            for column in range(-(-end // self.size)):
                lost = window and (column + 1) * self.size <= self.computed[row] - window + 1
                if lost and table[row, column]:
                    page = int(table[row, column])
                    free.insert(0, page)
                    for layer, (k, v) in enumerate(self.caches):
                        if self.model.config.windows[layer] == window:
                            k[page], v[page] = torch.nan, torch.nan
                    table[row, column] = 0
                elif not lost and not table[row, column]:
                    table[row, column] = free.pop()

    @torch.no_grad()
    def step(self, work: list[tuple[int, list[int]]], wanted: str = "every") -> list[Tensor]:
        """Runs (row, new tokens) pairs as one batch; logits of every new token, per pair, or of the last alone ("last"; "last among all": attention
        computes the others all the same)."""
        ids, positions, rows, starts, slots = [], [], [], [0], [[] for _ in self.windows]
        for row, tokens in work:
            begin = self.computed[row]
            end = begin + len(tokens)
            self._allocate(row, end)
            ids += tokens
            positions += range(begin, end)
            for table, out in zip(self.tables, slots, strict=True):
                out += [int(table[row, p // self.size]) * self.size + p % self.size for p in range(begin, end)]
            self.computed[row] = end
            rows.append(row)
            starts.append(starts[-1] + len(tokens))
        lengths = [self.computed[row] for row in rows]
        integers = {"ids": ids, "positions": positions, "query_start": starts, "lengths": lengths, "rows": rows}
        batch = Batch(
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in integers.items()},
            max_query=max(len(tokens) for _, tokens in work),
            max_length=max(lengths),
            ops=REFERENCE,
            kinds=tuple(StateView(torch.tensor(s, dtype=torch.int32), t, self.size) for s, t in zip(slots, self.tables, strict=True)),
            caches=self.caches,
        )
        if wanted != "every":
            batch.wanted = batch.query_start[1:] - 1
            batch.alone = torch.arange(len(work) + 1, dtype=torch.int32) if wanted == "last" else None
            return list(self.model.logits(self.model(batch)).split(1))
        return list(self.model.logits(self.model(batch)).split([len(tokens) for _, tokens in work]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens(variant: str, tmp_path: Path) -> None:
    ours, theirs = load_pair(variant, tmp_path)
    sequences = prompts(50, 1, 33)
    reference = their_logits(theirs, sequences)

    with torch.no_grad():  # packed, without cache
        packed = ours.logits(ours(Batch.packed(sequences, REFERENCE)))
    assert packed.dtype == torch.float32
    assert_close(packed, torch.cat(reference))

    numbers = random.Random(3)  # paged, in chunks of random sizes with changing neighbours
    paged = Paged(ours, len(sequences), 50)
    pieces: list[list[Tensor]] = [[] for _ in sequences]
    while any(done < len(s) for done, s in zip(paged.computed, sequences, strict=True)):
        sizes = [numbers.choice([0, 1, 1, 3, 11]) for _ in sequences]
        work = [(i, s[paged.computed[i] :][:size]) for i, (s, size) in enumerate(zip(sequences, sizes, strict=True))]
        work = [(i, tokens) for i, tokens in work if tokens]
        if work:
            for (i, _), logits in zip(work, paged.step(work), strict=True):
                pieces[i].append(logits)
    assert_close(torch.cat([torch.cat(p) for p in pieces]), torch.cat(reference))

    paged = Paged(ours, len(sequences), 50 + 64)  # greedy, batched: whole prompts, then one token each
    tokens = [int(logits[-1].argmax()) for logits in paged.step(list(enumerate(sequences)))]
    generated = [[token] for token in tokens]
    for _ in range(63):
        tokens = [int(logits[-1].argmax()) for logits in paged.step([(i, [token]) for i, token in enumerate(tokens)])]
        for output, token in zip(generated, tokens, strict=True):
            output.append(token)
    # Theirs, all at once: the outputs are the greedy ones if each is the likeliest after those before it.
    whole = [prompt + output for prompt, output in zip(sequences, generated, strict=True)]
    for prompt, output, logits in zip(sequences, generated, their_logits(theirs, whole), strict=True):
        assert output == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("wanted", ["last", "last among all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_last_layer_of_wanted_tokens_alone(variant: str, wanted: str, tmp_path: Path) -> None:
    """A pass for each sequence's last token gives that token what a pass for all gives it, and leaves the same keys and values."""
    ours, _ = load_pair(variant, tmp_path)
    sequences = prompts(50, 1, 33)
    passes = Paged(ours, len(sequences), 50), Paged(ours, len(sequences), 50)
    for size in (20, 1, 30):
        work = [(i, s[passes[0].computed[i] :][:size]) for i, s in enumerate(sequences) if passes[0].computed[i] < len(s)]
        every, last = passes[0].step(work), passes[1].step(work, wanted)
        assert [len(logits) for logits in last] == [1] * len(work)
        for whole, one in zip(every, last, strict=True):
            assert_close(one[0], whole[-1], 1e-5)
    for mine, theirs in zip(passes[1].caches, passes[0].caches, strict=True):
        assert torch.equal(torch.stack(mine).nan_to_num(7.0), torch.stack(theirs).nan_to_num(7.0))


@pytest.mark.parametrize("variant", ["mistral", "qwen2", "mixtral-window"])
def test_windows_are_exact_to_the_token(variant: str, tmp_path: Path) -> None:
    """The comparison above would notice a window that is off by one."""
    ours, theirs = load_pair(variant, tmp_path)
    sequences = prompts(50)
    wanted = their_logits(theirs, sequences)[0]
    for change in (-1, 1):
        config = dataclasses.replace(ours.config, windows=tuple(w + change if w else 0 for w in ours.config.windows))
        other = build(config, torch.float32, "cpu")
        other.load_state_dict(ours.state_dict())
        with torch.no_grad():
            got = other.logits(other(Batch.packed(sequences, REFERENCE)))
        first = next(w for w in ours.config.windows if w) + min(change, 0)  # the first position whose window differs
        assert_close(got[:first], wanted[:first])
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(got[first:], wanted[first:], 1e-3)


@pytest.mark.parametrize("variant", ["llama-biases", "mistral", "qwen3", "qwen3_moe"])
def test_gradients(variant: str, tmp_path: Path) -> None:
    """The training path: the gradient of a cross entropy, parameter by parameter."""
    ours, theirs = load_pair(variant, tmp_path)
    sequences = prompts(30, 12)
    targets = torch.tensor([t for s in prompts(12, 30) for t in s])
    torch.nn.functional.cross_entropy(ours.logits(ours(Batch.packed(sequences, REFERENCE))), targets).backward()
    logits = torch.cat([theirs(torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    torch.nn.functional.cross_entropy(logits, targets).backward()
    wanted = {name: param.grad for name, param in theirs.named_parameters()}
    compared = 0
    for _, param, layout in layouts(ours):
        assert param.grad is not None
        parts = next(p for p in (layout.parts, *layout.alternatives) if p[0].name in wanted)
        for part in parts:
            assert_close(part.view(param.grad), wanted[part.name], 1e-3)
            compared += 1
    assert compared == len(wanted)


def test_bfloat16_is_as_close_as_theirs(tmp_path: Path) -> None:
    ours, theirs = load_pair("qwen3", tmp_path)
    sequences = prompts(40)
    exact = their_logits(theirs, sequences)[0]
    wanted = their_logits(theirs.bfloat16(), sequences)[0]
    with torch.no_grad():
        model = ours.bfloat16()
        got = model.logits(model(Batch.packed(sequences, REFERENCE)))
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() < 1.2 * (wanted.float() - exact).norm()
    assert model.cos_sin.dtype == torch.float32


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_table(kind: str) -> None:
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=dict(ROPES[kind]))
    positions = torch.arange(4096)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0))
    ours = cos_sin_table(ModelConfig.from_hf({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope, 128, 4096, "cpu")
    assert ours.shape == (4096, 128) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.cat([cos[0, :, :64], sin[0, :, :64]], dim=-1), rtol=0, atol=5e-4)  # the ulp of 4096 radians


def test_dynamic_rotary_base_follows_the_length_asked_for() -> None:
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=1024, rope_parameters=dict(DYNAMIC))
    rope = ModelConfig.from_hf({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope
    cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(3000).unsqueeze(0))  # theirs, at the end of a text of 3000
    torch.testing.assert_close(cos_sin_table(rope, 128, 3000, "cpu")[:, :64], cos[0, :, :64], rtol=0, atol=2e-4)
    assert not torch.allclose(cos_sin_table(rope, 128, 1024, "cpu")[:, :64], cos[0, :1024, :64], atol=1e-2)


def test_transformers_4_config(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` at the top, as in most checkpoints there are."""
    new = tiny_model("llama", rope_parameters=LLAMA3).config.to_dict()
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old["rope_theta"] = LLAMA3["rope_theta"]
    old["rope_scaling"] = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items() if key != "rope_theta"}
    names = {"architectures": ["LlamaForCausalLM"]}
    assert ModelConfig.from_hf({**old, **names}) == ModelConfig.from_hf({**new, **names})


def test_a_chain_replaces_products_between_attentions(tmp_path: Path) -> None:
    """Where pack_chain gives a function, it gets each layer's products but the last's, and what it returns is the next layer's qkv; where that
    returns None, and after unpack, products run as ever."""
    ours, theirs = load_pair("qwen2", tmp_path)
    sequences = prompts(9, 4)
    calls = []

    class Ready:
        def __init__(self, values: Tensor) -> None:
            self.values = values

    def pack_linear(weight: Tensor, bias: Tensor | None) -> Any:
        return lambda x: x.values if isinstance(x, Ready) else torch.nn.functional.linear(x, weight, bias)

    def pack_chain(o: Tensor, gate_up: Tensor, down: Tensor, qkv: Tensor, bias: Tensor | None, mid: Tensor, after: Tensor, eps: float) -> Any:
        def chain(x: Tensor, residual: Tensor) -> Any:
            if len(x) != 13:
                return None
            calls.append(len(x))
            y, residual = REFERENCE.add_rms_norm(x @ o.T, residual, mid, eps)
            y, residual = REFERENCE.add_rms_norm(REFERENCE.silu_mul(y @ gate_up.T) @ down.T, residual, after, eps)
            return Ready(torch.nn.functional.linear(y, qkv, bias)), residual

        return chain

    ours.pack(pack_linear, pack_chain=pack_chain)
    with torch.no_grad():
        for chained in (ours.config.num_layers - 1, 0):
            got = ours.logits(ours(Batch.packed(sequences, REFERENCE)))
            assert_close(got, torch.cat(their_logits(theirs, sequences)))
            alone = ours.logits(ours(Batch.packed(sequences[1:], REFERENCE)))
            assert_close(alone, their_logits(theirs, sequences)[1])
            assert len(calls) == chained
            calls.clear()
            ours.unpack()


def test_pack_replaces_every_product(tmp_path: Path) -> None:
    ours, theirs = load_pair("qwen3", tmp_path)
    sequences = prompts(9)
    calls = []

    def pack_linear(weight: Tensor, bias: Tensor | None) -> Any:
        def product(x: Tensor) -> Tensor:
            calls.append(weight.shape)
            return torch.nn.functional.linear(x, weight, bias)

        return product

    ours.pack(pack_linear)
    for param in ours.parameters():
        param.detach().zero_()
    load(ours, tmp_path / "tiny-qwen3")  # a packed model takes new weights
    with torch.no_grad():
        got = ours.logits(ours(Batch.packed(sequences, REFERENCE)))
    assert_close(got, their_logits(theirs, sequences)[0])
    assert len(calls) == 4 * ours.config.num_layers + 1
    assert parameter_bytes(ours) == 4 * ours.config.num_parameters
