"""Every option once: what a model is (read from its folder) and how an engine or a server is to run it.

Owns ModelConfig, EngineConfig, ServerConfig and `resolve`, which turns "auto" into values. Knows nothing of torch, so that
`--help` and the API process stay light. Field descriptions here are the only source of the command line's help.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ConfigError", "DeviceInfo", "EngineConfig", "ModelConfig", "RopeConfig", "ServerConfig", "opt", "resolve"]


class ConfigError(ValueError):
    """The user's input cannot work; the message names the field or file and the mend. The CLI prints it and exits with 2."""


def opt(default: Any, help: str, choices: tuple[str, ...] = (), flag: str = "") -> Any:
    """A dataclass field with the one description that `--help` and the docs derive from. `flag`: its option's name, if not the field's,
    and perhaps a letter before it."""
    return field(default=default, metadata={"help": help, "choices": choices, "flag": flag})


# --------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding as `config.json` states it; formulas in layers/rotary.py."""

    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None = 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, DeepSeek's form
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the correction range to whole dimensions


DETERMINISTIC_CHUNK = 3  # tokens of which a step must hold at least one prompt's, if no prompt's may be computed alone

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}

# What an absent key of `config.json` means, where transformers' config classes give it a value of their own. A null is not an absent key.
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "qwen3_moe": {
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2},
}  # fmt: skip

# Keys of other models' formulas. A checkpoint that sets one would run and answer wrongly, so it is refused.
_FOREIGN = (
    "quantization_config", "compression_config", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale",
    "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "scale_emb", "scale_depth", "no_rope_layers",
    "attention_chunk_size", "shared_expert_intermediate_size", "n_shared_experts", "use_parallel_residual", "clip_qkv",
)  # fmt: skip
_ROPE_PLAIN_KEYS = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "finetuned"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's shape, independent of the family's own names for it."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()  # per layer: sliding window in tokens, 0 = full attention
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    renormalize_experts: bool = True
    moe_layers: tuple[bool, ...] = ()  # per layer: does a mixture of experts stand in for the MLP
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.num_layers)
        if not self.moe_layers:
            object.__setattr__(self, "moe_layers", (False,) * self.num_layers)

    @staticmethod
    def from_folder(path: str | Path) -> ModelConfig:
        """Reads `config.json` (and `generation_config.json` for the end-of-text ids). Raises ConfigError naming the file or key."""
        folder = Path(path)
        raw = read_json(folder / "config.json")
        generation = read_generation_config(folder)
        if generation.get("eos_token_id") is not None:
            raw = {**raw, "eos_token_id": generation["eos_token_id"]}
        return ModelConfig.from_hf(raw, source=str(folder / "config.json"))

    @staticmethod
    def from_hf(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Builds from a parsed `config.json`, of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

        Raises ConfigError naming the key for what is missing, contradictory, or would change the model's answers in a way we do not compute."""
        names = raw.get("architectures") or []
        family = next((ARCHITECTURES[n] for n in names if n in ARCHITECTURES), None)
        if family is None and not names and raw.get("model_type") in ARCHITECTURES.values():
            family = raw["model_type"]
        if family is None:
            asked = ", ".join(names) or repr(raw.get("model_type"))
            raise ConfigError(f"{source}: architecture {asked} is not supported; supported: {', '.join(ARCHITECTURES)}")
        raw = {**_ABSENT[family], **raw}
        _refuse(raw, source)

        def size(key: str, default: int | None = None) -> int:
            value = default if raw.get(key) is None else raw[key]
            if value is None:
                raise ConfigError(f"{source}: the key '{key}' is missing")
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{source}: '{key}' must be a positive integer, got {value!r}")
            return value

        layers, heads, hidden = size("num_hidden_layers"), size("num_attention_heads"), size("hidden_size")
        kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", hidden // heads)
        if heads % kv_heads:
            raise ConfigError(f"{source}: 'num_attention_heads' ({heads}) is not a multiple of 'num_key_value_heads' ({kv_heads})")
        if head_dim % 2:
            raise ConfigError(f"{source}: 'head_dim' ({head_dim}) must be even for rotary positions")
        moe = family in ("qwen3_moe", "mixtral")
        experts = size("num_experts", size("num_local_experts", 128 if family == "qwen3_moe" else 8)) if moe else 0
        top_k = size("num_experts_per_tok") if moe else 0
        if top_k > experts:
            raise ConfigError(f"{source}: 'num_experts_per_tok' ({top_k}) is more than the {experts} experts")
        bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe")
        eos = raw.get("eos_token_id")
        return ModelConfig(
            family=family,
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, source),
            max_position=size("max_position_embeddings", 2048),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
            qk_norm=family in ("qwen3", "qwen3_moe"),
            windows=_windows(raw, family, layers, source),
            num_experts=experts,
            experts_per_token=top_k,
            expert_intermediate_size=size("moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size") if moe else 0,
            renormalize_experts=family == "mixtral" or bool(raw.get("norm_topk_prob", False)),
            moe_layers=_moe_layers(raw, family, layers),
            dtype=_dtype(raw, source),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            bos_token_id=raw.get("bos_token_id"),
        )

    @property
    def state_kinds(self) -> tuple[int, ...]:
        """The distinct kinds of KV state, as windows (0 = full), full first. Every layer belongs to exactly one."""
        return tuple(sorted(set(self.windows)))

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes that one token's keys and values take over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes

    @property
    def num_parameters(self) -> int:
        """Parameters, counted from the shape (all experts, tied embeddings once)."""
        h, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = h * (q + 2 * kv) + q * h + (q + 2 * kv if self.qkv_bias else 0) + (h if self.o_bias else 0)
        attention += 2 * self.head_dim if self.qk_norm else 0
        dense = 3 * h * self.intermediate_size + ((2 * self.intermediate_size + h) if self.mlp_bias else 0)
        sparse = self.num_experts * (3 * h * self.expert_intermediate_size + h)
        mlps = sum(sparse if m else dense for m in self.moe_layers)
        return self.num_layers * (attention + 2 * h) + mlps + h + self.vocab_size * h * (1 if self.tie_embeddings else 2)


def _refuse(raw: dict[str, Any], source: str) -> None:
    """ConfigError for a key that asks for a computation which we do not do."""
    for key in _FOREIGN:
        if raw.get(key):
            raise ConfigError(f"{source}: '{key}' is set ({str(raw[key])[:80]}), which is not supported")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"{source}: 'hidden_act' {raw['hidden_act']!r} is not supported; supported: silu")


def _dtype(raw: dict[str, Any], source: str) -> str:
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"{source}: dtype '{dtype}' is not supported; supported: bfloat16, float16, float32")
    return dtype


def _rope(raw: dict[str, Any], source: str) -> RopeConfig:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    required = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",)}
    required["llama3"] = ("factor", "low_freq_factor", "high_freq_factor")
    if kind not in required:
        raise ConfigError(f"{source}: rope type '{kind}' is not supported; supported: {', '.join(required)}")
    if absent := [key for key in required[kind] if scaling.get(key) is None]:
        raise ConfigError(f"{source}: rope type '{kind}' needs '{absent[0]}'")
    keys = {f.name for f in dataclasses.fields(RopeConfig)}
    if unknown := [key for key, value in scaling.items() if key not in keys | _ROPE_PLAIN_KEYS and value is not None]:
        raise ConfigError(f"{source}: the rope parameter '{unknown[0]}' is not supported")
    for partial in (scaling.get("partial_rotary_factor"), raw.get("partial_rotary_factor")):
        if partial not in (None, 1):
            raise ConfigError(f"{source}: 'partial_rotary_factor' {partial} is not supported; only whole heads are rotated")
    # As transformers reads it: dynamic scaling always counts from the model's own limit, the others from the length before stretching.
    limit = raw.get("max_position_embeddings", 2048)
    original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings") or limit
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
    values = {k: v for k, v in scaling.items() if k in keys and v is not None} if kind != "default" else {}
    return RopeConfig(kind=kind, theta=float(theta), original_max_position=limit if kind == "dynamic" else original, **values)


def _windows(raw: dict[str, Any], family: str, layers: int, source: str) -> tuple[int, ...]:
    """Per-layer sliding windows: Mistral, Mixtral and (switched on) Qwen3-MoE use one everywhere, Qwen2 and 3 as `layer_types` says or else
    from `max_window_layers` on, Llama none."""
    window = raw.get("sliding_window") or 0
    if family == "llama" or (family.startswith("qwen") and not raw.get("use_sliding_window", False)):
        window = 0
    first = raw["max_window_layers"] if family in ("qwen2", "qwen3") else 0
    for key, value in (("sliding_window", window), ("max_window_layers", first)):
        if not isinstance(value, int) or value < 0:
            raise ConfigError(f"{source}: '{key}' must be a number of {'tokens' if key == 'sliding_window' else 'layers'}, got {value!r}")
    windows = tuple(window if i >= first else 0 for i in range(layers))
    kinds = raw.get("layer_types")
    if kinds is None:
        return windows
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{source}: 'layer_types' must say full_attention or sliding_attention for each of the {layers} layers")
    stated = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if ("sliding_attention" in kinds and not window) or (family not in ("qwen2", "qwen3") and stated != windows):
        raise ConfigError(f"{source}: 'layer_types' contradicts 'sliding_window' ({window or 'none'}) of a {family} model")
    return stated


def _moe_layers(raw: dict[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    if family == "mixtral":
        return (True,) * layers
    if family != "qwen3_moe":
        return (False,) * layers
    dense, every = raw.get("mlp_only_layers") or [], raw.get("decoder_sparse_step", 1)
    return tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError with the path if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json` of a checkpoint, {} where there is none."""
    path = Path(folder) / "generation_config.json"
    return read_json(path) if path.exists() else {}


# -------------------------------------------------------------------------------------------------------- engine


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to run a model. Names follow vLLM's where vLLM has the option. None and "auto" are turned into values by `resolve`."""

    model: str = opt("bundled", "checkpoint folder, hub name, or 'bundled' for the model inside the package")
    tokenizer: str | None = opt(None, "folder or hub name of the tokenizer, if not the model's own")
    skip_tokenizer_init: bool = opt(False, "load no tokenizer: prompts are token ids, results carry no text")
    revision: str | None = opt(None, "branch, tag or commit of a hub name")
    dtype: str = opt("auto", "precision of weights and activations", ("auto", "bfloat16", "float16", "float32"))
    device: str = opt("auto", "auto takes a GPU where there is one", ("auto", "cuda", "cpu"))
    load_format: str = opt("auto", "dummy makes random weights from config.json alone", ("auto", "dummy"))
    seed: int = opt(0, "seed of dummy weights and of requests that bring none")
    max_model_len: int | None = opt(None, "longest prompt plus output, in tokens (the model's own limit if not given)")
    max_num_seqs: int | None = opt(None, "requests running at once (256)")
    max_num_batched_tokens: int | None = opt(None, "token budget of a step; longer prompts are computed in chunks (GPU 8192, CPU 512)")
    page_size: int | None = opt(None, "tokens in a KV page (GPU 64, CPU 16)")
    num_pages: int | None = opt(None, "KV pages; by default as many as fit in the memory granted")
    gpu_memory_utilization: float = opt(0.9, "share of a GPU's memory for weights, KV pages and workspace")
    cpu_kv_gib: float = opt(2.0, "most memory for KV pages on the CPU, GiB (taken as it is used)")
    enable_prefix_caching: bool = opt(True, "reuse the KV pages of equal prompt prefixes")
    max_pinned_fraction: float = opt(0.25, "share of the KV pages that pinned prefixes may take, 0 to 1")
    enable_sleep_mode: bool = opt(False, "let the engine sleep (POST /sleep): its memory is given back, the weights stay in host memory")
    enforce_eager: bool = opt(False, "capture no CUDA graphs")
    overlap: int | None = opt(None, "steps in flight while results are read: 0 or 1 (GPU 1, CPU 0)")
    deterministic: bool = opt(False, "the same request gives bitwise the same output alone, in any batch, cached or cold; a little slower")
    kernels: str = opt("auto", "implementation of the operations", ("auto", "reference", "triton", "cpu"))
    num_threads: int | None = opt(None, "CPU threads of the engine (all cores)")
    profile: str | None = opt(None, "folder for profiles of steps: between POST /start_profile and /stop_profile, or of each workload")
    max_engine_restarts: int = opt(5, "starts of a new engine process within five minutes after one died; open requests go on in it (0: none)")
    hang_timeout: float = opt(300.0, "seconds without progress after which a working engine process counts as dead")
    disable_log_stats: bool = opt(False, "do not log throughput every ten seconds")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                raise ConfigError(f"{f.name}: {value!r} is not one of {', '.join(choices)}")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages", "num_threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}: must be a positive integer, got {value!r}")
        if self.overlap not in (None, 0, 1):
            raise ConfigError(f"overlap: must be 0 or 1, got {self.overlap!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization: must be in (0, 1], got {self.gpu_memory_utilization}")
        if not 0 <= self.max_pinned_fraction <= 1:
            raise ConfigError(f"max_pinned_fraction: must be from 0 to 1, got {self.max_pinned_fraction}")
        if self.max_engine_restarts < 0:
            raise ConfigError(f"max_engine_restarts: must not be negative, got {self.max_engine_restarts}")
        if not self.hang_timeout > 0:
            raise ConfigError(f"hang_timeout: must be positive, got {self.hang_timeout}")
        if self.cpu_kv_gib <= 0:
            raise ConfigError(f"cpu_kv_gib: must be positive, got {self.cpu_kv_gib}")
        if self.page_size is not None and self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size: must be a power of two, got {self.page_size}")


@dataclass(frozen=True)
class DeviceInfo:
    """What `resolve` must know of the machine; made by engine/core.py, or by a test."""

    kind: str  # "cuda" | "cpu"
    cores: int


def resolve(config: EngineConfig, model: ModelConfig, device: DeviceInfo) -> EngineConfig:
    """Every "auto" and None turned into a value but `num_pages`, which needs the memory left after the weights.

    Raises ConfigError for a combination that cannot run."""
    gpu = device.kind == "cuda"
    if config.device == "cuda" and not gpu:
        raise ConfigError("device: cuda was asked for, but torch sees no GPU here; use --device cpu")
    if config.kernels == "triton" and not gpu:
        raise ConfigError("kernels: triton needs a GPU; use --kernels auto")
    if config.kernels == "cpu" and gpu:
        raise ConfigError("kernels: cpu was asked for on a GPU; use --device cpu or --kernels auto")
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    limit = config.max_model_len or model.max_position
    stretched = model.max_position
    if model.rope.kind in ("linear", "dynamic", "yarn", "llama3") and model.rope.original_max_position:
        stretched = max(stretched, int(model.rope.factor * model.rope.original_max_position))
    if limit > stretched:
        raise ConfigError(f"max_model_len: {limit} is more than the {stretched} positions the model was made for")
    budget = config.max_num_batched_tokens or (8192 if gpu else 512)
    seqs = config.max_num_seqs or min(256, budget - (DETERMINISTIC_CHUNK - 1 if config.deterministic else 0))
    if budget < seqs:
        raise ConfigError(f"max_num_batched_tokens: {budget} cannot hold one token for each of max_num_seqs={seqs} requests")
    if config.deterministic:
        if config.kernels == "reference":
            raise ConfigError("deterministic: plain torch sums in an order that depends on the batch; use --kernels auto")
        if not gpu and dtype == "float16":
            raise ConfigError("deterministic: float16 on the CPU runs in plain torch, whose sums depend on the batch; use --dtype bfloat16")
        if budget < seqs + DETERMINISTIC_CHUNK - 1 or seqs < 1:
            raise ConfigError(
                f"deterministic: max_num_batched_tokens={budget} must leave room for {DETERMINISTIC_CHUNK} prompt tokens beside "
                f"{seqs - 1} running requests; raise it, or lower max_num_seqs"
            )
    return dataclasses.replace(
        config,
        device=device.kind,
        dtype=dtype,
        max_model_len=limit,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        page_size=config.page_size or (64 if gpu else 16),
        overlap=config.overlap if config.overlap is not None else int(gpu),
        num_threads=config.num_threads or device.cores,
    )


# -------------------------------------------------------------------------------------------------------- server


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where and how the API listens."""

    host: str = opt("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = opt(8000, "port to listen on")
    root_path: str = opt("", "prefix of the paths, /some/where, under which a reverse proxy shows the server; it may strip it or not")
    grpc_port: int | None = opt(None, "port for the API over gRPC as well, 0 for any free one; needs miniinfer[grpc]")
    ssl_certfile: str | None = opt(None, "certificate (PEM, with its chain) to serve HTTPS, and gRPC over TLS")
    ssl_keyfile: str | None = opt(None, "the certificate's private key (PEM)")
    served_model_name: str | None = opt(None, "model name in the API (the folder's or hub name if not given)")
    api_key: list[str] | None = opt(None, "clients must send this key, or one of several: give the option again, or a list with commas")
    api_keys_file: str | None = opt(None, "TOML or JSON file of keys, with a name and perhaps rates and a priority for each")
    cors_origin: list[str] | None = opt(None, "origin whose web pages may call the API ('*': any); may be given again")
    chat_template: str | None = opt(None, "file with a jinja chat template, instead of the checkpoint's")
    trust_request_chat_template: bool = opt(False, "let requests bring a chat_template of their own (sandboxed, bounded in time and memory)")
    pin_prefix: list[str] | None = opt(
        None, "file with a prefix to pin: messages (JSON), or text that prompts begin with; see /v1/prefixes; may be given again"
    )
    tool_call_parser: str = opt(
        "auto", "how the model writes tool calls (hermes, qwen3_coder, llama3_json, mistral ...), or none; auto reads the template"
    )
    reasoning_parser: str = opt("auto", "how the model marks its reasoning (think, mistral, harmony), or none; auto reads the template")
    models: list[str] | None = opt(
        None, "one more model, NAME[:VERSION]=MODEL[,option=value ...], loaded when asked for; may be given again", flag="model"
    )
    models_dir: str | None = opt(None, "folder of checkpoint folders, each a model (or NAME/VERSION), which clients may add to by /models/register")
    model_alias: list[str] | None = opt(None, "another name of a model, ALIAS=NAME; may be given again")
    max_loaded_models: int = opt(0, "models in memory at once (0: as many as there is room for)")
    model_idle_seconds: float = opt(0.0, "put a model away that nobody has asked for in so long; the next request brings it back (0: never)")
    max_waiting: int = opt(2048, "requests accepted but unfinished; above it a request gets 429")
    max_waiting_tokens: int = opt(8 << 20, "tokens of unfinished requests, prompts and most output together; above it a request gets 429")
    max_connections: int = opt(4096, "open connections; above it the one that has been idle longest is closed")
    files_dir: str | None = opt(None, "folder for uploaded files and batches, which go on after a restart (a temporary one if not given)")
    max_file_mib: int = opt(200, "largest uploaded file, MiB; above it, or fifty times it for all files of a client, an upload gets 413")
    max_body_mib: int = opt(16, "largest request body, MiB; above it a request gets 413")
    log_level: str = opt("info", "how much is logged", ("debug", "info", "warning", "error"))
    log_format: str = opt("text", "lines for people, or JSON objects for programs", ("text", "json"))
    otlp_endpoint: str | None = opt(None, "OpenTelemetry collector (OTLP over HTTP) that gets a span for each request; needs miniinfer[otel]")

    def __post_init__(self) -> None:
        given = [self.api_key] if isinstance(self.api_key, str) else self.api_key or []
        keys = [key.strip() for text in given for key in text.split(",")]
        if not all(key and key.isascii() and key.isprintable() for key in keys):
            raise ConfigError("api_key: a key must be printable ASCII and must not be empty")
        object.__setattr__(self, "api_key", list(dict.fromkeys(keys)) or None)
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ConfigError(f"root_path: must be like /some/where, of letters, digits and ._~-, got {self.root_path!r}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile: give both, or neither")
        if self.max_loaded_models < 0 or self.model_idle_seconds < 0:
            raise ConfigError("max_loaded_models and model_idle_seconds: must not be negative")
        for name in ("max_waiting", "max_waiting_tokens", "max_connections", "max_file_mib", "max_body_mib"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")

    @property
    def guarded(self) -> bool:
        """Does the API ask for a key."""
        return self.api_key is not None or self.api_keys_file is not None
