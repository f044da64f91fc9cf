"""The notebooks in JupyterLab, in a real browser: they run to the end, sliders change figures, clicks play audio.

A test asserts what happened, not when: waits take minutes before they fail.
"""

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install -e '.[dev]'")

from lab import CHROME, COUNT_CELLS, DRIVER, GRAPH, LEFT, RIGHT, RUN_TIMEOUT_S, App, Lab, until  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402

pytestmark = pytest.mark.skipif(not (CHROME and DRIVER), reason="no Chromium with chromedriver on the PATH")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab") / "here") as lab:
        yield lab


@pytest.fixture(scope="module")
def explore(lab):
    lab.run_all("explore")
    return lab


def click_until(lab, selector, index, condition, what):
    "Click the middle of an element; once more where nothing happened for a minute, as on a machine that is busy."
    clicked_at = -float("inf")

    def happened():
        nonlocal clicked_at
        if time.monotonic() - clicked_at > 60:
            element = lab.driver.find_elements("css selector", selector)[index]
            ActionChains(lab.driver).move_to_element(element).pause(0.5).click().perform()
            clicked_at = time.monotonic()
        return condition()

    return until(happened, what)


PANELS = ("patchout", "layers", "attention", "song", "library")
SLIDERS = [
    (".maestlib-patchout .maestlib-time", ".maestlib-patchout .maestlib-mel", RIGHT),
    (".maestlib-patchout .maestlib-time", ".maestlib-patchout .maestlib-tags", RIGHT),
    (".maestlib-patchout .maestlib-frequency", ".maestlib-patchout .maestlib-mel", RIGHT),
    (".maestlib-layers .maestlib-block", ".maestlib-layers .maestlib-map", RIGHT),
    (".maestlib-layers .maestlib-block", ".maestlib-layers .maestlib-neighbors", LEFT),
    (".maestlib-attention .maestlib-block", ".maestlib-attention .maestlib-light", RIGHT),
    (".maestlib-attention .maestlib-head", ".maestlib-attention .maestlib-light", RIGHT),
    (".maestlib-song .maestlib-top", ".maestlib-song .maestlib-time-tags", LEFT),
    (".maestlib-song .maestlib-window", ".maestlib-song .maestlib-time-tags", RIGHT),
    (".maestlib-library .maestlib-glide", ".maestlib-library .maestlib-library-map", RIGHT),
]


@pytest.mark.parametrize("slider, figure, key", SLIDERS, ids=lambda v: v.rsplit("-")[-1] if len(v) > 1 else "")
def test_a_slider_changes_a_figure(explore, slider, figure, key):
    elapsed_ms = explore.changes(slider, figure, key)
    print(f"{slider} → {figure}: {elapsed_ms:.0f} ms")


def test_outputs_are_the_five_explorers(explore, tmp_path):
    outputs = explore.outputs()
    indices = [index for index, _ in outputs]
    assert len(outputs) == 5 and indices == sorted(set(indices))
    for name, (_, element) in zip(PANELS, outputs, strict=True):
        assert element.find_elements("css selector", f".maestlib-{name}")
    explore.screenshot(outputs[0][1], tmp_path / "output.png")
    explore.screenshot(".maestlib-patchout", tmp_path / "patchout.png")
    for name in ("output", "patchout"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_click_on_the_map_plays(explore):
    explore.bring(".maestlib-layers .maestlib-map")
    before = explore.state(".maestlib-layers .maestlib-neighbors")
    played = "const a = document.querySelector('.maestlib-layers audio'); return a.currentTime > 0"
    point = ".maestlib-layers .maestlib-map .points path.point"
    click_until(explore, point, 20, lambda: explore.js(played), "the clip plays")
    until(lambda: explore.state(".maestlib-layers .maestlib-neighbors") != before, "its neighbors are shown")


def test_the_cursor_follows_the_player(explore):
    figure = ".maestlib-song .maestlib-time-tags"
    explore.bring(figure)
    cursor = GRAPH + "return gd.layout.shapes[0].x0"

    def sought():
        return explore.js(cursor, figure) > 30

    click_until(explore, f"{figure} .nsewdrag", 0, sought, "a click seeks")
    first = explore.js(cursor, figure)
    until(lambda: explore.js(cursor, figure) > first + 0.3, "the cursor moves")


def test_tsne_keeps_what_was_chosen(explore):
    figure = ".maestlib-layers .maestlib-map"
    explore.bring(figure)
    explore.driver.find_elements("css selector", ".maestlib-layers .maestlib-method button")[1].click()
    title = GRAPH + "return gd.layout.title.text"
    until(lambda: explore.js(title, figure).startswith("t-SNE of block"), "t-SNE is drawn")
    assert explore.js(GRAPH + "return gd.data.at(-1).x.length", figure) == 1, "the star"


def draw_lasso(lab, figure, left, right):
    "Draw around a part of a figure, from one fraction of its width to another."
    area = lab.driver.find_element("css selector", f"{figure} .nsewdrag")
    width, height = area.size["width"], area.size["height"]
    step, down = (right - left) * width, 0.96 * height
    start = (left - 0.5) * width, -0.48 * height
    pen = ActionChains(lab.driver, duration=50).move_to_element_with_offset(area, *map(round, start)).click_and_hold()
    for x, y in ((step / 2, 0), (step / 2, 0), (0, down / 2), (0, down / 2), (-step, 0), (0, -down + 2)):
        pen.move_by_offset(round(x), round(y))
    pen.release().perform()


MAP, LIBRARY = ".maestlib-library .maestlib-library-map", ".maestlib-library"
TEXTS = """return [...document.querySelectorAll('.maestlib-library %s')].map(o => o.text).join('|')
.replaceAll('\\xa0', ' ')"""
SONGS, COLOR = TEXTS % ".maestlib-songs option", TEXTS % ".maestlib-color option:checked"
BRIGHT = GRAPH + "return [...(gd.data[0].selectedpoints ?? [])]"  # songs that are highlighted


def select_by_lasso(lab, left, right):
    "Draw a lasso until songs are selected; one is lost where the map is drawn again meanwhile. Returns the songs."
    lab.bring(MAP)
    before = lab.js(SONGS)
    for attempt in range(5):
        draw_lasso(lab, MAP, left, right)
        with contextlib.suppress(AssertionError) if attempt < 4 else contextlib.nullcontext():
            until(lambda: lab.js(SONGS) not in ("", before), "songs are selected", 20 * (1 + attempt))
            break
    return lab.js(SONGS).split("|")[1:]


def test_a_selection_stays(explore):
    songs = select_by_lasso(explore, 0.3, 0.8)
    bright = until(lambda: explore.js(BRIGHT, MAP), "songs are highlighted")
    assert len(bright) == len(songs) > 1
    explore.changes(".maestlib-library .maestlib-glide", MAP, RIGHT)
    explore.changes(".maestlib-library .maestlib-glide", MAP, LEFT)  # a round trip to Python and back, twice
    assert explore.js(BRIGHT, MAP) == bright, "they stay highlighted"
    assert not explore.js(GRAPH + "return gd.layout.selections?.length", MAP), "the lasso is removed"
    explore.picture("selection")


def test_a_click_selects_one_song_and_a_button_its_nearest(explore):
    explore.bring(MAP)
    click_until(explore, f"{MAP} .points path.point", 7, lambda: len(explore.js(BRIGHT, MAP)) == 1, "one is selected")
    assert explore.js(SONGS).split("|")[0] == "1 song selected"
    played = "const a = document.querySelector('.maestlib-library audio'); return a.currentTime > 0"
    until(lambda: explore.js(played), "it plays")
    explore.bring(f"{LIBRARY} .maestlib-nearest").click()
    until(lambda: len(explore.js(BRIGHT, MAP)) == 11, "its nearest are selected, too")


def test_songs_are_selected_labeled_and_saved(explore):
    explore.bring(MAP)
    explore.driver.find_element("css selector", f"{LIBRARY} .maestlib-tag input").send_keys("left", "\ue007")
    message = explore.driver.find_element("css selector", f"{LIBRARY} .maestlib-message")
    for left, right, button in ((0, 0.4, "yes"), (0.6, 1, "no")):
        count = len(select_by_lasso(explore, left, right))
        explore.bring(f"{LIBRARY} .maestlib-{button}").click()
        until(lambda: f"{count} songs: {button}; saved" in message.text, "they are labeled")  # noqa: B023
    until(lambda: "chance 50 %" in explore.driver.find_element("css selector", LIBRARY).text, "my tag is fitted")
    until(lambda: explore.js(COLOR) == "my tag: left", "the songs are colored by it")
    explore.choose(f"{LIBRARY} .maestlib-songs", 2)
    until(lambda: len(explore.js(BRIGHT, MAP)) == 1, "one song of the list is highlighted")
    explore.bring(f"{LIBRARY} .maestlib-no").click()
    until(lambda: "1 song: no; saved" in message.text, "it is labeled alone")

    def select_likeliest():  # once the fit, in the background, is done
        explore.bring(f"{LIBRARY} .maestlib-most").click()
        return "left fits best" in message.text

    until(select_likeliest, "the likeliest are selected")
    names = explore.js(SONGS).split("|")[1:]
    until(lambda: len(explore.js(BRIGHT, MAP)) == len(names), "they are highlighted")
    explore.picture("my-tags")
    explore.bring(f"{LIBRARY} .maestlib-playlist").click()
    until(lambda: ".m3u8" in message.text, "a playlist is saved")
    playlist = Path(message.text.split(" as ")[1])
    assert playlist.read_text(encoding="utf8").splitlines()[1:3][0].split(",", 1)[1] == names[0]


def test_a_file_is_dropped_on_a_panel(explore, tmp_path):
    soundfile.write(tmp_path / "dropped.wav", np.sin(np.arange(16000 * 4) * 0.2).astype("float32"), 16000)
    drop = """const [panel, bytes] = arguments, transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(bytes)], "dropped.wav"));
    const event = name => new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true});
    panel.dispatchEvent(event("dragover")); panel.dispatchEvent(event("drop"));"""
    explore.js(
        drop, explore.bring(".maestlib-library .maestlib-message"), list((tmp_path / "dropped.wav").read_bytes())
    )
    message = explore.driver.find_element("css selector", ".maestlib-library .maestlib-message")
    until(lambda: "dropped.wav" in message.text and "nearest" in message.text, "it is placed among the songs")
    star = GRAPH + "return gd.data[1].x.length"
    until(lambda: explore.js(star, ".maestlib-library .maestlib-library-map") == 1, "the star is shown")


FITS = """return [...document.querySelectorAll('.js-plotly-plot')]
.every(figure => Math.abs(figure._fullLayout?.width - figure.clientWidth) < 1)"""
CUT_OFF = """return [...document.querySelectorAll('.maestlib')].flatMap(panel => {
const right = panel.getBoundingClientRect().right + 1;
const parts = [...panel.querySelectorAll('.main-svg, button, select, input, audio, table')];
return parts.filter(part => part.getBoundingClientRect().right > right).map(part => part.outerHTML.slice(0, 80)) })"""


@pytest.mark.slow
@pytest.mark.parametrize("theme", ("JupyterLab Light", "JupyterLab Dark"))
@pytest.mark.parametrize("width", (1280, 1920))
def test_nothing_is_cut_off(explore, width, theme):
    size = explore.driver.get_window_size()
    explore.driver.set_window_size(width, 1100)
    try:
        explore.js("window.jupyterapp.commands.execute('apputils:change-theme', {theme: arguments[0]})", theme)
        until(lambda: explore.js("return document.body.dataset.jpThemeName") == theme, theme)
        until(lambda: explore.js(FITS), "figures are as wide as their cells")
        assert explore.js(CUT_OFF) == []
        for name in PANELS:
            panel = explore.bring(f".maestlib-{name}")
            explore.js("arguments[0].scrollIntoView()", panel)
            time.sleep(0.4)
            explore.picture(f"{name}-{width}{'-dark' if 'Dark' in theme else ''}")
    finally:
        explore.driver.set_window_size(size["width"], size["height"])


def test_the_console_has_no_errors(explore):
    assert explore.errors() == []


def test_uploads(explore, tmp_path):
    (tmp_path / "broken.mp3").write_text("not music")
    tone = np.sin(np.arange(16000 * 4) * 0.2).astype("float32")
    soundfile.write(tmp_path / "tone.wav", tone, 16000)
    figure = ".maestlib-patchout .maestlib-mel"
    explore.bring(".maestlib-patchout .maestlib-upload")
    before = explore.state(figure)
    message = explore.driver.find_element("css selector", ".maestlib-patchout .maestlib-message")
    upload = explore.driver.find_element("css selector", ".maestlib-patchout .maestlib-upload input")
    upload.send_keys(str(tmp_path / "broken.mp3"))
    until(lambda: "broken.mp3" in message.text, "the broken file is named")
    assert explore.state(figure) == before
    upload.send_keys(str(tmp_path / "tone.wav"))
    until(lambda: explore.state(figure) != before, "another file, another spectrogram")
    until(lambda: message.text == "tone.wav.", "the file is named, and the error is cleared")
    seconds = GRAPH + "return gd.layout.xaxis.range[1]"
    until(lambda: abs(explore.js(seconds, figure) - 4) < 0.1, "four seconds are shown")
    menu = "return document.querySelector('.maestlib-patchout .maestlib-track select').value"
    until(lambda: explore.js(menu) == "", "the menu is cleared")


@pytest.mark.slow
def test_a_file_of_115_mb_arrives(explore, tmp_path):
    soundfile.write(tmp_path / "hour.wav", np.tile(np.sin(np.arange(16000 * 4) * 0.2), 900), 16000)
    explore.bring(".maestlib-patchout .maestlib-upload")
    explore.driver.find_element("css selector", ".maestlib-patchout .maestlib-upload input").send_keys(
        str(tmp_path / "hour.wav")
    )
    message = explore.driver.find_element("css selector", ".maestlib-patchout .maestlib-message")
    until(lambda: "60 min" in message.text, "its length is named")


def test_a_menu_has_a_tooltip_and_keeps_its_keys(explore):
    menu = explore.bring(".maestlib-layers .maestlib-track select")
    cells = explore.js(COUNT_CELLS)
    ActionChains(explore.driver).move_to_element(menu).perform()
    tip = "return arguments[0].closest('[title]')?.title"
    until(lambda: "neighbors" in (explore.js(tip, menu) or ""), "the tooltip is there")
    before = explore.state(".maestlib-layers .maestlib-neighbors")
    menu.send_keys("d", "d")
    until(lambda: explore.state(".maestlib-layers .maestlib-neighbors") != before, "another tune is chosen")
    assert explore.js(COUNT_CELLS) == cells, "d d deletes a cell, but not from a menu"


@pytest.mark.slow
def test_a_study_runs_to_the_end(lab):
    lab.run_all("probing/probe")


@pytest.mark.slow
def test_the_explorer_as_an_app(tmp_path):
    pytest.importorskip("voila", reason="Voilà is not installed: pip install -e '.[dev]'")
    with App(tmp_path / "app") as app:
        app.driver.get(app.url)
        until(lambda: app.state(".maestlib-song .maestlib-time-tags"), "the last figure is drawn", RUN_TIMEOUT_S)
        for slider, figure, key in SLIDERS[0], SLIDERS[3], SLIDERS[5]:
            app.changes(slider, figure, key)
        assert not app.driver.find_elements("css selector", ".jp-CodeCell .jp-InputArea"), "no code is shown"
        app.picture("app")
