"""The message-level ZeroMQ proxy between Jupyter clients and a sandboxed kernel.

- `connection`: where clients connect, and the key they sign with
- `kernel_proxy`: one kernel's proxy, the asyncio face that the keeper uses
- `relay`: its thread, which reads, checks, signs and forwards messages
- `host`, `outbox`: the sockets that clients connect to, and output on its way to them
- `link`, `guest`: one kernel, and the four channels to it
- `wire`: Jupyter's message framing and signatures
- `requests`, `activity`: what waits for a kernel, and whether it is busy
"""

from warmcell.kernel_provisioner.proxy.connection import CHANNELS, Channel, Connection
from warmcell.kernel_provisioner.proxy.kernel_proxy import KernelProxy

__all__ = ["CHANNELS", "Channel", "Connection", "KernelProxy"]
