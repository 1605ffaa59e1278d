"""A real JupyterLab with directories of its own, as `make lab` starts it."""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from benchmarks.server import end_keeper
from tests.lanes import TOP
from tests.leaks import Places

START_TIMEOUT_S = 120.0
WARM_TIMEOUT_S = 180.0
CONNECT_RETRIES = 6
"""With pauses that double, half a second to begin with."""
END_TIMEOUT_S = 120.0

BUILT = TOP / "src" / "warmcell" / "labextension"
QUIET = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
"""Settings of JupyterLab under which it looks for nothing on the internet."""
OWN_FIRST = {"JUPYTER_PREFER_ENV_PATH": "0"}
"""Else Jupyter takes the labextension that was installed last, not the one of this tree."""
FOREIGN = {"ipyparallel-labextension": True}
"""Labextensions that only the tests' environment has."""


@dataclass
class Lab:
    """JupyterLab with the labextension as it was last built; kernels and keeper end with it."""

    places: Places
    settings: Mapping[str, object] = field(default_factory=dict)
    """What `c.Warmcell` is set to."""
    env: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Start it and wait until it listens."""
        self.folder = self.places.root / "notebooks"
        self.folder.mkdir()
        self._configure()
        self.token = secrets.token_hex(16)
        self._said: deque[str] = deque(maxlen=60)
        self.url = ""
        self.start()
        return self

    def start(self) -> None:
        """Start it, again at the address where it was, and wait until it listens."""
        self._process = subprocess.Popen(
            self._argv(),
            env={**os.environ, **OWN_FIRST, **self.places.env, **self.env, "JUPYTER_TOKEN": self.token},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            text=True,
            start_new_session=True,
        )
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._listens.wait(START_TIMEOUT_S) or not self.url:
            said = "\n".join(self._said)
            self.__exit__()
            raise RuntimeError(f"JupyterLab did not start:\n{said}")
        # It says its address a moment before it listens there.
        with httpx.Client(transport=httpx.HTTPTransport(retries=CONNECT_RETRIES)) as client:
            client.get(f"{self.url}/api")

    def end(self, signum: int) -> None:
        """Send it a signal of which it ends, and wait for that; its keeper is not told."""
        self._process.send_signal(signum)
        self._process.wait(END_TIMEOUT_S)
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def sessions(self) -> dict[str, tuple[str, str]]:
        """Session and kernel of each open notebook, by the notebook's name."""
        answer = httpx.get(f"{self.url}/api/sessions", headers=self._headers)
        return {one["path"]: (one["id"], one["kernel"]["id"]) for one in answer.json()}

    def states(self) -> dict[str, str]:
        """State of the sandbox of each kernel, by the kernel's id."""
        answer = httpx.get(f"{self.url}/warmcell/api/v1/sandboxes", headers=self._headers)
        return {one["kernel_id"]: one["state"] for one in answer.json()["sandboxes"]}

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"}

    def __exit__(self, kind: object = None, *_: object) -> None:
        """End it, its kernels and its keeper; after a failure its last words go into the test's report."""
        if kind is not None:
            sys.stderr.write("\n".join(["JupyterLab said:", *self._said, ""]))
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        end_keeper(self.places)

    def page(self, path: str) -> str:
        """The address at which JupyterLab opens a notebook, in a workspace of its own."""
        return f"{self.url}/lab/tree/{path}?token={self.token}&reset"

    def notebook(
        self,
        name: str,
        *cells: str,
        kernel: str = "warmcell",
        display_name: str = "Python 3 (Warmcell)",
        choice: Mapping[str, object] | None = None,
    ) -> Path:
        """Write a notebook of these cells that remembers a choice."""
        made = {
            "cells": [
                {
                    "cell_type": "code",
                    "id": f"c{n}",
                    "metadata": {},
                    "execution_count": None,
                    "outputs": [],
                    "source": c,
                }
                for n, c in enumerate(cells)
            ],
            "metadata": {
                "kernelspec": {"name": kernel, "display_name": display_name, "language": "python"},
                **({} if choice is None else {"warmcell": dict(choice)}),
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        path = self.folder / name
        path.write_text(json.dumps(made))
        return path

    def kernelspec(self, name: str, display_name: str, config: Mapping[str, object]) -> None:
        """Install a kernelspec of ours with settings of its own."""
        spec = json.loads((TOP / "kernel_provisioner" / "kernelspec" / "kernel.json").read_text())
        spec["display_name"] = display_name
        spec["metadata"]["kernel_provisioner"]["config"] = dict(config)
        directory = Path(self.places.env["JUPYTER_DATA_DIR"]) / "kernels" / name
        directory.mkdir(parents=True)
        (directory / "kernel.json").write_text(json.dumps(spec))

    def choose(self, plugin: str, settings: Mapping[str, object]) -> None:
        """Set user settings of a JupyterLab plugin, such as `@jupyterlab/apputils-extension:themes`."""
        config = Path(self.places.env["JUPYTER_CONFIG_DIR"])
        path = config / "lab" / "user-settings" / f"{plugin.replace(':', '/')}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(settings)))

    def wait_warm(self) -> None:
        """Wait until the template of some kernel's sandbox has imported all that it is to import."""
        self._wait(_is_warm)

    def wait_prepared(self) -> None:
        """Wait until a sandbox waits for the next kernel."""
        self._wait(_is_prepared)

    def _wait(self, enough: Callable[[dict[str, Any]], bool]) -> None:
        """Read the events until one of them is enough."""
        with httpx.stream(
            "GET", f"{self.url}/warmcell/api/v1/events", headers=self._headers, timeout=WARM_TIMEOUT_S
        ) as events:
            for line in events.iter_lines():
                if line.startswith("data: ") and enough(json.loads(line.removeprefix("data: "))):
                    return
        raise RuntimeError("the events ended before that")

    def _configure(self) -> None:
        config = Path(self.places.env["JUPYTER_CONFIG_DIR"])
        config.mkdir(parents=True)
        values = {"keeper_idle_s": 1.0, **self.settings}
        lines = [f"c.Warmcell.{name} = {value!r}" for name, value in values.items()]
        (config / "jupyter_warmcell_config.py").write_text("\n".join(lines) + "\n")
        (config / "labconfig").mkdir()
        (config / "labconfig" / "page_config.json").write_text(json.dumps({"disabledExtensions": FOREIGN}))
        for plugin, settings in QUIET.items():
            self.choose(plugin, settings)
        # The build of this tree, whatever copy of it the environment has.
        extensions = Path(self.places.env["JUPYTER_DATA_DIR"]) / "labextensions" / "@warmcell"
        extensions.mkdir(parents=True)
        (extensions / "labextension").symlink_to(BUILT)

    def _argv(self) -> list[str]:
        root = ["--allow-root"] if os.getuid() == 0 else []
        return [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", *root),
            *("--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={self.folder}"),
            *(f"--ServerApp.port={self.url.rpartition(':')[2] or 0}", "--ServerApp.port_retries=0"),
        ]

    def _read(self) -> None:
        """Keep the server's last words; the first URL in them is where it listens."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.rstrip())
            found = re.search(r"(http://127\.0\.0\.1:\d+)/", line)
            if found:
                self.url = found[1]
                self._listens.set()
        self._listens.set()


def _is_warm(told: dict[str, Any]) -> bool:
    return any((box.get("template") or {}).get("state") == "ready" for box in told.get("sandboxes", [told]))


def _is_prepared(told: dict[str, Any]) -> bool:
    """Changes of a template are told of sandboxes that wait; the hello counts those."""
    waiting = any(template["prepared"] for template in told.get("templates", []))
    return waiting or told.get("status", {}).get("state") == "ready"
