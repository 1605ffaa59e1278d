"""The picture and the table that documents show of cells and values on several ranks."""

import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

from benchmarks import results, spread

MACHINE = {"cpu": "C", "cores": 2, "memory_gib": 4.0, "linux": "6", "python": "3"}


def measured() -> dict[str, Any]:
    return {
        "at": "2026-01-02T03:04:05+00:00",
        "machine": {**MACHINE, "packages": {"ipykernel": "7", "torch": "2"}},
        "costs": [
            {"ranks": ranks, "bytes": size, "n": 1, "remote_s": [0.01], "ipyparallel_s": [0.02 * ranks]}
            for ranks in spread.RANKS
            for size in (0, 1000, 10**9)
            if (ranks, size) != (8, 10**9)
        ],
        "left_out": {"1 GB to 8": "4 GiB of memory are too little"},
    }


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    """Drawing what is stored gives the same bytes, which are a picture with a line for each number of ranks."""
    for name in ("one.svg", "two.svg"):
        spread.draw(measured(), tmp_path / name)
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    words = [element.text for element in xml.fromstring(drawn).iter() if element.text]
    assert {"%%remote", "ipyparallel push", "1 rank", "8 ranks"} <= set(words)


def test_each_size_is_told_for_each_number_of_ranks() -> None:
    """Both times and their ratio; what was left out, and why."""
    lines = spread.table(measured()).splitlines()
    assert lines[0] == "| | 1 rank | 2 ranks | 4 ranks | 8 ranks |"
    assert lines[2].startswith("| `pass` | 10 ms / 20 ms (0.50×) | 10 ms / 40 ms (0.25×) |")
    assert lines[4].startswith("| 1 GB |")
    assert lines[4].endswith(" – |")
    assert lines[-1].startswith("Medians of `%%remote` / ipyparallel (ratio); 2026-01-02, on C, 2 cores")
    assert lines[-1].endswith("Left out: 1 GB to 8, since 4 GiB of memory are too little.")


def test_documents_show_the_newest(tmp_path: Path) -> None:
    """Picture and table are those of what is stored."""
    content = spread.newest()
    assert content is not None
    spread.draw(content, tmp_path / "now.svg")
    assert (tmp_path / "now.svg").read_bytes() == spread.IMAGE.read_bytes(), "run: python -m benchmarks --tables"
    assert spread.page(results.PAGE.read_text(), content) == results.PAGE.read_text()
