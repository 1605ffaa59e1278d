"""Whatever is in a file that people declare an image by: it is an image, or is refused with what to mend."""

from pathlib import Path

from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images.image import Image

WORDS = [
    *("name: a\n", "dependencies:\n", "  - python=3.12\n", "  - pip:\n", "    - six\n", "    - -r more.txt\n"),
    *("channels: ", "[conda-forge]\n", "variables:\n", "  A: 1\n", "2001-99-99", "!!int x", "&a [*a]", "*a", "<<: 1\n"),
    *("? [a]\n: b\n", "six", "six>=1", "six[a]", "; python_version<'3'", " @ https://a.test/x.whl", "--pre\n", "\t"),
    *("-i https://a.test\n", "-r x.txt\n", "[project]\n", "dependencies = [", "'six'", "]\n", "[a.b]\n", "x = 1\n"),
    *("optional-dependencies = {a = ['b']}\n", "\n", " ", "\\\n", "#", "- ", ": ", "{", "}", "[", ",", "\0", "\u2028"),
    *("ä", "\ud800", "9" * 5000, "[" * 5000, "{a: " * 3000),
]
SOUND = {
    "environment.yml": b"dependencies:\n  - python=3.12\n  - pip:\n    - six\nvariables:\n  A: 1\n",
    "requirements.txt": b"six>=1  # a\n--pre\n",
    "pyproject.toml": b"[project]\ndependencies = ['six']\noptional-dependencies = {a = ['b']}\n",
}


def read(name: str, path: Path) -> Image:
    """The image that a file of that name declares."""
    if name == "environment.yml":
        return Image.from_environment(path)
    base = Image.python("3.12")
    if name == "requirements.txt":
        return base.pip_install_from_requirements(path)
    return base.pip_install_from_pyproject(path, optional_dependencies=["a"])


@LENGTHS
def test_any_file_declares_an_image_or_is_refused(examples: int, tmp_path: Path) -> None:
    """And what is declared survives the wire."""

    def take(drawn: tuple[str, bytes]) -> None:
        name, content = drawn
        (tmp_path / name).write_bytes(content)
        image = read(name, tmp_path / name)
        assert Image.from_json(image.to_json()) == image

    texts = st.lists(st.sampled_from(WORDS), max_size=12).map(lambda all: "".join(all).encode(errors="surrogatepass"))
    begun = st.tuples(st.sampled_from(sorted(SOUND.values())), texts).map(b"".join)
    give_anything(
        st.tuples(st.sampled_from(sorted(SOUND)), st.one_of(st.binary(max_size=60), texts, begun)),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        memory_max=64 * 2**20,
        sound=list(SOUND.items()),
        broken=[
            *(("environment.yml", text) for text in (b"[" * 100_000, b"a: 2001-99-99", b"? [a]\n: b\n")),
            ("pyproject.toml", b"a = " + b"[" * 9999),
            ("requirements.txt", b"-r requirements.txt"),
        ],
    )
