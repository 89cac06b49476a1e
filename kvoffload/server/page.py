"""The page at ``/``: three files of this package, which talk to the same server and load nothing from anywhere else."""

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

PATHS = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """The routes; they need no key, since the page has nothing in it."""
    for path, (name, media_type) in PATHS.items():
        _add(app, path, (files("kvoffload.server") / "static" / name).read_bytes(), media_type)


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    async def page() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=_HEADERS)

    app.add_api_route(path, page, methods=["GET"])
