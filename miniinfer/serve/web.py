"""The page at `/`: chat and live figures in a browser. Owns how its files are sent; what they do is theirs (assets/web).

The files hold nothing secret and need no key: the page asks for one when the API does. They are read once, when the routes are made.
"""

from __future__ import annotations

import gzip
import hashlib
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    # Only our own files, no inline code, and no string of a model's can become markup: the browser refuses what the page would not do anyway.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "vary": "accept-encoding",
    "cache-control": "no-cache",  # kept, but asked about each time: a new version shows at once, an old one costs a 304
}


def router() -> APIRouter:
    """The page and its files. They live below /web/, so that only `/` itself is taken from the APIs' paths."""
    pages = {}
    for file in (files("miniinfer") / "assets" / "web").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            body = file.read_bytes()
            tag = f'W/"{hashlib.sha256(body).hexdigest()[:20]}"'  # weak: the same for both encodings
            pages[file.name] = body, gzip.compress(body), {**_HEADERS, "content-type": kind, "etag": tag}
    routes = APIRouter(include_in_schema=False)

    def send(http: Request, name: str) -> Response:
        if name not in pages:
            raise HTTPException(404)
        body, small, headers = pages[name]
        if headers["etag"] in [tag.strip() for tag in http.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        if "gzip" in http.headers.get("accept-encoding", ""):
            return Response(small, headers={**headers, "content-encoding": "gzip"})
        return Response(body, headers=headers)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(http: Request) -> Response:
        return send(http, "index.html")

    @routes.api_route("/web/{name}", methods=["GET", "HEAD"])
    async def part(http: Request, name: str) -> Response:
        return send(http, name)

    return routes
