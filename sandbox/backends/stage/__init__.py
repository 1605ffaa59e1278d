"""Between the keeper and a sandbox: a process that makes what a sandbox needs, then becomes it.

Joining control groups and making private mounts concern a whole process, hence one of its own. It reads a plan from a
socket (its length in eight bytes, then marshalled); answers with one JSON line and, where it made mounts, a descriptor
of the run directory; and replaces itself by the plan's `argv`. Its mounts live in a mount namespace that only it and
its descendants are in, so nothing of them is ever seen on the host, and nothing is left when the sandbox ends.

Standard library only, and as little of it as can be (no socket, no json): this start is part of every sandbox's start.
Imports are relative: it is started without its package, by `backends.child`.
"""
