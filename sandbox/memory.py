"""What can be done with a sandbox's memory: save it, suspend and resume it, bring it back, clone it."""

from warmcell.sandbox.bringing_back import BringingBack
from warmcell.sandbox.saving import Saving


class Memory(Saving, BringingBack):
    """All of it. Operations on one sandbox exclude each other; that is the caller's to see to."""
