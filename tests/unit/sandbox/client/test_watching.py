"""What a watcher says, of which some may be lost on the way."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from warmcell.sandbox.client.watching import CoreWatch, FileChange


class Calls:
    """Gives what a watcher has said."""

    def __init__(self, *entries: Mapping[str, Any]) -> None:
        self._entries = entries

    async def call(self, method: str, path: str, **how: Any) -> Any:
        return {"python": ""}

    async def entries(self, path: str, body: Any, item: str) -> AsyncGenerator[Mapping[str, Any]]:
        for entry in self._entries:
            yield entry


def piece(text: str) -> dict[str, str]:
    return {"stdout": base64.b64encode(text.encode()).decode()}


def line(name: str) -> str:
    return json.dumps({"kind": "created", "name": name}) + "\n"


def test_what_was_lost_may_end_in_the_middle_of_a_line() -> None:
    """The half that follows means nothing, in however many pieces it comes; what comes after it is told."""

    async def told() -> list[FileChange]:
        said = [piece('{"started": true}\n' + line("a")[:9]), {"lost": 3}, piece('"kind": '), piece('"x"}\n')]
        watch = CoreWatch(
            Calls(*said, piece(line("b")), {"ended": {"error": None, "exit_code": 0}}),  # type: ignore[arg-type]
            "/sandboxes/x",
            ".",
            recursive=False,
            timeout_s=None,
        )
        await watch.begin()
        changes = []
        while (change := await watch.next()) is not None:
            changes.append(change)
        return changes

    assert asyncio.run(told()) == [FileChange("lost", ""), FileChange("created", "b")]
