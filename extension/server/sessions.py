"""The server's sessions, remembered with the keeper: Jupyter keeps them in memory only.

A session is what ties a notebook or console of a page to its kernel. With its old id in the next server, an open tab
finds its kernel again and a reloaded one does not start another.
"""

import asyncio
import os
import types
from collections.abc import Sequence
from typing import Any

from jupyter_server.services.sessions.sessionmanager import SessionManager

from warmcell.extension.server.keeping import provisioner_of
from warmcell.sandbox.errors import WarmcellError

REMEMBER_TIMEOUT_S = 20.0
"""A page does not wait longer for a keeper that hangs."""


class RememberingSessionManager(SessionManager):
    """Tells the keeper what is open on each of its kernels, and under which name."""

    async def save_session(
        self,
        session_id: str,
        path: str | None = None,
        name: str | None = None,
        type: str | None = None,
        kernel_id: str | None = None,
    ) -> dict[str, Any]:
        """A session begins."""
        saved: dict[str, Any] = await super().save_session(  # type: ignore[no-untyped-call]
            session_id, path=path, name=name, type=type, kernel_id=kernel_id
        )
        await self._remember(kernel_id)
        return saved

    async def update_session(self, session_id: str, **kwargs: Any) -> None:
        """It has another name, or another kernel."""
        before = self._kernel_of(session_id)
        await super().update_session(session_id, **kwargs)  # type: ignore[no-untyped-call]
        for kernel_id in {before, self._kernel_of(session_id)}:
            await self._remember(kernel_id)

    async def recreate(self, sessions: Sequence[dict[str, str]], kernel_id: str) -> None:
        """Have sessions of an earlier server under the ids that they had there; one that exists is left as it is."""
        known = {row["session_id"] for row in self.cursor.execute("SELECT session_id FROM session").fetchall()}
        for session in sessions:
            if session["id"] not in known:
                await super().save_session(  # type: ignore[no-untyped-call]
                    session["id"], path=session["path"], name=session["name"], type=session["type"], kernel_id=kernel_id
                )

    def _kernel_of(self, session_id: str) -> str | None:
        row = self.cursor.execute("SELECT kernel_id FROM session WHERE session_id=?", (session_id,)).fetchone()
        return None if row is None else row["kernel_id"]

    async def _remember(self, kernel_id: str | None) -> None:
        manager: Any = self.kernel_manager._kernels.get(kernel_id) if kernel_id is not None else None
        provisioner = provisioner_of(manager)
        if provisioner is None:
            return
        rows = self.cursor.execute(
            "SELECT session_id AS id, path, name, type FROM session WHERE kernel_id=?", (kernel_id,)
        ).fetchall()
        sessions = [{key: row[key] or "" for key in ("id", "path", "name", "type")} for row in rows]
        notebook = next((one for one in sessions if one["type"] == "notebook"), None)
        place = None if notebook is None else self._place(notebook)
        try:
            async with asyncio.timeout(REMEMBER_TIMEOUT_S):
                await provisioner.remember(sessions, notebook=place)
        except (WarmcellError, TimeoutError) as error:
            self.log.warning("Warmcell: the sessions of kernel %s are not remembered: %s", kernel_id, error)

    def _place(self, session: dict[str, str]) -> str | None:
        """The notebook's file; None if its server's contents are no files."""
        folder = self.kernel_manager.cwd_for_path(session["path"])
        path = os.path.join(folder, session["path"].rpartition("/")[2])
        if not path.endswith(".ipynb"):
            # JupyterLab begins a session under a random path in the notebook's folder, with the notebook's name.
            path = os.path.join(folder, session["name"].rpartition("/")[2])
        return path if path.endswith(".ipynb") and os.path.isabs(path) else None


def remembering(kind: type[Any]) -> type[Any]:
    """The same class of session managers, which remembers; one that is not of Jupyter's kind as it is."""
    if not issubclass(kind, SessionManager) or issubclass(kind, RememberingSessionManager):
        return kind
    if kind is SessionManager:
        return RememberingSessionManager
    return types.new_class(f"Remembering{kind.__name__}", (RememberingSessionManager, kind))
