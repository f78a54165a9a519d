"""The page of an inspection in a real browser: it loads, filters, sorts, plays, and fits a phone."""

import pytest

from browser import Browser, find_browser
from inspections import EVIL_PHONE, make_page

SHOWN = "[...document.querySelectorAll('{}')].filter(e => e.offsetParent).map(e => e.dataset.code).join()"
ROWS, CARDS = SHOWN.format("tr.codeword"), SHOWN.format("article.codeword")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(find_browser(), tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    path = folder / "page.html"
    path.write_text(make_page(folder, context_seconds=0.1).html, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def opened(browser, file):
    browser.problems.clear()
    browser.requests.clear()
    browser.resize(1_200)
    browser.open(file)
    yield
    assert browser.problems == []


def choose(browser, field, value):
    browser.run(
        f"(() => {{ const field = document.getElementById('{field}'); field.value = {value!r};"
        " field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def test_page_requests_nothing_and_runs_nothing_from_the_corpus(browser, file):
    assert browser.requests and all(url.startswith((file.as_uri(), "data:")) for url in browser.requests)
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.getElementById('phone').options[1].value") in (EVIL_PHONE, "AA")


def test_the_content_security_policy_blocks_foreign_scripts(browser):
    # What the page would do with a hole in its escaping.
    browser.run(
        "(() => { const s = document.createElement('script'); s.text = 'window.x = 1'; document.body.append(s); })()"
    )
    assert browser.run("window.x === undefined")
    assert any("Content Security Policy" in text for text in browser.problems)
    browser.problems.clear()


def test_filter(browser):
    assert browser.run(ROWS) == browser.run(CARDS) == "0,3,5"
    choose(browser, "phone", "AA")
    assert browser.run(ROWS) == browser.run(CARDS) == "5"
    assert browser.run("document.getElementById('status').textContent") == "1 of 3 codewords"
    choose(browser, "phone", EVIL_PHONE)
    assert browser.run(CARDS) == "3"
    choose(browser, "number", "5")
    assert browser.run(CARDS) == ""
    browser.run("document.querySelector('button[type=reset]').click()")
    assert browser.run("new Promise(done => setTimeout(done, 50)).then(() => true)")
    assert browser.run(CARDS) == "0,3,5"
    choose(browser, "number", "3")
    assert browser.run(ROWS) == browser.run(CARDS) == "3"


@pytest.mark.parametrize(
    ("order", "expected"),
    [("code", "0,3,5"), ("frames", "5,3,0"), ("seconds", "5,3,0"), ("place", "3,5,0"), ("purity", "0,3,5")],
)
def test_sorting(browser, order, expected):
    choose(browser, "order", order)
    assert browser.run(ROWS) == browser.run(CARDS) == expected


def test_a_link_to_a_hidden_codeword_shows_it(browser):
    choose(browser, "phone", "AA")
    browser.run("location.hash = '#codeword-3'")
    assert browser.run("new Promise(done => setTimeout(done, 200)).then(() => true)")
    assert browser.run(CARDS) == "0,3,5"
    top = browser.run("document.getElementById('codeword-3').getBoundingClientRect().top")
    assert 0 <= top < 900


def test_sounds_have_a_duration(browser):
    durations = browser.run(
        """Promise.all([...document.querySelectorAll('button.play')].map(button => new Promise((done, failed) => {
            const sound = new Audio(button.dataset.src);
            sound.addEventListener('loadedmetadata', () => done([button.getAttribute('aria-label'), sound.duration]));
            sound.addEventListener('error', () => failed(button.getAttribute('aria-label')));
        })))"""
    )
    assert len(durations) == 9
    # 10 frames and what is heard behind them, as in test_inspection.py.
    assert dict(durations)["Play codeword 3 in a.wav at 0.00 s"] == pytest.approx(4_840 / 16_000, abs=1e-3)


def pressed(browser):
    return browser.run("[...document.querySelectorAll('button.play')].map(b => b.getAttribute('aria-pressed')).join()")


def test_the_keyboard_plays_sounds(browser):
    # From the last field of the form, as a person would go on.
    browser.run("document.querySelector('button.play').focus()")
    browser.press(" ", "Space", 32, " ")
    assert pressed(browser).startswith("true,false")
    assert browser.run(
        """new Promise(done => { const look = () => document.querySelector('.play[aria-pressed=true]')
            ? setTimeout(look, 20) : done(true); look(); })"""
    )
    assert "true" not in pressed(browser)
    # Another one stops the first, and the same one stops itself.
    browser.run("document.querySelectorAll('button.play')[3].click()")
    browser.run("document.querySelectorAll('button.play')[4].click()")
    assert pressed(browser).count("true") == 1
    browser.run("document.querySelectorAll('button.play')[4].click()")
    assert pressed(browser).count("true") == 0


def test_the_keyboard_reaches_everything(browser):
    seen = []
    for _ in range(60):
        browser.press("Tab", "Tab", 9)
        seen.append(browser.run("document.activeElement.className + document.activeElement.id"))
    assert seen[0] == "skip"
    assert {"number", "phone", "order", "scroll"} <= set(seen)
    assert seen.count("play") >= 9


@pytest.mark.parametrize("width", [320, 400, 1_200])
def test_nothing_overflows_the_viewport(browser, width):
    browser.resize(width)
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == browser.run("document.documentElement.clientWidth")
    outside = browser.run(
        """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, .unseen, .skip, noscript')
            && e.offsetParent && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)"""
    )
    assert outside == []


CONTRAST = """(() => {
    const light = color => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        for (let e = element; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (!color.startsWith('rgba')) return light(color);
        }
    };
    return [...document.querySelectorAll('p, td, th, a, caption, h1, h3, .where, .phone, summary, label')]
        .filter(e => e.offsetParent && e.textContent.trim())
        .map(e => [light(getComputedStyle(e).color), behind(e)])
        .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(browser, scheme):
    browser.resize(1_200, scheme=scheme)
    ratios = browser.run(CONTRAST)
    # WCAG 2.2, 1.4.3.
    assert len(ratios) > 50 and min(ratios) >= 4.5
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
