"""Chromium, driven by playwright, for the tests of what is drawn in browsers; they are skipped where either is missing."""

import contextlib
import shutil

import numpy as np
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def path():
    """That of the system's Chromium."""
    found = next((place for name in NAMES if (place := shutil.which(name))), None)
    return found or pytest.skip("there is no Chromium: apt-get install chromium")


@contextlib.contextmanager
def started():
    """A browser that is running."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives Chromium, is not installed")
    executable = path()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Page:
    """A page with a viewer, which must not write to the console, fail or ask for anything.

    Attributes:
        page: playwright's.
    """

    def __init__(self, browser, file, width=1300, height=900, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.set_default_timeout(15000)
        self.page.goto(file.resolve().as_uri())
        self.page.locator(".matrix canvas").wait_for()

    def _asked(self, url):
        if not url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"asked for {url}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert self.complaints == []

    @property
    def said(self) -> str:
        """What is told of the chosen weight."""
        return self.page.locator(".said").inner_text()

    @property
    def heading(self) -> str:
        return self.page.locator(".one h2").first.inner_text()

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def point(self, row, key, rows, keys):
        """Puts the pointer on a cell of a matrix of so many rows and keys."""
        box = self.page.locator(".matrix canvas").bounding_box()
        self.page.mouse.move(
            box["x"] + (key + 0.5) * box["width"] / keys, box["y"] + (row + 0.5) * box["height"] / rows
        )

    def cells(self, rows, keys):
        """The colour in each cell of a matrix, [rows, keys, red green blue alpha]."""
        return np.array(self.page.evaluate(
            """([rows, keys]) => { const c = document.querySelector(".matrix canvas");
            const all = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            const at = (y, x) => 4 * (Math.floor(y * c.height) * c.width + Math.floor(x * c.width));
            return Array.from({ length: rows }, (_, i) => Array.from({ length: keys }, (_, j) => {
              const n = at((i + 0.2) / rows, (j + 0.2) / keys); return [...all.slice(n, n + 4)]; })); }""",
            [rows, keys],
        ))  # fmt: skip

    def saved(self, label):
        """What a button of the export menu saves: (name of the file, its bytes)."""
        self.page.locator("details.menu summary").click()
        with self.page.expect_download() as download:
            self.page.get_by_text(label, exact=True).click()
        with open(download.value.path(), "rb") as file:
            return download.value.suggested_filename, file.read()
