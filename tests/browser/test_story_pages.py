"""A story on a page without a kernel: it moves by mouse and keys, and says so where there is no network."""

import pytest
import torch
from harness import Page, opened
from plotly.offline import get_plotlyjs

import libortho as lo
from libortho.stories import Story, ruler_story
from libortho.weights import dissect, ruler

PAGE = (
    "<!doctype html><html><head><meta charset=utf-8><meta name=color-scheme content='light dark'></head><body>{}</body>"
)


class Plain(Page):
    "A page of HTML, with or without the network on which plotly's program is."

    def __init__(self, browser, text, theme, network):
        super().__init__(browser, theme)
        # a cross-origin script: it is taken only with this header, and if its digest is the one in the page
        if network:
            answer = {
                "body": get_plotlyjs(),
                "content_type": "text/javascript; charset=utf-8",
                "headers": {"Access-Control-Allow-Origin": "*"},
            }
            self.context.route("https://cdn.plot.ly/**", lambda route: route.fulfill(**answer))
        self.context.route("http://127.0.0.1:1/", lambda route: route.fulfill(body=text, content_type="text/html"))
        self.page.goto("http://127.0.0.1:1/")


@pytest.fixture(scope="module")
def html():
    torch.manual_seed(0)
    w = torch.randn(64, 256)
    ratios, scale = (2.0, 3.5, 5.5, 7.0), {"group_size": "row", "scale": "ratio", "density": 0.02}
    rulers = {f"{r:g}": ruler(dissect(w, lo.OrthoConfig(scale_args={"r": r}, **scale))) for r in ratios}
    return PAGE.format(Story(ruler_story(rulers, "ratio R", "3.5"), "a layer under its ratio")._repr_html_() * 2)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_story_moves_without_a_kernel(browser, html, theme):
    with opened(Plain, browser, html, theme, True) as page:
        box = page.page.get_by_role("figure", name="a layer under its ratio").first
        bars, said = box.locator(".barlayer .trace").first, box.locator(".slider-label")
        bars.wait_for(state="attached")
        page.until(lambda: "ratio R: 3.5" in said.first.text_content(), "the slider does not say where it is")
        before = bars.inner_html()
        box.focus()
        box.press("ArrowRight")
        page.until(lambda: "ratio R: 5.5" in said.first.text_content(), "an arrow key does not move it")
        page.until(lambda: bars.inner_html() != before, "the bars are the same")
        box.press("ArrowLeft")
        page.until(lambda: bars.inner_html() == before, "it does not lead back")
        assert (
            "ratio R: 3.5" in page.page.locator(".lo-story").last.locator(".slider-label").first.text_content()
        )  # the other one
        rail = box.locator(".slider-rail-touch-rect").bounding_box()
        page.page.mouse.click(rail["x"] + rail["width"] - 3, rail["y"] + rail["height"] / 2)
        page.until(lambda: "ratio R: 7" in said.first.text_content(), "the mouse does not move it")
        page.page.mouse.move(0, 0)
        text = box.locator(".gtitle").evaluate("text => getComputedStyle(text).fill")
        assert text == page.page.evaluate("getComputedStyle(document.body).color")
        page.shoot("story", box)
        assert page.look() == []


def test_without_a_network_it_says_so(browser, html):
    with opened(Plain, browser, html, "light", False) as page:
        page.page.get_by_text("its program comes from https://cdn.plot.ly/plotly-").first.wait_for()
