"""What watches a folder of a sandbox, as a process on this machine: it bears what comes and goes at once."""

import json
import subprocess
import sys
import threading
from pathlib import Path

from warmcell.sandbox import watcher


def test_directories_that_go_as_they_come_end_no_watch(tmp_path: Path) -> None:
    """Some are gone before they are watched, some before they are listed; what comes after them is told."""
    argv = [sys.executable, "-I", "-S", watcher.__file__, str(tmp_path), "1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        try:
            assert watching.stdout is not None
            assert json.loads(watching.stdout.readline()) == {"started": True}

            def churn() -> None:
                for number in range(2000):
                    made = tmp_path / f"d{number % 7}"
                    (made / "below").mkdir(parents=True)
                    (made / "below").rmdir()
                    made.rmdir()
                (tmp_path / "last").touch()

            making = threading.Thread(target=churn)
            making.start()
            for line in watching.stdout:
                if json.loads(line) == {"kind": "created", "name": "last"}:
                    break
            making.join()
            assert watching.poll() is None
        finally:
            watching.kill()
