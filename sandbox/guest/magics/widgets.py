"""Widgets of remote kernels, as far as they show something: their models are elsewhere, so what they say is followed.

Progress bars, texts and boxes of them become HTML and text, which any front end shows and which a saved notebook keeps.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

VIEW = "application/vnd.jupyter.widget-view+json"
"""A view of a model that is with the remote kernel: here nobody would find it."""

COMMS = ("comm_open", "comm_msg", "comm_close")
KEYS = ("_model_name", "value", "min", "max", "bar_style", "description", "children", "orientation")
VALUE_MAX = 64 * 1024
"""Characters of one widget's text."""

_MODEL = "IPY_MODEL_"
_TAGS = re.compile(r"<[^>]*>")
_COLOURS = {"success": "#43a047", "danger": "#e53935", "warning": "#fb8c00"}


class Models:
    """Those of one kernel, by id."""

    def __init__(self) -> None:
        self._states: dict[str, dict[str, Any]] = {}

    def hear(self, message: Mapping[str, Any]) -> bool:
        """Take what a message of a comm says; whether that may change what is shown."""
        content = message["content"]
        comm, kind = str(content.get("comm_id")), message["msg_type"]
        if kind == "comm_close":
            return self._states.pop(comm, None) is not None
        data = content.get("data")
        said = data.get("state") if isinstance(data, Mapping) else None
        if not isinstance(said, Mapping) or (kind == "comm_msg" and comm not in self._states):
            return False
        if kind == "comm_open" and content.get("target_name") != "jupyter.widget":
            return False
        kept = {key: _bounded(said[key]) for key in KEYS if key in said}
        self._states.setdefault(comm, {}).update(kept)
        return bool(kept)

    def opened(self) -> list[dict[str, Any]]:
        """Messages that tell somebody else all that is known."""
        return [
            {
                "msg_type": "comm_open",
                "content": {"comm_id": comm, "target_name": "jupyter.widget", "data": {"state": dict(state)}},
            }
            for comm, state in self._states.items()
        ]

    def bundle(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What is displayed, with the widget in it as HTML and text where it is one of those that can be."""
        rest = {kind: value for kind, value in data.items() if kind != VIEW}
        view = data.get(VIEW)
        model = str(view.get("model_id")) if isinstance(view, Mapping) else ""
        rich = self._rich(model, set()) if model else ""
        if not rich:
            return rest
        return {**rest, "text/html": rich, "text/plain": self._plain(model, set())}

    def _rich(self, model: str, seen: set[str]) -> str:
        state = self._states.get(model)
        if state is None or model in seen:
            return ""
        seen.add(model)
        name, label = str(state.get("_model_name", "")), html.escape(str(state.get("description") or ""))
        if "Progress" in name:
            share, told = _share(state)
            colour = _COLOURS.get(str(state.get("bar_style")), "")
            style = "vertical-align:middle;width:14em" + (f";accent-color:{colour}" if colour else "")
            value = "" if share is None else f" value='{share:.4f}'"
            return f"<span>{label} <progress aria-label='{label or told}' style='{style}'{value}></progress></span>"
        if name.startswith(("HTML", "Label")):
            value = str(state.get("value") or "")
            return f"<span>{label}{value if name.startswith('HTML') else html.escape(value)}</span>"
        children = [self._rich(child, seen) for child in _children(state)]
        if name.endswith("BoxModel") and any(children):
            if name.startswith("V"):
                return "".join(f"<div>{child}</div>" for child in children if child)
            return f"<div>{' '.join(child for child in children if child)}</div>"
        return ""

    def _plain(self, model: str, seen: set[str]) -> str:
        state = self._states.get(model)
        if state is None or model in seen:
            return ""
        seen.add(model)
        name, label = str(state.get("_model_name", "")), str(state.get("description") or "")
        if "Progress" in name:
            return " ".join(filter(None, (label, _share(state)[1])))
        if name.startswith(("HTML", "Label")):
            value = str(state.get("value") or "")
            return label + (html.unescape(_TAGS.sub("", value)) if name.startswith("HTML") else value)
        between = "\n" if name.startswith("V") else " "
        return between.join(filter(None, (self._plain(child, seen) for child in _children(state)))).strip()


def _children(state: Mapping[str, Any]) -> list[str]:
    """Ids of the models within a box."""
    children = state.get("children")
    if not isinstance(children, (list, tuple)):
        return []
    return [child[len(_MODEL) :] for child in children if isinstance(child, str) and child.startswith(_MODEL)]


def _share(state: Mapping[str, Any]) -> tuple[float | None, str]:
    """How far a progress bar is, and in words; None where it does not know."""
    try:
        low, high = float(state.get("min") or 0), float(state.get("max", 100))
        value = float(state.get("value") or 0)
        if state.get("bar_style") == "info" and high - low <= 1:  # tqdm's way to say that it knows no end.
            return None, ""
        share = min(1.0, max(0.0, (value - low) / (high - low)))
    except (TypeError, ValueError, ZeroDivisionError):
        return None, ""
    return share, f"{100 * share:.0f} %"


def _bounded(value: Any) -> Any:
    return value[:VALUE_MAX] if isinstance(value, str) else value
