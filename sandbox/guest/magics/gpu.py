"""`%gpu`: another GPU for this notebook, which keeps its variables."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .answers import wait_for_answer
from .api import Api, KeeperError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

NONE = ("none", "cpu")


class Gpu:
    """The magic of one shell."""

    def __init__(self, shell: InteractiveShell, connect: Callable[[], Api]) -> None:
        self._connect = connect

    def gpu(self, line: str) -> None:
        """Give this notebook another GPU, with all its variables; without a word, list the machine's GPUs.

            %gpu A100      another kind, where this kernel has used no GPU so far
            %gpu GPU-…     this very one, of the kind that the kernel has
            %gpu none      give it back
            %gpu

        What is on the GPU goes along to another one of its kind. It holds until the next restart: what the notebook
        is to have then is chosen in the Warmcell menu.
        """
        wanted = line.strip()
        api = self._connect()
        if not wanted:
            for each in api.gpus():
                _say(_words(each))
            return
        token = secrets.token_hex(8)
        api.change_gpu(None if wanted.lower() in NONE else wanted, token)
        answer = wait_for_answer(api.run_directory, token)
        if answer.get("ok") is not True:
            raise KeeperError(str(answer.get("message")), str(answer.get("hint") or ""), str(answer.get("code") or ""))
        names = [_name(each) for each in answer.get("gpus", ())]
        _say(f"GPU: {', '.join(names)}" if names else "No GPU")


def _words(gpu: Mapping[str, Any]) -> str:
    """One device on a line."""
    held = "in use" if gpu.get("lease") else "free"
    return f"{gpu['index']}  {_name(gpu)}  {int(gpu['memory_total_bytes']) / 2**30:.0f} GiB  {held}  {gpu['uuid']}"


def _name(gpu: Mapping[str, Any]) -> str:
    return f"{gpu['name']} (simulated)" if gpu.get("simulated") else str(gpu["name"])


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - it is the cell's output.
