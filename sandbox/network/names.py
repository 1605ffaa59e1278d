"""Names that are looked up at servers of somebody's choice, instead of as the host does. RFC 1035, in part."""

import asyncio
import ipaddress
import secrets
import struct
from collections.abc import Sequence
from typing import Final

PORT: Final = 53
ANSWER_S: Final = 3.0
"""How long one server has; then the next one is asked."""
GRACE_S: Final = 0.25
"""How long addresses of the other kind are waited for, once there are some."""
MESSAGE_MAX: Final = 65535
A, AAAA, IN = 1, 28, 1

_HEAD = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
_LENGTH = struct.Struct("!H")
_ANSWERS, _TRUNCATED, _RECURSION, _CODE = 0x8000, 0x0200, 0x0100, 0x000F
_NO_SUCH_NAME = 3


class NoAnswerError(Exception):
    """A server has not said, or said something that is no answer."""


class NoSuchNameError(NoAnswerError):
    """There is no such name, of whatever kind."""


class AskedServers:
    """Looks up names at these servers, the first that answers."""

    def __init__(self, servers: Sequence[str], *, port: int = PORT) -> None:
        """Ask nobody yet.

        Args:
            servers: Their addresses.
            port: Of them all.
        """
        self._servers = tuple(servers)
        self._answered = ""
        """Who has answered last, and is asked first."""
        self._port = port

    async def __call__(self, name: str) -> Sequence[str]:
        """The addresses of a name; none where there is no such name, or no server answers."""
        asking = [asyncio.create_task(self._ask(name, kind)) for kind in (A, AAAA)]
        try:
            done, others = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            if any(one.result() is None for one in done):
                return ()
            if others:  # Some servers say nothing of one kind; they are waited for where there is no other address.
                await asyncio.wait(others, timeout=GRACE_S if any(one.result() for one in done) else None)
            found = [one.result() for one in asking if one.done()]
        finally:
            for one in asking:
                one.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        return tuple(dict.fromkeys(address for addresses in found for address in addresses or ()))

    async def _ask(self, name: str, kind: int) -> Sequence[str] | None:
        """Its addresses of a kind; None where there is no such name."""
        for server in sorted(self._servers, key=lambda one: one != self._answered):  # The others in their order.
            try:
                found: Sequence[str] | None = await asyncio.wait_for(self._one(server, name, kind), ANSWER_S)
            except NoSuchNameError:
                found = None
            except (NoAnswerError, OSError, TimeoutError):
                continue
            self._answered = server
            return found
        return ()

    async def _one(self, server: str, name: str, kind: int) -> Sequence[str]:
        asked = question(name, kind)
        told = await self._by_datagram(server, asked)
        if _HEAD.unpack_from(told)[1] & _TRUNCATED:
            told = await self._by_stream(server, asked)
        return addresses(told, asked)

    async def _by_datagram(self, server: str, asked: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        transport, _ = await loop.create_datagram_endpoint(lambda: _Hears(heard), remote_addr=(server, self._port))
        try:
            transport.sendto(asked)
            while True:
                told = await heard.get()
                if isinstance(told, Exception):
                    raise NoAnswerError from told
                if len(told) >= _HEAD.size and told[:2] == asked[:2]:  # Else it is somebody's guess.
                    return told
        finally:
            transport.close()

    async def _by_stream(self, server: str, asked: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(server, self._port)
        try:
            writer.write(_LENGTH.pack(len(asked)) + asked)
            (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            return await reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise NoAnswerError from None
        finally:
            writer.close()


class _Hears(asyncio.DatagramProtocol):
    def __init__(self, heard: "asyncio.Queue[bytes | Exception]") -> None:
        self._heard = heard

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._heard.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        self._heard.put_nowait(exc)


def question(name: str, kind: int) -> bytes:
    """A request for the addresses of a name, under a number that nobody can guess."""
    labels = b"".join(bytes((len(label),)) + label.encode("ascii") for label in name.split("."))
    head = _HEAD.pack(secrets.randbits(16), _RECURSION, 1, 0, 0, 0)
    return head + labels + b"\0" + struct.pack("!HH", kind, IN)


def addresses(told: bytes, asked: bytes) -> list[str]:
    """Those in an answer to that question, of the kind that it asks for.

    Raises:
        NoSuchNameError: There is no such name.
        NoAnswerError: It is none, or the server cannot answer.
    """
    try:
        number, flags, questions, answers, _, _ = _HEAD.unpack_from(told)
        end = len(asked)
        same = told[_HEAD.size : end].lower() == asked[_HEAD.size :].lower()
        if number != _HEAD.unpack_from(asked)[0] or not flags & _ANSWERS or questions != 1 or not same:
            raise NoAnswerError
        if flags & _CODE == _NO_SUCH_NAME:
            raise NoSuchNameError
        if flags & _CODE:
            raise NoAnswerError
        (wanted,) = _LENGTH.unpack_from(asked, end - 4)
        found, at = [], end
        for _ in range(answers):
            at = _after_name(told, at)
            kind, of, _, size = _RECORD.unpack_from(told, at)
            at += _RECORD.size
            data = told[at : at + size]
            if kind == wanted and of == IN and len(data) == (4 if kind == A else 16) == size:
                found.append(str(ipaddress.ip_address(data)))
            at += size
        return found
    except (struct.error, IndexError) as error:
        raise NoAnswerError from error


def _after_name(told: bytes, at: int) -> int:
    """Where a name ends that begins there: names of answers are not looked at, since all lead to the one asked for."""
    while (length := told[at]) != 0:
        if length & 0xC0:
            return at + 2
        at += length + 1
    return at + 1
