"""The command `miniinfer`: one table of commands, each with options derived from dataclasses.

Owns the derivation (fields, types and descriptions become argparse options), the terminal chat, `info`, and how errors look: a mistake of
the user's is one line on stderr and exit code 2. Heavy modules are imported by the command that needs them, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from miniinfer import __version__
from miniinfer.config import ConfigError, EngineConfig, ServerConfig, opt
from miniinfer.utils import setup_logging, starting

T = TypeVar("T")

# --------------------------------------------------------------------------------- options from dataclasses and structs


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and whose options cannot be abbreviated."""

    def __init__(self, prog: str, description: str) -> None:
        width = min(130, max(80, shutil.get_terminal_size((100, 0)).columns))
        usage = "%(prog)s [options]"
        super().__init__(prog, usage, description, allow_abbrev=False, formatter_class=lambda prog: _Help(prog, max_help_position=34, width=width))

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message} (options: {self.prog} --help)\n")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Like parse_args, but an unknown option is named together with the one that was probably meant."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(
                f"unknown option {name}{f', did you mean {near[0]}?' if near else ''}" if name.startswith("-") else f"unexpected argument {name!r}"
            )
        return args


class _Help(argparse.HelpFormatter):
    """Short help: a switch is shown in the one form that changes something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[1 if action.default is True else 0]
        return super()._format_action_invocation(action)


@dataclass(frozen=True)
class Option:
    """One field as the command line sees it."""

    name: str
    kind: type  # bool, int, float or str
    many: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    flag: str


def options_of(cls: type) -> list[Option]:
    """The fields of an option dataclass, or of a msgspec struct whose annotations carry the descriptions, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    options = []
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else _struct_fields(cls):
        hint, help, choices, flag = hints[field.name], "", (), field.name
        if typing.get_origin(hint) is typing.Annotated:
            hint, help = typing.get_args(hint)[:2]
        else:
            help, choices = field.metadata.get("help", ""), field.metadata.get("choices", ())
            flag = field.metadata.get("flag") or flag
        members = [
            h for h in (typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)) if h is not type(None)
        ]
        lists = [typing.get_args(m)[0] for m in members if typing.get_origin(m) is list]
        options.append(Option(field.name, (lists or members)[0], bool(lists), field.default, help, choices, flag))
    return options


def _struct_fields(cls: type) -> Iterable[Any]:
    import msgspec

    return msgspec.structs.fields(cls)


def add_options(
    parser: Parser, cls: type, *, only: Iterable[str] = (), skip: Iterable[str] = (), positional: str = "", title: str = "", **defaults: Any
) -> None:
    """Adds an option for each field (or those in `only`); `positional` is an argument instead; `defaults` replace the class's own. A switch that
    is on by default is shown as its --no- form, so its description has to go on from "do not"."""
    group = parser.add_argument_group(title or (cls.__doc__ or cls.__name__).split(". ")[0].strip().rstrip("."))
    for option in options_of(cls):
        if (only and option.name not in only) or option.name in skip:
            continue
        default = defaults.get(option.name, option.default)
        known = [] if default is None or isinstance(default, bool) or default in ("", argparse.SUPPRESS) else [f"default: {default}"]
        notes = "; ".join([" | ".join(option.choices), *known] if option.choices else known)
        text = ("do not " if default is True else "") + option.help + (f" ({notes})" if notes else "")
        text = text.replace("%", "%%")
        if option.name == positional:
            group.add_argument(option.name, nargs="?", metavar=positional.upper(), default=default, help=text)
            parser.usage = f"%(prog)s [options] [{positional.upper()}]"
            continue
        settings: dict[str, Any] = {"default": default, "help": text, "dest": option.name}
        if option.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif option.choices:
            settings.update(choices=option.choices, metavar="NAME")
        else:
            settings.update(type=option.kind, metavar={int: "N", float: "X"}.get(option.kind, "TEXT"))
            if option.many:
                settings["action"] = "append"
        group.add_argument(*("-" * min(2, len(name)) + name.replace("_", "-") for name in option.flag.split()), **settings)


def take(cls: type[T], args: argparse.Namespace) -> T:
    """An instance of `cls` from the options that were added for it. Raises ConfigError where the values cannot work together."""
    return cls(**{option.name: getattr(args, option.name) for option in options_of(cls) if option.name in args})


# ------------------------------------------------------------------------------------------------------------- serve


def _serve_options(parser: Parser) -> None:
    add_options(parser, ServerConfig)
    add_options(parser, EngineConfig, positional="model", model=None)


def _serve(args: argparse.Namespace) -> int:
    from miniinfer.serve.launch import serve

    if args.model is None:
        args.model = "" if args.models or args.models_dir else "bundled"
    return serve(take(EngineConfig, args), take(ServerConfig, args))


# ---------------------------------------------------------------------------------------------------- generate, chat

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "stop", "ignore_eos",
)  # fmt: skip


def _sampling_options(parser: Parser, *more: str) -> None:
    """Only options that are given count; the rest is the checkpoint's generation_config.json's."""
    from miniinfer.data import SamplingParams

    add_options(parser, SamplingParams, only=(*SAMPLING, *more), **{name: argparse.SUPPRESS for name in (*SAMPLING, *more)})


def _sampling(args: argparse.Namespace, llm: Any = None) -> Any:
    """SamplingParams from what was given; with an LLM, over its checkpoint's defaults."""
    import msgspec

    from miniinfer.data import SamplingParams

    defaults = msgspec.to_builtins(llm.get_default_sampling_params()) if llm else {}
    given = {name: getattr(args, name) for name in (*SAMPLING, "n") if name in args}
    try:
        return SamplingParams(**{**defaults, "max_tokens": None, **given})
    except ValueError as e:
        raise ConfigError(str(e)) from None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Prompts and output. Without any prompt, one is read from standard input."""

    file: str | None = opt(None, "file with one prompt per line")
    json: bool = opt(False, "print one JSON object per prompt")


def _generate_options(parser: Parser) -> None:
    parser.usage = "%(prog)s [options] [PROMPT ...]"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to continue")
    add_options(parser, GenerateOptions)
    _sampling_options(parser, "n")
    add_options(parser, EngineConfig, skip=("skip_tokenizer_init", "profile"))


def _generate(args: argparse.Namespace) -> int:
    options = take(GenerateOptions, args)
    prompts = list(args.prompts)
    if options.file is not None:
        prompts += [line for line in _read(options.file).splitlines() if line]
        if not prompts:
            raise ConfigError(f"file: {options.file} has no prompts")
    if not prompts:
        prompts = [sys.stdin.read().removesuffix("\n")]
    llm = _engine(args)
    try:
        outputs = llm.generate(prompts, _sampling(args, llm), use_tqdm=len(prompts) > 1 and sys.stderr.isatty())
    except ValueError as e:
        raise ConfigError(str(e)) from None
    for output in outputs:
        if options.json:
            samples = [{"text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason} for o in output.outputs]
            print(json.dumps({"prompt": output.prompt, "outputs": samples}, ensure_ascii=False))
        else:
            for sample in output.outputs:
                print(f"{output.prompt}{sample.text}")
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {e.strerror if isinstance(e, OSError) else 'not UTF-8'}") from None


def _engine(args: argparse.Namespace) -> Any:
    """An LLM in this process, from the EngineConfig options among `args`."""
    _sampling(args)  # a bad value should not have to wait for the model
    config = take(EngineConfig, args)
    setup_logging("warning")
    with starting(config.device):
        from miniinfer.engine.llm import LLM

        return LLM(**dataclasses.asdict(config))


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Whom to talk to. Ctrl-C stops an answer, Ctrl-D leaves."""

    url: str | None = opt(None, "talk to a running server (http://127.0.0.1:8000) instead of loading a model")
    api_key: str | None = opt(None, "bearer token for the server")
    system: str | None = opt(None, "system message")


def _chat_options(parser: Parser) -> None:
    add_options(parser, ChatOptions)
    _sampling_options(parser)
    add_options(parser, EngineConfig, positional="model", skip=("skip_tokenizer_init", "profile"))


def _chat(args: argparse.Namespace) -> int:
    options = take(ChatOptions, args)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    if options.url:
        answer = _remote(options.url, options.api_key, {name: getattr(args, name) for name in SAMPLING if name in args})
    else:
        answer = _local(args)
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return 0
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        reply = ""
        try:
            for piece in answer(messages):
                reply += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not interactive:
                raise
        print(flush=True)
        messages.append({"role": "assistant", "content": reply})


def _local(args: argparse.Namespace) -> Callable[[list[dict[str, str]]], Iterator[str]]:
    """Answers from a model in this process, streamed."""
    from miniinfer.engine.output import OutputProcessor, validate

    llm = _engine(args)
    params = _sampling(args, llm)
    processor = OutputProcessor(llm.tokenizer, deltas=True)

    def answer(messages: list[dict[str, str]]) -> Iterator[str]:
        try:
            prompt = llm.tokenizer.render_chat(messages, add_generation_prompt=True)
            ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
            validate(ids, params, llm.info, llm.tokenizer)
        except ValueError as e:
            raise ConfigError(str(e)) from None
        for message in processor.add("chat", prompt, ids, params):
            llm.core.add(message)
        try:
            while llm.core.has_work:
                deltas, aborts = processor.process(llm.core.step())
                llm.core.abort(aborts)
                yield from (output.text for delta in deltas for output in delta.outputs)
        finally:
            llm.core.abort(processor.drop(["chat"]))

    return answer


def _remote(url: str, api_key: str | None, sampling: dict[str, Any]) -> Callable[[list[dict[str, str]]], Iterator[str]]:
    """Answers from an OpenAI-compatible server, streamed."""
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    models = json.loads(b"".join(_http(base + "/models", headers)))

    def answer(messages: list[dict[str, str]]) -> Iterator[str]:
        body = {"model": models["data"][0]["id"], "messages": messages, "stream": True, **sampling}
        for line in _http(base + "/chat/completions", headers, json.dumps(body).encode()):
            data = line.strip().removeprefix(b"data:").strip()
            if not data.startswith(b"{"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise ConfigError(f"{base}: {event['error'].get('message', event['error'])}")
            for choice in event.get("choices", ()):
                yield choice["delta"].get("content") or ""

    return answer


def _http(url: str, headers: dict[str, str], body: bytes | None = None) -> Iterator[bytes]:
    """The lines of a response's body, as they arrive. Raises ConfigError with the server's words."""
    import http.client
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
            yield from response
    except urllib.error.HTTPError as e:
        raise ConfigError(f"{url}: {e.code} {e.reason}: {e.read(2000).decode(errors='replace')}") from None
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise ConfigError(f"{url}: {getattr(e, 'reason', None) or e}") from None


# -------------------------------------------------------------------------------------------------------------- info


def _info_options(parser: Parser) -> None:
    from miniinfer.models.describe import InfoOptions

    add_options(parser, InfoOptions, positional="model")


def _info(args: argparse.Namespace) -> int:
    from miniinfer.models.describe import GIB, InfoOptions, describe

    facts = describe(take(InfoOptions, args))
    if args.json:
        print(json.dumps(facts))
        return 0
    kv, needs, here = facts["kv_bytes"]["cpu"] / GIB, facts["needs_bytes"], facts["available_bytes"]
    active = f" ({facts['active_parameters'] / 1e9:.3g} G active per token)" if facts["active_parameters"] != facts["parameters"] else ""
    print(f"{facts['model']}: {facts['architecture']}")
    print(f"  shape       {facts['shape']}")
    millions = facts["parameters"] / 1e6
    count = f"{millions / 1e3:.4g} G" if millions >= 1000 else f"{millions:.4g} M"
    print(f"  parameters  {count}{active}, {facts['dtype']}: {facts['weight_bytes'] / GIB:.3g} GiB")
    print(f"  context     {facts['context']:,} tokens, {facts['rope']} RoPE")
    print(f"  files       {facts['files']}")
    print(f"  KV cache    {facts['kv_bytes_per_token'] / 1024:.4g} KiB a token; {facts['requests']} x {facts['length']:,} tokens: {kv:.2f} GiB")
    print(f"  on a GPU    {needs['cuda'] / GIB:.2f} GiB at --gpu-memory-utilization {EngineConfig.gpu_memory_utilization}, workspace not counted")
    print(f"  on a CPU    {needs['cpu'] / GIB:.2f} GiB with --cpu-kv-gib {kv:.2f}" + (f"; {here / GIB:.1f} GiB available here" if here else ""))
    return 0


# ------------------------------------------------------------------------------------------------------------- batch

BATCH_MODEL = ("served_model_name", "chat_template", "tool_call_parser", "reasoning_parser", "models", "max_loaded_models", "max_body_mib")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Requests as OpenAI's batches have them. Those whose custom_id is in the output file already are not run again."""

    input_file: str | None = opt(None, "JSONL file: custom_id, method, url and body in every line", flag="i input_file")
    output_file: str | None = opt(None, "JSONL file that answers and errors are added to", flag="o output_file")


def _batch_options(parser: Parser) -> None:
    add_options(parser, BatchOptions)
    add_options(parser, ServerConfig, only=BATCH_MODEL, title="Names, and how requests and answers are read")
    add_options(parser, EngineConfig, positional="model", skip=("profile",), model=None)


def _batch(args: argparse.Namespace) -> int:
    options = take(BatchOptions, args)
    if options.input_file is None or options.output_file is None:
        raise ConfigError("input_file and output_file: both are needed: miniinfer batch -i in.jsonl -o out.jsonl MODEL")
    from miniinfer.serve.batch_run import run

    setup_logging("warning")
    if args.model is None:
        args.model = "" if args.models else "bundled"
    return run(Path(options.input_file), Path(options.output_file), take(EngineConfig, args), take(ServerConfig, args))


# ------------------------------------------------------------------------------------------------------ bench, train


def _offline_options(parser: Parser) -> None:
    from miniinfer.bench.offline import OfflineBench

    add_options(parser, OfflineBench)
    add_options(parser, EngineConfig, skip=("skip_tokenizer_init", "tokenizer", "load_format", "disable_log_stats"), enable_prefix_caching=False)


def _offline(args: argparse.Namespace) -> int:
    from miniinfer.bench import offline

    setup_logging("warning")
    return offline.main(take(EngineConfig, args), take(offline.OfflineBench, args))


def _start_options(parser: Parser) -> None:
    from miniinfer.bench.start import StartBench

    add_options(parser, StartBench)
    add_options(parser, EngineConfig, positional="model", skip=("skip_tokenizer_init", "profile", "disable_log_stats"))


def _start(args: argparse.Namespace) -> int:
    from miniinfer.bench import start

    return start.main(take(EngineConfig, args), take(start.StartBench, args))


def _serving_options(parser: Parser) -> None:
    from miniinfer.bench.serving import ServingBench

    add_options(parser, ServingBench)


def _serving(args: argparse.Namespace) -> int:
    from miniinfer.bench import serving

    return serving.main(take(serving.ServingBench, args))


def _kernels_options(parser: Parser) -> None:
    from miniinfer.bench.kernels import KernelBench

    add_options(parser, KernelBench)


def _kernels(args: argparse.Namespace) -> int:
    from miniinfer.bench import kernels

    return kernels.main(take(kernels.KernelBench, args))


def _train_options(parser: Parser) -> None:
    from miniinfer.train.trainer import TrainConfig

    add_options(parser, TrainConfig)


def _train(args: argparse.Namespace) -> int:
    from miniinfer.train.trainer import TrainConfig, train

    setup_logging()
    return train(take(TrainConfig, args))


# -------------------------------------------------------------------------------------------------------------- main


@dataclass(frozen=True)
class Command:
    help: str
    options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "serve": Command("OpenAI-compatible server", _serve_options, _serve),
    "chat": Command("talk to a model in the terminal", _chat_options, _chat),
    "generate": Command("continue prompts from arguments, a file or standard input", _generate_options, _generate),
    "batch": Command("run a file of requests, as OpenAI's batches have them, without a server", _batch_options, _batch),
    "info": Command("what a checkpoint is and the memory it needs", _info_options, _info),
    "bench offline": Command("throughput and latency of the engine beside their physical floors", _offline_options, _offline),
    "bench start": Command("time from a process's start to the first token, by stages", _start_options, _start),
    "bench serving": Command("latency percentiles of any OpenAI-compatible server under load", _serving_options, _serving),
    "bench kernels": Command("each GPU kernel beside its ceiling and plain torch", _kernels_options, _kernels),
    "train": Command("train a small model", _train_options, _train),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C. `--help` and bad options raise SystemExit."""
    argv = sys.argv[1:] if argv is None else argv
    name = next((key for key in (" ".join(argv[:2]), argv[0] if argv else "") if key in COMMANDS), None)
    if name is None:
        return _overview(argv)
    command = COMMANDS[name]
    try:
        parser = Parser(f"miniinfer {name}", command.help[0].upper() + command.help[1:] + ".")
        command.options(parser)
        return command.run(parser.parse(argv[len(name.split()) :]))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ConfigError as e:
        message = str(e)
    except MemoryError as e:
        message = f"not enough memory: {e or 'see miniinfer info MODEL'}"
    except RuntimeError as e:
        if type(e).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        message = f"not enough GPU memory: {str(e).splitlines()[0]}"
    print(f"miniinfer {name}: {message}", file=sys.stderr)
    return 2


def _overview(argv: list[str]) -> int:
    """The list of commands, or of those below a first word; an error if something else was asked for."""
    if argv == ["--version"]:
        print(__version__)
        return 0
    words = [a for a in argv if a not in ("-h", "--help")]
    below = [name for name in COMMANDS if name.split()[: len(words)] == words]
    if not below or (words and words == argv):
        known = [name for name in COMMANDS if name.split()[0] == argv[0]] or list(COMMANDS)
        print(f"miniinfer: no command {' '.join(words[:2])!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    print(f"usage: miniinfer {' '.join([*words, 'COMMAND'])} [options]\n\ncommands:")
    for name in below:
        print(f"  {name:15} {COMMANDS[name].help}")
    print("\nminiinfer COMMAND --help shows a command's options.")
    return 0


if __name__ == "__main__":  # as `python -m miniinfer`, not nothing
    sys.exit(main())
