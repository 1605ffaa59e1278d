"""`%%remote`: run the cell elsewhere, show what it shows, raise what it raises."""

from __future__ import annotations
import __future__

import atexit
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import modules
from ..values import name_classes
from . import output
from .api import Api
from .arguments import ArgumentError, Arguments, check_known, items_of, near, parse, table
from .capture import Reads, captured, reads
from .fanout import FanOut, Ranks, Sent, Task
from .forked import InCloneError, Inheritance, clones
from .jobs import Job, Jobs
from .pods import BusyError, Pods
from .sending import Parcel

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

VERBS = ("ls", "attach", "logs", "stop", "wait", "close")
LAST = "warmcell_last"
"""What the value of a cell's last line is called on its way."""

_NOTHING = object()


class Where(NamedTuple):
    """Where a cell is about to run."""

    pod: Ranks
    parcel: Callable[[], Sent]
    """Looks at what the ranks need."""
    done: Callable[[], object]
    """Told that the cell has run."""
    leave: Callable[[], None]
    """Lets go of the ranks."""


class Remote:
    """The magics of one shell."""

    def __init__(self, shell: InteractiveShell, connect: Callable[[], Api]) -> None:
        self._shell = shell
        self._connect = connect
        self.pods = Pods(connect)
        self._jobs = Jobs()
        atexit.register(self.close)

    def magic(self, line: str, cell: str) -> None:
        from IPython.core.error import UsageError

        if not cell.strip():
            raise UsageError("%%remote runs the lines below it, and there are none")
        try:
            arguments = parse(line, self.pods.defaults)
            check_known("send", arguments.send, self._shell.user_ns)
            items = items_of(arguments.each, self._shell.user_ns)
        except ArgumentError as error:
            raise UsageError(f"%%remote: {error}") from None
        found = reads(cell, self._shell.transform_cell)
        try:
            job, finish, after = self._prepared(arguments, cell, found, items)
        except InCloneError:
            self.pods, self._jobs = Pods(self._connect), Jobs()  # Those are the original's.
            if self._is_all():
                return
            raise
        if arguments.detach:
            self._detach(job, arguments, finish, after)
            return
        view = output.of(self._shell, job.board)
        job.attach(view)
        job.run(finish, after)
        view.close(job.board.summary())
        job.result()

    magic.__doc__ = f"""Run this cell in another sandbox, on one or more ranks, each with its own GPU if asked for.

    %%remote [KEY=VALUE ...] [detach]

{table()}

    Variables that the cell reads are sent by themselves, functions and classes of the notebook with what they use; what
    a rank already has is not sent again. Output appears as it comes. An error over there is an error here and stops the
    other ranks; the stop button stops all. Each rank sees RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as
    from torchrun. The sandbox is kept for the next %%remote with the same gpu, n, session, image and memory, variables
    included, and removed with this kernel. It sees the same files as this notebook.
    %remote? says what can be done with a cell that was detached.
    """

    def line(self, line: str) -> None:
        """What runs remotely, and what to do with it.

            %remote ls            all remote cells of this notebook
            %remote attach [N]    show a cell that runs, from its beginning; the stop button only stops showing it
            %remote logs [N]      what it has shown until now
            %remote stop [N]      interrupt it
            %remote wait [N]      wait for it, and have what it brings back
            %remote close [NAME]  remove the sandboxes that are kept, or those of a session

        Without a number the last one that runs is meant.
        """
        from IPython.core.error import UsageError

        verb, _, rest = line.strip().partition(" ")
        verb, rest = verb or "ls", rest.strip()
        if verb not in VERBS:
            raise UsageError(f"%remote {verb}: there is {', '.join(VERBS)}.{near(verb, VERBS)}")
        if verb == "ls":
            self._list()
        elif verb == "close":
            _say(f"{self.pods.close(rest or None)} sandboxes removed")
        else:
            try:
                job = self._jobs.find(rest)
            except KeyError as error:
                raise UsageError(f"%remote {verb}: {error.args[0]}") from None
            self._do(verb, job)

    def close(self) -> None:
        """Remove the sandboxes that are kept. Idempotent."""
        atexit.unregister(self.close)
        self.pods.end()

    def _do(self, verb: str, job: Job) -> None:
        if verb == "stop":
            job.stop()
            job.wait()
            _say(repr(job))
            return
        if verb == "wait":
            job.result()
            _say(repr(job))
            return
        view = output.of(self._shell, job.board)
        job.attach(view)
        try:
            if verb == "attach":
                job.wait()
        except KeyboardInterrupt:
            _say(f"{job!r} goes on; %remote stop {job.number} stops it")
        finally:
            job.leave(view)
            view.close(job.board.summary())

    def _list(self) -> None:
        for job in self._jobs.all():
            first = next((line for line in job.cell.splitlines() if line.strip()), "")
            _say(f"{job.number:3}  {job.state:7} {job.place}  {first[:60]}")
        if not self._jobs.all():
            _say("No remote cell has run yet")

    def _prepared(
        self, arguments: Arguments, cell: str, found: Reads, items: Sequence[Any]
    ) -> tuple[Job, Callable[[list[Mapping[str, Any]]], Any], Callable[[], None]]:
        """The cell as a job; what makes its result, and what is to be done after it."""
        number = self._jobs.next_number()
        where = self._forked(arguments, items) if arguments.fork else self._taken(arguments, found, number)
        pod = where.pod
        try:
            parcel, tasks = where.parcel(), self._tasks(arguments, cell, pod, items)
            sent_before = pod.store.sent
            if arguments.detach and isinstance(parcel, Parcel):
                tasks = self._sent_ahead(pod, parcel, tasks)
            fan_out = FanOut(
                pod,
                tasks,
                parcel=parcel,
                get=arguments.get,
                last=LAST if arguments.result else "",
                timeout_s=arguments.timeout_s,
                cell=len(self._shell.user_ns["In"]) - 1,
                retry=bool(arguments.each),
                sent_before=sent_before,
                progress=_untold if arguments.detach else output.Progress(self._shell, "Bringing back"),
            )
            job = Job(number, cell, pod.place, fan_out, pod.devices, gpus_each=pod.gpus_each, quiet=_quiet(cell))
        except BaseException:
            where.leave()
            raise
        self._jobs.add(job)

        def finish(values: list[Mapping[str, Any]]) -> Any:
            return self._finish(arguments, values)

        def after() -> None:
            where.done()
            where.leave()

        return job, finish, after

    def _taken(self, arguments: Arguments, found: Reads, number: int) -> Where:
        """The kernels of a sandbox that is kept, which are sent what the cell reads."""
        waiting = output.Waiting(self._shell)
        pod = self.pods.take(arguments, f"Remote cell {number}", lambda text: _say(f"Remote: {text}"), waiting)
        waiting.close()
        names = self._shell.user_ns
        return Where(
            pod,
            parcel=lambda: Parcel(
                pod.store,
                self._values(arguments, found),
                arguments.send,
                output.Progress(self._shell),
                ranks=pod.ranks,
                imports=found.imported,
            ),
            done=lambda: pod.keep({name: names.get(name, _NOTHING) for name in found.assigned}),
            leave=lambda: self.pods.give_back(pod),
        )

    def _forked(self, arguments: Arguments, items: Sequence[Any]) -> Where:
        """Clones of this kernel, which have all that the cell reads; raises InCloneError in them."""
        running = next((job.number for job in self._jobs.all() if not job.done()), None)
        if running is not None:
            raise BusyError(
                f"Remote cell {running} runs, and a kernel that is connected to another one cannot be cloned. "
                f"Wait for it with %remote wait {running}, or stop it with %remote stop {running}."
            )
        if arguments.get or arguments.result:
            name_classes()
        ranks = clones(self.pods.api, arguments.n, items, self._shell.user_ns)
        where = Where(ranks, parcel=Inheritance, done=lambda: None, leave=ranks.close)
        try:
            _say(f"Remote: {ranks.place}, forked in {1000 * ranks.took_s:.0f} ms")
        except BaseException:
            where.leave()
            raise
        return where

    def _is_all(self) -> bool:
        """Whether the cell that runs is this magic and nothing else, so that nothing of it is left to be run."""
        parent: Mapping[str, Any] = getattr(self._shell, "get_parent", dict)() or {}
        return str(parent.get("content", {}).get("code", "")).lstrip().startswith("%%remote")

    def _values(self, arguments: Arguments, found: Reads) -> dict[str, Any]:
        names = self._shell.user_ns
        hidden = {
            name for name, value in self._shell.user_ns_hidden.items() if name in names and names[name] is value
        } | {"In", "Out", "get_ipython", "exit", "quit"}
        if arguments.each:
            hidden |= {"item", "index"}
        read = captured(found, names, hidden=hidden)
        values = {name: modules.with_parts(name, value, found.dotted) for name, value in read.items()}
        values.update({name: names[name] for name in arguments.send})
        return values

    def _tasks(self, arguments: Arguments, cell: str, pod: Ranks, items: Sequence[Any]) -> Sequence[Task]:
        code = cell
        if not cell.lstrip().startswith("%%"):  # Its lines have numbers as here.
            futures = _futures(self._shell.compile.flags)
            first = f"from __future__ import {', '.join(futures)}" if futures else "# %%remote"
            code = f"{first}\n{cell}"
        if not arguments.each:
            return [Task(code, {}, rank) for rank in range(pod.ranks)]
        return [
            Task(code, {"item": item, "index": index}, None, f"{arguments.each}[{index}]")
            for index, item in enumerate(items)
        ]

    def _sent_ahead(self, pod: Ranks, parcel: Parcel, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks of a cell that is to be detached: all that they read is sent or copied, as it is now."""
        tasks = [task._replace(extra=parcel.copied(task.extra)) if task.extra else task for task in tasks]
        FanOut(pod, [Task("", {}, rank) for rank in range(pod.ranks)], parcel=parcel).run(output.Stream(self._shell))
        return tasks

    def _detach(
        self,
        job: Job,
        arguments: Arguments,
        finish: Callable[[list[Mapping[str, Any]]], Any],
        after: Callable[[], None],
    ) -> None:
        if arguments.result:
            self._shell.user_ns[arguments.result] = job
        threading.Thread(target=job.run, args=(finish, after), daemon=True, name="warmcell-detached").start()
        _say(f"Remote cell {job.number} runs on its own. %remote attach, logs, stop or wait {job.number}.")

    def _finish(self, arguments: Arguments, values: list[Mapping[str, Any]]) -> Any:
        """Put what came back where it belongs; the value of the last line, else what `get=` names."""
        single = len(values) == 1 and not arguments.each and arguments.n == 1
        found = {
            name: values[0].get(name) if single else [one.get(name) for one in values]
            for name in (*arguments.get, *((LAST,) if arguments.result else ()))
        }
        result = found.pop(LAST, None)
        self._shell.user_ns.update(found)
        if arguments.result and not arguments.detach:
            self._shell.user_ns[arguments.result] = result
        return result if arguments.result else found or None


def _futures(flags: int) -> list[str]:
    """What cells before have imported from `__future__`, which holds for the whole notebook."""
    features = {name: getattr(__future__, name) for name in __future__.all_feature_names}
    return [name for name, one in features.items() if flags & one.compiler_flag]


def _quiet(cell: str) -> bool:
    """Whether a semicolon at its end says that its value is not to be shown."""
    from IPython.core.displayhook import DisplayHook

    ends: Callable[[str], bool] = DisplayHook.semicolon_at_end_of_expression
    return bool(ends(cell))


def _untold(got: int, total: int) -> None:
    """Whoever goes on meanwhile has another cell by then."""


def _say(text: str) -> None:
    print(text)  # noqa: T201 - it is the cell's output, which its kernel shows soon.
