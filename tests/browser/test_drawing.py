"""The page of trainer.serve, as somebody uses it who draws, types or brings files; with a model that has seen all of MNIST."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import browser, keep, page
from conftest import ROOT, arguments
from PIL import Image
from playwright.sync_api import Page

from trainer import dataset

pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where trainer.serve shows a model of the preset `fast`."""
    model_dir = tmp_path_factory.mktemp("reader") / "run"
    options = {"preset": "fast", "report": False, "model_dir": model_dir}
    subprocess.run([sys.executable, "-m", "trainer.task", *arguments(options)], cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "-m", "trainer.serve", f"--model_dir={model_dir}", "--port=0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found
        yield found[0]
        process.terminate()
        assert process.wait(30) == 0


def opened(page: Page, address: str) -> Page:
    page.goto(address)
    page.wait_for_selector("body[data-state=ready]")
    return page


def answer(page: Page) -> str:
    page.wait_for_selector('#answer[data-final="true"][data-state=answered]')
    found = page.locator("#answer").get_attribute("data-class")
    assert found is not None
    assert page.locator("#label").inner_text() == found
    return found


def draw(page: Page, strokes: list[list[tuple[float, float]]]) -> None:
    """Draws with the mouse; points are shares of the canvas."""
    box = page.locator("#canvas").bounding_box()
    assert box
    for stroke in strokes:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=3)
        page.mouse.up()


def arc(x: float, y: float, radius: float, start: float, end: float) -> list[tuple[float, float]]:
    """A part of a circle, in degrees clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 15))
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


THREE = [arc(0.48, 0.34, 0.15, -160, 90) + arc(0.48, 0.65, 0.17, -90, 150)]


def test_drawn_3_is_read_as_3(page: Page, address: str) -> None:
    opened(page, address)
    draw(page, THREE)
    assert answer(page) == "3"
    assert page.locator("#bars > li").count() == 10
    assert page.locator("#bars > li.best").get_attribute("data-class") == "3"
    assert page.locator("#seen").evaluate("picture => [picture.naturalWidth, picture.naturalHeight]") == [28, 28]
    keep(page, "serve")
    page.locator("#clear").click()
    page.wait_for_selector("#answer[data-state=empty]")


def test_strokes_are_added_and_taken_back(page: Page, address: str) -> None:
    opened(page, address)
    draw(page, [[(0.5, 0.2), (0.5, 0.8)]])
    assert answer(page) == "1"
    draw(page, [arc(0.65, 0.5, 0.2, 0, 360)])
    page.wait_for_selector('#answer[data-final="true"]:not([data-class="1"])')
    page.keyboard.press("Control+z")
    page.wait_for_selector('#answer[data-final="true"][data-class="1"]')


def test_everything_is_done_by_keyboard(page: Page, address: str) -> None:
    opened(page, address)
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.id") != "canvas":
        assert page.evaluate("document.activeElement.tagName") != "BODY", "Tab never comes to the drawing area"
        page.keyboard.press("Tab")
    for _ in range(8):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    for _ in range(16):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert answer(page) == "1"
    assert "1" in page.locator("#status").inner_text()
    page.keyboard.press("c")
    page.wait_for_selector("#answer[data-state=empty]")


def test_files_are_read_in_a_batch(page: Page, address: str, tmp_path: Path) -> None:
    test_set: Any = dataset.load("").test
    paths = []
    for digit in range(4):
        # The most usual one, which no model takes for another: the first 3 in the file is half an 8.
        images = test_set.images[test_set.labels == digit, ..., 0].astype(np.float32)
        usual = np.argmin(((images - images.mean(axis=0)) ** 2).sum(axis=(1, 2)))
        paths.append(tmp_path / f"digit {digit}.png")
        Image.fromarray(images[usual].astype(np.uint8)).resize((140, 140)).save(paths[-1])
    opened(page, address)
    page.locator("#upload").set_input_files(paths)
    page.locator("#rows > tr").nth(3).wait_for()
    assert page.locator("#rows td.file").all_inner_texts() == [path.name for path in paths]
    assert [text.split()[0] for text in page.locator("#rows button.class").all_inner_texts()] == ["0", "1", "2", "3"]


def test_page_fits_a_phone_in_the_dark(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True)
    phone = opened(context.new_page(), address)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    box = phone.locator("#canvas").bounding_box()
    assert box
    phone.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    answer(phone)
    keep(phone, "serve-phone")
    context.close()
