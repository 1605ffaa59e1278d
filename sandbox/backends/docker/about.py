"""What an engine says of itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from warmcell.sandbox.errors import BackendUnavailableError

OLDEST_API = (1, 41)
"""Of Docker 20.10: the first that gives a container control groups of its own to see."""

TRIED_API = (1, 45)
"""Of Docker 26.1, the newest with which the tests were run."""

TELLS_DEVICES = (1, 50)
"""Since Docker 28.2 its answer has the devices that it would hand out."""


_LIMITS = {"memory": "MemoryLimit", "pids": "PidsLimit", "cpu": "CpuCfsQuota"}
"""What it calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself."""

    version: str
    api: tuple[int, int]
    runtimes: frozenset[str]
    default_runtime: str
    own_kernels: frozenset[str]
    """Those of the runtimes that give each container a kernel of its own: the host sees nothing of what is in it."""
    driver: str
    """What keeps the files of images and containers."""
    can: Mapping[str, bool]
    """Whether it limits memory, pids, cpu."""
    cdi: bool
    """Whether it hands out devices by the names of the Container Device Interface."""
    rootless: bool
    """Whether it is an ordinary user's own."""
    live_restore: bool
    """Whether containers stay when it is restarted."""
    untried: tuple[str, ...] = ()
    """What of it no test has been run with."""
    keeps_user: bool = False
    """Whether a container's user is the same one on the host if that is asked for: Podman's rootless ones can."""
    podman: bool = False
    """Whether it is Podman: its memory has neither owner nor a most number of files, and it leaves out requests for
    devices without a word.
    """


def read_info(said: Mapping[str, Any], api: str) -> EngineInfo:
    """Read its answer to `info`.

    Raises:
        BackendUnavailableError: It is too old, or its containers' users are others on the host whatever is asked for.
    """
    major, _, minor = api.partition(".")
    found = (int(major), int(minor))
    version = str(said.get("ServerVersion", "?"))
    if found < OLDEST_API:
        raise BackendUnavailableError(
            f"The container engine {version} is too old", hint="Upgrade it to Docker 20.10 or newer."
        )
    runtimes = dict(said.get("Runtimes") or {})
    security = " ".join(said.get("SecurityOptions") or ())
    podman = "BuildahVersion" in said
    rootless = bool(said.get("Rootless")) or "name=rootless" in security  # As Podman says it, and Docker.
    if (rootless and not podman) or "name=userns" in security:
        raise BackendUnavailableError(
            f"The container engine {version} gives containers other users than this machine's "
            f"({'it runs without root' if rootless else 'userns-remap'}), with whom nobody here can speak",
            hint="Use one of the system's without userns-remap, or Podman; or the bubblewrap backend.",
        )
    # It leaves out what is asked for, and says all the same that it can.
    unlimited = podman and rootless and str(said.get("CgroupVersion")) == "1"
    return EngineInfo(
        version=version,
        api=found,
        runtimes=frozenset(runtimes),
        default_runtime=str(said.get("DefaultRuntime") or ""),
        own_kernels=frozenset(name for name, about in runtimes.items() if _has_own_kernel(name, about)),
        driver=str(said.get("Driver") or ""),
        can={name: bool(said.get(told)) and not unlimited for name, told in _LIMITS.items()},
        cdi=bool(said.get("CDISpecDirs")) and found >= (1, 44) and (found < TELLS_DEVICES or _has_gpus(said)),
        rootless=rootless,
        live_restore=bool(said.get("LiveRestoreEnabled")),
        untried=tuple(_untried(said, security, found)),
        keeps_user=podman and rootless,
        podman=podman,
    )


def _untried(said: Mapping[str, Any], security: str, api: tuple[int, int]) -> Iterator[str]:
    if api > TRIED_API:
        yield "an engine newer than Docker 26.1"
    if str(said.get("CgroupVersion")) == "2":
        yield "control groups of version 2"
    for option, name in (("apparmor", "AppArmor"), ("selinux", "SELinux")):
        if f"name={option}" in security:
            yield name


def _has_gpus(said: Mapping[str, Any]) -> bool:
    """Whether a device of NVIDIA's was discovered: newer engines know the interface also where there is none."""
    return any(str(one.get("ID", "")).startswith("nvidia.com/gpu") for one in said.get("DiscoveredDevices") or ())


def _has_own_kernel(name: str, about: object) -> bool:
    """gVisor's runsc, Kata Containers and libkrun, by their programs or, where those are not told, by their names."""
    told = (about.get("path") or about.get("runtimeType")) if isinstance(about, Mapping) else ""
    program = str(told or name).rpartition("/")[2]
    return any(known in program for known in ("runsc", "kata", "krun"))
