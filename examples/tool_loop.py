"""A tool loop: a model asks for tools, they run in a throwaway sandbox, and what they say goes back to the model.

    python examples/tool_loop.py

Messages and calls have the shape of OpenAI's chat completions, which most servers of models speak. Here the model is a
script, so that this runs anywhere; put yours in its place: a function that takes the messages and gives the next, as
`client.chat.completions.create(messages=messages, tools=TOOLS, …).choices[0].message.model_dump()` does.
"""

import inspect
import json
from collections.abc import Callable, Generator
from typing import Any

from warmcell import Sandbox
from warmcell.sandbox.errors import WarmcellError

Message = dict[str, Any]
ANSWER_MAX = 4000  # characters; a model need not read a megabyte


def run_python(box: Sandbox, code: str) -> str:
    """Run Python, as in a notebook's cell: variables stay, and the value of the last line is shown."""
    done = box.run(code, timeout=60)
    return "\n".join(str(part) for part in (done.stdout, done.stderr, done.error, done.text) if part)


def run_shell(box: Sandbox, command: str) -> str:
    """Run a line in the shell."""
    done = box.exec("sh", "-c", command, timeout=60)
    return f"{done.stdout}{done.stderr}(exit code {done.exit_code})"


def write_file(box: Sandbox, path: str, text: str) -> str:
    """Write a text file."""
    return f"{box.files.write(path, text).size_bytes} bytes"


def described(tool: Callable[..., str]) -> dict[str, Any]:
    """A tool as a model is told of it; all arguments are text."""
    names = list(inspect.signature(tool).parameters)[1:]
    takes = {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}
    return {"type": "function", "function": {"name": tool.__name__, "description": tool.__doc__, "parameters": takes}}


FUNCTIONS: dict[str, Callable[..., str]] = {tool.__name__: tool for tool in (run_python, run_shell, write_file)}
TOOLS = [described(tool) for tool in FUNCTIONS.values()]


def answer(box: Sandbox, name: str, arguments: str) -> str:
    """What a call comes to. Mistakes go back to the model, which mends them more often than not."""
    try:
        said = FUNCTIONS[name](box, **json.loads(arguments))
    except (KeyError, ValueError, TypeError, WarmcellError) as error:
        said = f"{type(error).__name__}: {error}"
    return said if len(said) <= ANSWER_MAX else f"{said[:ANSWER_MAX]}\n({len(said) - ANSWER_MAX} characters more)"


def work(model: Callable[[list[Message]], Message], task: str, box: Sandbox, turns: int = 20) -> str:
    """Ask, do, tell, until the model asks for nothing more."""
    messages: list[Message] = [{"role": "user", "content": task}]
    for _ in range(turns):
        messages.append(asked := model(messages))
        if not asked.get("tool_calls"):
            return str(asked["content"])
        for call in asked["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            said = answer(box, name, arguments)
            print(f"{name} {arguments}\n  -> {said[-120:]!r}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": said})
    raise RuntimeError(f"no answer after {turns} turns")


def script() -> Generator[Message, str, None]:
    """Stands in for a model: it gets a column's name wrong, reads the error, mends it, and answers with what it saw."""

    def call(name: str, **arguments: str) -> Message:
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"role": "assistant", "tool_calls": [{"id": f"call_{name}", "type": "function", "function": function}]}

    yield call("write_file", path="sales.csv", text="month,euros\nMay,310\nJune,420\nJuly,365\n")
    yield call("run_python", code="import csv\nrows = list(csv.DictReader(open('sales.csv')))\nlen(rows)")
    said = yield call("run_python", code="max(rows, key=lambda row: int(row['price']))['month']")
    if "KeyError" in said:
        said = yield call("run_python", code="max(rows, key=lambda row: int(row['euros']))['month']")
    best = said.strip("'\n")
    said = yield call("run_shell", command=f"grep {best} sales.csv")
    yield {
        "role": "assistant",
        "content": f"The best month was {best}, with {said.split()[0].partition(',')[2]} euros.",
    }


def main() -> None:
    steps = script()

    def model(messages: list[Message]) -> Message:
        return next(steps) if len(messages) == 1 else steps.send(messages[-1]["content"])

    with Sandbox(preload=(), timeout=300, tags={"example": "tool_loop"}) as box:
        print(work(model, "Which month sold best?", box))


if __name__ == "__main__":
    main()
