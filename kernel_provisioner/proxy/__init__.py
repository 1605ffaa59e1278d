"""The message-level ZeroMQ proxy between Jupyter clients and a sandboxed kernel.

- `connection`: where clients connect, and the key they sign with
- `kernel_proxy`: one kernel's proxy, the asyncio face that the keeper uses
- `relay`: its thread
- `traffic`: what the thread does with each message: reads, checks, signs, forwards
- `pauses`: a kernel that is left alone and goes on: snapshots, suspension, undo
- `crossings`: what a kernel has answered while it was paused
- `stand_in`, `unwanted`: who answers for a suspended kernel; what an undone one says in vain
- `host`, `clients`: where clients connect, and output on its way to them
- `link`: one kernel, and the four channels to it
- `wire`, `zmtp`: Jupyter's message framing and signatures, and ZeroMQ's protocol below
- `requests`, `activity`: what waits for a kernel, and whether it is busy
"""

from warmcell.kernel_provisioner.proxy.connection import CHANNELS, Channel, Connection
from warmcell.kernel_provisioner.proxy.kernel_proxy import MESSAGE_MAX_BYTES, KernelProxy

__all__ = ["CHANNELS", "MESSAGE_MAX_BYTES", "Channel", "Connection", "KernelProxy"]
