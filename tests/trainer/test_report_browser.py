"""The report in a real browser: it shows all there is, asks nobody for anything, and fits a phone."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.trainer.report_folders import make_folders
from trainer.report.__main__ import main

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
UNLOADED = "[...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length"
UNSEEN = (
    "[...document.querySelectorAll('figure svg, img')].filter(each => each.getBoundingClientRect().width < 40).length"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"none of {', '.join(NAMES)} is on the PATH: install chromium")
        pytest.skip(f"none of {', '.join(NAMES)} is on the PATH")
    with sync_playwright() as playwright:
        # No sandbox, for it refuses root; the page is our own, and runs no script.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str], browser: Browser) -> Path:
    """A report of everything, which takes a browser to look at."""
    folders = make_folders(tmp_path_factory.getbasetemp() / "report", json.dumps(models))
    path = tmp_path_factory.mktemp("page") / "report.html"
    given = [*folders.seeds, folders.killed, "--evaluation", folders.evaluation, "--sweep", folders.sweep]
    assert main([*map(str, given), "--out", str(path)]) == 0
    return path


@pytest.mark.redis
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_whole(browser: Browser, report: Path, size: dict[str, int], scheme: str) -> None:
    """Every picture and chart is there, nothing sticks out, nothing is asked for, nobody complains."""
    context = browser.new_context(viewport=size, color_scheme=scheme)
    try:
        page = context.new_page()
        said, asked = listen(page)
        page.goto(report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
        assert page.evaluate("document.images.length") > 20
        assert page.locator("figure svg").count() > 10
        assert page.evaluate(UNLOADED) == 0
        assert page.evaluate(UNSEEN) == 0
        assert page.evaluate(OVERFLOW) == 0
        assert {address for address in asked if not address.startswith("data:")} == {report.as_uri()}
        assert said == []
        ground, ink = (
            page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
        )
        assert (brightness(ground) < brightness(ink)) == (scheme == "dark")
        assert abs(brightness(ground) - brightness(ink)) > 180
    finally:
        context.close()


def listen(page: Page) -> tuple[list[str], list[str]]:
    """What the page's console says, and the addresses that it asks for."""
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    return said, asked


def brightness(colour: str) -> float:
    """Of `rgb(r, g, b)`, from 0 to 255."""
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3
