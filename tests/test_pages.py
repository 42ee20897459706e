"""The checks of the site: each kind of fault is seen, and a good page has none."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from pages import front_errors, link_errors  # noqa: E402

GOOD = """<h2 id="place">A place</h2><a href="sub/b.html#there">b</a> <a href="#place">here</a>
<a href="https://example.org/x#y">out</a><img src="a.png" alt="a picture">"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(b"png")
    (tmp_path / "sub" / "b.html").write_text('<p id="there">b</p><a href="../a.html">back</a>')

    def errors(page):
        (tmp_path / "a.html").write_text(page)
        return list(link_errors(tmp_path))

    return errors


def test_a_good_page(site):
    assert site(GOOD) == []


@pytest.mark.parametrize(
    "bad, said",
    [
        ('<a href="sub/c.html">c</a>', "'sub/c.html' leads nowhere"),
        ('<a href="sub/b.html#nowhere">b</a>', "the page has no such place"),
        ('<a href="#nowhere">here</a>', "the page has no such place"),
        ('<img src="b.png" alt="gone">', "'b.png' leads nowhere"),
        ('<img src="a.png">', "'a.png' has no alternative text"),
        ('<img src="a.png" alt=" ">', "'a.png' has no alternative text"),
        ('<a href="../outside.html">out</a>', "leads nowhere"),
    ],
)
def test_a_fault_is_seen(site, bad, said):
    (error,) = site(GOOD + bad)
    assert error.startswith("a.html: ") and said in error


def test_front_matter():
    good = {"title": "One", "description": "what"}
    assert list(front_errors([("a", good, None), ("b", good | {"title": "Two"}, None)])) == []
    found = list(front_errors([("a", good, None), ("b", {"title": "One"}, None), ("c", {"description": "x"}, None)]))
    assert len(found) == 3 and "no description" in found[0] and "that of a too" in found[1] and "no title" in found[2]
