"""LLM: offline generation in the caller's process, with vLLM's names and shapes, so that a script moves over by changing its import.

Owns the public offline API and the progress bar. The engine is EngineCore, texts are engine/text.py's and engine/output.py's, as in the server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from miniinfer.config import ConfigError, EngineConfig, read_generation_config
from miniinfer.data import POOLINGS, EmbeddingOutput, EmbeddingRequestOutput, Logprob, RequestOutput, SamplingParams
from miniinfer.engine.beam import BeamSearch, BeamSearchParams
from miniinfer.engine.core import EngineCore
from miniinfer.engine.output import OutputProcessor, unit, validate
from miniinfer.engine.text import Tokenizer
from miniinfer.models.hub import resolve_folder
from miniinfer.utils import get_logger

log = get_logger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A model in this process. Options are EngineConfig's; ConfigError names one that does not exist or cannot work.

    >>> llm = LLM("Qwen/Qwen3-0.6B")
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=20))[0].outputs[0].text
    """

    def __init__(self, model: str = "bundled", **options: Any) -> None:
        known = {f.name for f in dataclasses.fields(EngineConfig)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"LLM: unknown option {', '.join(unknown)}; the options are: {', '.join(sorted(known))}")
        config = EngineConfig(model=model, **options)
        self.core = EngineCore(config)
        self.info = self.core.info
        folder = Path(self.info["folder"])
        self.tokenizer: Tokenizer | None = None
        if not config.skip_tokenizer_init:
            own = config.tokenizer
            self.tokenizer = Tokenizer.from_folder(resolve_folder(own, config.revision, "tokenizer.json") if own else folder)
        self.processor = OutputProcessor(self.tokenizer)
        self._defaults = read_generation_config(folder)
        self._ids = count()

    def get_tokenizer(self) -> Tokenizer | None:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the values that the checkpoint's generation_config.json recommends."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return SamplingParams(**{n: self._defaults[n] for n in names if self._defaults.get(n) is not None})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt: a text, a list of token ids, or {"prompt": ...} / {"prompt_token_ids": [...]}; one of them or a list.

        `sampling_params`, `priority`: one for all, or one each. Returns one RequestOutput per prompt, in order. One that failed alone, say by a bad
        grammar, has its `error` set, and the log says so. ValueError names a bad prompt or field; then nothing has been started."""
        wanted: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        params = self._params_for(len(wanted), sampling_params)
        priorities = [priority or 0] * len(wanted) if priority is None or isinstance(priority, int) else list(priority)
        if len(priorities) != len(wanted):
            raise ValueError(f"priority: {len(priorities)} values for {len(wanted)} prompts")
        requests = []
        for i, (prompt, each) in enumerate(zip(wanted, params, strict=True)):
            text, ids = self._tokens(prompt)
            try:
                validate(ids, each, self.info, self.tokenizer)
            except ValueError as e:
                raise ValueError(f"prompts[{i}]: {e}") from None
            requests.append((text, ids, each, priorities[i]))
        outputs = self._run(requests, use_tqdm)
        failed = [f"prompts[{i}]: {output.error}" for i, output in enumerate(outputs) if output.error is not None]
        if failed:
            log.warning("%d of %d requests failed, see `error` of their outputs; the first: %s", len(failed), len(outputs), failed[0])
        return outputs

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation ([{"role": ..., "content": ...}, ...]) or a list of conversations, rendered by the checkpoint's chat template.
        With `continue_final_message` the answer goes on where the last message ends."""
        if self.tokenizer is None:
            raise ValueError("chat: needs a tokenizer, but the engine was made with skip_tokenizer_init=True")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = self.tokenizer.render_chat(
                list(conversation), tools, add_generation_prompt, continue_final_message, **(chat_template_kwargs or {})
            )
            prompts.append({"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm, priority)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """The `beam_width` best continuations of each prompt, best first, as the outputs of a RequestOutput."""
        searches, texts = [], []
        for i, prompt in enumerate([prompts] if _is_one(prompts) else list(prompts)):  # type: ignore[list-item]
            text, ids = self._tokens(prompt)  # type: ignore[arg-type]
            try:
                validate(ids, params.step_params(), self.info, self.tokenizer)
            except ValueError as e:
                raise ValueError(f"prompts[{i}]: {e}") from None
            searches.append(BeamSearch(ids, params, self.info["eos_token_ids"], self.info["max_model_len"]))
            texts.append(text)
        while open_ := [search for search in searches if not search.done]:
            requests: list[tuple[str | None, list[int], SamplingParams, int]]
            requests = [(None, ids, params.step_params(), 0) for search in open_ for ids in search.prompts()]
            outputs = iter(self._run(requests, use_tqdm=False))
            for search in open_:
                search.advance([_first_table(next(outputs)) for _ in search.beams])
        found = zip(searches, texts, strict=True)
        return [RequestOutput(str(next(self._ids)), text, s.prompt, s.best(self.tokenizer, 2 * params.beam_width), True) for s, text in found]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], use_tqdm: bool = True, *, pooling: str = "last", normalize: bool = True
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt: the final hidden state of its last token, or the mean over all (`pooling` "mean"); of length 1 if `normalize`."""
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        params, requests = SamplingParams(max_tokens=1), []
        for i, prompt in enumerate([prompts] if _is_one(prompts) else list(prompts)):  # type: ignore[list-item]
            text, ids = self._tokens(prompt)  # type: ignore[arg-type]
            try:
                validate(ids, params, self.info, self.tokenizer, pooled=True)
            except ValueError as e:
                raise ValueError(f"prompts[{i}]: {e}") from None
            requests.append((text, ids, params, 0))
        found: list[EmbeddingRequestOutput] = []
        for output in self._run(requests, use_tqdm, pooling):
            if output.embedding is None:
                raise RuntimeError(f"the engine failed on prompts[{len(found)}]: {output.error}")
            vector = EmbeddingOutput(unit(output.embedding, normalize=normalize))
            found.append(EmbeddingRequestOutput(output.request_id, vector, output.prompt_token_ids))
        return found

    def sleep(self, level: int = 1) -> dict[str, Any]:
        """Gives the memory of weights and KV pages back until `wake_up`. Level 1 keeps the weights in host memory, level 2 reads them from the
        checkpoint again. Returns figures. ValueError unless the LLM was made with `enable_sleep_mode`."""
        return self.core.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> dict[str, Any]:
        """Undoes `sleep`, for all of it or for `tags`: "weights", "kv_cache". RuntimeError if there is too little memory; it sleeps on then."""
        return self.core.wake_up(tags)

    def start_profile(self) -> None:
        """Begins a profile of the steps to come. ValueError unless the LLM was made with `profile`, a folder."""
        self.core.control("start_profile")

    def stop_profile(self) -> dict[str, Any]:
        """Ends it; figures of its steps and, as "trace", the file for ui.perfetto.dev."""
        return self.core.control("stop_profile")

    def _params_for(self, number: int, given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * number
        if len(given) != number:
            raise ValueError(f"sampling_params: {len(given)} values for {number} prompts")
        return list(given)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if other := [key for key, value in prompt.items() if key not in ("prompt", "prompt_token_ids") and value is not None]:
                raise ValueError(f"prompts: a dict may have 'prompt' and 'prompt_token_ids', not {other[0]!r}")
            if prompt.get("prompt_token_ids") is not None:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if "prompt" not in prompt:
                raise ValueError("prompts: a dict needs the key 'prompt' or 'prompt_token_ids'")
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            return None, list(prompt)  # type: ignore[arg-type]  # a dict whose prompt is token ids
        if self.tokenizer is None:
            raise ValueError("prompts: text needs a tokenizer, but the engine was made with skip_tokenizer_init=True; give token ids")
        return prompt, self.tokenizer.encode(prompt)

    def _run(
        self, requests: list[tuple[str | None, list[int], SamplingParams, int]], use_tqdm: bool, pooling: str | None = None
    ) -> list[RequestOutput]:
        """Adds everything, then steps until all have ended. Interrupted, it leaves the engine empty."""
        if self.core.is_sleeping:
            raise RuntimeError("the LLM is asleep: call wake_up() first")
        ids = [str(next(self._ids)) for _ in requests]
        finished: dict[str, RequestOutput] = {}
        bar = tqdm(total=len(requests), desc="requests", unit="req", disable=not use_tqdm, dynamic_ncols=True)
        tokens = 0
        try:
            for request_id, (text, prompt, params, priority) in zip(ids, requests, strict=True):
                for message in self.processor.add(request_id, text, prompt, params, priority=priority):
                    message.pooling = pooling
                    self._finish(self.core.add(message), finished, bar)
            while len(finished) < len(requests):
                updates = self.core.step()
                tokens += sum(len(u.token_ids) for u in updates)
                if self._finish(updates, finished, bar):
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s", refresh=False)
        finally:
            bar.close()
            if len(finished) < len(requests):
                self.core.abort(self.processor.drop([i for i in ids if i not in finished]))
            while self.core.has_work:  # the overlapped step that is still out
                self.core.step()
        return [finished[i] for i in ids]

    def _finish(self, updates: list[Any], finished: dict[str, RequestOutput], bar: Any) -> int:
        """Collects the requests that these updates end; returns their number."""
        if not updates:
            return 0
        outputs, aborts = self.processor.process(updates)
        if aborts:
            self.core.abort(aborts)
        ended = [o for o in outputs if o.finished]
        for output in ended:
            finished[output.request_id] = output
        bar.update(len(ended))
        return len(ended)


def _first_table(output: RequestOutput) -> dict[int, Logprob]:
    """The log-probabilities of a request's one token."""
    tables = output.outputs[0].logprobs
    if not tables:
        raise RuntimeError(f"the engine failed on a beam: {output.error}")
    return tables[0]


def _is_one(prompts: Any) -> bool:
    """One prompt rather than a list of them."""
    return isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int))
