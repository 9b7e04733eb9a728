"""Files and batches through openai-python, on an engine that writes what a test tells it to; what the API promises holds after a crash, too."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from chat_tokenizer import save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from serve_fake import FakeEngine, Server

from miniinfer.config import ConfigError, ServerConfig
from miniinfer.data import SamplingParams
from miniinfer.engine.text import Tokenizer
from miniinfer.serve.admission import BACKGROUND_PRIORITY, Admission
from miniinfer.serve.batch_lines import Line, LineError, Result, Results, Runner, check, read_lines
from miniinfer.serve.multipart import FormError, FormReader, boundary_of
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.storage import Lines, Store

CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": ["hi", "there"]},
    "/v1/responses": {"input": "hi"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(FakeEngine(tokenizer), max_file_mib=1) as server:
        yield server


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=20)


def line(custom_id: str, url: str = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**BODIES[url], **more}}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in lines)


def submit(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, window: Any = "24h") -> Any:
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window)


def until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
    return found


def ended(client: openai.OpenAI, id: str) -> Any:
    def look() -> Any:
        batch = client.batches.retrieve(id)
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return until(look)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """A results file by custom_id, each of which is there once."""
    assert file_id is not None
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    assert len({item["custom_id"] for item in found}) == len(found)
    return {item["custom_id"]: item for item in found}


# -------------------------------------------------------------------------------------------------------------- files


def test_a_file_goes_in_and_comes_out(server: Server) -> None:
    client = client_of(server)
    content = bytes(range(256)) * 2000 + b"\r\n--"
    file = client.files.create(file=("../../etc/a b.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.bytes == len(content) and file.filename == "../../etc/a b.jsonl" and file.purpose == "batch" and file.status == "processed"
    assert file.expires_at is not None and file.expires_at - file.created_at in (3600, 3601)
    assert client.files.retrieve(file.id) == file and file in client.files.list().data
    assert client.files.content(file.id).content == content
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=file.id):
            ask(file.id)


def test_lists_have_pages(server: Server) -> None:
    client = client_of(server)
    made = [client.files.create(file=(f"{i}", b"x"), purpose="batch").id for i in range(5)]
    assert [file.id for file in client.files.list(limit=2)][:5] == made[::-1]  # page by page
    assert [file.id for file in client.files.list(order="asc", after=made[1], limit=2).data] == made[2:4]
    assert client.files.list(purpose="batch_output").data == [] and client.files.list(order="asc", after=made[-1]).data == []
    with pytest.raises(openai.BadRequestError, match="after: there is no 'file-x'"):
        client.files.list(after="file-x")
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.files.list(limit=0)
    for id in made:
        client.files.delete(id)


FORM = {"content-type": "multipart/form-data; boundary=b"}


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    """A form's body; a part with a name is a file."""
    body = b""
    for name, filename, data in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        body += f'--b\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
    return body + b"--b--\r\n"


FILE, PURPOSE = ("file", "f", b"x"), ("purpose", None, b"batch")


@pytest.mark.parametrize(
    ("body", "headers", "status", "param"),
    [
        (form(FILE), FORM, 400, "purpose"),
        (form(PURPOSE), FORM, 400, "file"),
        (form(FILE, ("purpose", None, b"fine-tune")), FORM, 400, "purpose"),
        (form(FILE, PURPOSE, ("nonsense", None, b"1")), FORM, 400, "nonsense"),
        (form(FILE, FILE, PURPOSE), FORM, 400, "file"),
        (form(FILE, PURPOSE, PURPOSE), FORM, 400, "purpose"),
        (form(PURPOSE, ("file", None, b"x")), FORM, 400, "file"),
        (form(FILE, ("purpose", None, b"batch" * 500)), FORM, 400, "purpose"),
        (form(FILE, PURPOSE, ("expires_after[seconds]", None, b"3600")), FORM, 400, "expires_after[anchor]"),
        (form(FILE, PURPOSE, ("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"1" * 40)), FORM, 400, None),
        (form(FILE, PURPOSE)[:-8], FORM, 400, None),
        (b"--b\r\n\r\nx\r\n--b--\r\n", FORM, 400, None),
        (b"--b\r\nx: " + b"y" * 40_000, FORM, 400, None),
        (b"", FORM, 400, None),
        (form(FILE, PURPOSE), {"content-type": "multipart/form-data"}, 415, None),
        (b"{}", {"content-type": "application/json"}, 415, None),
        (form(("file", "f", b"x" * (1 << 20) + b"y"), PURPOSE), FORM, 413, "file"),
        (form(("x" * 10, None, b"x" * (1 << 21))), FORM, 400, "x" * 10),
    ],
)
def test_a_bad_upload_is_refused_and_leaves_nothing(server: Server, body: bytes, headers: dict[str, str], status: int, param: str | None) -> None:
    answer = httpx.post(server.url + "/v1/files", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and (param is None or error["param"] == param), error
    assert client_of(server).files.list().data == []


def test_an_upload_that_breaks_off_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Server(FakeEngine(tokenizer), files_dir=str(tmp_path / "files")) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\ncontent-type: multipart/form-data; boundary=b\r\n\r\n"
            sock.sendall(head + form(("file", "f", b"x" * 300_000))[:200_000])
            until(lambda: list((tmp_path / "files" / "files").iterdir()))
        until(lambda: not list((tmp_path / "files" / "files").iterdir()))
        assert client_of(server).files.list().data == []


def test_a_client_has_limited_room_and_others_have_theirs(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniinfer.serve.storage.LARGEST", 2)
    monkeypatch.setattr("miniinfer.serve.storage.MAX_FILES", 3)
    with Server(FakeEngine(tokenizer), api_key=["first-key", "other-key"], max_file_mib=1) as server:
        mine, other = client_of(server, "first-key"), client_of(server, "other-key")
        large = [mine.files.create(file=("f", bytes(1 << 20)), purpose="batch").id for _ in range(2)]
        for content, why in ((b"x", "reached 2 MiB"), (bytes(1 << 20), "reached 2 MiB")):
            with pytest.raises(openai.APIStatusError, match=why) as caught:
                mine.files.create(file=("f", content), purpose="batch")
            assert caught.value.status_code == 413
        assert other.files.create(file=("f", b"x"), purpose="batch").bytes == 1
        mine.files.delete(large[0])
        for _ in range(2):
            mine.files.create(file=("f", b"x"), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="you have 3 files"):
            mine.files.create(file=("f", b"x"), purpose="batch")


class _Parts:
    """What a reader makes of a body that comes in pieces of these sizes."""

    @staticmethod
    async def read(body: bytes, boundary: bytes, sizes: list[int]) -> list[tuple[str, str | None, bytes]]:
        async def stream() -> AsyncGenerator[bytes]:
            at, left = 0, list(sizes)
            while at < len(body):
                size = left.pop() if left else 50
                yield body[at : at + size]
                at += size

        reader = FormReader(stream(), boundary)
        return [(part.name, part.filename, b"".join([piece async for piece in reader.data()])) async for part in reader.parts()]


DATA = st.lists(st.sampled_from([b"\r\n", b"--", b"\r", b"-", b"b", b"\r\n--", b"x", b"\r\n--b"]), max_size=12).map(b"".join)


@given(
    files=st.lists(st.tuples(st.sampled_from(["file", "a", "größe"]), st.sampled_from(["f.txt", 'q".x', "ü"]), DATA), max_size=3),
    fields=st.dictionaries(st.sampled_from(["x", "y[z]"]), DATA.map(lambda data: data.decode())),
    sizes=st.lists(st.integers(1, 40), max_size=40),
)
def test_a_form_says_the_same_however_it_is_cut(files: list[tuple[str, str, bytes]], fields: dict[str, str], sizes: list[int]) -> None:
    request = httpx.Request("POST", "http://x", data=fields, files=[(name, (filename, data)) for name, filename, data in files] or [("f", b"")])
    boundary = boundary_of(request.headers["content-type"])
    assert boundary is not None
    found = asyncio.run(_Parts.read(request.read(), boundary, sizes))
    wanted = [(name, None, value.encode()) for name, value in fields.items()]
    wanted += [(name, filename.replace('"', "%22"), data) for name, filename, data in files] or [("f", "upload", b"")]
    assert found == wanted


NEARLY = [b"--b", b"\r\n", b"--", b"content-disposition: form-data; name=x", b"\r\n\r\n", b"x"]


@given(body=st.lists(st.sampled_from(NEARLY), max_size=14).map(b"".join))
def test_whatever_is_no_form_is_refused(body: bytes) -> None:
    with contextlib.suppress(FormError):
        asyncio.run(_Parts.read(body, b"b", [3] * 5))


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("url", BODIES)
def test_a_batch_has_an_answer_for_every_line(server: Server, url: str) -> None:
    client = client_of(server)
    lines = [line(f"line {i}", url, model="tiny" if i != 2 else "other") for i in range(6)]
    batch = submit(client, lines, url)
    assert batch.status == "validating" and batch.endpoint == url and batch.object == "batch"
    batch = ended(client, batch.id)
    counts = batch.request_counts
    assert batch.status == "completed" and (counts.total, counts.completed, counts.failed) == (6, 5, 1) and batch.model == "tiny"
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at <= batch.expires_at
    answers, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert answers.keys() == {f"line {i}" for i in (0, 1, 3, 4, 5)} and errors.keys() == {"line 2"}
    response = answers["line 0"]["response"]
    assert response["status_code"] == 200 and answers["line 0"]["error"] is None and response["request_id"].startswith("batch_req_")
    whole = httpx.post(server.url + url, json=lines[0]["body"]).json()
    assert response["body"].keys() == whole.keys() and response["body"]["object"] == whole["object"]
    failed = errors["line 2"]["response"]
    assert failed["status_code"] == 404 and failed["body"]["error"]["code"] == "model_not_found"
    usage = batch.usage
    assert usage.input_tokens > 0 and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert (usage.output_tokens > 0) == (url != "/v1/embeddings")
    about = client.files.retrieve(batch.output_file_id)
    assert about.purpose == "batch_output" and about.filename == f"{batch.id}_output.jsonl"


GOOD = line("a")


@pytest.mark.parametrize(
    ("text", "code", "param", "number"),
    [
        (b"", "empty_file", None, None),
        (b"\n \n", "empty_file", None, None),
        (jsonl([GOOD]) + b"\n" * 5000, "too_many_blank_lines", None, 1002),
        (b"\xff\xfe", "invalid_json_line", None, 1),
        (b"[]", "invalid_request", None, 1),
        (b"[" * 100_000, "invalid_request", None, 1),
        (jsonl([GOOD]) + b"{", "invalid_json_line", None, 2),
        (jsonl([GOOD]) + b"\n" + jsonl([{**GOOD, "custom_id": 1}]), "invalid_request", "custom_id", 3),
        (jsonl([{k: v for k, v in GOOD.items() if k != "body"}]), "missing_required_parameter", "body", 1),
        (jsonl([{**GOOD, "extra": 1}]), "invalid_request", "extra", 1),
        (jsonl([{**GOOD, "custom_id": ""}]), "invalid_custom_id", "custom_id", 1),
        (jsonl([{**GOOD, "method": "GET"}]), "invalid_method", "method", 1),
        (jsonl([line("a", "/v1/completions")]), "invalid_url", "url", 1),
        (jsonl([{**GOOD, "url": "/metrics"}]), "invalid_url", "url", 1),
        (jsonl([{**GOOD, "body": [1]}]), "invalid_body", "body", 1),
        (jsonl([GOOD]).replace(b'"hi"', b"[" * 5000 + b"]" * 5000), "invalid_json_line", None, 1),
        (jsonl([line("a", stream=True)]), "invalid_body", "body", 1),
        (jsonl([line("a", background=True)]), "invalid_body", "body", 1),
        (jsonl([GOOD, line("b"), GOOD]), "duplicate_custom_id", "custom_id", 3),
        (jsonl([line("a", user="x" * 5000)]), "line_too_long", None, 1),
    ],
)
def test_what_is_wrong_with_an_input_is_named_with_its_line(text: bytes, code: str, param: str | None, number: int | None, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(text)
    found = check(read_lines(tmp_path / "in", 4096 if code == "line_too_long" else 1 << 20, CHAT))
    (error,) = found.errors
    assert (error.code, error.param, error.line) == (code, param, number), error
    assert error.message


def test_an_input_is_read_as_it_is(tmp_path: Path) -> None:
    body = b'{ "messages":[{"role":"user","content":"\\u00fc \xc3\xbc"}], "stream":false, "seed": 1e0}'
    text = b'\xef\xbb\xbf{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":' + body + b"}\r\n\r\n"
    (tmp_path / "in").write_bytes(text)
    (found,) = read_lines(tmp_path / "in", 4096)
    assert found == Line(1, "a", CHAT, body)
    assert check([found] * 1).errors == [] and check(iter([found, Line(2, "b", CHAT, b"{}")]), 1).errors[0].code == "too_many_requests"


def test_a_bad_input_is_a_failed_batch(server: Server) -> None:
    client = client_of(server)
    batch = ended(client, submit(client, [GOOD, {**line("b"), "method": "PUT"}, GOOD]).id)
    assert batch.status == "failed" and batch.output_file_id is None and batch.failed_at
    assert [(error.line, error.param) for error in batch.errors.data] == [(2, "method"), (3, "custom_id")]
    with pytest.raises(openai.BadRequestError, match="input_file_id: there is no file 'file-x'"):
        client.batches.create(input_file_id="file-x", endpoint="/v1/completions", completion_window="24h")
    for window in ("24", "0h", "1d"):
        with pytest.raises(openai.BadRequestError, match="completion_window"):
            submit(client, [GOOD], window=window)
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        submit(client, [GOOD], "/v1/moderations")
    with pytest.raises(openai.NotFoundError, match="there is no batch 'batch_x'"):
        client.batches.retrieve("batch_x")


class Gated(FakeEngine):
    """Answers only as many prompts as it is let, and knows them all."""

    def __init__(self, tokenizer: Tokenizer, let: int = 0, **info: Any) -> None:
        super().__init__(tokenizer)
        self.info |= info
        self.let = let
        self.texts: Counter[str] = Counter()
        self.most = 0

    async def generate(self, prompt: list[int], params: SamplingParams, *args: Any, **more: Any) -> AsyncGenerator[Any]:
        assert self.tokenizer is not None
        self.texts[self.tokenizer.decode(prompt)] += 1
        place = self.texts.total()
        async for out in super().generate(prompt, params, *args, **more):
            self.most = max(self.most, len(self.open))
            while place > self.let:
                await asyncio.sleep(0.005)
            yield out


def numbered(count: int) -> list[Any]:
    return [line(str(i), messages=[{"role": "user", "content": f"say {i}"}]) for i in range(count)]


def test_cancel_keeps_what_is_done(tokenizer: Tokenizer) -> None:
    engine = Gated(tokenizer, let=5, max_num_seqs=8)
    with Server(engine) as server:
        client = client_of(server)
        batch = submit(client, numbered(40))
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 5)
        with pytest.raises(openai.ConflictError, match="has not ended"):
            client.files.delete(batch.input_file_id)
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = ended(client, batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
        assert len(lines_of(client, batch.output_file_id)) == 5 == batch.request_counts.completed and batch.error_file_id is None
        until(lambda: not engine.open)
        assert server.fleet.gate.admission.requests == 0
        with pytest.raises(openai.ConflictError, match="it is cancelled"):
            client.batches.cancel(batch.id)
        engine.let = 1 << 30  # and a cancelled batch takes no place from the next one
        assert ended(client, submit(client, numbered(20)).id).request_counts.completed == 20


def test_the_background_stays_in_the_background(tokenizer: Tokenizer) -> None:
    engine = Gated(tokenizer, let=0, max_num_seqs=16)
    with Server(engine) as server:
        client = client_of(server)
        batch = submit(client, numbered(40))
        until(lambda: len(engine.open) == 8)  # half of what the engine can run
        asked = threading.Thread(target=lambda: client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "me"}]))
        asked.start()
        until(lambda: len(engine.open) == 9)
        engine.let = 9
        asked.join(20)
        assert not asked.is_alive()
        engine.let = 1 << 30
        assert ended(client, batch.id).request_counts.completed == 40
        priorities = Counter(priority for _, _, priority, _ in engine.seen)
        assert priorities == {BACKGROUND_PRIORITY: 40, 0: 1} and engine.most == 9
        metrics = httpx.get(server.url + "/metrics").text
        assert 'request_success_total{finished_reason="stop",model_name="tiny"} 41.0' in metrics
        assert 'time_to_first_token_seconds_count{model_name="tiny"} 1.0' in metrics  # of the one that somebody has waited for


def run_all(count: int, run: Callable[[Line], Any], monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[Result]:
    """Runs so many lines with four slots; cancelled when so many are kept."""
    monkeypatch.setattr("miniinfer.serve.batch_lines.AGAIN", 0.01)
    kept: list[Result] = []

    async def main() -> None:
        slots, enough = asyncio.Semaphore(4), asyncio.Event()

        async def keep(results: list[Result]) -> None:
            kept.extend(results)
            await asyncio.sleep(0.001)
            if stop_at is not None and len(kept) >= stop_at:
                enough.set()

        work = asyncio.create_task(Runner(run, keep, slots, 8).all(iter([Line(i, str(i), CHAT, b"{}") for i in range(count)])))
        if stop_at is not None:
            await enough.wait()
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        assert slots._value == 4, "every slot has been given back"

    asyncio.run(main())
    return kept


def test_a_line_that_finds_no_place_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: Counter[int] = Counter()

    async def run(line: Line) -> Result:
        tried[line.number] += 1
        await asyncio.sleep(0)
        again = line.number % 3 == 0 and tried[line.number] <= 3
        return Result(line, status=503 if again else 200, again=again)

    kept = run_all(20, run, monkeypatch)
    assert sorted(result.line.number for result in kept) == list(range(20)) and all(result.ok for result in kept)
    assert tried == {i: 4 if i % 3 == 0 else 1 for i in range(20)}


def test_what_is_finished_when_it_stops_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[int] = []

    async def run(line: Line) -> Result:
        await asyncio.sleep(0.001)
        finished.append(line.number)
        return Result(line, status=200)

    kept = run_all(1000, run, monkeypatch, stop_at=30)
    assert [result.line.number for result in kept] == finished and 30 <= len(finished) < 1000


def test_whoever_cannot_write_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(line: Line) -> Result:
        return Result(line, status=200)

    async def main() -> None:
        async def keep(_: list[Result]) -> None:
            raise OSError(errno.ENOSPC, "full")

        slots = asyncio.Semaphore(4)
        with pytest.raises(OSError, match="full"):
            await Runner(run, keep, slots, 8).all(Line(i, str(i), CHAT, b"{}") for i in itertools.count())
        assert slots._value == 4

    asyncio.run(main())


def test_half_of_the_room_is_not_for_the_background() -> None:
    admission = Admission(ServerConfig(max_waiting=10, max_waiting_tokens=1000))
    whole = admission.enter([1] * 8, 1, None, background=True)  # alone it may be larger
    with pytest.raises(ApiError, match="in the background"):
        admission.enter([1], 1, None, background=True)
    whole.leave(1)
    tickets = [admission.enter([1], 1, None, background=True) for _ in range(5)]
    with pytest.raises(ApiError) as caught:
        admission.enter([1], 1, None, background=True)
    assert caught.value.status == 429
    tickets += [admission.enter([1], 1, None) for _ in range(5)]
    for ticket in tickets:
        ticket.leave(1)
    assert (admission.requests, admission.background, admission.tokens) == (0, 0, 0)
    admission.enter([200], 200, None, background=True)
    with pytest.raises(ApiError):
        admission.enter([100], 100, None, background=True)


def test_a_full_server_is_no_failure_of_a_line(tokenizer: Tokenizer) -> None:
    engine = Gated(tokenizer)
    with Server(engine, max_waiting=4) as server:
        client = client_of(server)
        batch = submit(client, numbered(6))
        until(lambda: server.api.metrics.refused["429"] > 0)
        engine.let = 100
        batch = ended(client, batch.id)
        assert batch.request_counts.completed == 6 and batch.error_file_id is None


# ----------------------------------------------------------------------------------------------------------- restarts


def stored(root: Path, batch: Any) -> list[str]:
    """custom_ids in a batch's output, in mid-run too; the file is found by the batch's record."""
    record = json.loads((root / "batches" / f"{batch.id}.json").read_text())
    path = root / "files" / record["output_id"]
    return [json.loads(text)["custom_id"] for text in path.read_text().splitlines()] if path.exists() else []


def test_a_batch_goes_on_after_a_restart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = Gated(tokenizer, let=11, max_num_seqs=8)
    with Server(first, files_dir=str(tmp_path)) as server:
        client = client_of(server)
        batch = submit(client, numbered(30))
        until(lambda: len(stored(tmp_path, batch)) == 11)
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 11)  # counted once it is on disk
        with pytest.raises(ConfigError, match="in use by another server"):
            Store(ServerConfig(files_dir=str(tmp_path))).root  # noqa: B018  taking the folder is what is tested
    done = stored(tmp_path, batch)
    record = json.loads((tmp_path / "batches" / f"{batch.id}.json").read_text())
    assert record["status"] == "in_progress"
    with (tmp_path / "files" / record["output_id"]).open("a") as file:
        file.write('{"id": "batch_req_1", "custom_id": "29", "resp')  # as a process leaves it that is killed while it writes
    (tmp_path / "files" / "file-torn").write_bytes(b"an upload that was cut off")
    second = Gated(tokenizer, let=1 << 30)
    with Server(second, files_dir=str(tmp_path)) as server:
        client = client_of(server)
        after = ended(client, batch.id)
        assert after.status == "completed" and after.request_counts.completed == 30
        answers = lines_of(client, after.output_file_id)
        assert answers.keys() == {str(i) for i in range(30)}
        again = {text.split("say ")[1].split("<")[0].split("\n")[0] for text in second.texts}
        assert len(second.texts) == 19 == second.texts.total() and again.isdisjoint(done)
        assert after.usage.output_tokens == sum(item["response"]["body"]["usage"]["completion_tokens"] for item in answers.values())
        assert {file.id for file in client.files.list()} == {after.input_file_id, after.output_file_id}
    assert not (tmp_path / "files" / "file-torn").exists()
    with Server(Gated(tokenizer), files_dir=str(tmp_path)) as server:  # and what has ended is still there
        assert client_of(server).batches.retrieve(batch.id) == after


def test_what_is_not_done_in_time_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Server(Gated(tokenizer, let=3, max_num_seqs=8), files_dir=str(tmp_path)) as server:
        batch = submit(client_of(server), numbered(10), window="2h")
        assert batch.expires_at - batch.created_at == 7200
        until(lambda: len(stored(tmp_path, batch)) == 3)
    path = tmp_path / "batches" / f"{batch.id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "expires_at": int(time.time()) - 1}))
    with Server(Gated(tokenizer), files_dir=str(tmp_path)) as server:
        client = client_of(server)
        batch = ended(client, batch.id)
        assert batch.status == "expired" and batch.expired_at and (batch.request_counts.completed, batch.request_counts.failed) == (3, 7)
        answers, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
        assert answers.keys() | errors.keys() == {str(i) for i in range(10)}
        assert all(item["response"] is None and item["error"]["code"] == "batch_expired" for item in errors.values())


def test_a_full_disk_fails_the_batch_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    client = client_of(server)
    with monkeypatch.context() as patched:
        patched.setattr(Lines, "add", full)
        batch = ended(client, submit(client, numbered(5)).id)
        assert batch.status == "failed" and "No space left" in batch.errors.data[0].message
    assert ended(client, submit(client, numbered(5)).id).request_counts.completed == 5


def test_lines_survive_what_interrupts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\nthr")
    lines = Lines(path)
    assert list(lines) == [b"one\n", b"two\n"] and path.read_bytes() == b"one\ntwo\nthr"  # nothing is lost before something is written
    with pytest.raises(BlockingIOError):
        Lines(path)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            lines.add(b"three\n")
    assert path.read_bytes() == b"one\ntwo\n"
    lines.add(b"three\n" * 100_000)
    lines.close()
    assert Lines(path).size == 8 + 600_000


def test_a_file_of_something_else_is_no_results_file(tmp_path: Path) -> None:
    path, result = tmp_path / "notes", b'{"custom_id": "a", "response": null}\n'
    for text, number in ((b"dear diary\n", 1), (result + b"[]\n", 2), (result * 2, 2)):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"line {number} of .*notes is not a result"):
            Results(path)
        assert path.read_bytes() == text


# ---------------------------------------------------------------------------------------------------------------- keys


KEYS = """
[[keys]]
key = "first-long-key"
name = "first"
priority = 3
requests_per_minute = 600

[[keys]]
key = "other-long-key"
name = "other"
"""


def test_files_and_batches_are_their_clients(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS)
    engine = Gated(tokenizer, let=1 << 30)
    with Server(engine, api_keys_file=str(keys), files_dir=str(tmp_path / "files")) as server:
        mine, other = client_of(server, "first-long-key"), client_of(server, "other-long-key")
        batch = ended(mine, submit(mine, numbered(4)).id)
        assert batch.request_counts.completed == 4 and {priority for _, _, priority, _ in engine.seen} == {BACKGROUND_PRIORITY + 3}
        assert other.files.list().data == [] and other.batches.list().data == [] and len(mine.files.list().data) == 2
        for ask, id in (
            (other.files.retrieve, batch.output_file_id),
            (other.files.content, batch.output_file_id),
            (other.files.delete, batch.output_file_id),
            (other.batches.retrieve, batch.id),
            (other.batches.cancel, batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask(id)
        with pytest.raises(openai.BadRequestError, match="there is no file"):
            other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    assert b"long-key" not in b"".join(path.read_bytes() for path in (tmp_path / "files").rglob("*") if path.is_file())


def test_a_batch_waits_for_its_clients_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys, folder = tmp_path / "keys.toml", str(tmp_path / "files")
    keys.write_text(KEYS)
    with Server(Gated(tokenizer, max_num_seqs=8), api_keys_file=str(keys), files_dir=folder) as server:
        batch = submit(client_of(server, "first-long-key"), numbered(12))
    keys.write_text(KEYS.replace('"first"', '"stranger"'))
    without = Gated(tokenizer, let=1 << 30)
    with Server(without, api_keys_file=str(keys), files_dir=folder) as server:
        with pytest.raises(openai.NotFoundError):  # the key is another client's now
            client_of(server, "first-long-key").batches.retrieve(batch.id)
        assert not without.seen
    keys.write_text(KEYS.replace("first-long-key", "a-changed-key"))
    with Server(Gated(tokenizer, let=1 << 30), api_keys_file=str(keys), files_dir=folder) as server:
        assert ended(client_of(server, "a-changed-key"), batch.id).request_counts.completed == 12


def test_a_batch_leaves_its_client_half_of_the_rate(tokenizer: Tokenizer, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS.replace("600", "60"))
    engine = Gated(tokenizer, let=1 << 30)
    with Server(engine, api_keys_file=str(keys)) as server:
        client = client_of(server, "first-long-key")
        batch = submit(client, numbered(200))
        until(lambda: len(engine.seen) >= 25)
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "and me"}])
        assert server.api.metrics.refused["429"] == 0
        assert len(engine.seen) < 100
        client.batches.cancel(batch.id)


def test_a_line_cannot_be_asked_for_from_outside(tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), api_key="secret") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", CHAT, json.dumps(BODIES[CHAT]), {"content-type": "application/json", "miniinfer.caller": "x"})
        assert connection.getresponse().status == 401


def test_errors_are_counted_but_not_without_end() -> None:
    many = [LineError("invalid_json_line", "no", None, i) for i in range(1000)]
    assert len(check(many).errors) == 100
