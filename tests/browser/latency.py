"""Times the labs in a real browser: `make bench-browser` writes reports/browser/latency.json.

From the key to the frame that shows the change, measured in the page; each lab alone, with nothing in the background.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from harness import PICTURES, ROOT, Jupyter, Notebook, chromium, opened, write_notebook
from labs import SAID, SWITCH
from playwright.sync_api import sync_playwright

KEYS = 15
LATTICE = """
import torch
from libortho.latticelab import lattice_lab
import libortho as lo
torch.manual_seed(0)
layer = torch.nn.Linear(5632, 2048)
lattice_lab(torch.nn.Sequential(layer), lo.OrthoConfig(group_size="row", scale="ratio", density=0.01))
"""
# name: notebook or cell, slider (or the last one), what changes, how, keys (one change each), aim in milliseconds
LABS = {
    "AlphaLab: 20 tokens": ("AlphaLab", SWITCH, SAID, "textContent", ("Home", "End"), 1500),
    "LatticeLab: 2048 × 5632": (LATTICE, "ratio", ".lo-lab .barlayer", "innerHTML", ("ArrowLeft", "ArrowRight"), 300),
    "GapLab: cached": ("GapLab", "", ".widget-html-content:has(.lo-position)", "textContent", ("End", "Home"), 300),
}


def measure(browser, server, folder, source, label, selector, what, keys):
    "Milliseconds of each key."
    if "\n" in source:
        path = write_notebook(folder / "latency.ipynb", source.strip())
    else:
        path = Path(folder) / f"{source}.ipynb"
        path.write_bytes((ROOT / "nbs" / "_app" / path.name).read_bytes())
    with opened(Notebook, browser, server, path.name) as page:
        page.run_all(600)
        page.page.locator(selector).first.wait_for(state="attached", timeout=300_000)
        working = page.page.locator(".lo-lab").get_by_role("button", name="Stop")
        if source == "GapLab" and working.is_visible():
            working.click()  # the cells of this position are there; the others can wait
        page.until(lambda: not working.is_visible(), "it still works in the background", 1800)
        page.page.locator(".lo-lab").scroll_into_view_if_needed()
        handle = page.slider(label) if label else page.page.locator(".lo-lab").get_by_role("slider").last
        handle.focus()
        times = []
        for i in range(KEYS):
            times.append(page.wait_change(selector, lambda key=keys[i % 2]: handle.press(key), 30, what)["first"])
            page.until(lambda: not working.is_visible(), "it still works in the background")
        assert page.look() == [], page.look()
    return times


def main():
    wanted = sys.argv[1:] or [name.split(":")[0] for name in LABS]
    found = {}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder, Jupyter(folder) as server:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for name, (*how, aim) in LABS.items():
            if name.split(":")[0] not in wanted:
                continue
            times = measure(browser, server, Path(folder), *how)
            median = statistics.median(times)
            load = os.getloadavg()[0]
            found[name] = {"median_ms": median, "aim_ms": aim, "ms": times, "load": load, "cpus": os.cpu_count()}
            print(f"{name}: {median:.0f} ms (aim {aim}; {min(times):.0f} to {max(times):.0f}, load {load:.1f})")
        browser.close()
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / "latency.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
