"""Whether what a page shows can be used by everybody, as far as axe can tell."""

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page


def assert_accessible(page: Page, *selectors: str) -> None:
    """No rule of axe is broken in what these selectors match; each must match something."""
    page.evaluate(Axe().axe_script)
    found = page.evaluate("include => axe.run({include}, {resultTypes: ['violations']})", [[one] for one in selectors])
    told = [
        f"{rule['id']}: {rule['help']}: {node['html']} ({node['failureSummary']})"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]
    assert not told, "\n".join(told)
