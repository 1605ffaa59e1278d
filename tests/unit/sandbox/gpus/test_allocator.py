"""The pure choice of devices."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcell.sandbox.errors import (
    InvalidRequestError,
    NoGpuAvailableError,
    UnknownGpuKindError,
    WarmcellError,
)
from warmcell.sandbox.gpus.allocator import Use, allocate, candidates
from warmcell.sandbox.gpus.requests import parse
from warmcell.sandbox.models import GIB, GpuDevice


def machine(*kinds: tuple[str, int]) -> tuple[GpuDevice, ...]:
    return tuple(
        GpuDevice(uuid=f"GPU-{index}", index=index, name=name, memory_total_bytes=gib * GIB)
        for index, (name, gib) in enumerate(kinds)
    )


MIXED = machine(("H100", 80), ("T4", 16), ("A100-40", 40), ("A100-80", 80), ("A100-40", 40))


def indices(devices: tuple[GpuDevice, ...]) -> list[int]:
    return [device.index for device in devices]


@pytest.mark.parametrize(
    ("request_", "taken", "expected"),
    [
        ("any", (), [1]),
        ("any", (1,), [2]),
        ("24GiB", (), [2]),
        ("48GiB", (), [3]),
        ("A100", (2,), [4]),
        ("A100:2", (), [2, 4]),
        ("A100:2", (2,), [4, 3]),
        ("A100:3", (), [2, 4, 3]),
        ("any:2", (), [2, 4]),
        (("H100", "any"), (), [0]),
        (("H100", "any"), (0,), [1]),
        (("B200", "T4"), (), [1]),
        (("H100:2", "A100:2"), (), [2, 4]),
    ],
)
def test_the_least_that_will_do_is_given(
    request_: str | tuple[str, ...], taken: tuple[int, ...], expected: list[int]
) -> None:
    """Fallbacks in order, then least memory, then one kind for all, then lowest index."""
    held = {f"GPU-{index}": Use("somebody") for index in taken}
    assert sorted(indices(allocate(parse(request_), MIXED, held).devices)) == sorted(expected)


def test_a_kind_that_is_not_there_is_told_apart_from_a_busy_one() -> None:
    """Unknown, impossible and busy are three errors."""
    with pytest.raises(UnknownGpuKindError):
        allocate(parse("B200"), MIXED, {})
    with pytest.raises(InvalidRequestError, match="asks for 4 GPUs, and this machine has 3 such"):
        allocate(parse("A100:4"), MIXED, {})
    with pytest.raises(InvalidRequestError, match="at most 80GiB"):
        allocate(parse("200GiB"), MIXED, {})
    with pytest.raises(NoGpuAvailableError):
        allocate(parse("T4"), MIXED, {"GPU-1": Use("bob")})


def test_a_busy_kind_says_who_has_it() -> None:
    """The error names the holder of each device that would have served, and no other."""
    with pytest.raises(NoGpuAvailableError) as caught:
        allocate(parse("A100:3"), MIXED, {"GPU-2": Use("sandbox abc"), "GPU-0": Use("nobody's business")})
    assert "1 of 3 devices are in use (GPU 2 by sandbox abc)" in caught.value.message
    assert [row["uuid"] for row in caught.value.details["held"]] == ["GPU-2"]
    assert "warmcell ps" in caught.value.hint


def test_candidates_leave_out_a_fallback_that_can_never_be_met() -> None:
    """Devices of an impossible alternative are not looked at."""
    assert indices(candidates(parse(("H100:2", "T4")), MIXED)) == [1]


kinds = st.sampled_from([("T4", 16), ("A100-40", 40), ("A100-80", 80), ("H100", 80)])
machines = st.lists(kinds, max_size=8).map(lambda found: machine(*found))
wishes = st.lists(
    st.tuples(
        st.sampled_from(["any", "A100", "H100", "T4", "A100-80GB", "24GiB", "48GiB", "B200"]),
        st.integers(min_value=1, max_value=4),
    ).map(lambda wish: f"{wish[0]}:{wish[1]}"),
    min_size=1,
    max_size=3,
).map(tuple)


@given(machines, st.lists(st.tuples(wishes, st.booleans()), max_size=20))
def test_no_device_is_ever_given_twice(
    devices: tuple[GpuDevice, ...], steps: list[tuple[tuple[str, ...], bool]]
) -> None:
    """Whatever is asked and given back in whatever order: grants are disjoint, whole and of the kind."""
    grants: list[tuple[GpuDevice, ...]] = []
    for wish, give_back in steps:
        if give_back and grants:
            grants.pop(0)
        taken = {device.uuid: Use("a grant") for grant in grants for device in grant}
        try:
            granted = allocate(parse(wish), devices, taken).devices
        except WarmcellError:
            continue
        assert not {device.uuid for device in granted} & set(taken)
        assert len({device.uuid for device in granted}) == len(granted)
        assert any(
            len(granted) == alternative.count and all(map(alternative.matches, granted))
            for alternative in parse(wish).alternatives
        )
        grants.append(granted)


@given(machines, wishes, st.data())
def test_the_answer_depends_on_the_question_alone(
    devices: tuple[GpuDevice, ...], wish: tuple[str, ...], data: st.DataObject
) -> None:
    """The order in which devices and holders are listed changes nothing."""
    held = data.draw(st.sets(st.sampled_from([d.uuid for d in devices]))) if devices else set()
    shuffled = data.draw(st.permutations(devices))

    def answer(listed: list[GpuDevice], taken: list[str]) -> object:
        try:
            return allocate(parse(wish), listed, dict.fromkeys(taken, Use("x")))
        except WarmcellError as error:
            return type(error)

    assert answer(list(devices), sorted(held)) == answer(shuffled, sorted(held, reverse=True))


@given(machines, wishes, st.data())
def test_busy_is_said_only_if_it_could_be_met(
    devices: tuple[GpuDevice, ...], wish: tuple[str, ...], data: st.DataObject
) -> None:
    """What fails for want of a free device succeeds on the same machine when all is free, and the reverse."""
    held = data.draw(st.sets(st.sampled_from([d.uuid for d in devices]))) if devices else set()
    try:
        allocate(parse(wish), devices, {})
        possible = True
    except InvalidRequestError:
        possible = False
    try:
        allocate(parse(wish), devices, dict.fromkeys(held, Use("x")))
    except NoGpuAvailableError:
        assert possible
    except InvalidRequestError:
        assert not possible
    else:
        assert possible


def joined(*groups: str) -> tuple[GpuDevice, ...]:
    """Eight devices of one kind; those of a group, by index, are joined by NVLink, all others by PCIe."""
    found = machine(*[("A100", 80)] * 8)
    near = {
        (a.index, b.index): 0 if any(str(a.index) in one and str(b.index) in one for one in groups) else 50
        for a in found
        for b in found
        if a is not b
    }
    return tuple(
        dataclasses.replace(a, near={b.uuid: near[a.index, b.index] for b in found if a is not b}) for a in found
    )


@pytest.mark.parametrize(
    ("request_", "taken", "expected"),
    [
        ("A100:2", "", [0, 3]),
        ("A100:2", "0", [1, 2]),
        ("A100:2", "01", [4, 5]),
        ("A100:4", "", [4, 5, 6, 7]),
        ("A100:4", "4", [0, 5, 6, 7]),
        ("A100", "0", [3]),
        ("A100", "03", [1]),
        ("A100", "0123", [4]),
    ],
)
def test_the_nearest_are_given_and_joined_ones_are_left_whole(request_: str, taken: str, expected: list[int]) -> None:
    """Several come from one group that fits; one comes from a group that is broken already, or is the smallest."""
    held = {f"GPU-{index}": Use("somebody") for index in taken}
    assert indices(allocate(parse(request_), joined("03", "12", "4567"), held).devices) == expected


def test_a_share_is_refused_where_none_are_allowed() -> None:
    """And a smaller one than the operator allows."""
    with pytest.raises(InvalidRequestError, match="GPUs are not shared here"):
        allocate(parse("A100-40/2"), MIXED, {})
    with pytest.raises(InvalidRequestError, match="cut into 2 shares at most"):
        allocate(parse("T4/4"), MIXED, {}, most_parts=2)
    assert allocate(parse(["T4/4", "T4"]), MIXED, {}, most_parts=2).parts == 1
