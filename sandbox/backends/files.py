"""Removing what sandboxes have left on disk."""

import os
import shutil
from pathlib import Path


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a whole tree, directories that nobody may enter included. Blocks."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for top, names, _ in os.walk(path):
        for name in names:  # An overlay leaves a directory of mode 0 behind, and guests make what they like.
            inner = os.path.join(top, name)
            if not os.path.islink(inner) and not os.access(inner, os.R_OK | os.W_OK | os.X_OK):
                os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)
