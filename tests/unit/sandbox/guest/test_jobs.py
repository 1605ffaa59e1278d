"""What is kept of a remote cell for whoever looks at it later."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

from warmcell.sandbox.guest.magics import jobs
from warmcell.sandbox.guest.magics.jobs import Job


class View:
    """Counts what it is shown."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def begin(self, rank: int, label: str) -> None:
        """It began."""

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        self.texts.append(message["content"]["text"])


def test_what_is_kept_of_output_is_bounded_in_size_too() -> None:
    """A few large messages count as many small ones: the last are kept."""
    job = Job(1, "cell", "here", cast(Any, SimpleNamespace()), ["CPU"], quiet=False)
    job.begin(0, "")
    for number in range(100):
        text = str(number) + "x" * 2**20
        job.message(0, {"msg_type": "stream", "content": {"name": "stdout", "text": text}, "metadata": {}})
    view = View()
    job.attach(cast(Any, view))
    assert sum(map(len, view.texts)) <= jobs.LOG_MAX_SIZE
    assert [text.rstrip("x") for text in view.texts] == [str(number) for number in range(85, 100)]
