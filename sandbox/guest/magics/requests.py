"""What GPUs all ranks need together, from what each of them is to have. The keeper knows the words themselves."""

from __future__ import annotations

import re
from typing import NamedTuple

ALTERNATIVES_MAX = 16
"""Of one request."""

_COUNTED = re.compile(r"(?P<name>.*?)\s*(?:(?P<sign>[:/])\s*(?P<count>[0-9]{1,4}))?")


class Each(NamedTuple):
    """One alternative of what a rank is to have: so many of a kind, or one of so many shares of one."""

    name: str
    number: int
    parts: int
    text: str

    def for_ranks(self, ranks: int) -> str:
        """The same for so many ranks; those that have shares of a GPU have whole ones together."""
        if ranks == 1:
            return self.text
        return f"{self.name}:{-(-ranks // self.parts) if self.parts > 1 else ranks * self.number}"

    def ranks_on(self, gpus: int) -> int:
        """How many ranks find room on so many GPUs, one at least."""
        return max(1, gpus * self.parts if self.parts > 1 else gpus // max(1, self.number))

    def down_from(self, ranks: int) -> list[str]:
        """What so many ranks need, else one less, and so on: fallbacks of one request."""
        wanted = [self.for_ranks(number) for number in range(ranks, 0, -1)]
        distinct = list(dict.fromkeys(wanted))
        return [*distinct[: ALTERNATIVES_MAX - 1], distinct[-1]] if len(distinct) > ALTERNATIVES_MAX else distinct


def each(gpu: str) -> list[Each]:
    """The alternatives in a request of one rank."""
    found = []
    for text in gpu.split(","):
        part = _COUNTED.fullmatch(text.strip())
        name, sign, count = part.group("name", "sign", "count") if part is not None else (text, None, None)
        number = int(count or 1)
        shared = sign == "/"
        found.append(Each(name, 1 if shared else number, number if shared else 1, text.strip()))
    return found


def of(gpu: str | None, ranks: int) -> str | list[str] | None:
    """The request for all ranks; None where they have no GPU."""
    if gpu is None:
        return None
    wanted = [one.for_ranks(ranks) for one in each(gpu)]
    return wanted[0] if len(wanted) == 1 else wanted
