"""What the helper needs to make sandboxes for ordinary users, found once."""

from __future__ import annotations

import contextlib
import os

from warmcell.sandbox.backends.cgroups import Cgroups, leftovers
from warmcell.sandbox.helper import create
from warmcell.sandbox.helper.owners import Owners
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from warmcell.sandbox.helper.wire import Conversation

SANDBOXES_MAX = 64
"""Of one user, unless it is told otherwise."""


class Maker:
    """Which bubblewrap, which control groups, whose sandboxes."""

    def __init__(self, runtime: str, *, most: int = SANDBOXES_MAX) -> None:
        """Configure it.

        Args:
            runtime: A directory of root's alone, gone when the machine is started anew.
            most: Sandboxes of one user at a time.
        """
        self._runtime = runtime
        self._cgroups = Cgroups()
        self._bwrap: Path | None = None
        self.owners = Owners(f"{runtime}/owners", most=most)
        self.why_not = ""

    def prepare(self) -> None:
        """Look once for all workers, and remove what a helper that was killed has left."""
        os.makedirs(self._runtime, 0o700, exist_ok=True)
        with contextlib.suppress(HelperError):
            self.bwrap()
        for group in leftovers(self._cgroups.parents()):
            group.remove_within(1.0)

    def bwrap(self) -> Path:
        """The bubblewrap that is run.

        Raises:
            HelperError: There is none.
        """
        if self._bwrap is None:
            try:
                self._bwrap = create.find_bwrap()
            except HelperError as error:
                self.why_not = error.message
                raise
        self.why_not = ""
        return self._bwrap

    def make(self, conversation: Conversation, *, alive: int) -> None:
        """Serve a request for a sandbox, for as long as that lives.

        Raises:
            HelperError: It was refused or did not start.
        """
        create.create(
            conversation,
            runtime=self._runtime,
            owners=self.owners,
            cgroups=self._cgroups,
            bwrap=self.bwrap(),
            alive=alive,
        )
