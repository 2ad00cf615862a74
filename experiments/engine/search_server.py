"""The web server of a page to search in: its routes, its limits, and what it refuses.

    GET  /api/collection        what is searched: counts, classes, runs
    GET  /api/images            ?class= &right_only_in=RUN &offset= &limit=   images, by number
    GET  /api/nearest/NUMBER    ?k= &class= &run=    the nearest of an image of the collection
    POST /api/nearest           the same of the image in the body, which is not kept
    POST /api/update            looks for changed files now
    GET  /thumbnails/NUMBER, /images/NUMBER          pictures, encoded anew

Every number and class is checked. An error is a sentence, in JSON: {"error": "..."}.
A request with ?collection=ID is refused once the numbers are those of another collection.
"""

from collections.abc import AsyncIterator, Callable, Collection, Sequence
import ipaddress
import os
import pathlib
import re
import socket
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experiments.engine import collection as collection_lib
from experiments.engine import search_pictures
from experiments.engine.search_pictures import Encoded
from experiments.engine.search_service import SearchService, Snapshot
from rll_jax.data import images

MAX_BYTES, MAX_PIXELS = 20_000_000, 50_000_000  # of an image that is sent here
_MAX_K, _MAX_LIMIT = 200, 1000
_SECONDS = 60  # to send an image
_UPLOADS = 4  # read and embedded at once
_PAGE = pathlib.Path(__file__).parent / "search_page"
_SCRIPTS = ("page.js", "grid.js", "parts.js")
_STATIC = {"style.css": "text/css", **dict.fromkeys(_SCRIPTS, "text/javascript")}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class _Query(NamedTuple):
    """What is asked of an image: the number of nearest, the class and the runs to search."""

    k: int
    among: np.ndarray | None
    runs: list[int]


def make_app(service: SearchService, host: str) -> Starlette:
    """Returns the server.

    Args:
      service: what is served.
      host: the address that it listens at, of which follows by which names it may be called.
    """
    api = _Api(service)
    routes = [
        Route("/", _static("index.html", "text/html")),
        *(Route(f"/static/{name}", _static(name, kind)) for name, kind in _STATIC.items()),
        Route("/favicon.ico", _static("icon.svg", "image/svg+xml")),
        Route("/api/collection", api.collection),
        Route("/api/images", api.images),
        Route("/api/nearest", api.nearest_to_upload, methods=["POST"]),
        Route("/api/nearest/{number}", api.nearest),
        Route("/api/update", api.update, methods=["POST"]),
        Route("/thumbnails/{number}", api.thumbnail),
        Route("/images/{number}", api.picture),
    ]
    middleware = [Middleware(_Guard, names=_names(host))]
    handlers: dict[Any, Callable[..., Response]] = {HTTPException: _refusal, Exception: _failure}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Api:
    """The routes. Those that decode or search run in threads, so that no request holds others."""

    def __init__(self, service: SearchService) -> None:
        self._service = service
        # A search within a class copies its embeddings.
        self._searchers = anyio.CapacityLimiter(os.cpu_count() or 2)
        self._decoders = anyio.CapacityLimiter(os.cpu_count() or 2)
        self._uploads = anyio.CapacityLimiter(_UPLOADS)

    def collection(self, request: Request) -> Response:
        service, snapshot = self._service, self._service.snapshot
        known = snapshot.collection
        state = (snapshot.version, service.looks, service.is_updating, hash(service.problem))
        tag = f'"{service.id}.{".".join(map(str, state))}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        counts = np.bincount(known.class_of[known.class_of >= 0], minlength=len(known.classes))
        body = {
            "id": service.id,
            "version": snapshot.version,
            "folder": _text(str(service.folder)),
            "count": len(known.files),
            "unreadable": snapshot.num_unreadable,
            "looks": service.looks,
            "updating": service.is_updating,
            "problem": _text(service.problem),
            "classes": [
                {"name": _text(name), "count": count}
                for name, count in zip(known.classes, counts.tolist(), strict=True)
            ],
            "runs": [
                {"name": _text(run.name), "step": run.trained.step, "dimension": values.shape[1]}
                for run, values in zip(service.runs, known.embeddings, strict=True)
            ],
            "limits": {"bytes": MAX_BYTES, "pixels": MAX_PIXELS},
        }
        return JSONResponse(body, headers={"ETag": tag, "Cache-Control": "no-cache"})

    def images(self, request: Request) -> Response:
        snapshot = self._snapshot(request)
        known = snapshot.collection
        offset = _whole(request, "offset", 0, 0, 10**9)
        limit = _whole(request, "limit", 100, 0, _MAX_LIMIT)
        rows = self._rows_of_class(request, snapshot)
        rows = np.arange(len(known.files)) if rows is None else rows
        if "right_only_in" in request.query_params:
            run = _whole(request, "right_only_in", 0, 0, len(known.embeddings) - 1)
            if len(known.embeddings) < 2:
                raise HTTPException(400, "Only one run is searched: there is nothing to compare.")
            try:
                differing = self._service.right_only_in(run, snapshot)
            except ValueError as error:
                raise HTTPException(500, f"The runs cannot be compared: {error}.") from None
            if isinstance(differing, float):
                return JSONResponse({"progress": round(differing, 3)}, 202)
            rows = np.intersect1d(rows, differing, assume_unique=True)
        shown = [self._item(row, snapshot) for row in rows[offset : offset + limit].tolist()]
        return JSONResponse({"total": len(rows), "offset": offset, "images": shown})

    async def nearest(self, request: Request) -> Response:
        return await anyio.to_thread.run_sync(self._nearest, request, limiter=self._searchers)

    def _nearest(self, request: Request) -> Response:
        snapshot = self._snapshot(request)
        query = self._query(request, snapshot)
        row = self._row(request, snapshot)
        vectors = [embeddings[row] for embeddings in snapshot.collection.embeddings]
        answer = self._answer(snapshot, query, vectors, row)
        return JSONResponse({"query": self._item(row, snapshot), **answer})

    async def nearest_to_upload(self, request: Request) -> Response:
        snapshot = self._snapshot(request)
        query = self._query(request, snapshot)
        async with self._uploads:
            data = await _body(request)
            return await anyio.to_thread.run_sync(self._answer_upload, snapshot, query, data)

    def _answer_upload(self, snapshot: Snapshot, query: _Query, data: bytes) -> Response:
        try:
            image = images.EncodedImage(data, "the picture sent")
            if image.width * image.height > MAX_PIXELS:
                raise HTTPException(
                    413,
                    f"The picture has {image.width} x {image.height} pixels; "
                    f"at most {MAX_PIXELS / 1e6:.0f} million are taken.",
                )
            shown = search_pictures.thumbnail_of(image).as_url()
            vectors = self._service.embed(image)
        except images.BadImageError as error:
            reason = str(error).rpartition(" bytes): ")[2]
            raise HTTPException(415, f"This cannot be read as a picture: {reason}.") from None
        except ValueError as error:
            raise HTTPException(500, f"The search failed: {error}.") from None
        about = {"thumbnail": shown, "width": image.width, "height": image.height}
        return JSONResponse({"query": about, **self._answer(snapshot, query, vectors, None)})

    def _answer(
        self, snapshot: Snapshot, query: _Query, vectors: Sequence[np.ndarray], row: int | None
    ) -> dict[str, Any]:
        """Returns the nearest by each run, and how many of them the runs agree on."""
        known = snapshot.collection
        found = [
            collection_lib.nearest(
                known.embeddings[run], vectors[run], query.k, among=query.among, leave_out=row
            )
            for run in query.runs
        ]
        common = set(found[0][0].tolist()).intersection(*(rows.tolist() for rows, _ in found))
        own = collection_lib.NO_CLASS if row is None else known.class_of[row]
        runs = []
        for run, (rows, similarities) in zip(query.runs, found, strict=True):
            right = (known.class_of[rows] == own) & (own != collection_lib.NO_CLASS)
            items = [
                self._item(each, snapshot)
                | {"similarity": round(similarity, 6), "same_class": same, "common": each in common}
                for each, similarity, same in zip(
                    rows.tolist(), similarities.tolist(), right.tolist(), strict=True
                )
            ]
            runs.append({"run": run, "same_class": int(right.sum()), "images": items})
        return {"agree": len(common) if len(found) > 1 else None, "runs": runs}

    async def update(self, request: Request) -> Response:
        return JSONResponse({"look": self._service.look_now()}, 202)

    async def thumbnail(self, request: Request) -> Response:
        def encoded(row: int, snapshot: Snapshot) -> Encoded:
            path = self._service.path(row, snapshot)
            return search_pictures.thumbnail(path, self._service.stamp(row, snapshot))

        return await self._picture(request, encoded)

    async def picture(self, request: Request) -> Response:
        def encoded(row: int, snapshot: Snapshot) -> Encoded:
            return search_pictures.picture(self._service.path(row, snapshot))

        return await self._picture(request, encoded)

    async def _picture(
        self, request: Request, encoded: Callable[[int, Snapshot], Encoded]
    ) -> Response:
        snapshot = self._service.snapshot
        row = self._row(request, snapshot)
        stamp = self._service.stamp(row, snapshot)
        asked = request.query_params.get("v", stamp)
        if asked.partition(".")[0] != self._service.id:
            raise HTTPException(409, _OTHER_COLLECTION)
        # With the stamp in its address a picture never changes.
        lasts = "max-age=31536000, immutable" if "v" in request.query_params else "no-cache"
        headers = {"ETag": f'"{stamp}"', "Cache-Control": f"private, {lasts}"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        try:
            found = await anyio.to_thread.run_sync(encoded, row, snapshot, limiter=self._decoders)
        except (images.BadImageError, OSError) as error:
            raise HTTPException(404, _lost(error)) from None
        return Response(found.data, media_type=found.media_type, headers=headers)

    def _snapshot(self, request: Request) -> Snapshot:
        if request.query_params.get("collection", self._service.id) != self._service.id:
            raise HTTPException(409, _OTHER_COLLECTION)
        return self._service.snapshot

    def _row(self, request: Request, snapshot: Snapshot) -> int:
        number = request.path_params["number"]
        is_number = re.fullmatch(r"[0-9]{1,12}", number, re.ASCII)
        row = snapshot.collection.row(int(number)) if is_number else None
        if row is None:
            raise HTTPException(404, f"The collection has no image of number {number[:40]}.")
        return row

    def _rows_of_class(self, request: Request, snapshot: Snapshot) -> np.ndarray | None:
        name = request.query_params.get("class")
        if name is None:
            return None
        known = snapshot.collection
        texts = {_text(each): number for number, each in enumerate(known.classes)}
        number = texts.get(name)
        if number is None:
            raise HTTPException(404, f"The collection has no class {name[:200]!r}.")
        return np.flatnonzero(known.class_of == number)

    def _query(self, request: Request, snapshot: Snapshot) -> _Query:
        runs = list(range(len(self._service.runs)))
        if "run" in request.query_params:
            runs = [_whole(request, "run", 0, 0, len(runs) - 1)]
        k = _whole(request, "k", 20, 1, _MAX_K)
        return _Query(k, self._rows_of_class(request, snapshot), runs)

    def _item(self, row: int, snapshot: Snapshot) -> dict[str, Any]:
        known = snapshot.collection
        number, label = int(known.numbers[row]), int(known.class_of[row])
        of_class = None if label == collection_lib.NO_CLASS else _text(known.classes[label])
        return {
            "number": number,
            "name": _text(known.files[row]),
            "class": of_class,
            "v": self._service.stamp(row, snapshot),
        }


_OTHER_COLLECTION = "The collection is another one by now: load the page again."


def _text(name: str) -> str:
    """Returns a name as text; the names of files may hold any bytes."""
    return name.encode(errors="backslashreplace").decode()


def _lost(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "The file is gone."
    return "The file cannot be read as a picture any more."


def _whole(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    value = int(text) if re.fullmatch(r"-?[0-9]{1,12}", text, re.ASCII) else low - 1
    if not low <= value <= high:
        expected = f"a whole number from {low} to {high}"
        raise HTTPException(400, f"{name}={text[:40]}: expected {expected}.")
    return value


async def _body(request: Request) -> bytes:
    """Returns the body of a request.

    Of one that is too long, some more is read and dropped, so that the browser reads the answer.

    Raises:
      HTTPException: it is too long, comes too slowly or is empty.
    """
    parts, length = [], 0
    try:
        with anyio.fail_after(_SECONDS):
            async for part in _stream(request):
                length += len(part)
                if length <= MAX_BYTES:
                    parts.append(part)
                else:
                    parts.clear()
                if length > 4 * MAX_BYTES:
                    break
    except TimeoutError:
        raise HTTPException(408, f"The picture did not arrive within {_SECONDS} seconds.") from None
    if length > MAX_BYTES:
        raise HTTPException(
            413, f"The file has more than {MAX_BYTES / 1e6:.0f} MB, the most that is taken."
        )
    if not length:
        raise HTTPException(415, "The file is empty.")
    return b"".join(parts)


async def _stream(request: Request) -> AsyncIterator[bytes]:
    try:
        async for part in request.stream():
            yield part
    except ClientDisconnect:
        raise HTTPException(400, "The sender has gone.") from None


def _static(name: str, media_type: str) -> Callable[[Request], Response]:
    data = (_PAGE / name).read_bytes()

    def endpoint(request: Request) -> Response:
        return Response(data, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return endpoint


def _refusal(request: Request, error: HTTPException) -> Response:
    sentence = error.detail
    if sentence in ("Not Found", "Method Not Allowed"):
        sentence = "There is nothing at this address."
    return JSONResponse({"error": sentence}, error.status_code, headers=error.headers)


def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The server failed; its terminal says how."}, 500)


class _Guard:
    """Adds headers that shut others out, and refuses what another site sends."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        request = Request(scope)
        response: ASGIApp = self._app
        if not _is_own(request.headers.get("host", ""), self._names):
            response = JSONResponse({"error": "This server has another name: refused."}, 400)
        elif request.method not in ("GET", "HEAD") and _is_foreign(request):
            response = JSONResponse({"error": "Another site sent this: refused."}, 403)
        await response(scope, receive, send_guarded)


def _names(host: str) -> set[str]:
    """Returns the names by which a browser may call, beside addresses in numbers."""
    own = socket.gethostname().lower()
    return {"localhost", host.lower(), own, f"{own}.local"}


def _is_own(host: str, names: Collection[str]) -> bool:
    """Whether the Host of a request is an address in numbers, or one of the names.

    The name of another site may lead here, too, and its pages could then read all.
    """
    name = re.sub(r":[0-9]+$", "", host.lower())
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name in names
    return True


def _is_foreign(request: Request) -> bool:
    """Whether a browser says that a page from elsewhere sends the request."""
    origin = request.headers.get("origin")
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    site = request.headers.get("sec-fetch-site", "same-origin")
    return origin not in (None, own) or site not in ("same-origin", "none")
