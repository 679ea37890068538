"""A real browser for tests of pages; where there is none, the test is skipped with the reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox",  # CI runs as root, where Chromium starts only without
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start a headless Chromium: the one named by GLMTUNE_BROWSER, playwright's own, or the system's.

    Yields:
        Playwright's ``Browser``.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.skip("no browser: the package playwright is not installed")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = [
            os.environ.get("GLMTUNE_BROWSER"),
            own if os.path.exists(own) else None,
            *map(shutil.which, NAMES),
        ]
        path = next((each for each in found if each), None)
        if path is None:
            pytest.skip("no browser: neither `playwright install chromium` nor a system's Chromium was found")
        try:
            browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        except Error as error:
            pytest.skip(f"no browser: {path} does not start ({str(error).splitlines()[0]})")
        try:
            yield browser
        finally:
            browser.close()
