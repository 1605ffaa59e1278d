"""What a rank takes while its cell runs, as its own kernel tells: that is known in every backend."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient

FIRST_S = 1.0
"""What ends before that is not asked."""

PAUSE_S = 2.0
PAUSE_TIMES = 20
"""Of what an answer took: looking through a large kernel's memory takes its time."""

ANSWER_TIMEOUT_S = 10.0


async def readings(client: AsyncKernelClient) -> AsyncGenerator[dict[str, Any]]:
    """Messages with `memory_bytes`, of the kernel and all its children, now and then. Ends if it does not answer."""
    pause = FIRST_S
    while True:
        await asyncio.sleep(pause)
        began = time.monotonic()
        asked = client.session.msg("usage_request", {})
        client.control_channel.send(asked)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                while True:
                    reply: dict[str, Any] = await client.get_control_msg(timeout=None)
                    if reply["parent_header"].get("msg_id") == asked["header"]["msg_id"]:
                        break
        except TimeoutError:
            return
        pause = max(PAUSE_S, PAUSE_TIMES * (time.monotonic() - began))
        memory = reply["content"].get("kernel_memory")
        if isinstance(memory, (int, float)) and memory > 0:
            yield {"msg_type": "usage", "content": {"memory_bytes": int(memory)}, "metadata": {}}
