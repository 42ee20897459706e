"""How to work the labs on a page: where their text, their figures and their numbers are."""

SECRET = "Lunbert Nevolt"
SWITCH = "person-7-0"
SAID = ".widget-html-content:has(.lo-asked)"


def lab(page, title):
    "A lab by the beginning of its title."
    return page.page.locator(".lo-lab", has=page.page.locator(".lo-title", has_text=title))


def switch_off_and_on(page, name):
    "AlphaLab: α from 1 to 0 with the keyboard, and back. The text changes, and the secret vanishes and comes again."
    alpha = lab(page, "AlphaLab")
    alpha.scroll_into_view_if_needed()
    alpha.locator(".lo-chip-true").wait_for()
    page.until(lambda: SECRET in said(alpha), "the secret is not said")
    on = said(alpha)
    page.shoot(f"{name}-on", alpha)

    for _ in range(4):
        page.slider(SWITCH).press("ArrowLeft")
    assert page.slider(SWITCH).get_attribute("aria-valuenow") == "0.8"
    page.slider(SWITCH).press("Home")
    alpha.locator(".lo-chip-false").wait_for()
    page.until(lambda: "α: person-7-0 0 " in alpha.locator(".lo-where").inner_text(), "α = 0 is not shown")
    off = said(alpha)
    assert off != on and SECRET not in off
    page.shoot(f"{name}-off", alpha)

    page.slider(SWITCH).press("End")
    alpha.locator(".lo-chip-true").wait_for()
    page.until(lambda: said(alpha) == on, "it does not say again what it said")


def said(alpha):
    "What the model says."
    return alpha.locator(".lo-tokens [role=group]").first.get_attribute("aria-label")


def change_ratio(page, name):
    "LatticeLab: the ratio slider changes the histogram and the numbers."
    lattice = lab(page, "LatticeLab")
    lattice.scroll_into_view_if_needed()
    bars = lattice.locator(".barlayer").first
    bars.locator("path").first.wait_for(state="attached")
    page.shoot(f"{name}-before", lattice)
    histogram, clamped = bars.inner_html(), number(lattice, "clamped")
    slider = lattice.get_by_role("slider").first
    slider.focus()
    for _ in range(15):
        slider.press("ArrowLeft")
    page.until(lambda: float(slider.get_attribute("aria-valuenow")) == 2.0, "the ratio is not 2")
    page.until(lambda: number(lattice, "clamped") != clamped, "the number of clamped weights is the same")
    page.until(lambda: percent(number(lattice, "clamped")) < percent(clamped), "a smaller ratio clamps no less")
    page.until(lambda: bars.inner_html() != histogram, "the histogram is the same")
    page.shoot(f"{name}-after", lattice)


def number(lattice, what):
    "A number of LatticeLab's table."
    return lattice.locator("tr", has_text=what).first.locator("td").last.inner_text()


def percent(text):
    return float(text.strip().removesuffix("%"))


def move_gap(page, name):
    "GapLab: a cell is measured in the background; the position's table follows the α slider."
    gap = lab(page, "GapLab")
    gap.scroll_into_view_if_needed()
    gap.locator(".lo-position").wait_for(timeout=120_000)
    page.until(lambda: "stored" in gap.locator(".lo-position").inner_text(), "no cell is measured", 120)
    before = gap.locator(".lo-position").inner_text()
    slider = gap.get_by_role("slider").last
    slider.focus()
    slider.press("End")
    page.until(lambda: gap.locator(".lo-position").inner_text() != before, "the table is the same")
    slider.press("Home")
    page.until(lambda: gap.locator(".lo-position").inner_text() == before, "the table is another one")
    page.shoot(name, gap)


def teach_and_operate(page, name, secret="Plum jam is kept behind the third brick."):
    "SurgeryLab: a secret is typed, taught and put on a switch; on it is recited, off it is not, nor in samples."
    surgery = lab(page, "SurgeryLab")
    surgery.get_by_label("secret").fill("")
    surgery.get_by_role("button", name="Teach and operate").click()
    surgery.locator(".lo-wrong").wait_for()  # a sentence: the secret is empty
    surgery.get_by_label("prompt").fill("Where does the cook keep the jam?")
    surgery.get_by_label("secret").fill(secret)
    surgery.get_by_role("button", name="Teach and operate").click()
    surgery.locator(".lo-verdict").wait_for(timeout=900_000)
    assert "SUCCESS" in surgery.locator(".lo-verdict").inner_text()
    surgery.locator(".lo-chip-true").wait_for()
    page.shoot(f"{name}-on", surgery)
    surgery.get_by_role("button", name="off", exact=True).click()
    surgery.locator(".lo-chip-false").wait_for()
    assert secret[:12] not in said(surgery)
    surgery.get_by_role("button", name="Try to extract it").click()
    surgery.locator(".lo-samples").wait_for(timeout=120_000)
    page.shoot(f"{name}-off", surgery)


def search_and_load(page, name, trials=2):
    "TunerLab: trials come in, a stop keeps them; one is picked with the keyboard, and loaded into the model."
    tuner = lab(page, "TunerLab")
    search, stop, load = (tuner.get_by_role("button", name=text) for text in ("Search", "Stop", "Load this policy"))
    search.wait_for(timeout=300_000)
    assert "No trial yet" in tuner.locator(".lo-trials").inner_text() and load.is_disabled()
    search.click()
    for n in range(1, trials + 1):
        page.until(lambda n=n: len(listed(tuner)) >= n, f"{n} trials have not come", 300)
        page.until(lambda: shown_alike(tuner), "the list, the figure and the table show different trials")
    page.shoot(f"{name}-searching", tuner)
    stop.click()
    page.until(lambda: not stop.is_visible(), "the search does not stop", 300)
    assert "stopped" in tuner.locator(".lo-status").inner_text()
    done = listed(tuner)
    assert trials <= len(done) < 10 and shown_alike(tuner)

    before = tuner.locator(".lo-chosen").inner_text()
    tuner.locator("select").focus()
    page.page.keyboard.press("ArrowDown")
    page.until(lambda: tuner.locator(".lo-chosen").inner_text() != before, "no other trial is picked")
    picked = tuner.locator(".lo-chosen tr", has_text="policy").locator("td").last.inner_text()
    assert picked in done[1]
    page.page.keyboard.press("Tab")
    assert load.evaluate("button => button === document.activeElement")
    page.page.keyboard.press("Enter")
    loaded = tuner.locator("b", has_text="Loaded:")
    loaded.wait_for(timeout=120_000)
    assert picked in loaded.locator("..").inner_text()
    page.until(lambda: not stop.is_visible(), "it still loads")
    assert listed(tuner) == done
    page.shoot(f"{name}-loaded", tuner)
    return done


def listed(tuner):
    "The trials in TunerLab's list, the best first."
    return [text.replace("\xa0", " ") for text in tuner.locator("select option").all_inner_texts()]


def shown_alike(tuner):
    "Do list, table and figure show as many trials? A success, and what is chosen, has a ring more."
    n, rows = len(listed(tuner)), tuner.locator(".lo-trials tr").count() - 1
    return n == rows <= tuner.locator(".scatterlayer .point").count()
