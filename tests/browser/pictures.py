"""Takes the pictures of the labs that README and tutorials show: `make pictures` writes nbs/images/NAME.png."""

import shutil
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Jupyter, Notebook, chromium, opened
from labs import change_ratio, lab, move_gap, switch_off_and_on
from PIL import Image
from playwright.sync_api import sync_playwright

COLOURS = 128  # a palette; a photograph would need more


def compact(source, target):
    "Write a picture with a palette."
    Image.open(source).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB")


def main():
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for name in ("tutorials", "images"):
            shutil.copytree(ROOT / "nbs" / name, Path(folder) / name)
        with Jupyter(folder) as server, opened(Notebook, browser, server, "tutorials/02_dashboards.ipynb") as page:
            page.run_all(600)
            switch_off_and_on(page, "alphalab")
            change_ratio(page, "latticelab")
            move_gap(page, "gaplab")
            for title in ("AlphaLab", "LatticeLab", "GapLab"):
                at_rest = lab(page, title).get_by_role("button", name="Stop")  # shown while there is work
                page.until(lambda button=at_rest: not button.is_visible(), f"{title} still works", 600)
            page.slider("person-7-0").press("Home")
            lab(page, "AlphaLab").locator(".lo-chip-false").wait_for()
            page.page.evaluate("document.activeElement.blur()")
            for title in ("AlphaLab", "LatticeLab", "GapLab"):
                lab(page, title).scroll_into_view_if_needed()
                compact(page.shoot(title.lower(), lab(page, title)), ROOT / "nbs" / "images" / f"{title.lower()}.png")
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
