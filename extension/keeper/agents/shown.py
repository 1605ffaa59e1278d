"""What a kernel shows: believed as far as it is of Jupyter's form. Whatever runs in the sandbox may have written it."""

from collections.abc import Mapping
from typing import Any

STREAMS = ("stdout", "stderr")


def believed(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message, or a note in its place where those who read it could not: they take its fields as they are."""
    kind, content, metadata = (message.get(name) for name in ("msg_type", "content", "metadata"))
    if not isinstance(content, Mapping) or not isinstance(metadata, Mapping):
        return note(f"[a {kind} that is no message is left out]\n")
    return message if _is_sound(kind, content) else note(f"[a {kind} that is not of its form is left out]\n")


def note(text: str) -> dict[str, Any]:
    """Words of ours among what a kernel shows."""
    return {"msg_type": "stream", "content": {"name": "stderr", "text": text}, "metadata": {}}


def _is_sound(kind: object, content: Mapping[str, Any]) -> bool:
    match kind:
        case "stream":
            return _is_stream(content)
        case "error":
            return _is_error(content)
        case "execute_result" | "display_data" | "update_display_data":
            return _is_display(content)
    return True


def _is_stream(content: Mapping[str, Any]) -> bool:
    return content.get("name") in STREAMS and isinstance(content.get("text"), str)


def _is_error(content: Mapping[str, Any]) -> bool:
    lines = content.get("traceback")
    words = (content.get("ename"), content.get("evalue"), *(lines if isinstance(lines, list) else (None,)))
    return all(isinstance(one, str) for one in words)


def _is_display(content: Mapping[str, Any]) -> bool:
    transient = content.get("transient", {})
    return (
        isinstance(content.get("data"), Mapping)
        and isinstance(content.get("metadata", {}), Mapping)
        and isinstance(transient, Mapping)
        and isinstance(transient.get("display_id"), (str, type(None)))
    )
