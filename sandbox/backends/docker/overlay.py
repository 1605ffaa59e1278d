"""Mounts an overlay among the mounts of a process: `python -I -S overlay.py PIDFD LAYER PLAN`.

From the moment in which it has entered every file is the image's, modules of Python's as well: nothing is imported, or
looked up, from then on.
"""

import ctypes
import json
import os
import sys

DONE = "done"
CLONE_NEWNS, MS_NOSUID, MS_NODEV, MS_BIND = 0x00020000, 2, 4, 4096
SYS_OPEN_TREE, SYS_MOVE_MOUNT = 428, 429
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, AT_FDCWD = 1, 4, -100


def main() -> None:
    """Print `DONE`, or the number of the error."""
    process, layer, plan = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    lowers = ":".join(filter(None, (plan["saved"], plan["lower"])))
    options = f"lowerdir={lowers},upperdir={plan['upper']},workdir={plan['work']}{plan['options']}".encode()
    first, *others = (os.fsencode(target) for target in plan["targets"])
    saved, part = os.fsencode(plan["saved"]), os.fsencode(plan["part"])

    def check(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), "")
        return result

    said = DONE
    try:
        tree = check(libc.syscall(SYS_OPEN_TREE, layer, part, OPEN_TREE_CLONE)) if saved else -1
        check(libc.setns(process, CLONE_NEWNS))
        os.umask(0)
        if saved:
            os.mkdir(saved, 0o700)
            check(libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, saved, MOVE_MOUNT_F_EMPTY_PATH))
        os.mkdir(plan["upper"], plan["mode"])
        os.chown(plan["upper"], *plan["owner"])
        os.mkdir(plan["work"], 0o700)
        flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV)
        check(libc.mount(b"overlay", first, b"overlay", flags, options))
        for other in others:
            check(libc.mount(first, other, None, ctypes.c_ulong(MS_BIND), None))
    except OSError as error:
        said = str(error.errno or 5)
    finally:
        os.write(1, said.encode())
        os._exit(0)


if __name__ == "__main__":
    main()
