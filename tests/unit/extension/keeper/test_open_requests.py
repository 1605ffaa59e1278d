"""Requests that are under way: each is looked at, whatever becomes of the others."""

import asyncio

from warmcell.extension.keeper.open_requests import OpenRequests
from warmcell.sandbox.errors import BackendUnavailableError, UnauthenticatedError


class Request:
    """Notes why it was ended; one that `breaks` cannot be."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.ended = asyncio.Event()
        self._breaks = breaks

    def no_longer(self, error: UnauthenticatedError) -> None:
        if self._breaks:
            raise RuntimeError("gone")
        self.ended.set()


async def test_one_that_cannot_be_looked_at_keeps_no_other() -> None:
    """Neither what cannot be asked about nor what cannot be ended; and what ends later is ended, too."""
    requests, later = OpenRequests(look_s=0.01), False

    def cannot() -> None:
        raise BackendUnavailableError("no key")

    def revoked() -> None:
        raise UnauthenticatedError("revoked")

    def revoked_later() -> None:
        if later:
            revoked()

    odd, broken, first, second = Request(), Request(breaks=True), Request(), Request()
    for request, check in ((odd, cannot), (broken, revoked), (first, revoked), (second, revoked_later)):
        requests.add(request, check)
    async with asyncio.timeout(10):
        await first.ended.wait()
        assert not second.ended.is_set()
        later = True
        await second.ended.wait()
    assert not odd.ended.is_set()
    for request in (odd, broken):
        requests.discard(request)
