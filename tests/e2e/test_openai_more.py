"""openai-python against a real server on a real (tiny, random) model: embeddings, responses, beam search, tokens, batches."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_process import ROOT, ServerProcess, wait_for

from miniinfer import LLM

MODEL = "tiny-qwen3"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), device="cpu", dtype="float32", num_threads=1)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_offline_ones(client: openai.OpenAI, llm: LLM, pooling: Any) -> None:
    texts = ["hello there", "one two three " * 60, "x"]
    answer = client.embeddings.create(model=MODEL, input=texts, extra_body={"pooling": pooling})
    for entry, output in zip(answer.data, llm.embed(texts, use_tqdm=False, pooling=pooling), strict=True):
        assert entry.embedding == pytest.approx(output.outputs.embedding, abs=1e-4)
        assert math.hypot(*entry.embedding) == pytest.approx(1, abs=1e-5)


def test_a_response_is_the_chat_answer(client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "hello there"}]
    chat = client.chat.completions.create(model=MODEL, messages=said, max_completion_tokens=20, temperature=0)
    response = client.responses.create(model=MODEL, input="hello there", max_output_tokens=20, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    events = list(client.responses.create(model=MODEL, input="hello there", max_output_tokens=20, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == response.output_text
    more = client.responses.create(model=MODEL, input="and?", previous_response_id=response.id, max_output_tokens=5, temperature=0)
    whole: Any = [*said, {"role": "assistant", "content": response.output_text}, {"role": "user", "content": "and?"}]
    again = client.chat.completions.create(model=MODEL, messages=whole, max_completion_tokens=5, temperature=0)
    assert more.output_text == again.choices[0].message.content and more.usage and again.usage
    assert more.usage.input_tokens == again.usage.prompt_tokens


def test_a_wide_beam_finds_something_at_least_as_likely(client: openai.OpenAI) -> None:
    def search(width: int) -> float:
        body = {"use_beam_search": True, "beam_width": width, "ignore_eos": True}
        answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=6, logprobs=0, extra_body=body)
        logprobs = answer.choices[0].logprobs
        assert logprobs and logprobs.token_logprobs and len(logprobs.token_logprobs) == 6
        return sum(value or 0.0 for value in logprobs.token_logprobs)

    greedy = client.completions.create(model=MODEL, prompt="one two", max_tokens=6, logprobs=0, temperature=0, extra_body={"ignore_eos": True})
    assert greedy.choices[0].logprobs and greedy.choices[0].logprobs.token_logprobs
    assert search(1) == pytest.approx(sum(value or 0.0 for value in greedy.choices[0].logprobs.token_logprobs), abs=1e-3)
    assert search(8) >= search(1) - 1e-3


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "one two", "max_tokens": 8, "temperature": 1.5, "seed": 3, "logprobs": 0}
    every = client.completions.create(**fields, n=6)
    likeliest = max(every.choices, key=lambda choice: sum(value or 0.0 for value in choice.logprobs.token_logprobs))  # type: ignore[union-attr]
    assert client.completions.create(**fields, best_of=6).choices[0].text == likeliest.text


def test_tokens_are_what_is_billed(server: ServerProcess, client: openai.OpenAI) -> None:
    root = server.url.removesuffix("/v1")
    found = httpx.post(root + "/tokenize", json={"prompt": "hello there, you"}).json()
    answer = client.completions.create(model=MODEL, prompt=found["tokens"], max_tokens=1)
    assert answer.usage and answer.usage.prompt_tokens == found["count"]
    assert httpx.post(root + "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "hello there, you"}


def lines_for(count: int) -> list[dict[str, Any]]:
    bodies = [{"prompt": f"number {i}", "max_tokens": 24, "temperature": 0, "ignore_eos": True} for i in range(count)]
    return [{"custom_id": f"line {i}", "method": "POST", "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)]


def texts_of(results: str) -> dict[str, str]:
    """custom_ids and what was answered, each there once."""
    found = [json.loads(line) for line in results.splitlines()]
    assert len({item["custom_id"] for item in found}) == len(found)
    return {item["custom_id"]: item["response"]["body"]["choices"][0]["text"] for item in found}


def directly(client: openai.OpenAI, lines: list[dict[str, Any]]) -> dict[str, str]:
    asks = [{name: line["body"][name] for name in ("prompt", "max_tokens", "temperature")} for line in lines]
    answers = [client.completions.create(model=MODEL, extra_body={"ignore_eos": True}, **ask) for ask in asks]
    return {line["custom_id"]: answer.choices[0].text for line, answer in zip(lines, answers, strict=True)}


def test_a_server_killed_in_a_batch_goes_on_with_it(client: openai.OpenAI, folder: Path, tmp_path: Path) -> None:
    lines = lines_for(200)
    options = ("--files-dir", str(tmp_path / "files"), "--max-num-seqs", "8", "--served-model-name", MODEL)
    first = ServerProcess(folder, tmp_path / "first.log", *options)
    try:
        killed = first.client()
        file = killed.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
        batch = killed.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        assert wait_for(lambda: killed.batches.retrieve(batch.id).request_counts.completed > 20, 30)  # type: ignore[union-attr]
        first.process.kill()
    finally:
        first.close()
    output = json.loads(next((tmp_path / "files" / "batches").glob("*.json")).read_text())["output_id"]
    before = (tmp_path / "files" / "files" / output).read_text()
    whole = before[: before.rfind("\n") + 1]
    assert 20 < len(texts_of(whole)) < 200
    second = ServerProcess(folder, tmp_path / "second.log", *options)
    try:
        again = second.client()
        assert wait_for(lambda: again.batches.retrieve(batch.id).status == "completed", 60)
        batch = again.batches.retrieve(batch.id)
        assert batch.output_file_id and batch.error_file_id is None
        after = again.files.content(batch.output_file_id).text
        assert after.startswith(whole) and len(texts_of(after)) == 200  # nothing was computed twice, nothing is missing
    finally:
        second.close()
    some = lines[::20]
    assert {name: text for name, text in texts_of(after).items() if name in {line["custom_id"] for line in some}} == directly(client, some)


def test_the_command_batch_goes_on_where_it_was_killed(client: openai.OpenAI, folder: Path, tmp_path: Path) -> None:
    lines = lines_for(200)
    lines[17]["body"]["max_tokens"] = -1
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    fixed = ["--device", "cpu", "--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "8", "--served-model-name", MODEL]
    command = [sys.executable, "-m", "miniinfer", "batch", "-i", str(source), "-o", str(target), str(folder), *fixed]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    assert wait_for(lambda: target.exists() and target.read_text().count("\n") > 20, 60)
    killed.kill()
    killed.wait()
    before = target.read_text()
    whole = before[: before.rfind("\n") + 1]
    assert whole.count("\n") < 200
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "199 of 200 lines done, 1 failed" in done.stderr, done.stderr
    assert target.read_text().startswith(whole)
    failed = [line for line in target.read_text().splitlines() if json.loads(line)["response"]["status_code"] != 200]
    assert [json.loads(line)["custom_id"] for line in failed] == ["line 17"]
    answers = texts_of("\n".join(line for line in target.read_text().splitlines() if line not in failed))
    assert {name: answers[name] for name in ("line 3", "line 150")} == directly(client, [lines[3], lines[150]])
    source.write_text(source.read_text() + "\n{}\n")
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2 and "line 201: Object missing required field" in wrong.stderr
