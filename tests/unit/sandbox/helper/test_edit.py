"""Whether the image of a kernel is made lazy."""

from pathlib import Path

import pytest

from tests.unit.sandbox.helper.made_images import Entry, Process, Vma, memory, write
from warmcell.sandbox.helper import dump, program
from warmcell.sandbox.helper.images import lazy
from warmcell.sandbox.helper.shelf import Shelf

PAGES = 600


@pytest.mark.root
@pytest.mark.parametrize(
    ("accounting", "plain", "lazy_"), [("0", "", True), ("1", "", True), ("2", "", False), ("0", "1", False)]
)
def test_an_image_is_lazy_where_reservations_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounting: str, plain: str, lazy_: bool
) -> None:
    """Not where all memory is accounted for, for then nothing marks what an allocator counts on to be zeros."""
    (tmp_path / "overcommit").write_text(f"{accounting}\n")
    monkeypatch.setattr(dump, "OVERCOMMIT", str(tmp_path / "overcommit"))
    monkeypatch.setenv(program.PLAIN_VARIABLE, plain)
    content = b"".join(number.to_bytes(8, "little") * 512 for number in range(1, PAGES + 1))
    process = Process(7, [Vma(1000, PAGES + 1), Vma(5000, 4, flags=0x122)], [Entry(1000, PAGES, content)])
    process.entries.append(Entry(5000, 1, content[:4096]))
    draft = Shelf(str(tmp_path / "images"), 0).draft("a" * 12)
    try:
        made = write(tmp_path / "made", [process])
        for path in made.iterdir():
            path.rename(Path(draft.path) / path.name)
        before = memory(Path(draft.path), 7)
        assert dump._edit(draft) == lazy_
        assert bool(lazy.page_files(Path(draft.path))) == lazy_
        assert memory(Path(draft.path), 7) == before
    finally:
        draft.close(keep=True)
