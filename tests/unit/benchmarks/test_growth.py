"""The picture and the table that documents show of a sweep."""

import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

from benchmarks import growth, results

MACHINE = {"cpu": "C", "cores": 2, "memory_gib": 4.0, "linux": "6", "python": "3"}
USED = {"before": 0.5, "resume": 0.2, "first time": 0.9, "again": 0.4}


def sweep() -> dict[str, Any]:
    return {
        "at": "2026-01-02T03:04:05+00:00",
        "machine": {**MACHINE, "packages": {"ipykernel": "7", "torch": "2"}},
        "costs": [{"state_mb": size, **dict.fromkeys(growth.COSTS, size / 1000)} for size in (10, 1000)],
        "left_out": {"8000 MB": "1 GiB of memory are too little"},
        "price": {"mapped": {"read all": USED}, "copied": {"read all": {**USED, "resume": 1.0}}},
    }


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    """Drawing what is stored gives the same bytes, which are a picture with a line and a name for each cost."""
    for name in ("one.svg", "two.svg"):
        growth.draw(sweep(), tmp_path / name)
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    words = [element.text for element in xml.fromstring(drawn).iter() if element.text]
    assert set(growth.COSTS) <= set(words)


def test_the_price_is_told_for_each_kind_of_restore() -> None:
    """One line for each use and kind, then the machine, and what was left out with its reason."""
    lines = growth.price_table(sweep()).splitlines()
    assert lines[2] == "| read all | mapped | 0.50 s | 0.20 s | 0.90 s | 0.40 s |"
    assert lines[3] == "| read all | copied | 0.50 s | 1.00 s | 0.90 s | 0.40 s |"
    assert lines[-1].startswith("2026-01-02, on C, 2 cores")
    assert lines[-1].endswith("Left out: 8000 MB, since 1 GiB of memory are too little.")


def test_documents_show_the_newest_sweep(tmp_path: Path) -> None:
    """Picture and table are those of what is stored."""
    content = growth.newest()
    assert content is not None
    growth.draw(content, tmp_path / "now.svg")
    assert (tmp_path / "now.svg").read_bytes() == growth.IMAGE.read_bytes(), "run: python -m benchmarks --tables"
    assert growth.page(results.PAGE.read_text(), content) == results.PAGE.read_text()
