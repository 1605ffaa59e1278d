"""What a page is told when a kernel cannot be launched."""

import json
from collections.abc import AsyncIterator

import pytest

from benchmarks.server import JupyterServer
from tests.leaks import Places

pytestmark = pytest.mark.bubblewrap


@pytest.fixture
async def server(places: Places) -> AsyncIterator[JupyterServer]:
    async with JupyterServer(places, settings={"prepared": 0}) as running:
        yield running


async def test_a_session_that_cannot_start_says_why_and_the_cure(server: JupyterServer) -> None:
    """`POST /api/sessions` answers with our sentence and its cure, not with "unhandled error", and keeps nothing."""
    notebook = server.root / "a.ipynb"
    notebook.write_text(json.dumps({"metadata": {"warmcell": {"memory": "1KiB"}}, "cells": [], "nbformat": 4}))
    body = {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "warmcell"}}
    answer = await server.http.post("/api/sessions", json=body)
    assert answer.status_code == 500
    assert "too few for a kernel" in answer.json()["message"]
    assert "Ask for at least" in answer.json()["message"]
    assert (await server.http.get("/api/kernels")).json() == []
    assert (await server.http.get("/api/sessions")).json() == []
