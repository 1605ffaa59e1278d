"""Building images from Python: `warmcell.build_image`."""

import contextlib
from collections.abc import Callable
from typing import Any

from warmcell.sandbox.client.keeper import SyncKeeperClient
from warmcell.sandbox.errors import ProtocolError, from_json
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import ImageInfo


def build_image(
    image: Image,
    *,
    name: str = "",
    backend: str = "auto",
    again: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> ImageInfo:
    """Have the keeper build an image, unless it is there already. Blocks as long as that takes.

    Args:
        image: What is declared.
        name: What it is called from now on, for kernelspecs and `Image.from_name`.
        backend: For whose sandboxes: "bubblewrap", "docker"; "auto": the usual one's, if it can have such an image.
        again: Build it although it is there.
        progress: Gets each line of the build's output.

    Raises:
        ImageBuildError: A step failed; `details["output"]` has the last lines.
        WarmcellError: It cannot be built like that, the disk is full, or the keeper is gone.
    """
    with SyncKeeperClient.connect() as keeper:
        return build_with(keeper, image, name=name, backend=backend, again=again, progress=progress)


def build_with(
    keeper: SyncKeeperClient, image: Image, *, name: str, backend: str, again: bool, progress: Callable[[str], None]
) -> ImageInfo:
    """As `build_image`, with a connection that is there."""
    body = {"image": image.to_json(), "name": name, "backend": backend, "again": again}
    said: dict[str, Any] = {}
    with contextlib.closing(keeper.lines("/images", body)) as lines:
        for said in lines:
            if "line" in said:
                progress(str(said["line"]))
    if "error" in said:
        raise from_json(said["error"])
    if "image" not in said:
        raise ProtocolError("The keeper broke off as it built an image", hint="Build it again; keeper.log says more.")
    return ImageInfo.from_json(said["image"])
