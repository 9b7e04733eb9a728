"""The API over gRPC through a channel, over a fake engine: streams, keys, deadlines, cancellations, health, and the option itself."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import END, FakeEngine

from miniinfer.config import ServerConfig
from miniinfer.engine.text import Tokenizer
from miniinfer.serve import grpc as served
from miniinfer.serve.fleet import Fleet
from miniinfer.serve.record import Record
from miniinfer.serve.service import Service

API = served.Api()
V1, HEALTH = "miniinfer.v1.", "grpc.health.v1."
KEY = "secret-secret-secret"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Client:
    """The methods over one channel, and what is behind them."""

    def __init__(self, channel: grpc.aio.Channel, service: Service, fleet: Fleet) -> None:
        self.service, self.engine, self.fleet = service, service.engine, fleet
        self.generate = self._method(channel.unary_stream, served.SERVICE, "Generate", f"{V1}GenerateResponse")
        self.embed = self._method(channel.unary_unary, served.SERVICE, "Embed", f"{V1}EmbedResponse")
        self.info = self._method(channel.unary_unary, served.SERVICE, "ModelInfo", f"{V1}ModelInfoResponse")
        self.check = self._method(channel.unary_unary, served.HEALTH, "Check", f"{HEALTH}HealthCheckResponse")
        self.watch = self._method(channel.unary_stream, served.HEALTH, "Watch", f"{HEALTH}HealthCheckResponse")

    def _method(self, make: Any, service: str, method: str, answer: str) -> Any:
        return make(f"/{service}/{method}", request_serializer=lambda m: m.SerializeToString(), response_deserializer=API.message(answer).FromString)

    async def run(self, request: Any, **call: Any) -> list[Any]:
        return [part async for part in self.generate(request, **call)]


def request(text: str | None = "hello", **fields: Any) -> Any:
    return API.message(f"{V1}GenerateRequest")(**({} if text is None else {"text": text}), **fields)


def serve(tokenizer: Tokenizer, test: Callable[[Client], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Runs a test beside a server of its own."""

    @asynccontextmanager
    async def client() -> AsyncGenerator[Client]:
        service = Service(FakeEngine(tokenizer), ServerConfig(**options), "tiny", {})  # type: ignore[arg-type]
        fleet = Fleet.of(service)
        server, port = await served.start(fleet, "127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Client(channel, service, fleet)
        await server.stop(None)
        assert service.unfinished == 0 and not service.engine.open  # type: ignore[attr-defined]

    async def main() -> None:
        async with client() as made:
            await test(made)

    asyncio.run(asyncio.wait_for(main(), 20))


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call
    return e.value.code(), e.value.details() or ""


def test_a_stream(tokenizer: Tokenizer) -> None:
    async def test(client: Client) -> None:
        sampling = {"max_tokens": 50, "temperature": 0.5, "seed": 5, "stop_token_ids": [9], "logprobs": 0}
        parts = await client.run(request(sampling=sampling, model="tiny", priority=2, cache_salt="mine"))
        tokens = [*tokenizer.encode("hello there"), END]
        assert "".join(p.text for p in parts) == "hello there" and [t for p in parts for t in p.token_ids] == tokens
        assert [round(v, 6) for p in parts for v in p.logprobs] == [-t / 1000 for t in tokens]
        assert len(parts) == len(tokens) and [p.finish_reason for p in parts] == [""] * (len(parts) - 1) + ["stop"]
        prompt, params, priority, salt = client.engine.seen[0]
        usage = parts[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (len(prompt), len(tokens), 3)
        assert (params.max_tokens, params.temperature, params.seed, params.stop_token_ids, priority, salt) == (50, 0.5, 5, [9], 2, "mine")

    serve(tokenizer, test)


def test_prompts_and_outputs_of_all_kinds(tokenizer: Tokenizer) -> None:
    async def test(client: Client) -> None:
        await client.run(request(None, token_ids={"ids": [5, 6, 7]}))
        assert client.engine.seen[-1][0] == [5, 6, 7]
        await client.run(request(None, conversation={"messages": [{"role": "user", "content": "hello"}]}))
        prompt = tokenizer.decode(client.engine.seen[-1][0], skip_special_tokens=False)
        assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        parts = await client.run(request(sampling={"n": 2, "stop": ["the"]}))
        texts = {i: "".join(p.text for p in parts if p.index == i) for i in (0, 1)}
        assert texts == {0: "hello ", 1: "hello "} and parts[-1].stop_reason == "the"
        await client.run(request(sampling={"regex": "h.*"}))
        wanted = client.engine.seen[-1][1].structured_outputs
        assert wanted is not None and (wanted.kind, wanted.text) == ("regex", "h.*")

    serve(tokenizer, test)


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"text": None}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"sampling": {"temperature": -1.0}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"sampling": {"temperature": float("nan")}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"sampling": {"max_tokens": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"sampling": {"max_tokens": 100_000}}, grpc.StatusCode.INVALID_ARGUMENT, "this model's maximum context"),
        ({"sampling": {"stop_token_ids": [99_999]}}, grpc.StatusCode.INVALID_ARGUMENT, "stop_token_ids"),
        ({"model": "other"}, grpc.StatusCode.NOT_FOUND, "the model 'other'"),
    ],
)
def test_a_bad_field_is_named(tokenizer: Tokenizer, fields: dict[str, Any], code: grpc.StatusCode, named: str) -> None:
    async def test(client: Client) -> None:
        got, details = await code_of(client.run(request(**fields)))
        assert got == code and details.startswith(named), details

    serve(tokenizer, test)


def test_keys(tokenizer: Tokenizer) -> None:
    async def test(client: Client) -> None:
        assert (await code_of(client.run(request())))[0] == grpc.StatusCode.UNAUTHENTICATED
        assert (await code_of(client.run(request(), metadata=(("authorization", "Bearer wrong"),))))[0] == grpc.StatusCode.UNAUTHENTICATED
        assert (await code_of(client.info(API.message(f"{V1}ModelInfoRequest")())))[0] == grpc.StatusCode.UNAUTHENTICATED
        assert not client.engine.seen
        assert await client.run(request(), metadata=(("authorization", f"Bearer {KEY}"),))
        assert (await client.check(API.message(f"{HEALTH}HealthCheckRequest")())).status == 1, "health asks for no key"

    serve(tokenizer, test, api_key=[KEY])


def test_calls_are_recorded(tokenizer: Tokenizer) -> None:
    seen: list[Record] = []

    async def test(client: Client) -> None:
        client.fleet.sinks[:] = [seen.append]
        await client.run(request(sampling={"max_tokens": 3}), metadata=(("x-request-id", "mine"),))
        await client.embed(API.message(f"{V1}EmbedRequest")(text="hello"))
        await code_of(client.run(request(sampling={"max_tokens": 0})))
        call = client.generate(request())
        client.service.engine.delay = 0.05  # type: ignore[attr-defined]
        await anext(aiter(call))
        call.cancel()
        while len(seen) < 4:
            await asyncio.sleep(0.01)

    serve(tokenizer, test)
    assert [(r.method, r.path, r.status) for r in seen] == [
        ("gRPC", "/miniinfer.v1.MiniInfer/Generate", 200), ("gRPC", "/miniinfer.v1.MiniInfer/Embed", 200),
        ("gRPC", "/miniinfer.v1.MiniInfer/Generate", 400), ("gRPC", "/miniinfer.v1.MiniInfer/Generate", 499),
    ]  # fmt: skip
    assert seen[0].request_id == "mine" and seen[0].client == "127.0.0.1" and seen[0].output_tokens == 3 and seen[0].finish_reasons == ["length"]


def test_admission(tokenizer: Tokenizer) -> None:
    async def test(client: Client) -> None:
        client.engine.gate = asyncio.Event()
        first = asyncio.create_task(client.run(request()))
        while not client.engine.open:
            await asyncio.sleep(0.01)
        call = client.generate(request())
        assert (await code_of(call.read()))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(await call.trailing_metadata())["retry-after"]) >= 1
        client.engine.gate.set()
        assert (await first)[-1].finish_reason == "stop"
        client.service.gate.draining = True
        assert (await code_of(client.run(request())))[0] == grpc.StatusCode.UNAVAILABLE

    serve(tokenizer, test, max_waiting=1)


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_who_does_not_wait_any_longer_aborts(tokenizer: Tokenizer, how: str) -> None:
    async def test(client: Client) -> None:
        client.engine.gate = asyncio.Event()
        call = client.generate(request(), timeout=0.3 if how == "deadline" else None)
        reading = asyncio.create_task(call.read())
        while not client.engine.open:
            await asyncio.sleep(0.01)
        if how == "deadline":
            assert (await code_of(reading))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        while client.engine.open or client.service.unfinished:
            await asyncio.sleep(0.01)
        assert len(client.engine.aborted) == 1

    serve(tokenizer, test)


def test_an_engine_that_dies(tokenizer: Tokenizer) -> None:
    async def test(client: Client) -> None:
        ask = API.message(f"{HEALTH}HealthCheckRequest")
        watch = client.watch(ask())
        assert (await watch.read()).status == 1
        client.engine.die_after = 3
        assert await code_of(client.run(request())) == (grpc.StatusCode.UNAVAILABLE, "the engine has died")
        assert (await client.check(ask(service=served.SERVICE))).status == 2
        assert (await watch.read()).status == 2
        watch.cancel()
        assert (await code_of(client.check(ask(service="other"))))[0] == grpc.StatusCode.NOT_FOUND

    serve(tokenizer, test)


def test_embed(tokenizer: Tokenizer) -> None:
    async def test(client: Client) -> None:
        ask = API.message(f"{V1}EmbedRequest")
        got = await client.embed(ask(token_ids={"ids": [5, 6, 7]}, normalize=False))
        assert list(got.embedding) == [7, 2, -1] and got.usage.prompt_tokens == 3
        got = await client.embed(ask(text="hello", pooling="mean", dimensions=2))
        assert len(got.embedding) == 2 and sum(x * x for x in got.embedding) == pytest.approx(1)
        code, details = await code_of(client.embed(ask(text="hello", pooling="max")))
        assert code == grpc.StatusCode.INVALID_ARGUMENT and details.startswith("pooling")

    serve(tokenizer, test)


def test_model_info(tokenizer: Tokenizer) -> None:
    async def test(client: Client) -> None:
        info = await client.info(API.message(f"{V1}ModelInfoRequest")())
        assert (info.model, info.max_model_len, info.vocab_size) == ("tiny", 512, 320) and info.server_version

    serve(tokenizer, test)


def test_the_descriptors_are_of_the_proto_files(tmp_path: Path) -> None:
    folder, made = served.DESCRIPTORS.parent, tmp_path / "api.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", "--include_imports", f"--descriptor_set_out={made}"]
    subprocess.run([*command, "miniinfer.proto", "health.proto"], check=True)
    assert made.read_bytes() == served.DESCRIPTORS.read_bytes()


def test_without_grpcio_the_option_names_the_extra() -> None:
    code = """if True:
        import sys
        sys.modules["grpc"] = None
        from miniinfer.config import ConfigError, EngineConfig, ServerConfig
        from miniinfer.serve.launch import serve
        try:
            serve(EngineConfig(model="bundled"), ServerConfig(grpc_port=0))
        except ConfigError as e:
            print(e)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert done.stdout.startswith("grpc_port: ") and "miniinfer[grpc]" in done.stdout, done.stderr
