"""`warmcell.remote`: functions that run on ranks, as cells do with `%%remote`."""

from __future__ import annotations

import concurrent.futures
import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from ..values import RESULT
from .arguments import ArgumentError, Arguments, bounded, read, strings
from .fanout import FanOut, Task
from .output import Lines, Progress, Waiting
from .pods import Pod, Pods
from .sending import Parcel

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

KEYWORDS = ("gpu", "n", "session", "timeout", "image", "memory")
"""What can be said here, of all that `%%remote` knows."""

FUNCTION, CALL = "_warmcell_function", "_warmcell_call"
CODE = f"{RESULT} = {{}}{FUNCTION}(*{CALL}[0], **{CALL}[1])"

_pods: Callable[[], Pods] | None = None


def use(pods: Callable[[], Pods]) -> None:
    """Have functions run on the ranks that `pods` gives, rather than on those of this notebook's magic."""
    global _pods
    _pods = pods


@overload
def remote(function: Callable[..., Any], /) -> RemoteFunction: ...


@overload
def remote(
    *,
    gpu: str | None = None,
    n: int | str | None = None,
    session: str = "",
    timeout: float | str | None = None,
    image: str | None = None,
    memory: str | None = None,
) -> Callable[[Callable[..., Any]], RemoteFunction]: ...


def remote(
    function: Callable[..., Any] | None = None,
    /,
    *,
    gpu: str | None = None,
    n: int | str | None = None,
    session: str = "",
    timeout: float | str | None = None,
    image: str | None = None,
    memory: str | None = None,
) -> Callable[[Callable[..., Any]], RemoteFunction] | RemoteFunction:
    """A decorator, with or without these: calls of the function run in another sandbox, on `n` ranks at a time.

    What is not said here comes from the notebook's metadata, then from the operator, as of `%%remote`; else it is one
    rank without a GPU.

    Args:
        function: What runs there; it may be asynchronous, and is awaited there.
        gpu: A GPU for each rank, as in "A100"; "none" where there is a default.
        n: How many ranks, or "max": as many as there are GPUs free.
        session: A name for ranks of its own.
        timeout: Seconds that one call may take, or a time as in "15m".
        image: What the sandbox is made of.
        memory: Most memory of each rank, as in "8GiB".

    Raises:
        ArgumentError: A value is not of its form.
    """
    said = {"gpu": gpu, "n": n, "session": session, "timeout": timeout, "image": image, "memory": memory}
    given = strings(said)
    read(given, {"gpu": "any"})
    if function is not None and not callable(function):
        raise ArgumentError(
            f'{function!r} is no function; what is wanted has a name, as in @warmcell.remote(gpu="A100")'
        )
    return RemoteFunction(function, given) if function is not None else lambda function: RemoteFunction(function, given)


class RemoteFunction:
    """A function whose calls run on ranks."""

    def __init__(self, function: Callable[..., Any], given: Mapping[str, str]) -> None:
        if not callable(function):
            raise ArgumentError(f"warmcell.remote(…) takes a function, and {function!r} is none")
        self._function = function
        self._given = dict(given)
        self._queue: list[_Submitted] = []
        self._lock = threading.Lock()
        self._works = False
        self._turn = threading.Lock()
        functools.update_wrapper(self, function, updated=())

    def __repr__(self) -> str:
        return f"<remote {getattr(self._function, '__name__', self._function)!s}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """It goes to ranks as the function itself, which may call itself there."""
        return operator.itemgetter(0), ((self._function,),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it on a rank, and wait.

        Raises:
            BaseException: What it raised there.
        """
        return self._run([(args, kwargs)])[0]

    def map(self, *items: Iterable[Any]) -> list[Any]:
        """Call it with each item, as `map` does: on all ranks at once, the results in the items' order.

        A rank that ends is replaced, and its item begun again.

        Raises:
            BaseException: What the first call that failed has raised; the others are stopped.
        """
        return self._run([(args, {}) for args in bounded(zip(*items), "what is mapped")])

    def submit(self, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Call it on a rank, and go on here: a future. Several run on all ranks at once."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            self._queue.append(_Submitted(future, args, kwargs, getattr(_shell(), "get_parent", dict)()))
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, daemon=True, name="warmcell-submitted").start()
        return future

    def _work(self) -> None:
        """Run what was submitted until nothing is left; what comes meanwhile is run together next."""
        while True:
            with self._lock:
                batch, self._queue = self._queue, []
                if not batch:
                    self._works = False
                    return
            batch = [one for one in batch if one.future.set_running_or_notify_cancel()]
            show = _Futures(batch)
            try:
                if batch:
                    self._run([(one.args, one.kwargs) for one in batch], show)
            except BaseException as error:
                show.fail(error)

    def _run(self, calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]], show: _Futures | None = None) -> list[Any]:
        if not calls:
            return []
        pods = _current()
        arguments = read(self._given, {key: value for key, value in pods.defaults.items() if key in KEYWORDS})
        with self._turn:
            # Whoever submits goes on, and has another cell by then.
            waiting = Waiting(_shell(), None if show is None else show.cell)
            pod = pods.take(arguments, repr(self), lambda text: None, waiting)
            waiting.close()
            try:
                return self._run_on(pod, arguments, calls, show)
            finally:
                pods.give_back(pod)

    def _run_on(self, pod: Pod, arguments: Arguments, calls: list[Any], show: _Futures | None) -> list[Any]:
        name = getattr(self._function, "__name__", "function")
        # What an asynchronous function returns is waited for there.
        code = CODE.format("await " if inspect.iscoroutinefunction(self._function) else "")
        tasks = [
            Task(code, {CALL: call}, None, f"{name}, call {number}" if len(calls) > 1 else "")
            for number, call in enumerate(calls)
        ]
        cell = None if show is None else show.cell
        parcel = Parcel(pod.store, {FUNCTION: self._function}, (), Progress(_shell(), cell=cell))
        fan_out = FanOut(
            pod,
            tasks,
            parcel=parcel,
            get=(RESULT,),
            timeout_s=arguments.timeout_s,
            retry=True,
            together=show is None,
            progress=Progress(_shell(), "Bringing back", cell),
        )
        if show is not None:
            fan_out.on_result = show.result
            fan_out.on_error = show.error
        return [result.get(RESULT) for result in fan_out.run(Lines(pod.ranks))]


class _Submitted(NamedTuple):
    """A call that somebody has submitted."""

    future: concurrent.futures.Future[Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cell: Mapping[str, Any]
    """The request of the cell that did it; empty where there is no notebook."""


class _Futures:
    """Those of one batch, each told as its call ends."""

    def __init__(self, batch: Sequence[_Submitted]) -> None:
        self._futures = [one.future for one in batch]
        self.cell = batch[0].cell if batch else {}
        """The one that shows what is sent for all, and what comes back: the first that submitted."""

    def result(self, number: int, values: Mapping[str, Any]) -> None:
        """A call has brought this back."""
        self._futures[number].set_result(values.get(RESULT))

    def error(self, number: int, error: BaseException) -> None:
        """A call has failed."""
        self._futures[number].set_exception(error)

    def fail(self, error: BaseException) -> None:
        """All that are not done have failed."""
        for future in self._futures:
            if not future.done():
                future.set_exception(error)


def _shell() -> InteractiveShell | None:
    """That of this notebook, if it is one."""
    from IPython.core.getipython import get_ipython

    return get_ipython()


def _current() -> Pods:
    """Those of this notebook's magic, else what was set."""
    shell = _shell()
    magic = None if shell is None else shell.magics_manager.magics["cell"].get("remote")
    if magic is not None:
        pods: Pods = magic.__self__.pods
        return pods
    if _pods is None:
        raise ArgumentError("there is no %%remote here; run `%load_ext warmcell` first")
    return _pods()
