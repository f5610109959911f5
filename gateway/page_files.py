"""The live page's own files: plain HTML, CSS and ES modules, served as they lie in `page/`."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = {path.name: path for path in FOLDER.iterdir() if path.suffix in TYPES}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing from elsewhere is loaded, no script runs but the page's files, and a new version is seen at once."""


async def page_file(request: web.Request) -> web.FileResponse:
    """GET / and /page/{name}. Raises `HTTPNotFound`."""
    name = request.match_info.get("name", "index.html")
    if name not in FILES:
        raise web.HTTPNotFound
    return web.FileResponse(FILES[name], headers={**HEADERS, "Content-Type": TYPES[FILES[name].suffix]})
