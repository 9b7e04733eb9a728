"""Beam search through the server: rounds of ordinary requests, which the engine batches and admission counts. The search is engine/beam.py's."""

from __future__ import annotations

from contextlib import aclosing

from miniinfer.data import SamplingParams
from miniinfer.engine.beam import BeamSearch, BeamSearchParams, Table
from miniinfer.serve.answers import Answer, ChatAnswer, CompletionAnswer, Prompt
from miniinfer.serve.protocol import ApiError
from miniinfer.serve.service import Service


async def beam_answer(service: Service, answer: ChatAnswer | CompletionAnswer, params: SamplingParams) -> bytes:
    """Searches for each of the answer's prompts and puts the n best into its choices. ApiError for what a search cannot have."""
    if params.structured_outputs is not None:
        raise ApiError(400, "use_beam_search: not possible together with structured output or tools that must be called", param="use_beam_search")
    if params.prompt_logprobs is not None:
        raise ApiError(400, "echo: prompt log-probabilities are not possible with use_beam_search", param="echo")
    info, request = service.engine.info, answer.request
    for number, prompt in enumerate(answer.prompts):
        service.check_length(prompt, params.max_tokens)
        room = info["max_model_len"] - len(prompt.token_ids)
        wanted = request.beam_search_params(room if params.max_tokens is None else params.max_tokens)
        assert wanted is not None
        search = BeamSearch(prompt.token_ids, wanted, info.get("eos_token_ids", ()), info["max_model_len"], params.stop_token_ids or ())
        while not search.done:
            search.advance(await _round(service, answer, search, wanted))
        for output in search.best(service.engine.tokenizer, params.logprobs, params.skip_special_tokens)[: answer.n]:
            output.index += number * answer.n
            answer.completion_tokens += len(output.token_ids)
            answer.add(output)
    return answer.result()


async def _round(service: Service, answer: ChatAnswer | CompletionAnswer, search: BeamSearch, wanted: BeamSearchParams) -> list[Table]:
    """The likeliest next tokens of each beam."""
    prompts = [Prompt(ids) for ids in search.prompts()]
    running = Answer(f"{answer.id}-{len(prompts[0].token_ids)}", service.model, answer.request, prompts, 1, None)
    async with aclosing(service.items(running, wanted.step_params())) as items:
        async for item in items:
            for delta in item.outputs:
                running.add(delta)
    tables = [choice.logprobs[0] for choice in running.choices if choice.logprobs]
    if len(tables) != len(prompts):
        raise ApiError(500, "the engine returned no log-probabilities for a beam")
    return tables
