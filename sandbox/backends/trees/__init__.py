"""Copies of trees that a guest has made and may still be changing.

Everything is opened relative to a descriptor of the tree's top, never through a symbolic link, so whatever names, links
and races a guest makes, nothing outside is read or written. What vanishes while it is copied is left out.

A tree can be an overlay's upper layer above one that was saved earlier (`base`). The copy is then what both together
stand for, with the unchanged files of the earlier one as hard links: a saved layer is never changed.

Standard library only, and little of it: a sandbox's start runs this too.
"""

from .copying import Copy
from .entries import CREATE, DIRECTORY, Refused, beneath, entries, is_whiteout, within

__all__ = ["CREATE", "DIRECTORY", "Copy", "Refused", "beneath", "entries", "is_whiteout", "within"]
