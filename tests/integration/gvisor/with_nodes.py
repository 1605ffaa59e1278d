"""A process of its own, in a mount namespace of its own whose /dev has the nodes of an NVIDIA driver, though there is
none: to be run with a directory and the version that the driver is said to have.

It makes a gVisor sandbox with the first of two GPUs, looks around in it, tries to save it, and prints what it has seen
as a line of JSON.
"""

import asyncio
import json
import os
import secrets
import stat
import subprocess
import sys
from pathlib import Path

from tests.integration.gvisor.boxes import Boxes
from tests.leaks import Places
from warmcell.sandbox.backends import cdi
from warmcell.sandbox.backends.gvisor import nvproxy
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import UnsupportedOperationError
from warmcell.sandbox.models import GpuDevice, SandboxId, SnapshotId

NODES = {"nvidiactl": (195, 255), "nvidia0": (195, 0), "nvidia1": (195, 1), "nvidia-uvm": (511, 0)}
GPU = GpuDevice(uuid="GPU-1", index=0, name="A100", memory_total_bytes=1, device_nodes=("/dev/nvidia0",))
LIBRARY = next(str(path) for path in sorted(Path("/usr/bin").iterdir()) if path.is_file() and not path.is_symlink())
"""A file of the system's that the driver has another one of."""
LOOK = """
import errno, json, os
seen = {}
for name in sorted(os.listdir("/dev")):
    if name.startswith("nvidia"):
        try:
            os.close(os.open(f"/dev/{name}", os.O_RDWR))
            seen[name] = "opened"
        except OSError as error:
            seen[name] = errno.errorcode[error.errno]
texts = [open(path).read() for path in ("/opt/nv/libcuda.so.1", "@system@")]
about = {"libraries": os.environ["LD_LIBRARY_PATH"], "sys": sorted(os.listdir("/sys")), "uid": os.getuid()}
print(json.dumps({"nodes": seen, "texts": texts, **about}))
"""


def make_nodes(root: Path) -> None:
    """Below a /dev that this process alone sees."""
    made = root / "dev"
    made.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", made], check=True)
    for name in ("upper", "work"):
        (made / name).mkdir()
    options = f"lowerdir=/dev,upperdir={made}/upper,workdir={made}/work"
    subprocess.run(["mount", "-t", "overlay", "none", "-o", options, "/dev"], check=True)
    for name, number in NODES.items():
        os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(*number))


def make_specification(root: Path) -> None:
    """Of a driver whose library is nowhere in the system."""
    library = root / "libcuda.so.550"
    library.write_text("the driver's")
    edits = {
        "deviceNodes": [{"path": "/dev/nvidia0"}],
        "mounts": [{"hostPath": str(library), "containerPath": at} for at in ("/opt/nv/libcuda.so.550", LIBRARY)],
        "hooks": [{"path": "/x", "args": ["x", "create-symlinks", "--link", "libcuda.so.550::/opt/nv/libcuda.so.1"]}],
    }
    cdi.DIRECTORIES = (root / "cdi",)  # type: ignore[assignment]
    cdi.DIRECTORIES[0].mkdir()
    said = {"kind": cdi.KIND, "devices": [{"name": "GPU-1", "containerEdits": edits}]}
    (cdi.DIRECTORIES[0] / "nvidia.json").write_text(json.dumps(said))


async def main(root: Path, version: str) -> None:
    make_nodes(root)
    make_specification(root)
    nvproxy.DRIVER = root / "version"
    nvproxy.DRIVER.write_text(version)
    boxes = Boxes(Places(root))
    sandbox_id = SandboxId(secrets.token_hex(6))
    directory = boxes.paths.sandboxes / sandbox_id
    directory.mkdir(mode=0o700)
    instance = await boxes.backend.create(boxes.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[GPU])
    try:
        channel = await GuestChannel.open(instance.run_directory)
        seen = json.loads((await channel.exec([sys.executable, "-c", LOOK.replace("@system@", LIBRARY)])).stdout)
        image = SnapshotId(secrets.token_hex(6))
        try:
            await boxes.engine.dump(instance, pid=1, image=image, then="stop", while_frozen=asyncio.Event().wait)
        except UnsupportedOperationError as error:
            seen["saved"] = str(error)
        seen["after"] = (await channel.exec(["echo", "still there"])).stdout
    finally:
        await instance.stop()
    seen["left"] = [path.name for path in directory.iterdir()]
    try:
        await boxes.engine.maker(boxes.backend, None).create(
            boxes.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[GPU]
        )
    except UnsupportedOperationError as error:
        seen["restored"] = str(error)
    await boxes.close()
    sys.stdout.write(json.dumps(seen))


asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
