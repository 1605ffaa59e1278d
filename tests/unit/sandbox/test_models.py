"""The wire forms of the engine's nouns."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import (
    ErrorInfo,
    GpuDevice,
    Limits,
    LimitStatus,
    Mount,
    Phase,
    SandboxId,
    SandboxInfo,
    SandboxSpec,
    TemplateStatus,
    Workspace,
)

TEXT = st.text(max_size=8)
SPECS = st.builds(
    SandboxSpec,
    python=TEXT,
    workspace=st.none() | st.builds(Workspace, path=TEXT, mode=st.sampled_from(["rw", "ro", "none"])),
    network=st.sampled_from(["none", "host"]),
    mounts=st.lists(st.builds(Mount, source=TEXT, target=TEXT, mode=st.sampled_from(["ro", "rw"]))).map(tuple),
    env=st.dictionaries(TEXT, TEXT, max_size=3),
    limits=st.builds(Limits, memory_bytes=st.none() | st.integers(0), cpus=st.none() | st.floats(0, 64)),
    gpu=st.none() | TEXT | st.lists(TEXT, max_size=3).map(tuple),
    preload=st.lists(TEXT, max_size=3).map(tuple),
)


@given(SPECS)
def test_a_spec_survives_the_wire(spec: SandboxSpec) -> None:
    """Through JSON and back it is the same spec."""
    assert SandboxSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_an_info_survives_the_wire() -> None:
    """Nested forms, enums and mappings come back as what they were."""
    info = SandboxInfo(
        id=SandboxId("abc"),
        state=State.FAILED,
        backend="bubblewrap",
        isolated=True,
        owner="notebook",
        gpus=(GpuDevice(uuid="GPU-1", index=0, name="A100", memory_total_bytes=1),),
        limits={"memory": LimitStatus(value=1.0, enforced=False, why="no cgroup")},
        template=TemplateStatus(name="default", state="ready", failed={"x": "ImportError"}),
        phase=Phase(name="guest", since=1.5),
        error=ErrorInfo(code="sandbox_died", message="m", details={"exit_code": 137}),
    )
    assert SandboxInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "lacks 'python'"),
        ({"python": 3}, "python must be str, not int"),
        ({"python": "/p", "pyhton": "/p"}, "no field 'pyhton'"),
        ({"python": "/p", "network": "lan"}, "'lan' is not one of 'none', 'host'"),
        ({"python": "/p", "limits": {"memory_bytes": "8GiB"}}, "limits.memory_bytes must be int, not str"),
        ({"python": "/p", "limits": {"pids": True}}, "limits.pids must be int, not bool"),
        ({"python": "/p", "preload": "torch"}, "preload must be a list, not str"),
        ({"python": "/p", "mounts": [{"source": 1}]}, "mounts[0].source must be str, not int"),
        ({"python": "/p", "env": []}, "env must be an object, not list"),
        ({"python": "/p", "workspace": "/w"}, "workspace must be an object, not str"),
    ],
)
def test_a_malformed_spec_names_the_place_and_the_cure(data: dict[str, object], says: str) -> None:
    """One error, with where it is wrong and what to give instead."""
    with pytest.raises(InvalidRequestError) as caught:
        SandboxSpec.from_json(data)
    assert says in caught.value.message
    assert caught.value.hint


def test_shape_ignores_what_a_kernel_is_given_and_sees_what_is_fixed() -> None:
    """Prepared sandboxes serve another environment or a simulated GPU, but no other mounts or devices."""
    spec = SandboxSpec(python="/p", workspace=Workspace(path="/w"))
    simulated = GpuDevice(uuid="s", index=0, name="A100", memory_total_bytes=1, simulated=True)
    real = dataclasses.replace(simulated, simulated=False, device_nodes=("/dev/nvidia0",))
    assert dataclasses.replace(spec, env={"A": "1"}).shape() == spec.shape()
    assert dataclasses.replace(spec, gpu="A100").shape((simulated,)) == spec.shape()
    assert spec.shape((real,)) != spec.shape()
    assert dataclasses.replace(spec, workspace=Workspace(path="/v")).shape() != spec.shape()
    assert dataclasses.replace(spec, network="host").shape() != spec.shape()
