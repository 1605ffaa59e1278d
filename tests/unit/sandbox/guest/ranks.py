"""Messages as ranks send them, and a shell that keeps what is published."""

from typing import Any


class Shell:
    """A shell as far as output goes: what was published, and whether it is a kernel's."""

    kernel = object()

    def __init__(self) -> None:
        self.published: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.display_pub = self

    def publish(self, data: dict[str, Any], metadata: dict[str, Any] | None = None, **said: Any) -> None:
        self.published.append((data, said))


def text(words: str, name: str = "stdout") -> dict[str, Any]:
    return {"msg_type": "stream", "content": {"name": name, "text": words}}


def shows(data: dict[str, Any], kind: str = "display_data", **transient: str) -> dict[str, Any]:
    return {"msg_type": kind, "content": {"data": data, "transient": transient}}


def opens(comm: str, **state: Any) -> dict[str, Any]:
    content = {"comm_id": comm, "target_name": "jupyter.widget", "data": {"state": state}}
    return {"msg_type": "comm_open", "content": content}


def changes(comm: str, **state: Any) -> dict[str, Any]:
    return {"msg_type": "comm_msg", "content": {"comm_id": comm, "data": {"method": "update", "state": state}}}
