"""The pages that people look at after training, in a real browser: TensorBoard's, and the report."""

from pathlib import Path

import pytest
from chromium import SIZE, browser, keep, page
from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


def test_time_series_show_learning_first(page: Page, tensorboard: str) -> None:
    page.goto(f"{tensorboard}/#timeseries")
    groups = page.locator("metrics-card-groups .group-title")
    groups.get_by_text("loss", exact=True).wait_for()
    titles = [title.strip() for title in groups.all_text_contents()]
    assert titles[:3] == ["accuracy", "loss", "optimizer"], titles
    # Training, validation and test are lines of one chart.
    card = page.locator("scalar-card").first
    for split in ("train", "validation", "test"):
        card.get_by_text(f"run/tensorboard/{split}").first.wait_for()
    keep(page, "tensorboard-time-series")


def test_pictures_are_drawn(page: Page, tensorboard: str) -> None:
    page.goto(f"{tensorboard}/#images")
    picture = page.locator("tf-image-loader img").first
    picture.wait_for()
    page.wait_for_function("picture => picture.complete && picture.naturalWidth > 300", arg=picture.element_handle())
    assert page.locator("tf-image-loader").count() >= 3
    keep(page, "tensorboard-images")


def test_runs_are_compared_by_their_options(page: Page, tensorboard: str) -> None:
    page.goto(f"{tensorboard}/#hparams")
    page.get_by_text("test.accuracy").first.wait_for()
    page.get_by_text("learning_rate").first.wait_for()
    keep(page, "tensorboard-hparams")


def test_custom_scalars_open(page: Page, tensorboard: str) -> None:
    page.goto(f"{tensorboard}/#custom_scalars")
    page.get_by_text("where a step's time goes, ms").first.wait_for()


def test_features_of_the_test_set_are_points_in_space(page: Page, tensorboard: str) -> None:
    page.goto(f"{tensorboard}/#projector")
    frame = page.frame_locator("iframe").frame_locator("iframe")
    frame.locator(".numDataPoints", has_text="203").wait_for()
    frame.locator(".dim", has_text="128").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_opens_without_a_network(browser: Browser, finished: Path, scheme: str) -> None:
    context = browser.new_context(offline=True, viewport=SIZE, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(str(error)))
    page.on("console", lambda message: asked.append(message.text))
    page.goto((finished / "report.html").as_uri())
    assert page.locator("h1").inner_text() == "run"
    assert page.locator("figure svg").count() == 9
    # All that was fetched is the page itself and what it carries.
    assert [address for address in asked if not address.startswith("data:")] == [(finished / "report.html").as_uri()]
    # Text is legible in both: the colour of letters in pictures is the page's.
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = [sum(map(int, colour[4:-1].split(","))) / 765 for colour in (ink, ground)]
    assert abs(light[0] - light[1]) > 0.6, (ink, ground)
    keep(page, f"report-{scheme}")
    context.close()
