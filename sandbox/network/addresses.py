"""Which addresses are the public internet's. Pure."""

import ipaddress
from collections.abc import Iterable
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Block = ipaddress.IPv4Network | ipaddress.IPv6Network


def _blocks(*texts: str) -> tuple[Block, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


NEVER: Final = _blocks(
    "0.0.0.0/8",
    "100.100.100.200/32",  # where one cloud's machines are told their secrets
    "168.63.129.16/32",  # another's
    "169.254.0.0/16",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",
    "::/128",
    "fd00:ec2::/32",
    "fe80::/10",
    "ff00::/8",
)
"""Nobody may have these opened: metadata of clouds, link-local, multicast, and what is no address of a machine."""

PRIVATE: Final = _blocks(
    "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"
)
"""The operator may have these opened for hosts that are named."""

PUBLIC_V6: Final = ipaddress.ip_network("2000::/3")
NOT_PUBLIC_V6: Final = _blocks("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
"""Tunnels that have another address inside, and examples."""
TRANSLATED: Final = _blocks("::/96", "::ffff:0:0/96", "64:ff9b::/96")
"""The last four bytes are an IPv4 address that is meant."""


def meant(address: Address) -> Address:
    """The IPv4 address that is within an IPv6 one and is what is reached by it; else the address itself."""
    if isinstance(address, ipaddress.IPv6Address) and int(address) > 1 and _within(address, TRANSLATED):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def meant_block(block: Block) -> Block:
    """The same of a block, all of which is within such addresses."""
    first = meant(block[0])
    if isinstance(block, ipaddress.IPv6Network) and isinstance(first, ipaddress.IPv4Address) and block.prefixlen >= 96:
        return ipaddress.IPv4Network((int(first), block.prefixlen - 96))
    return block


def why_not(address: Address, *, private: bool = False) -> str | None:
    """Why a sandbox may not speak with an address; None: it may.

    Args:
        address: Which.
        private: Whether it may be one of the operator's own network.
    """
    address = meant(address)
    if _within(address, NEVER):
        return "an address that is not public"
    if _within(address, PRIVATE):
        return None if private else "a private address"
    if isinstance(address, ipaddress.IPv6Address) and (
        address.scope_id or address not in PUBLIC_V6 or _within(address, NOT_PUBLIC_V6)
    ):
        return "an address that is not public"
    return None


def _within(address: Address, blocks: Iterable[Block]) -> bool:
    return any(address in block for block in blocks if block.version == address.version)
