"""REST of principals and their tokens: for the user's own processes, but for what a principal asks about itself."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from warmcell.extension.keeper.agents import checks
from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.principals import USUAL_SCOPES, Principals, Quota
from warmcell.extension.keeper.quotas import PrincipalQuotas
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError, SnapshotNotFoundError, WarmcellError
from warmcell.sandbox.lifecycle import TERMINAL
from warmcell.sandbox.models import SandboxId

LONGEST_WAIT_S = 300.0
ROUNDS = 3
"""A start that was already under way may come up while the others are ended."""


@dataclass(frozen=True, slots=True)
class PrincipalsApi:
    """What these handlers work with; the application's setting `principals`."""

    principals: Principals
    quotas: PrincipalQuotas


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix."""
    return [
        (r"/openapi\.json", DocumentHandler),
        (r"/tokens", TokensHandler),
        (r"/tokens/([^/]+)", TokenHandler),
        (r"/principals", PrincipalsHandler),
        (r"/principals/([^/]+)", PrincipalHandler),
    ]


class _Handler(JsonHandler):
    @property
    def api(self) -> PrincipalsApi:
        api: PrincipalsApi = self.settings["principals"]
        return api

    def describe(self, name: str) -> dict[str, Any]:
        """A principal, what it may have and what it has."""
        quota, used = self.api.principals.quota(name), self.api.quotas.usage(name)
        return {"name": name, "quota": quota.to_json(), "used": used.to_json()}


class DocumentHandler(_Handler):
    """What this API is, for programs."""

    def get(self) -> None:
        from warmcell.extension.keeper.openapi import document  # read by few, so made for few

        self.answer(document())


class TokensHandler(_Handler):
    """All tokens, and a new one."""

    def get(self) -> None:
        self.answer({"tokens": [info.to_json() for info in self.api.principals.tokens()]})

    async def post(self) -> None:
        body = self.body()
        unknown = sorted(set(body) - {"principal", "scopes", "expires_in_s", "quota"})
        if unknown:
            raise InvalidRequestError(
                f"A token has no {unknown[0]!r}", hint="Send principal, scopes, expires_in_s and quota."
            )
        quota, scopes, name = body.get("quota"), body.get("scopes", list(USUAL_SCOPES)), body.get("principal")
        if not isinstance(name, str):
            raise InvalidRequestError("A token is somebody's", hint="Send `principal`, a name.")
        if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
            raise InvalidRequestError("scopes is a list of names", hint='Send {"scopes": ["read", "run"]}.')
        info, token = await asyncio.to_thread(
            self.api.principals.create,
            name,
            scopes=scopes,
            expires_in_s=_seconds(body.get("expires_in_s")),
            quota=None if quota is None else Quota.from_json(_object(quota)),
        )
        self.answer({**info.to_json(), "token": token}, 201)


class TokenHandler(_Handler):
    """One token."""

    async def delete(self, token_id: str) -> None:
        """It is of no use from now on; what its principal has stays."""
        await asyncio.to_thread(self.api.principals.revoke, token_id)
        self.set_status(204)


class PrincipalsHandler(_Handler):
    """Everybody who has or had a token, with what each has."""

    def get(self) -> None:
        self.answer({"principals": [self.describe(name) for name in self.api.principals.names()]})


class PrincipalHandler(_Handler):
    """One principal; `self` is whoever asks with a token."""

    async def get(self, name: str) -> None:
        wait = checks.number(self.get_query_argument("wait", "0"), "wait", most=LONGEST_WAIT_S)
        if wait:  # Whoever holds something open for a token hears here when that ends.
            await self.unless_gone(asyncio.sleep(wait))
        principal = self.principal
        if name == "self" and principal is not None:
            self.answer({**self.describe(principal.name), "scopes": sorted(principal.scopes)})
            return
        if name not in self.api.principals.names():
            raise NotFoundError(f"There is no principal {name}", hint="`warmcell token ls` lists them.")
        self.answer(self.describe(name))

    async def delete(self, name: str) -> None:
        """End its sandboxes and remove its snapshots. When the user asks, its tokens and its quota go too, at first."""
        tokens: Sequence[str] = []
        if self.principal is not None:
            name = self.principal.name
        else:
            tokens = await asyncio.to_thread(self.api.principals.remove, name)
        sandboxes = await self._end_sandboxes(name)
        snapshots = await self._remove_snapshots(name)
        self.answer({"sandboxes": sandboxes, "snapshots": snapshots, "tokens": list(tokens)})

    async def _end_sandboxes(self, name: str) -> list[str]:
        keeper, gone = self.settings["keeper"], set[SandboxId]()
        for _ in range(ROUNDS):
            infos = [info for info in keeper.service.infos() if info.principal == name]
            mine = [info.id for info in infos if info.state not in TERMINAL or info.id not in gone]
            if not mine:
                break
            ends = await asyncio.gather(*(keeper.stop(one) for one in mine), return_exceptions=True)
            gone.update(mine)
            for end in ends:
                if isinstance(end, BaseException):
                    raise end
        return sorted(gone)

    async def _remove_snapshots(self, name: str) -> list[str]:
        store, gone = self.settings["keeper"].service.memory.store, []
        failure: WarmcellError | None = None
        for info in store.infos():
            if info.principal != name:
                continue
            try:
                await store.remove(info.id)
                gone.append(info.id)
            except SnapshotNotFoundError:  # it went with its sandbox
                continue
            except WarmcellError as error:
                failure = error
        if failure is not None:
            raise failure
        return gone


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequestError("expires_in_s is a number of seconds", hint="Leave it out for a token that stays.")
    return float(value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequestError("quota must be an object", hint='Send {"quota": {"sandboxes": 8}}.')
    return value
