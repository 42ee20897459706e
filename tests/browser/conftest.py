"""A browser for the tests of this folder; without chromium they are skipped."""

import pytest
from harness import Jupyter, chromium


@pytest.fixture(scope="module")  # its event loop would be in the way of the tests of other modules
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not chromium():
        pytest.skip("there is no chromium: `make setup` installs it as root, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where the servers of a module find their notebooks."
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def jupyter(browser, folder):
    with Jupyter(folder) as server:
        yield server
