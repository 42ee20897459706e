"""The labs in a real browser: the notebook about them in JupyterLab, and the apps under Voila."""

import shutil

import pytest
from harness import ROOT, App, Jupyter, Notebook, Voila, opened
from labs import change_ratio, lab, listed, move_gap, search_and_load, switch_off_and_on, teach_and_operate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A copy of the notebooks that are opened here."
    target = tmp_path_factory.mktemp("nbs")
    for name in ("tutorials", "images", "_app"):
        shutil.copytree(ROOT / "nbs" / name, target / name)
    return target


def test_dashboards(browser, folder):
    with Jupyter(folder) as server, opened(Notebook, browser, server, "tutorials/02_dashboards.ipynb") as page:
        page.run_all(300)
        assert page.look() == []
        switch_off_and_on(page, "alphalab")
        change_ratio(page, "latticelab")
        move_gap(page, "gaplab")
        page.change_theme("dark")
        for title in ("AlphaLab", "LatticeLab", "GapLab"):
            page.shoot(title.lower(), lab(page, title))
        assert page.look() == []


def test_apps(browser, folder):
    with Voila(folder / "_app", theme="dark") as server:
        with opened(App, browser, server, "AlphaLab.ipynb", 300) as page:
            switch_off_and_on(page, "voila-alphalab")
            assert page.look() == []
        with opened(App, browser, server, "LatticeLab.ipynb") as page:
            change_ratio(page, "voila-latticelab")
            assert page.look() == []


@pytest.mark.slow
def test_gap_app(browser, folder):
    with Voila(folder / "_app") as server, opened(App, browser, server, "GapLab.ipynb", 300) as page:
        move_gap(page, "voila-gaplab")
        assert page.look() == []


@pytest.mark.slow
def test_surgery_app(browser, folder):
    with Voila(folder / "_app") as server, opened(App, browser, server, "SurgeryLab.ipynb", 300) as page:
        teach_and_operate(page, "surgerylab")
        assert page.look() == []


@pytest.mark.slow
def test_tuner_app(browser, folder, tmp_path):
    app = folder / "_app" / "TunerLab.ipynb"
    kept = 'cache_dir() / \\"labs\\" / \\"tuner\\"'
    assert app.read_text().count(kept) == 1
    app.write_text(app.read_text().replace(kept, f"'{tmp_path}'"))  # nothing is there yet
    with Voila(folder / "_app") as server:
        with opened(App, browser, server, app.name, 300) as page:
            done = search_and_load(page, "tunerlab")
            assert page.look() == []
    with Voila(folder / "_app", theme="dark") as server, opened(App, browser, server, app.name, 300) as page:
        tuner = lab(page, "TunerLab")
        page.until(lambda: listed(tuner) == done, "finished trials are not there when it is opened again", 120)
        page.shoot("tunerlab", tuner)
        assert page.look() == []
