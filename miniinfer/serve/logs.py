"""The log's line for every request: who asked for what, how long it took, and how it ended. Never what was said.

Owns the line's fields and words. How lines are written, as text or as JSON, is utils.py's; what is known of a request record.py's.
"""

from __future__ import annotations

from typing import Any

from miniinfer.serve.record import Record
from miniinfer.utils import get_logger

log = get_logger(__name__)

_POLLED = ("/live", "/ready", "/health", "/metrics", "/v1/loads", "/load", "/ping")  # asked every few seconds by machines: not worth a line


def log_request(record: Record) -> None:
    """One line; nothing for a probe that found all well."""
    if log.isEnabledFor(20) and not (record.status == 200 and record.path in _POLLED):
        log.info("%s", _Words(record), extra={"fields": fields(record)})


def fields(record: Record) -> dict[str, Any]:
    """What a line says, for programs; times in milliseconds."""
    values: dict[str, Any] = {
        "request_id": record.request_id,
        "client": record.client,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "total_ms": _ms(record.seconds),
        "error": record.error,
    }
    if record.answer_id is not None:
        values |= {
            "answer_id": record.answer_id,
            "model": record.model,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
            "finish_reason": ",".join(dict.fromkeys(record.finish_reasons)),
            "queue_ms": _ms(record.queued),
            "ttft_ms": _ms(record.first_token),
        }
    return {name: value for name, value in values.items() if value is not None}


class _Words:
    """The line for people, made only if somebody reads it."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __str__(self) -> str:
        record = self._record
        text = f"{record.request_id} {record.method} {record.path} {record.status} in {1e3 * record.seconds:.1f} ms"
        if record.answer_id is not None:
            text += f": {record.prompt_tokens} prompt tokens ({record.cached_tokens} cached), {record.output_tokens} of output"
            text += f", {','.join(dict.fromkeys(record.finish_reasons)) or 'no end'}"
        return text


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
