"""Empty libraries in the place of those that criu brings along and never uses for us.

criu starts anew for each clone. Two of its libraries, for TLS and for nftables, bring in most of the others: all of
them together are three of the four milliseconds of a start. We have it send nothing and lock no network, so it calls
none of their functions; were one called, criu would end with exit code 127.
"""

from __future__ import annotations

import itertools
import os
import re
import struct

from warmcell.sandbox.helper import linux

UNUSED = re.compile(rb"lib(?:gnutls|nftables)\.so\.\d+")
ELF_64_LITTLE = b"\x7fELF\x02\x01"
ROOM_BYTES = 1 << 16
PAGE_BYTES = 1 << 16
"""As large as they are anywhere."""
HEADER_BYTES, SEGMENT_BYTES, SYMBOL_BYTES, ENTRY_BYTES = 64, 56, 24, 16
SHARED_OBJECT, LOAD, DYNAMIC, STACK, READ_WRITE = 3, 1, 2, 0x6474E551, 6
HASH, STRTAB, SYMTAB, STRSZ, SYMENT, SONAME, END = 4, 5, 6, 10, 11, 14, 0
GLOBAL_OBJECT, ANY_SECTION = 0x11, 1
VARIABLE, VARIABLE_BYTES = b"gnutls_free", 8
"""The one variable of theirs that criu names. It has to be there as soon as criu begins, as functions need not."""


def directory(program: str) -> int:
    """A directory in memory with an empty library for each of these that a program names; -1 where it names none.

    Raises:
        OSError: The program cannot be read, or there cannot be such a directory.
    """
    with open(program, "rb") as file:
        content = file.read()
    names = sorted(set(UNUSED.findall(content)))
    if not names or not content.startswith(ELF_64_LITTLE):
        return -1
    made = linux.memory_directory(size_bytes=ROOM_BYTES)
    try:
        for name in names:
            fd = os.open(os.fsdecode(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=made)
            with os.fdopen(fd, "wb") as file:
                file.write(library(name, content[:HEADER_BYTES]))
    except BaseException:
        os.close(made)
        raise
    return made


def library(name: bytes, program: bytes) -> bytes:
    """A shared library without functions, and without versions of them, which the loader then does not ask for.

    Args:
        name: Its name.
        program: The header of a program that it is for.
    """
    text = b"\0" + name + b"\0" + VARIABLE + b"\0"
    sizes = (HEADER_BYTES + 3 * SEGMENT_BYTES, 2 * SYMBOL_BYTES, 8, 7 * ENTRY_BYTES, 5 * 4)
    symbols, variable, dynamic, table, strings = itertools.accumulate(sizes)
    size = strings + len(text)
    machine, version = struct.unpack_from("<HI", program, 18)
    (flags,) = struct.unpack_from("<I", program, 48)
    header = (SHARED_OBJECT, machine, version, 0, HEADER_BYTES, 0, flags, HEADER_BYTES, SEGMENT_BYTES, 3, 0, 0, 0)
    segment, entry = struct.Struct("<IIQQQQQQ"), struct.Struct("<QQ")
    return b"".join(
        [
            program[:16],
            struct.pack("<HHIQQQIHHHHHH", *header),
            segment.pack(LOAD, READ_WRITE, 0, 0, 0, size, size, PAGE_BYTES),
            segment.pack(DYNAMIC, READ_WRITE, dynamic, dynamic, dynamic, table - dynamic, table - dynamic, 8),
            segment.pack(STACK, READ_WRITE, 0, 0, 0, 0, 0, 16),  # Without this the loader makes stacks executable.
            bytes(SYMBOL_BYTES),
            struct.pack("<IBBHQQ", 2 + len(name), GLOBAL_OBJECT, 0, ANY_SECTION, variable, VARIABLE_BYTES),
            bytes(VARIABLE_BYTES),
            entry.pack(SONAME, 1),
            entry.pack(STRTAB, strings),
            entry.pack(STRSZ, len(text)),
            entry.pack(SYMTAB, symbols),
            entry.pack(SYMENT, SYMBOL_BYTES),
            entry.pack(HASH, table),
            entry.pack(END, 0),
            struct.pack("<5I", 1, 2, 1, 0, 0),  # One bucket, two symbols: the bucket has the second.
            text,
        ]
    )
