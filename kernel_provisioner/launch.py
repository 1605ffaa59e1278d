"""The kernelspec's own command line: a sandboxed kernel for clients that know nothing of provisioners.

It never runs a kernel itself: it has the keeper start one in a sandbox, bound at the addresses of the connection
file, passes signals on, and ends with the kernel's exit code. If it is killed, the kernel goes too.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from warmcell.kernel_provisioner.proxy import Connection
from warmcell.kernel_provisioner.wishes import Wishes, notebook_of, read_choice
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError, TransportError, WarmcellError

START_TIMEOUT_S: Final = 300.0
WAIT_S: Final = 60.0
GRACE_S: Final = 2.0
"""How long the kernel has when this program is told to end."""
FAILED: Final = 1
"""Exit code when there is no kernel to have one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start a kernel and stay until it ends; its exit code, or 1 with one line on stderr."""
    options = _parser().parse_args(argv)
    try:
        return asyncio.run(_run(options.connection_file, options.config))
    except WarmcellError as error:
        print(f"warmcell: {error}", file=sys.stderr)  # noqa: T201 - whoever started it reads this
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m warmcell.kernel_provisioner.launch", description="Start a sandboxed Jupyter kernel."
    )
    parser.add_argument("-f", dest="connection_file", metavar="FILE", required=True, help="Jupyter's connection file")
    parser.add_argument("--config", metavar="JSON", default="{}", help="what the kernelspec configures")
    return parser


async def _run(connection_file: str, config: str) -> int:
    connection = await asyncio.to_thread(_read_connection, connection_file)
    wishes = Wishes.from_json(_object(config, "--config"))
    notebook = notebook_of(os.environ)
    if notebook is not None:
        choice = await asyncio.to_thread(read_choice, notebook)
        wishes = wishes.chosen(choice, source=f"metadata.warmcell of {notebook}")
    spec = wishes.spec(folder=os.getcwd(), environ=os.environ)
    body = {
        "kernel_id": str(uuid4()),
        "spec": spec.to_json(),
        "connection": connection.to_json(),
        "cwd": os.getcwd() if spec.workspace is not None else "",
        "notebook": notebook,
    }
    async with await KeeperClient.connect() as keeper:
        return await _Launched(keeper, body).stay()


class _Launched:
    """One kernel, from its start to its end."""

    def __init__(self, keeper: KeeperClient, body: Mapping[str, Any]) -> None:
        self._keeper = keeper
        self._body = body
        self._path = f"/kernels/{body['kernel_id']}"
        self._started = False
        self._told = asyncio.Event()
        """Set when this program is to end, or whoever started it has ended."""
        self._interrupts: set[asyncio.Task[None]] = set()

    async def stay(self) -> int:
        """Start the kernel, and end with it; the kernel's exit code."""
        with self._listening():
            life = asyncio.create_task(self._live())
            told = asyncio.create_task(self._told.wait())
            try:
                await asyncio.wait({life, told}, return_when=asyncio.FIRST_COMPLETED)
                if not life.done() and self._started:
                    await self._keeper.post(f"{self._path}/end", {"grace_s": GRACE_S})
                elif not life.done():
                    life.cancel()
                return await life
            except asyncio.CancelledError:
                return 128 + signal.SIGTERM
            finally:
                told.cancel()
                with contextlib.suppress(TransportError):
                    await self._keeper.delete(self._path)

    async def _live(self) -> int:
        timeout = None if self._body["spec"].get("gpu") else START_TIMEOUT_S  # A GPU may be waited for.
        await self._keeper.post("/kernels", self._body, timeout=timeout)
        self._started = True
        while True:
            kernel = await self._keeper.get(f"{self._path}?wait={WAIT_S:g}", timeout=2 * WAIT_S)
            if not kernel["alive"]:
                return FAILED if kernel["exit_code"] is None else int(kernel["exit_code"])

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Take signals, and notice the end of the process that started this one."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._told.set)
        loop.add_signal_handler(signal.SIGHUP, self._told.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        parent = _parent()
        if parent is not None:
            loop.add_reader(parent, self._told.set)
        try:
            yield
        finally:
            if parent is not None:
                loop.remove_reader(parent)
                os.close(parent)

    def _interrupt(self) -> None:
        if self._started:
            task = asyncio.create_task(self._pass_on(signal.SIGINT))
            self._interrupts.add(task)
            task.add_done_callback(self._interrupts.discard)

    async def _pass_on(self, signum: int) -> None:
        with contextlib.suppress(NotFoundError, TransportError):
            await self._keeper.post(f"{self._path}/signal", {"signum": int(signum)})


def _parent() -> int | None:
    """A descriptor that is readable when the Jupyter process that started this one has ended; None if it is another."""
    said = os.environ.get("JPY_PARENT_PID", "")
    if not said.isdigit() or int(said) != os.getppid():
        return None
    return os.pidfd_open(int(said))


def _read_connection(path: str) -> Connection:
    try:
        said = Path(path).read_text()
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"The connection file {path} cannot be read: {error}", hint="Jupyter makes it and gives its path with -f."
        ) from error
    return Connection.from_json(_object(said, f"The connection file {path}"))


def _object(said: str, what: str) -> Mapping[str, Any]:
    try:
        found = json.loads(said)
    except ValueError as error:
        raise InvalidRequestError(f"{what} is not JSON: {error}", hint="Let Jupyter write it.") from error
    if not isinstance(found, dict):
        raise InvalidRequestError(f"{what} is not a JSON object", hint="Let Jupyter write it.")
    return found


if __name__ == "__main__":
    sys.exit(main())
