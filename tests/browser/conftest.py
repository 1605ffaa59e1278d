"""A Chromium with a profile of its own for each test."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lanes import TOP, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page, ViewportSize

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--no-first-run",
)
TIMEOUT_MS = 60_000
"""For hangs: a page on a busy machine may take its time."""

SIZE: "ViewportSize" = {"width": 1280, "height": 720}
IMAGES = TOP / "docs" / "images"
OUTPUT = TOP / "tests" / "browser" / "output"
REWRITE = os.environ.get("WARMCELL_SCREENSHOTS") == "1"
"""Whether the pictures of the docs are taken anew; else they only go beside the tests."""


@pytest.fixture
def page(tmp_path: Path) -> Iterator["Page"]:
    """An empty page of a browser of its own."""
    with browser(tmp_path / "profile") as opened:
        yield opened


@contextmanager
def browser(profile: Path) -> Iterator["Page"]:
    """An empty page of a browser that ends with this."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium(),
            headless=True,
            viewport=SIZE,
            args=ARGUMENTS,
            device_scale_factor=2 if REWRITE else 1,
        )
        context.set_default_timeout(TIMEOUT_MS)
        yield context.pages[0]
        context.close()


@pytest.fixture
def pictures() -> Path:
    """Where screenshots go."""
    place = IMAGES if REWRITE else OUTPUT
    place.mkdir(parents=True, exist_ok=True)
    return place
