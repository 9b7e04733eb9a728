"""The command line: derivation of options from dataclasses, one-line errors with exit code 2, `info`, and chat over HTTP."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from miniinfer import cli
from miniinfer.config import ConfigError, EngineConfig, ServerConfig, opt

SHAPES = Path(cli.__file__).parent / "bench" / "shapes"
TINY = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 256, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a command line."""
    try:
        code: Any = cli.main(list(argv))
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example. With a second sentence."""

    count: int | None = opt(None, "how many")
    rate: float = opt(0.5, "how fast, in %")
    mode: str = opt("a", "which", ("a", "b"))
    keep_it: bool = opt(True, "throw it away")
    twice: bool = opt(False, "do it twice")
    word: list[str] | None = opt(None, "words")


def parse(*argv: str) -> Example:
    parser = cli.Parser("x", "X.")
    cli.add_options(parser, Example)
    return cli.take(Example, parser.parse(list(argv)))


def test_options_follow_the_dataclass() -> None:
    assert parse() == Example()
    given = parse("--count", "3", "--rate=2", "--mode", "b", "--no-keep-it", "--twice", "--word", "p", "--word", "q")
    assert given == Example(count=3, rate=2.0, mode="b", keep_it=False, twice=True, word=["p", "q"])


def test_help_shows_each_option_once_and_in_the_useful_form() -> None:
    parser = cli.Parser("x", "X.")
    cli.add_options(parser, Example)
    text = " ".join(parser.format_help().split())
    assert "An example:" in text and "second sentence" not in text
    assert "--no-keep-it do not throw it away" in text and "--twice do it twice" in text and "--no-twice" not in text
    assert (
        "--rate X how fast, in % (default: 0.5)" in text and "--mode NAME which (a | b; default: a)" in text and "--count N how many --rate" in text
    )


@pytest.mark.parametrize("argv", [["--count", "x"], ["--coun", "3"], ["--mode", "c"], ["--cuont", "3"], ["stray"], ["--count"]])
def test_wrong_options_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        parse(*argv)
    assert e.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and argv[0] in error
    assert ("did you mean --count?" in error) == argv[0].startswith("--c") or argv == ["--count", "x"] or argv == ["--count"]


def test_engine_and_server_options_round_trip() -> None:
    parser = cli.Parser("x", "X.")
    cli.add_options(parser, ServerConfig)
    cli.add_options(parser, EngineConfig, positional="model")
    args = parser.parse(["some/model", "--port", "81", "--no-enable-prefix-caching", "--max-model-len", "99", "--dtype", "float32"])
    assert cli.take(ServerConfig, args) == ServerConfig(port=81)
    assert cli.take(EngineConfig, args) == EngineConfig(model="some/model", enable_prefix_caching=False, max_model_len=99, dtype="float32")
    assert cli.take(EngineConfig, parser.parse([])) == EngineConfig()


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *name.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: miniinfer {name} [options]")
    assert "SUPPRESS" not in out and "None)" not in out


def test_overview_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        code, out, _ = run(capsys, *argv)
        assert code == 0 and all(name in out for name in cli.COMMANDS)
    code, out, _ = run(capsys, "bench", "--help")
    assert code == 0 and "bench offline" in out and "chat" not in out
    for argv in (["srve"], ["bench"], ["bench", "x"], ["--port", "1"]):
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), argv


def test_help_is_instant_and_light() -> None:
    code = "import sys; sys.argv = ['miniinfer', '--help']; from miniinfer.cli import main; main(); print([m for m in sys.modules if m in HEAVY])"
    heavy = "HEAVY = {'torch', 'numpy', 'fastapi', 'zmq', 'tokenizers', 'huggingface_hub', 'jinja2', 'asyncio', 'msgspec'};"
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for _ in range(4):
        out = subprocess.run([sys.executable, "-c", heavy + code], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]"
    seconds = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin) / 4  # processor time: other load does not count
    assert seconds < 0.25, "0.08 s when this was written"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["info", "{tmp}/nowhere"], "nowhere"),
        (["info", "{tmp}"], "config.json"),
        (["info", "{tmp}/odd"], "OddForCausalLM"),
        (["info", "{tmp}/tiny", "--requests", "0"], "requests"),
        (["generate", "--file", "{tmp}/nowhere.txt"], "nowhere.txt"),
        (["generate", "--file", "{tmp}/empty.txt"], "empty.txt"),
        (["generate", "--temperature", "-1", "x"], "temperature"),
        (["generate", "--model", "{tmp}/tiny", "--load-format", "dummy", "x"], "tokenizer"),
        (["generate", "--model", "{tmp}/tiny", "--load-format", "dummy", "--max-model-len", "9999999", "x"], "max_model_len"),
        (["generate", "--model", "{tmp}/tiny", "--load-format", "dummy", "--num-pages", "1", "x"], "num_pages"),
        (["chat", "{tmp}/tiny", "--page-size", "3"], "page_size"),
        (["chat", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["bench", "offline", "--model", "{tmp}/tiny", "--workload", "dec"], "'dec'"),
        (["bench", "serving", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["bench", "serving", "--rate", "1", "--concurrency", "2"], "rate and concurrency"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, config in (("tiny", TINY), ("odd", {**TINY, "architectures": ["OddForCausalLM"]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty.txt").write_text("\n")
    code, out, err = run(capsys, *(a.replace("{tmp}", str(tmp_path)) for a in argv))
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("miniinfer ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in err


def test_serve_fails_in_words(tmp_path: Path) -> None:
    """The engine is another process here: its error must reach the command's last line, whatever was logged before."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "architectures": ["OddForCausalLM"]}))
    argv = [sys.executable, "-m", "miniinfer", "serve", str(tmp_path), "--skip-tokenizer-init", "--port", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("miniinfer serve: ") and "OddForCausalLM" in done.stderr.splitlines()[-1]


def test_out_of_memory_and_interrupts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def failing(error: BaseException) -> cli.Command:
        def fail(args: object) -> int:
            raise error

        return cli.Command("x", lambda parser: None, fail)

    for error, code in ((torch.OutOfMemoryError("CUDA out of memory\nmore"), 2), (MemoryError(), 2), (KeyboardInterrupt(), 130)):
        monkeypatch.setitem(cli.COMMANDS, "info", failing(error))
        got, _, err = run(capsys, "info")
        assert got == code and err.count("\n") == (1 if code == 2 else 0)
    monkeypatch.setitem(cli.COMMANDS, "info", failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info"])


# -------------------------------------------------------------------------------------------------------------- info


def test_info_of_a_bare_config(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", str(SHAPES / "Qwen3-8B"), "--json", "--length", "1000", "--requests", "3")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"] == facts["active_parameters"] == 8_190_735_360  # as the hub states it
    assert facts["weight_bytes"] == 2 * facts["parameters"] and facts["kv_bytes_per_token"] == 147_456
    pages = 2 + 3 * (16 + 1)  # 1,000 tokens touch 16 pages of 64
    assert facts["kv_bytes"]["cuda"] == pages * 64 * 147_456
    assert facts["needs_bytes"]["cuda"] == pytest.approx((facts["weight_bytes"] + facts["kv_bytes"]["cuda"]) / 0.9)


def test_info_counts_active_experts(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "info", str(SHAPES / "Qwen3-30B-A3B"), "--json")
    facts = json.loads(out)
    assert facts["parameters"] / 1e9 == pytest.approx(30.5, abs=0.05) and facts["active_parameters"] / 1e9 == pytest.approx(3.35, abs=0.05)
    code, out, _ = run(capsys, "info", str(SHAPES / "Qwen3-30B-A3B"))
    assert code == 0 and "128 experts of 768, 8 used" in out and "no weights" in out


def test_info_states_what_the_engine_asks_for(tmp_path: Path) -> None:
    """A CPU engine given exactly the KV memory that info names can run that many full-length requests."""
    from miniinfer.engine.llm import LLM
    from miniinfer.models.describe import GIB, InfoOptions, describe

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    facts = describe(InfoOptions(model=str(tmp_path), requests=3))
    common: dict[str, Any] = dict(load_format="dummy", skip_tokenizer_init=True, device="cpu", max_num_seqs=3, kernels="reference", num_threads=1)
    llm = LLM(str(tmp_path), cpu_kv_gib=facts["kv_bytes"]["cpu"] / GIB, **common)
    assert min(llm.info["num_pages"]) * 16 >= 3 * 256
    one = describe(InfoOptions(model=str(tmp_path)))["kv_bytes"]["cpu"]
    with pytest.raises(ConfigError, match="cpu_kv_gib"):
        LLM(str(tmp_path), cpu_kv_gib=0.5 * one / GIB, **common)


# -------------------------------------------------------------------------------------------------------------- chat


class Handler(BaseHTTPRequestHandler):
    """Answers with the last message in capitals, one streamed event per character, in chunked encoding."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, Any]] = []

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "loud"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.seen.append(body)
        text = body["messages"][-1]["content"]
        if text == "fail":
            self.send_error(400, "no")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = [json.dumps({"choices": [{"delta": {"content": c.upper()}}]}) for c in text] + ['{"choices": []}', "[DONE]"]
        for data in [f"data: {event}\n\n".encode() for event in events]:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server() -> Any:
    Handler.seen = []
    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_chat_with_a_server(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nhow é you\n"))
    code, out, err = run(capsys, "chat", "--url", server, "--system", "be loud", "--temperature", "0.5")
    assert (code, out, err) == (0, "HELLO\nHOW É YOU\n", "")
    assert [m["role"] for m in Handler.seen[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert Handler.seen[1]["messages"][2]["content"] == "HELLO"
    assert Handler.seen[0]["temperature"] == 0.5 and Handler.seen[0]["model"] == "loud" and "top_p" not in Handler.seen[0]


def test_chat_reports_a_server_error(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fail\n"))
    code, _, err = run(capsys, "chat", "--url", server)
    assert code == 2 and "400" in err.splitlines()[0]


def test_chat_and_generate_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model's tokenizer and shape with random weights: chat streams what generate gives for the same prompt."""
    common = (
        "--load-format dummy --dtype float32 --device cpu --kernels reference --num-threads 1 --temperature 0 --max-tokens 12 --ignore-eos".split()
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nmore\n"))
    code, chat, err = run(capsys, "chat", *common)
    assert (code, err) == (0, "") and chat.strip()
    from miniinfer.engine.text import Tokenizer
    from miniinfer.models.hub import BUNDLED

    first = Tokenizer.from_folder(BUNDLED).render_chat([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    code, out, _ = run(capsys, "generate", first, "--json", *common)
    sample = json.loads(out)["outputs"][0]
    assert code == 0 and len(sample["token_ids"]) == 12 and sample["finish_reason"] == "length"
    assert chat.startswith(sample["text"] + "\n")
    code, _, err = run(capsys, "generate", "word " * 5000, *common)
    assert code == 2 and "tokens" in err.splitlines()[-1]


def test_the_module_itself_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "miniinfer.cli", "--help"], capture_output=True, text=True, check=True)
    assert "serve" in done.stdout
