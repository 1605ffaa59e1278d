"""Making a sandbox for an ordinary user: without a user namespace, so that its memory can be saved.

It is the sandbox that the keeper of root makes, with the same plan, stage and bubblewrap, and the guest under the
caller's own uid. What a caller says is in `wanted`, what may be shown in `shown`, how long it lives in `warden`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from warmcell.sandbox.backends import seccomp
from warmcell.sandbox.backends.bubblewrap import binary, plan, rootfs
from warmcell.sandbox.backends.bubblewrap.rootfs import View
from warmcell.sandbox.backends.etc import hostname
from warmcell.sandbox.backends.identity import GUEST_NAME, Identity, name_of
from warmcell.sandbox.backends.layers import SHARED
from warmcell.sandbox.backends.places import RUN, run_bytes
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.helper import shown, warden
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.wanted import Wanted, wanted
from warmcell.sandbox.models import SandboxId

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from warmcell.sandbox.backends.cgroups import Cgroups
    from warmcell.sandbox.helper.owners import Owners
    from warmcell.sandbox.helper.wire import Conversation

STAGE = "m"
USER_ATTRIBUTES = ",userxattr"
SHOWN_AS = {"layer": "environment", "changes": "changed"}
OLDEST_LINUX = (6, 6)
"""Memory file systems keep attributes of users from this version on; layers are saved with those."""


def create(
    conversation: Conversation, *, runtime: str, owners: Owners, cgroups: Cgroups, bwrap: Path, alive: int
) -> None:
    """Make what the caller asks for, and hold it until either side ends.

    Raises:
        HelperError: It was refused or did not start, and nothing is left of it.
    """
    if conversation.uid == 0:
        raise HelperError("unsupported", "Root's keeper makes its sandboxes itself")
    asked = wanted(conversation.request, conversation.fds)
    with owners.place(conversation.uid):
        trees = shown.clone_all(asked.trees, asked.mounts, conversation.uid, conversation.gid)
        made = compose(asked, trees, uid=conversation.uid, gid=conversation.gid, runtime=runtime, bwrap=bwrap)
        group, limits = cgroups.make(SandboxId(asked.id), asked.limits)
        entrances = [] if group is None else [str(file) for file in group.entrances]
        stage_plan = {"cgroups": entrances, "keeper": os.getpid(), "alone": (0, 0), **made}
        try:
            warden.hold(conversation, stage_plan, owners=owners, group=group, limits=limits, alive=alive)
        finally:
            if group is not None:
                group.remove_within(warden.GRACE_S)


def compose(
    asked: Wanted, trees: Mapping[str, int], *, uid: int, gid: int, runtime: str, bwrap: Path
) -> dict[str, Any]:
    """What the stage is told; nothing is made yet."""
    identity = Identity(uid=uid, gid=gid, name=asked.user or name_of(uid) or GUEST_NAME)
    view = View(base=Path(runtime) / STAGE, identity=identity, as_root=True)
    view.base.mkdir(mode=0o700, exist_ok=True)
    named = SandboxId(asked.named)
    network = "host" if asked.network == "host" else "none"
    rootfs.system(view)
    files, links = rootfs.configuration(
        view, "host" if network == "host" else "none", home=asked.home, name=hostname(named)
    )
    rooms = [("tmp", "/tmp", asked.limits.layer_bytes, "1777"), ("shm", "/dev/shm", asked.limits.shm_bytes, "1777")]
    if asked.private_home:
        rooms.append(("home", asked.home, asked.limits.layer_bytes, "0700"))
    for name, place, size, mode in rooms:
        devices = asked.devices if name == SHARED else ()
        view.entries[place] = view.tmpfs(name, size_bytes=_bounded(size), mode=mode, owned=True, devices=devices)
    size = _bounded(run_bytes(asked.limits))
    view.entries[RUN] = view.tmpfs("run", size_bytes=size, mode="0700", owned=True, follow=False)
    if asked.later:
        view.wait_in("run")
    view.directories.append({"path": "nothing", "mode": 0o755, "owner": None})
    view.directories += [
        {"path": f"home/{name}", "mode": 0o755, "owner": (uid, gid)} for name in asked.skeleton if asked.private_home
    ]
    for tree in asked.trees:
        made = {"name": tree.name, "path": tree.name, "tree": trees[tree.name], "swap": None, "recursive": True}
        view.clones.append(made)
    _overlays(view, asked)
    _arrange(view, asked)
    return {
        "session": False,
        "most_processes": None,
        "mounts": {
            "base": str(view.base),
            "user_namespace": False,
            "user": (uid, gid),
            "file_systems": view.file_systems,
            "clones": view.clones,
            "directories": view.directories,
            "files": [{"path": name, "content": content} for name, content in files.items()],
            "links": [{"path": name, "target": to} for name, to in links.items()],
            "fills": [
                {
                    "source": fill.fd,
                    "path": fill.path,
                    "only_top": fill.only_top,
                    "most_bytes": fill.most_bytes,
                    "most_entries": fill.most_entries,
                }
                for fill in asked.fills
            ],
            "overlays": view.overlays,
            "pipes": view.pipes,
            "root": view.plan(),
            "run": "run",
        },
        "argv": plan.command(
            view,
            bwrap=bwrap,
            named=named,
            network="host" if network == "host" else "none",
            home=asked.home,
            python=Path(asked.python),
            umask=asked.umask,
        ),
        "env": {},
        "inherit": {
            "control": [plan.STATUS_FD, plan.UP_FD],
            "files": {str(plan.SECCOMP_FD): seccomp.denylist()},
        },
    }


def _overlays(view: View, asked: Wanted) -> None:
    identity = view.identity
    owner = identity.uid, identity.gid
    for one in asked.overlays:
        view.tmpfs(one.name, size_bytes=_bounded(one.size_bytes), mode="0755", owned=False)
        view.directories.append({"path": f"{one.name}/upper", "mode": one.mode, "owner": owner})
        view.directories.append({"path": f"{one.name}/work", "mode": 0o755, "owner": owner})
        view.directories += [
            {"path": f"{one.name}/upper/{name}", "mode": 0o755, "owner": owner} for name in one.skeleton
        ]
        view.overlays.append(
            {
                "name": one.name,
                "path": SHOWN_AS[one.name],
                "lower": ":".join(one.lowers),
                "upper": f"{one.name}/upper",
                "work": f"{one.name}/work",
                "options": USER_ATTRIBUTES,
            }
        )


def _arrange(view: View, asked: Wanted) -> None:
    """What of the user's is shown where; whether it may be written was decided when the tree was cloned.

    The stage makes nothing in trees of the user's and follows no link in them, as it does so as root.
    """
    rooms = {"/tmp", *([asked.home] if asked.private_home else [])}
    trees = {tree.target: rootfs.own(tree.name, mode="rw") for tree in asked.trees if tree.target}
    for one in asked.overlays:
        whole = rootfs.own(SHOWN_AS[one.name], mode="rw")
        trees[one.target] = rootfs.choice(one.name, whole, rootfs.own(one.lowers[-1], mode="rw"))

    def around(place: str) -> str:
        return max((one for one in (*rooms, *trees) if place.startswith(f"{one}/")), key=len, default="")

    for place in asked.covered:
        if around(place):
            view.entries[place] = rootfs.own("nothing")
    view.entries.update(trees)
    for place, leads in asked.links.items():
        if around(place) in {"", *rooms}:
            view.entries.setdefault(place, rootfs.link(leads))


def _bounded(size_bytes: int) -> int:
    """At most what the machine has: a file system in memory of that size is as good as one without a cap."""
    return max(rootfs.PAGE_BYTES, min(size_bytes, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def find_bwrap() -> Path:
    """The bubblewrap that is run, as root.

    Raises:
        HelperError: There is none, or somebody else could change it, or Linux is too old.
    """
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < OLDEST_LINUX:
        raise HelperError(
            "backend_unavailable",
            f"Users' memory snapshots need Linux 6.6 or newer; this is {os.uname().release}",
            hint="Boot a newer kernel.",
        )
    try:
        found = binary.find()
    except BackendUnavailableError as error:
        raise HelperError("backend_unavailable", str(error.message), hint=error.hint) from error
    for path in (found.path, *found.path.parents):
        about = path.stat()
        sticky = bool(about.st_mode & stat.S_ISVTX)
        if about.st_uid != 0 or (stat.S_IMODE(about.st_mode) & 0o022 and not sticky):
            raise HelperError(
                "backend_unavailable",
                f"{found.path} could be changed by others than root",
                hint="Install bubblewrap for the whole machine: apt install bubblewrap.",
            )
    return found.path
