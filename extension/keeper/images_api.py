"""REST of images: look, build while one looks on, remove. Handlers translate, no more."""

import asyncio
import json
from collections import deque
from typing import Any

from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.http import JsonHandler
from warmcell.sandbox.errors import InvalidRequestError, WarmcellError
from warmcell.sandbox.images.cache import ImageCache
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import ImageInfo

FIELDS = {"image": dict, "backend": str, "name": str, "again": bool}
LINES_MAX = 10_000
"""Of a build's output so many wait for who reads slowly. Of what comes then the oldest are left out."""
FORM = 'Send {"image": {…}, "backend": "auto", "name": "", "again": false}.'


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix, for the user's own processes only."""
    return [(r"/images", ImagesHandler), (r"/images/([^/]+)", ImageHandler)]


class _Handler(JsonHandler):
    @property
    def images(self) -> ImageCache:
        images: ImageCache = self.settings["keeper"].images
        return images


class ImagesHandler(_Handler):
    """All images. A build answers a line of JSON for each line of output, the last one with the image or an error."""

    def get(self) -> None:
        infos = self.images.infos()
        self.answer(
            {
                "images": [info.to_json() for info in infos],
                "used_bytes": sum(info.size_bytes for info in infos),
                "quota_bytes": self.images.quota_bytes,
            }
        )

    async def post(self) -> None:
        body = self.body()
        for name, value in body.items():
            if name not in FIELDS or not isinstance(value, FIELDS[name]):
                raise InvalidRequestError(f"{name} is no part of a build, or not what it should be", hint=FORM)
        image = Image.from_json(body.get("image"))
        backend = body.get("backend") or "auto"
        if backend == "auto":
            wiring = self.settings["keeper"].wiring
            backend = self.images.backend_for(
                image, default=wiring.settings.usual_backend, among=wiring.settings.bounds().backends
            )
        lines = Lines()
        build = self.images.build(
            image, backend=backend, name=body.get("name", ""), tell=lines.put, again=body.get("again", False)
        )
        try:
            await self.unless_gone(self._tell(build, lines))
        except StreamClosedError:
            return

    async def _tell(self, build: Any, lines: "Lines") -> None:
        """Nothing is answered before the first line, so that what cannot be built at all has its own status."""
        task: asyncio.Task[ImageInfo] = asyncio.create_task(build)
        task.add_done_callback(lambda done: lines.end())
        try:
            line = await lines.get()
            if line is None:
                task.result()  # Raises what it refused with.
            self.set_header("Content-Type", "application/x-ndjson")
            while line is not None:
                await self._send({"line": line})
                line = await lines.get()
            await self._send(_end(task))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.finish()

    async def _send(self, what: dict[str, Any]) -> None:
        self.write(json.dumps(what) + "\n")
        await self.flush()


class Lines:
    """A build's output on its way to one who reads it."""

    def __init__(self) -> None:
        self._waiting: deque[str] = deque()
        self._left_out = 0
        self._ended = False
        self._news = asyncio.Event()

    def put(self, line: str) -> None:
        """One more."""
        self._waiting.append(line)
        if len(self._waiting) > LINES_MAX:
            self._waiting.popleft()
            self._left_out += 1
        self._news.set()

    def end(self) -> None:
        """There is no more."""
        self._ended = True
        self._news.set()

    async def get(self) -> str | None:
        """The next one; None after the last."""
        while not self._waiting and not self._ended:
            self._news.clear()
            await self._news.wait()
        if self._left_out:
            count, self._left_out = self._left_out, 0
            return f"[{count} lines are left out here: they came faster than they were read]"
        return self._waiting.popleft() if self._waiting else None


class ImageHandler(_Handler):
    """One image, by name or digest."""

    def get(self, ref: str) -> None:
        self.answer(self.images.info(ref).to_json())

    async def delete(self, ref: str) -> None:
        await self.images.remove(ref)
        self.set_status(204)
        self.finish()


def _end(task: "asyncio.Task[ImageInfo]") -> dict[str, Any]:
    try:
        return {"image": task.result().to_json()}
    except WarmcellError as error:
        return {"error": error.to_json()}
