"""Ollama's API, the part about models: which there are, which are in memory, what they are. Owns also what all of that API shares: the shape of
errors, names of models, how a body is read.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import AfterValidator, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from miniinfer.serve.fleet import Fleet, Member
from miniinfer.serve.foreign import thinking_variables
from miniinfer.serve.infill import can_infill
from miniinfer.serve.protocol import ApiError, Strict
from miniinfer.serve.schemas import Shape, Version, described
from miniinfer.serve.service import Service

OLLAMA = "0.12.6"  # the version of Ollama whose API this is
_NEVER = "2318-01-01T00:00:00Z"  # when a model that stays is unloaded


class OllamaErrorShape(Shape):
    """What went wrong, in Ollama's shape."""

    error: str


def _plain(name: str) -> str:
    return name.removesuffix(":latest")


Name = Annotated[str, AfterValidator(_plain)]


def shapes(body: Any, answer: Any, stream: str | None = None) -> dict[str, Any]:
    """A route's part of /openapi.json."""
    return described(body, answer, stream=stream, error=OllamaErrorShape)


async def read(fleet: Fleet, http: Request, kind: type[Any]) -> tuple[Service, Any]:
    """The model and the body. Ollama's users leave curl's content type as it is; a page in a browser, which is told by its origin, may not."""
    return await fleet.read(http, kind, any_type="origin" not in http.headers)


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


# ----------------------------------------------------------------------------------------------------------- models


def _details(info: dict[str, Any]) -> dict[str, Any]:
    count, family = info.get("num_parameters", 0), info.get("family", "")
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(info.get("dtype", ""), info.get("dtype", ""))
    return {"parent_model": "", "format": "safetensors", "family": family, "families": [family], "parameter_size": size, "quantization_level": kind}


def _model(member: Member) -> dict[str, Any]:
    """A model, as lists show it; of one that was never loaded not all is known. Its digest is of its files' names, sizes and times: it changes
    when they do."""
    info = member.service.engine.info if member.service is not None else {}
    folder = info.get("folder")
    files = sorted(path for path in Path(folder).iterdir() if path.is_file()) if folder else []
    states = [(path.name, path.stat().st_size, path.stat().st_mtime) for path in files]
    changed = max((at for _, _, at in states), default=float(member.created))
    return {
        "name": member.name,
        "model": member.name,
        "modified_at": datetime.fromtimestamp(changed, UTC).isoformat().replace("+00:00", "Z"),
        "size": sum(size for name, size, _ in states if name.endswith(".safetensors")),
        "digest": hashlib.sha256(repr((member.name, states)).encode()).hexdigest(),
        "details": _details(info),
    }


def _running(member: Member) -> dict[str, Any]:
    """The same of one in memory."""
    model, info = _model(member), member.service.engine.info if member.service is not None else {}
    on_gpu = model["size"] if info.get("device", "cpu") != "cpu" else 0
    return model | {"expires_at": _NEVER, "size_vram": on_gpu, "context_length": info.get("max_model_len")}


def _shown(member: Member, service: Service) -> dict[str, Any]:
    tokenizer, info = service.engine.tokenizer, service.engine.info
    template = tokenizer.chat_templates.get("default") if tokenizer else None
    family = info.get("family", "")
    able = {"tools": template is not None and "tools" in template.text, "thinking": bool(thinking_variables(service, True))}
    able["insert"] = can_infill(tokenizer)
    return {
        "modelfile": f"FROM {service.model}\n",
        "parameters": "\n".join(f"{name} {value}" for name, value in service.defaults.items()),
        "template": template.text if template else "",
        "details": _details(info),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": info.get("num_parameters", 0),
            f"{family}.context_length": info["max_model_len"],
            f"{family}.vocab_size": info["vocab_size"],
        },
        "capabilities": ["completion", *(name for name, has in able.items() if has)],
        "modified_at": _model(member)["modified_at"],
    }


# ----------------------------------------------------------------------------------------------------------- routes


class ShowRequest(Strict):
    """/api/show; `name` is an older word for `model`."""

    model: Name | None = None
    name: Name | None = None
    verbose: bool = False

    @model_validator(mode="after")
    def _one(self) -> ShowRequest:
        self.model = self.model or self.name
        if self.model is None:
            raise ApiError(400, "model: required field is missing", param="model")
        return self


class OllamaModel(Shape):
    name: str
    model: str
    size: int
    digest: str
    details: dict[str, Any]


class OllamaModels(Shape):
    models: list[OllamaModel]


class Shown(Shape):
    template: str
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]


def add_routes(routes: APIRouter, fleet: Fleet) -> None:
    """The routes about models."""

    @routes.get("/tags", **shapes(None, OllamaModels))
    async def tags() -> Response:
        return JSONResponse({"models": [_model(member) for member in fleet.members.values()]})

    @routes.get("/ps", **shapes(None, OllamaModels))
    async def running() -> Response:
        return JSONResponse({"models": [_running(member) for member in fleet.members.values() if member.state == "loaded"]})

    @routes.post("/show", **shapes(ShowRequest, Shown))
    async def show(http: Request) -> Response:
        service, request = await read(fleet, http, ShowRequest)
        return JSONResponse(_shown(fleet.find(request.model), service))

    @routes.get("/version", **shapes(None, Version))
    async def version() -> Response:
        """Of Ollama, whose API this is: editors ask whether it is recent enough."""
        return JSONResponse({"version": OLLAMA})
