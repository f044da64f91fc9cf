"""The notebooks in JupyterLab, in a real browser: Run All ends well, sliders move pictures, a click plays."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile

from maestlib.core.files import cache_path

HERE = Path(__file__).resolve().parent.parent
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install -e '.[dev]'")
CHROME = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROME and DRIVER), reason="no Chromium with chromedriver on the PATH")
LEFT, RIGHT = "\ue012", "\ue014"  # arrow keys
CELLS = """const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells].map(c => c.toJSON())
    .filter(c => c.cell_type == 'code' && c.source.length); """
ERRORS = (
    CELLS + "return cells.flatMap(c => c.outputs).filter(o => o.output_type == 'error').map(o => o.ename + o.evalue)"
)
MISSED = CELLS + "return cells.filter(c => c.execution_count == null).length"
BUSY = "return [...document.querySelectorAll('.jp-InputPrompt')].filter(e => e.innerText.includes('*')).length"
GRAPH = "const gd = document.querySelector(arguments[0]); "
CLOCK = """window.pressed = window.drawn = 0; if (!window.clocked) { window.clocked = true;
document.addEventListener('keydown', () => { window.pressed = performance.now(); window.drawn = 0 }, true) } """
LISTEN = """window.watched = gd; for (const e of ['afterplot', 'relayout'])
gd.on('plotly_' + e, () => { if (window.watched == gd) window.drawn ||= performance.now() })"""
STATE = (
    GRAPH
    + """
const sum = (v, i) => Array.from(v?.length ? v : [v ?? 0]).reduce((a, b) => a + (+b || 0) * (1 + i % 7), 0);
const data = t => [t.z, t.x, t.y].flatMap(a => [...(a || [])]).flat().reduce((s, v, i) => s + sum(v, i), 0);
return gd && gd.data ? JSON.stringify([gd.data.map(data), gd.data.map(t => t.marker?.line?.width),
                                       gd.layout.title, gd.layout.shapes]) : null"""
)
READY = """const panel = window.jupyterapp?.shell.currentWidget; const session = panel?.sessionContext;
return panel?.context?.isReady && session?.isReady && session.session?.kernel?.status == 'idle'
       && document.querySelectorAll('.jp-Notebook .jp-CodeCell').length > 2"""


def until(read, what: str, seconds: float = 30):
    "The first thing that is true of what `read_tensors` gives."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := read():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds:g} s")


class Lab:
    "JupyterLab on copies of the notebooks, and a browser that looks at it."

    def __init__(self, folder: Path, theme: str = "JupyterLab Light"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        (folder / "nbs").mkdir(parents=True)
        for path in HERE.glob("nbs/*.ipynb"):
            shutil.copy(path, folder / "nbs")
        wishes = {"apputils-extension/themes": f'{{"theme": "{theme}"}}',
                  "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
                  "notebook-extension/tracker":
                      '{"windowingMode": "none", "autoStartDefaultKernel": true}'}  # fmt: skip
        for name, wish in wishes.items():
            path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wish)
        for name in ("tunes", "mels", "embeddings", "speed"):  # made once for all tests; probes start from none
            cache_path(name).mkdir(exist_ok=True)
            (folder / "cache").mkdir(exist_ok=True)
            (folder / "cache" / name).symlink_to(cache_path(name))
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        places = {name: str(folder / name.lower()) for name in names}
        places |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "MAESTLIB_CACHE": str(folder / "cache")}
        wanted = {
            "token": "",
            "password": "",
            "root_dir": folder / "nbs",
            "port": self.url.rsplit(":")[-1],
            "port_retries": 0,
        }
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += ["--LabApp.expose_app_in_browser=True"]  # to run its commands
        command += [f"--ServerApp.{name}={value}" for name, value in wanted.items()]
        packages = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        environment = os.environ | places | {"PYTHONPATH": packages, "IPYTHONDIR": str(folder / "ipython")}
        with open(folder / "lab.log", "w") as log:
            self.server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        self.driver = None
        try:
            until(self._answers, "JupyterLab starts", 40)
            options = webdriver.ChromeOptions()
            options.binary_location = CHROME
            for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking",
                             "disable-dev-shm-usage", "window-size=1600,1400",
                             f"user-data-dir={folder / 'chrome'}"):  # fmt: skip
                options.add_argument(f"--{argument}")
            self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
            self.js = self.driver.execute_script
        except BaseException:
            self.close()
            raise

    def _answers(self):
        assert self.server.poll() is None, "JupyterLab ended: see lab.log"
        try:
            return urllib.request.urlopen(f"{self.url}/api").status == 200
        except OSError:
            return False

    def run_all(self, name: str, seconds: float = 120):
        "Open a notebook, run all its cells, and wait until none is running."
        self.js("window.jupyterapp?.serviceManager.sessions.shutdownAll()")
        self.driver.get(f"{self.url}/lab/tree/{name}.ipynb?reset")
        until(lambda: self.js(READY), f"{name} and its kernel are there", 60)
        self.js("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        until(lambda: self.js(BUSY), "cells start", 20)
        until(lambda: not self.js(BUSY), f"{name} ends", seconds)
        assert self.js(ERRORS) == [] and self.js(MISSED) == 0

    def bring(self, selector: str):  # the element, in view
        found = until(lambda: self.driver.find_elements("css selector", selector), f"{selector} is shown")[0]
        self.js("arguments[0].scrollIntoView({block: 'center'})", found)
        return found

    def choose(self, dropdown: str, number: int):
        "One of the entries, from 0."
        self.js(
            """arguments[0].selectedIndex = arguments[1];
        arguments[0].dispatchEvent(new Event('change', {bubbles: true}))""",
            self.bring(f"{dropdown} select"),
            number,
        )

    def state(self, figure: str):  # what a plotly figure shows, as text
        return self.js(STATE, figure)

    def changes(self, slider: str, figure: str, key: str = RIGHT, seconds: float = 15) -> float:  # ms, key to picture
        "Move a slider by the arrow keys; wait until the figure is another one."
        self.bring(figure)
        before = until(lambda: self.state(figure), f"{figure} is drawn")
        self.js(CLOCK + GRAPH + LISTEN, figure)
        self.driver.find_element("css selector", f"{slider} .noUi-handle").send_keys(key)
        until(lambda: self.state(figure) != before, f"{slider} changes {figure}", seconds)
        return self.js("return window.drawn - window.pressed")

    def picture(self, name: str):
        folder = HERE / "runs/screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(folder / f"{name}.png"))

    def close(self):
        if self.driver is not None:
            self.driver.quit()
        self.server.terminate()
        try:
            self.server.wait(10)
        except subprocess.TimeoutExpired:
            self.server.kill()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab") / "here")
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def explore(lab):
    lab.run_all("explore")
    return lab


SLIDERS = [
    (".maestlib-patchout .maestlib-time", ".maestlib-patchout .maestlib-mel", RIGHT),
    (".maestlib-patchout .maestlib-time", ".maestlib-patchout .maestlib-tags", RIGHT),
    (".maestlib-patchout .maestlib-frequency", ".maestlib-patchout .maestlib-mel", RIGHT),
    (".maestlib-layers .maestlib-block", ".maestlib-layers .maestlib-map", RIGHT),
    (".maestlib-layers .maestlib-block", ".maestlib-layers .maestlib-neighbours", RIGHT),
    (".maestlib-attention .maestlib-block", ".maestlib-attention .maestlib-light", RIGHT),
    (".maestlib-attention .maestlib-head", ".maestlib-attention .maestlib-light", RIGHT),
    (".maestlib-song .maestlib-top", ".maestlib-song .maestlib-time-tags", LEFT),
    (".maestlib-song .maestlib-window", ".maestlib-song .maestlib-time-tags", RIGHT),
]


@pytest.mark.parametrize("slider, figure, key", SLIDERS, ids=lambda v: v.rsplit("-")[-1] if len(v) > 1 else "")
def test_a_slider_changes_a_figure(explore, slider, figure, key):
    took = explore.changes(slider, figure, key)
    print(f"{slider} → {figure}: {took:.0f} ms")


def test_a_click_on_the_map_plays(explore):
    explore.bring(".maestlib-layers .maestlib-map")
    before = explore.state(".maestlib-layers .maestlib-neighbours")
    point = explore.driver.find_elements("css selector", ".maestlib-layers .maestlib-map .points path.point")[20]
    webdriver.ActionChains(explore.driver).move_to_element(point).pause(0.5).click().perform()
    playing = "const a = document.querySelector('.maestlib-layers audio'); return !a.paused && a.currentTime > 0"
    until(lambda: explore.js(playing), "the clip plays", 10)
    until(lambda: explore.state(".maestlib-layers .maestlib-neighbours") != before, "its neighbours are shown", 10)


def test_the_cursor_follows_the_player(explore):
    figure = ".maestlib-song .maestlib-time-tags"
    explore.bring(figure)
    drag = explore.driver.find_element("css selector", f"{figure} .nsewdrag")
    webdriver.ActionChains(explore.driver).move_to_element(drag).pause(0.5).click().perform()
    place = GRAPH + "return gd.layout.shapes[0].x0"
    first = until(lambda: explore.js(place, figure) > 30 and explore.js(place, figure), "a click seeks", 10)
    until(lambda: explore.js(place, figure) > first + 0.3, "the cursor moves", 10)


def test_tsne_keeps_what_was_chosen(explore):
    explore.bring(".maestlib-layers .maestlib-map")
    explore.driver.find_elements("css selector", ".maestlib-layers .maestlib-method button")[1].click()
    title = GRAPH + "return gd.layout.title.text"
    until(
        lambda: explore.js(title, ".maestlib-layers .maestlib-map").startswith("t-SNE of block"), "t-SNE is drawn", 60
    )
    assert explore.js(GRAPH + "return gd.data.at(-1).x.length", ".maestlib-layers .maestlib-map") == 1, "the star"


def test_pictures(explore):
    for theme in ("Dark", "Light"):
        explore.js(
            "window.jupyterapp.commands.execute('apputils:change-theme', {theme: arguments[0]})", f"JupyterLab {theme}"
        )
        until(lambda: explore.js("return document.body.dataset.jpThemeName") == f"JupyterLab {theme}", theme)  # noqa: B023
        for name in ("patchout", "layers", "attention", "song"):
            explore.bring(f".maestlib-{name}")
            time.sleep(0.4)
            explore.picture(name if theme == "Light" else f"{name}-dark")


def test_uploads(explore, tmp_path):
    (tmp_path / "broken.mp3").write_text("not music")
    tone = np.sin(np.arange(16000 * 4) * 0.2).astype("float32")
    soundfile.write(tmp_path / "tone.wav", tone, 16000)
    explore.bring(".maestlib-patchout .maestlib-upload")
    before = explore.state(".maestlib-patchout .maestlib-mel")
    says = explore.driver.find_element("css selector", ".maestlib-patchout .maestlib-message")
    chosen = explore.driver.find_element("css selector", ".maestlib-patchout .maestlib-upload input")
    chosen.send_keys(str(tmp_path / "broken.mp3"))
    until(lambda: "broken.mp3" in says.text, "the broken file is named", 10)
    assert explore.state(".maestlib-patchout .maestlib-mel") == before
    chosen.send_keys(str(tmp_path / "tone.wav"))
    until(lambda: explore.state(".maestlib-patchout .maestlib-mel") != before, "another file, another mel", 10)
    assert says.text == ""
    seconds = GRAPH + "return gd.layout.xaxis.range[1]"
    until(lambda: abs(explore.js(seconds, ".maestlib-patchout .maestlib-mel") - 4) < 0.1, "four seconds are shown", 10)
    assert explore.js("return document.querySelector('.maestlib-patchout .maestlib-track select').value") == ""
    soundfile.write(tmp_path / "hour.wav", np.tile(tone, 900), 16000)
    chosen.send_keys(str(tmp_path / "hour.wav"))
    until(lambda: "60 min" in says.text, "a file of 115 MB arrives", 60)


def test_a_menu_has_a_tooltip_and_keeps_its_keys(explore):
    menu = explore.bring(".maestlib-layers .maestlib-track select")
    cells = explore.js(CELLS + "return cells.length")
    webdriver.ActionChains(explore.driver).move_to_element(menu).perform()
    tip = "return arguments[0].closest('[title]')?.title"
    until(lambda: "neighbours" in (explore.js(tip, menu) or ""), "the tooltip is there", 10)
    before = explore.state(".maestlib-layers .maestlib-neighbours")
    menu.send_keys("d", "d")
    until(lambda: explore.state(".maestlib-layers .maestlib-neighbours") != before, "another tune is chosen", 10)
    assert explore.js(CELLS + "return cells.length") == cells, "d d deletes a cell, but not from a menu"


def test_probe(lab):
    lab.run_all("probe")


def test_layers_shows_what_is_chosen_and_probes_what_is_missing(lab):
    lab.run_all("layers")
    figure = ".maestlib-curves"
    before = until(lambda: lab.state(figure), "the curves are drawn")
    lab.choose(".maestlib-label", 2)
    until(lambda: lab.state(figure) != before, "another label, other curves", 10)
    lab.choose(".maestlib-token", 0)
    missing = lab.bring(".maestlib-compute button, button.maestlib-compute")
    lab.js("""for (const o of document.querySelectorAll('.maestlib-blocks option')) o.selected = o.index < 2;
    document.querySelector('.maestlib-blocks select').dispatchEvent(new Event('change', {bubbles: true}))""")
    until(lambda: "block 0+1, c: not probed" in lab.bring(".maestlib-numbers").text, "what was not probed is named", 20)
    missing.click()
    until(lambda: "0+1 c" in lab.bring(".maestlib-numbers").text, "probed", 60)
    lab.picture("probes")


def test_speed(lab):
    lab.run_all("speed")
    print(f"keep every → grid: {lab.changes('.maestlib-keep', '.maestlib-grid'):.0f} ms")
    print(f"keep every → frontier: {lab.changes('.maestlib-keep', '.maestlib-frontier'):.0f} ms")
    lab.changes(".maestlib-block", ".maestlib-frontier", LEFT)
    lab.picture("speed")
