"""Watches a directory and says what changes below it, line by line. Its source is run inside a sandbox.

Arguments: the directory, and "1" to watch those below it too; a third is the source of what tells of a file (`told` in
guest/files.py). A line is an object: {"started": true}, or {"failed": errno}, then {"kind", "name"} with names relative
to the directory, and with a teller "file", what there is to know of it, null where it is gone; {"lost": true} where the
system dropped some.
"""

import ctypes
import errno
import json
import os
import re
import struct
import sys

MODIFY, ATTRIB, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
OVERFLOW, IGNORED, ONLY_DIRECTORIES, IS_DIRECTORY = 0x4000, 0x8000, 0x01000000, 0x40000000
TYPES = {
    MODIFY: "written",
    ATTRIB: "changed",
    MOVED_FROM: "moved",
    MOVED_TO: "created",
    CREATE: "created",
    DELETE: "removed",
}
UNFINISHED = re.compile(r"#[0-9]+|\..*\.[0-9]+\.new")
"""What a file is called until it is whole, where Warmcell writes one: then it gets its name, which is what is told."""

HEAD = struct.Struct("iIII")
PIECE_BYTES = 65536


class Watcher:
    """The watches of one tree."""

    def __init__(self, top: str, recursive: bool, teller: str = "") -> None:
        """Nothing is watched yet."""
        self.top, self.recursive = top, recursive
        self.words = {"__name__": "files"}  # type: dict[str, object]
        exec(teller, self.words)  # noqa: S102 - its own source, in its own sandbox.
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self.libc.inotify_init1(os.O_CLOEXEC)
        self.names = {}  # type: dict[int, str]
        self.there = set()  # type: set[str]
        self.replacing = 0

    def add(self, name: str) -> int:
        """Watch one directory, and those below it; 0, or an errno."""
        path = os.path.join(self.top, name)
        mask = sum(TYPES) | ONLY_DIRECTORIES
        watch = self.libc.inotify_add_watch(self.descriptor, os.fsencode(path), mask)
        if watch < 0:
            return ctypes.get_errno()
        self.names[watch] = name
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    self.there.add(os.path.join(name, entry.name))
                    below = self.recursive and entry.is_dir(follow_symlinks=False)
                    if below and self.add(os.path.join(name, entry.name)) == errno.ENOSPC:
                        return errno.ENOSPC
        except OSError:  # It is gone again, or may not be looked into.
            return 0
        return 0

    def read(self) -> None:
        """Wait for changes and say them."""
        data = os.read(self.descriptor, PIECE_BYTES)
        at = 0
        while at < len(data):
            watch, mask, cookie, length = HEAD.unpack_from(data, at)
            at += HEAD.size
            raw = data[at : at + length].rstrip(b"\0")
            at += length
            if mask & OVERFLOW:
                say({"lost": True})
            elif mask & IGNORED:
                self.names.pop(watch, None)
            elif raw and watch in self.names:
                if UNFINISHED.fullmatch(os.fsdecode(raw)):
                    self.replacing = cookie or self.replacing
                else:
                    self.tell(mask, cookie, os.path.join(self.names[watch], os.fsdecode(raw)))

    def tell(self, mask: int, cookie: int, name: str) -> None:
        """Say one change; what a new directory holds already is new, too."""
        known = name in self.there
        if mask & (DELETE | MOVED_FROM):
            self.there.discard(name)
        elif mask & (CREATE | MOVED_TO):
            self.there.add(name)
        folder = self.recursive and mask & IS_DIRECTORY and mask & (CREATE | MOVED_TO)
        number = self.add(name) if folder else 0
        written = mask & MOVED_TO and cookie == self.replacing
        for bit, kind in TYPES.items():
            if mask & bit and not (written and known):
                self.say(kind, name)
        if written:
            self.say(TYPES[MODIFY], name)
        if number == errno.ENOSPC:  # The system watches no more.
            say({"lost": True})
        elif folder and number == 0:  # It is watched by now, so that whoever is told of it misses nothing in it.
            for found in self.listed(name):
                self.say(TYPES[CREATE], os.path.join(name, found))

    def listed(self, name: str) -> "list[str]":
        """What is in a directory, which may be gone by now."""
        try:
            return sorted(os.listdir(os.path.join(self.top, name)))
        except OSError:
            return []

    def say(self, kind: str, name: str) -> None:
        """A line for one change, with what there is to know of the file where that is wanted."""
        line = {"kind": kind, "name": name}  # type: dict[str, object]
        told = self.words.get("told")
        if callable(told):
            try:
                line["file"] = told(os.path.normpath(os.path.join(self.top, name)))
            except OSError:  # It is gone.
                line["file"] = None
        say(line)


def say(what: object) -> None:
    """A line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Until it is killed, or nobody listens."""
    watcher = Watcher(os.path.join(os.path.expanduser("~"), sys.argv[1]), sys.argv[2] == "1", "".join(sys.argv[3:]))
    failed = watcher.add("")
    say({"failed": failed} if failed else {"started": True})
    while not failed:
        watcher.read()


if __name__ == "__main__":
    main()
