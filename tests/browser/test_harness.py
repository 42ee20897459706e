"""The harness on a small lab: it works the controls, sees every kind of fault, and leaves nothing behind."""

import re
from itertools import pairwise

import pytest
from harness import App, Jupyter, Notebook, Voila, opened, write_notebook
from tiny_lab import CELL

FAULTS = """
import threading
import ipywidgets as W
from IPython.display import Javascript, display

def fail(kind):
    raise KeyError(kind)

def in_thread(kind):
    threading.Thread(target=fail, args=(kind,)).start()

def in_output(kind):
    with out:
        fail(kind)

def in_page(kind):
    with out:
        display(Javascript(f"console.error('{kind}'); setTimeout(() => {{throw new Error('late {kind}')}}, 0)"))

out, boxes = W.Output(), []
for kind, act in {"callback": fail, "thread": in_thread, "output": in_output, "page": in_page}.items():
    boxes.append(W.Button(description=kind))
    boxes[-1].on_click(lambda b, act=act: act(b.description))
W.VBox([*boxes, out])
"""

# A text that changes between what a page is given and when it listens: what a thread does now and then, done always.
LATE = """
import ipywidgets as W
from libortho.dashboard import Lab

text, give = W.HTML("early"), W.Widget._handle_control_comm_msg

def give_and_change(message):
    give(message)
    text.value = "late"

W.Widget._handle_control_comm_msg = give_and_change
text.add_class("late")
Lab("A late text", [], [text])
"""

# The kernel is busy when the page has drawn the lab: it hears of that, and of what the user does, only later.
BUSY = """
import time
import ipywidgets as W
import plotly.graph_objects as go
from libortho.dashboard import Figure, Lab

class Busy(Lab):
    def __init__(self):
        self.alpha = W.FloatSlider(1.0, min=0.0, max=1.0, step=0.1, description="α", continuous_update=False)
        self.typed, self.text = W.Text(description="typed"), W.HTML()
        self.figure = Figure(go.Figure(go.Bar(x=["off", "on"], y=[0, 1]), {"height": 200, "yaxis": {"range": [0, 1]}}))
        self.text.add_class("busy-text")
        super().__init__("Busy", [self.alpha, self.typed], [self.text, self.figure])
        for control in (self.alpha, self.typed):
            self.on(control, self.update)
        self.update()

    def update(self):
        a = self.alpha.value
        self.text.value = f"{a:g} {self.typed.value}"
        with self.figure.batch_update():
            self.figure.data[0].y = [1 - a, a]

Busy()
"""

# What the slider and the box show, frame by frame, as long as it is another thing than before.
RECORD = """() => {
  const [slider, box] = [".noUi-handle", "input[type=text]"].map(what => document.querySelector(".lo-lab " + what));
  const seen = window.seen = [];
  const look = () => {
    const now = [parseFloat(slider.getAttribute("aria-valuenow")), box.value];
    if (!seen.length || seen.at(-1)[0] !== now[0] || seen.at(-1)[1] !== now[1]) seen.push(now);
    requestAnimationFrame(look);
  };
  look();
}"""


@pytest.fixture
def notebooks(folder):
    write_notebook(folder / "busy.ipynb", BUSY, "time.sleep(4)")
    write_notebook(folder / "tiny.ipynb", CELL)
    write_notebook(folder / "late.ipynb", LATE)
    write_notebook(folder / "faults.ipynb", FAULTS, CELL, "raise LookupError('in a cell')", "'never run'")
    return folder


def check_tiny(page, name):
    text = page.page.locator(".tiny-text")
    text.wait_for()
    assert "cinnamon" in text.inner_text()
    bars = ".tiny-figure .barlayer .points"
    before = page.page.locator(bars).inner_html()
    page.shoot(f"{name}-on")
    times = page.wait_change(".tiny-text", lambda: page.slider("α").press("Home"))
    assert 0 < times["first"] <= times["last"]
    assert page.slider("α").get_attribute("aria-valuenow") == "0.0" and "water" in text.inner_text()
    page.until(lambda: page.page.locator(bars).inner_html() != before, "the figure does not follow")
    assert page.press("α", "ArrowRight", times=2) == 0.1
    page.page.wait_for_function("document.querySelector('.tiny-text').innerText.includes('α = 0.10')")
    page.shoot(f"{name}-off")
    assert page.look() == []


def test_jupyterlab(browser, jupyter, notebooks):
    with opened(Notebook, browser, jupyter, "tiny.ipynb") as page:
        page.run_all()
        check_tiny(page, "tiny")
        assert page.page.locator(".jp-Cell.jp-mod-selected").count() == 1  # the keys did not go to the notebook


def test_voila(browser, notebooks):
    with Voila(notebooks, "tiny.ipynb", theme="dark") as server, opened(App, browser, server) as page:
        check_tiny(page, "tiny-voila")


def test_text_that_changes_while_the_page_loads(browser, notebooks):
    with Voila(notebooks, "late.ipynb") as server, opened(App, browser, server) as page:
        text = page.page.locator(".late .widget-html-content")
        text.wait_for()
        page.until(lambda: text.inner_text() == "late", "the page does not hear of it")
        assert page.look() == []


def texts(page):
    return page.page.locator(".busy-text .widget-html-content").all_inner_texts()


def taller(page, i):
    "Which bar of the i-th view is drawn taller, the first or the second; None as long as there are not two."
    bars = page.page.locator(".lo-lab").nth(i).locator(".barlayer .point path")
    heights = bars.evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().height)")
    return heights.index(max(heights)) if len(heights) == 2 else None


def test_what_a_user_sets_while_the_kernel_is_busy_stays(browser, jupyter, notebooks):
    with opened(Notebook, browser, jupyter, "busy.ipynb") as page:
        page.start_all()
        slider = page.slider("α")
        slider.wait_for()
        page.page.evaluate(RECORD)
        slider.press("Home")
        box = page.page.get_by_label("typed")
        box.focus()
        written = 0
        while not page.has_run() or written < 20:
            page.page.keyboard.type("x")
            page.page.wait_for_timeout(100)
            written += 1
        page.until(lambda: texts(page) == [f"0 {'x' * written}"], "the lab did not hear of all")
        seen = page.page.evaluate("window.seen")
        assert all(a >= b and len(s) <= len(t) for (a, s), (b, t) in pairwise(seen)), seen
        assert box.evaluate("box => box === document.activeElement") and box.input_value() == "x" * written
        assert page.look() == []


def test_a_second_view_and_a_reload_show_what_is(browser, jupyter, notebooks):
    with opened(Notebook, browser, jupyter, "busy.ipynb") as page:
        page.run_all()
        page.slider("α").press("Home")
        page.page.get_by_label("typed").fill("word")
        page.until(lambda: texts(page) == ["0 word"], "the lab did not hear of it")
        page.page.locator(".busy-text").click(button="right")
        page.page.locator(".lm-Menu-item[data-command='notebook:create-output-view']").click()
        page.until(lambda: texts(page) == ["0 word"] * 2, "the second view shows something else")
        page.until(lambda: [taller(page, i) for i in (0, 1)] == [0, 0], "a figure shows α = 1")
        second = page.page.get_by_label("typed").last
        second.fill("word and")
        second.press_sequentially(" more")
        page.until(lambda: texts(page) == ["0 word and more"] * 2, "one view shows something else")
        assert second.evaluate("box => box === document.activeElement")
        assert page.page.get_by_label("typed").first.input_value() == "word and more"
        page.shoot("two-views")

        page.page.locator(".jp-NotebookPanel-toolbar [data-command='docmanager:save']").click()
        page.until(lambda: "widget-view" in (notebooks / "busy.ipynb").read_text(), "it is not saved")
        page.page.reload()
        page.page.locator(".busy-text").first.wait_for()
        page.until(lambda: texts(page)[:1] == ["0 word and more"], "the page forgot what was shown")
        shown = page.slider("α")
        page.until(lambda: shown.get_attribute("aria-valuenow") == "0.0", "the slider forgot where it was")
        shown.press("End")
        page.until(lambda: texts(page)[:1] == ["1 word and more"], "the slider is dead after a reload")
        page.until(lambda: taller(page, 0) == 1, "the figure is dead after a reload")
        assert page.look() == []


def test_faults_are_seen(browser, jupyter, notebooks):
    with opened(Notebook, browser, jupyter, "faults.ipynb") as page:
        page.run_all()
        assert page.look()[0].startswith("kernel: LookupError: in a cell")
        page.until(lambda: re.match("shown: .*LookupError", page.look()[-1], re.S), "the cell's red output is not seen")
        seen = {
            "callback": "kernel: KeyError: 'callback'",
            "thread": "stderr: .*Exception in thread.*KeyError: 'thread'",
            "output": "shown: -----.*KeyError.*'output'",
            "page": "console: page",
        }
        for kind, pattern in seen.items():

            def seen_so_far(pattern=pattern):
                return any(re.match(pattern, fault, re.S) for fault in page.look())

            assert not seen_so_far()
            page.page.get_by_role("button", name=kind, exact=True).click()
            page.until(seen_so_far, f"{kind} is not seen")
        page.until(lambda: "page: late page" in page.look(), "what a page throws later is not seen")

        page.page.get_by_role("checkbox", name="fault").check()
        page.slider("α").press("ArrowLeft")
        page.until(lambda: "shown: fault must be off; clear it" in page.look(), "the lab's sentence is not seen")


def test_faults_are_seen_under_voila(browser, notebooks):
    with Voila(notebooks, "faults.ipynb") as server, opened(App, browser, server) as page:
        page.until(lambda: any("executing cell [3]" in f for f in page.look()), "the cell's error is not seen")


def test_nothing_is_left_behind(browser, notebooks):
    with pytest.raises(ZeroDivisionError), Jupyter(notebooks) as server:
        with opened(Notebook, browser, server, "tiny.ipynb"):
            family = server.family()
            assert len(family) > 1  # a kernel, too
            raise ZeroDivisionError
    assert not any(process.is_running() for process in family)
    with pytest.raises(OSError):
        server.ask("api/status")
