"""Fixtures: a browser without a display, and pages in it whose errors fail the test.

Needs Chromium or Chrome on this machine. DIGITFLEET_SCREENSHOTS=FOLDER keeps what was seen.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

# Nothing of the browser's own may ask the network for anything.
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
SIZE = {"width": 1280, "height": 860}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of one module: each that imports it has its own, and Playwright allows one at a time."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "no browser: install Chromium (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose errors fail the test."""
    errors: list[str] = []
    page = browser.new_page(viewport=SIZE)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("requestfailed", lambda request: errors.append(f"{request.url}: {request.failure}"))
    yield page
    page.close()
    assert not errors


def keep(page: Page, name: str) -> None:
    if folder := os.environ.get("DIGITFLEET_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")
