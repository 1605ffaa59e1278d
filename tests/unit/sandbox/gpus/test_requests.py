"""The grammar of GPU requests, and which devices it names."""

import pytest
from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from warmcell.sandbox.errors import InvalidRequestError, UnknownGpuKindError
from warmcell.sandbox.gpus.requests import canonical, memory_bytes, parse, summary, unknown_kind
from warmcell.sandbox.models import GIB, MIB, GpuDevice


def device(name: str, mib: int, index: int = 0) -> GpuDevice:
    return GpuDevice(uuid=f"GPU-{index}", index=index, name=name, memory_total_bytes=mib * MIB)


# Names and sizes as NVML tells them.
T4 = device("Tesla T4", 15109)
L4 = device("L4", 23034)
A10G = device("A10G", 23028)
A100_40 = device("A100-SXM4-40GB", 40960)
A100_80 = device("A100 80GB PCIe", 81920)
H100 = device("H100 80GB HBM3", 81559)
H200 = device("H200", 143771)
RTX = device("GeForce RTX 4090", 24564)
A6000 = device("RTX A6000", 49140)
ADA = device("RTX 6000 Ada Generation", 49140)
ALL = (T4, L4, A10G, A100_40, A100_80, H100, H200, RTX, A6000, ADA)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("A100", {A100_40, A100_80}),
        ("a100-80gb", {A100_80}),
        ("A100-40GB", {A100_40}),
        ("A100-SXM4-40GB", {A100_40}),
        ("A10", set()),
        ("H100:2", {H100}),
        ("H100-80GB", {H100}),
        ("H200-141GB", {H200}),
        ("T4-16GB", {T4}),
        ("Tesla T4", {T4}),
        ("RTX 4090", {RTX}),
        ("rtx4090", {RTX}),
        ("4090", {RTX}),
        ("NVIDIA GeForce RTX 4090", {RTX}),
        ("RTX", {RTX, A6000, ADA}),
        ("RTX-6000", {ADA}),
        ("RTX-A6000", {A6000}),
        ("24GiB", {L4, A10G, RTX, A100_40, A100_80, H100, H200, A6000, ADA}),
        ("80 GB", {A100_80, H100, H200}),
        ("any", set(ALL)),
        (("H100", "T4"), {H100, T4}),
    ],
)
def test_a_request_names_the_devices_that_people_mean(
    request_: str | tuple[str, ...], expected: set[GpuDevice]
) -> None:
    """Short names, sizes as sold and the driver's own names all find the device, and no other one."""
    alternatives = parse(request_).alternatives
    assert {d for d in ALL if any(a.matches(d) for a in alternatives)} == expected


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("a100", "A100"),
        (" A100 : 1 ", "A100"),
        ("h100:2", "H100:2"),
        ("nvidia a100-80gib", "A100-80GB"),
        ("rtx 4090", "RTX-4090"),
        ("ANY", "any"),
        ("any:4", "any:4"),
        ("24 gb", "24GiB"),
        ("512MiB:2", "0.5GiB:2"),
        (["H100"], "H100"),
        (["H100", "a100"], ("H100", "A100")),
        ("H100, a100:2", ("H100", "A100:2")),
        (("A100", "a100:1"), "A100"),
        ("a100 / 2", "A100/2"),
        ("A100-1g.10gb", "A100-1G.10GB"),
    ],
)
def test_one_request_has_one_spelling(request_: str | list[str], expected: str | tuple[str, ...]) -> None:
    """Case, blanks, vendor words and repeated fallbacks do not make another request of it."""
    assert canonical(request_) == expected


@pytest.mark.parametrize(
    "request_",
    [
        *(
            "",
            " ",
            ":",
            ":2",
            "A100:",
            "A100:0",
            "A100:-1",
            "A100:1.5",
            "A100:x",
            "A100/1",
            "A100/17",
            "A100/2:2",
            "A100;H100",
            "A100,",
        ),
        *("A100/", "A100/1", "A100/17", "A100/2:2", "A100:2/2"),
        *("A" * 81, "0GiB", "🚀", "A100\n:2\x00"),
        *([], ["A100", 3], [["A100"]], ["any"] * 17),
    ],
)
def test_nonsense_is_refused_with_the_grammar(request_: object) -> None:
    """What is not in the grammar gives a typed error whose cure shows how to ask."""
    with pytest.raises(InvalidRequestError) as caught:
        parse(request_)  # type: ignore[arg-type]
    assert not isinstance(caught.value, UnknownGpuKindError)
    assert "Ask for" in caught.value.hint or "Write it" in caught.value.hint or "is cut into" in caught.value.hint


@LENGTHS
def test_the_canonical_form_is_its_own_canonical_form(examples: int) -> None:
    """Any text is either refused with the typed error or has a spelling that reads back as itself."""

    def read(text: str) -> None:
        spelled = canonical(text)
        assert canonical(spelled) == spelled
        assert parse(spelled) == parse(text)

    give_anything(
        st.text(max_size=90) | st.from_regex(r"[A-Za-z0-9 .:/-]{1,20}", fullmatch=True),
        read,
        refusals=InvalidRequestError,
        examples=examples,
        sound=["A100", "h100 : 2", "24GiB", "A100/2"],
        broken=["", "A100:", "A" * 5000],
    )


def test_an_unknown_kind_names_the_nearest_and_what_there_is() -> None:
    """A slip of the pen gets the word that was meant and the machine's list."""
    error = unknown_kind(parse("H1OO"), [H100, T4])
    assert error.details["nearest"] == "H100"
    assert 'Did you mean "H100"?' in error.hint
    assert "1 × H100 80GB HBM3 (80 GiB)" in error.hint


def test_an_unknown_kind_far_from_all_has_no_nearest() -> None:
    """No guess is better than a wild one."""
    error = unknown_kind(parse("Voodoo"), [H100])
    assert "nearest" not in error.details
    assert "Did you mean" not in error.hint


def test_without_any_gpu_the_cure_is_the_cpu() -> None:
    """A machine without GPUs says so instead of listing nothing."""
    error = unknown_kind(parse("any"), [])
    assert "no GPU" in error.message
    assert "Choose CPU" in error.hint


def test_the_summary_says_what_is_simulated() -> None:
    """Whatever shows a simulated device says so."""
    made_up = GpuDevice(uuid="GPU-sim-1", index=0, name="A100", memory_total_bytes=80 * GIB, simulated=True)
    assert summary([made_up, H100, H100]) == "1 × A100 (80 GiB, simulated), 2 × H100 80GB HBM3 (80 GiB)"
    assert summary([]) == "no GPU"


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * GIB), ("80 gb", 80 * GIB), ("512MiB", 512 * MIB), ("0.5GB", GIB // 2)]
)
def test_memory_is_read_in_binary_units(text: str, expected: int) -> None:
    """GB means GiB, as it does on the box of a card."""
    assert memory_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "80", "GiB", "-1GiB", "80TB", "1e3GiB", "0MiB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    """A malformed amount gives a typed error with an example."""
    with pytest.raises(InvalidRequestError, match="80GiB"):
        memory_bytes(text)
