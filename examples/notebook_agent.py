"""An agent that works over MCP and leaves a notebook of what it did.

    pip install 'warmcell[mcp]' matplotlib
    python examples/notebook_agent.py [analysis.ipynb]

The official MCP client starts `warmcell mcp` and speaks with it over stdio, as a desktop app or an editor does. Here
the agent is a script; put a model in the place of `script`: it is told what a cell has shown, and gives the next one.
"""

import asyncio
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import nbformat
from mcp import Client, StdioServerParameters
from mcp_types import CallToolResult, ImageContent, TextContent
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

SERVER = StdioServerParameters(command=str(Path(sys.executable).parent / "warmcell"), args=["mcp"])

PICTURE = """
import matplotlib.pyplot as plt
plt.plot(days, celsius)
plt.title(f"mean {mean:.1f} °C")
plt.show()
"""


def script() -> Generator[str, str, None]:
    """Stands in for a model: cells that build on each other, one of which fails and is mended. Empty: the end."""
    yield "import math\ndays = range(365)\ncelsius = [10 - 9 * math.cos(2 * math.pi * day / 365) for day in days]"
    shown = yield "mean = statistics.mean(celsius)\nprint(f'{mean:.1f} on {len(days)} days')"
    if "NameError" in shown:
        yield "import statistics\nmean = statistics.mean(celsius)\nprint(f'{mean:.1f} on {len(days)} days')"
    yield PICTURE.strip()
    yield ""


def said(result: CallToolResult) -> dict[str, Any]:
    """What a tool answers, for programs; what a model reads is in `result.content`."""
    if result.is_error or result.structured_content is None:
        raise RuntimeError("".join(block.text for block in result.content if isinstance(block, TextContent)))
    return result.structured_content


def outputs(result: CallToolResult) -> list[Any]:
    """What a cell has shown, as a notebook has it. The last block only tells how it stands."""
    found = []
    for block in result.content[:-1]:
        if isinstance(block, ImageContent):
            found.append(new_output("display_data", {block.mime_type: block.data}))
        elif isinstance(block, TextContent) and said(result)["status"] == "error" and block is result.content[-2]:
            lines = block.text.removeprefix("[error]\n").rstrip().splitlines()
            name, _, value = lines[-1].partition(": ")
            found.append(new_output("error", ename=name, evalue=value, traceback=lines))
        elif isinstance(block, TextContent):
            found.append(new_output("stream", text=block.text))
    return found


async def main(path: Path) -> None:
    cells, steps, shown = [new_markdown_cell("# A year's temperatures")], script(), ""
    async with Client(SERVER) as client:
        box = said(await client.call_tool("create_sandbox", {"preload": [], "on_timeout": "kill"}))["sandbox_id"]
        try:
            while code := steps.send(shown) if shown else next(steps):
                result = await client.call_tool("run_code", {"sandbox_id": box, "code": code})
                shown = "".join(block.text for block in result.content if isinstance(block, TextContent))
                cells.append(new_code_cell(code, execution_count=len(cells), outputs=outputs(result)))
                print(f"[{len(cells) - 1}] {said(result)['status']}: {code.splitlines()[-1]}")
        finally:
            await client.call_tool("kill_sandbox", {"sandbox_id": box})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    print(f"{path}: {len(cells)} cells")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "analysis.ipynb")))
