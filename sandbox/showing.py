"""Which GPUs a sandbox that runs sees, where that can be changed."""

import logging

from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import GpuDevice

log = logging.getLogger(__name__)


async def show(box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> None:
    """Have a sandbox see these devices and no others, where it can be shown others than it was made with.

    Raises:
        UnsupportedOperationError: The system refuses it, or a program has one of those open that are to go.
    """
    if box.instance.shows_others:
        await box.instance.show_gpus(devices)


async def hide(box: LiveSandbox) -> bool:
    """Have it see none, for others are to have what it had; whether that is so, as far as it could be."""
    try:
        await show(box, ())
    except Exception as error:  # Whatever it is, nobody else may have what it sees.
        log.warning("sandbox %s keeps its GPU, which it sees still: %s", box.info.id, error)
        return False
    return True
