"""What a kernel shows, as lines of E2B's code interpreter. Pure."""

import time
from collections.abc import Mapping
from typing import Any, Final

FORMATS: Final[Mapping[str, str]] = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}


def line(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The line for one entry of a run's output; None where E2B has none for it."""
    kind, content = entry.get("msg_type"), entry.get("content", {})
    if kind == "stream":
        return {"type": content["name"], "text": content["text"], "timestamp": time.time_ns()}
    if kind in ("execute_result", "display_data"):
        return {"type": "result", **formats(content["data"]), "is_main_result": kind == "execute_result"}
    if kind == "error":
        return {
            "type": "error",
            "name": content["ename"],
            "value": content["evalue"],
            "traceback": "\n".join(content["traceback"]),
        }
    return None


def ending(run: Mapping[str, Any], *, shown: bool) -> list[dict[str, Any]]:
    """The last lines of a run. Where it was cut short and no error was `shown`, one says so."""
    lines: list[dict[str, Any]] = []
    if run["execution_count"] is not None:
        lines.append({"type": "number_of_executions", "execution_count": run["execution_count"]})
    if run["status"] not in ("ok", None) and not shown:
        error = run["error"] or {"code": run["status"], "message": f"The run has ended: {run['status']}"}
        lines.append({"type": "error", "name": error["code"], "value": error["message"], "traceback": error["message"]})
    lines.append({"type": "end_of_execution"})
    return lines


def formats(data: Mapping[str, Any]) -> dict[str, Any]:
    """A display's data under E2B's names; what has none there is in `extra`."""
    found: dict[str, Any] = {}
    extra = {}
    for mime, value in data.items():
        if mime in FORMATS:
            found[FORMATS[mime]] = _bare(value) if mime == "text/plain" else value
        else:
            extra[mime] = value
    return {**found, **({"extra": extra} if extra else {})}


def _bare(text: Any) -> Any:
    """A text is shown without the quotes of its literal."""
    if isinstance(text, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
