"""JupyterLab on copies of the notebooks, driven by a headless browser. Needs selenium, Chromium and chromedriver.

with Lab(folder) as lab:
    lab.run_all("explore")
    for index, element in lab.outputs():
        lab.screenshot(element, f"cell-{index}.png")
"""

import contextlib
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.remote.webelement import WebElement

from maestlib.core.files import cache_path

ROOT = Path(__file__).resolve().parent.parent
CHROME = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
LEFT, RIGHT = "\ue012", "\ue014"  # arrow keys
TIMEOUT_S = 600  # how long a test waits for anything: a machine may be slow
RUN_TIMEOUT_S = 3600  # for all cells of a notebook

NOTEBOOK = "const notebook = window.jupyterapp.shell.currentWidget.content; "
CODE_CELLS = (
    NOTEBOOK
    + "const cells = [...notebook.model.cells].map(c => c.toJSON())"
    + ".filter(c => c.cell_type == 'code' && c.source.length); "
)
ERRORS = CODE_CELLS + (
    "return cells.flatMap(c => c.outputs).filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue)"
)
COUNT_CELLS = CODE_CELLS + "return cells.length"
COUNT_NOT_RUN = CODE_CELLS + "return cells.filter(c => c.execution_count == null).length"
COUNT_BUSY = "return [...document.querySelectorAll('.jp-InputPrompt')].filter(e => e.innerText.includes('*')).length"
IS_READY = """const panel = window.jupyterapp?.shell.currentWidget; const session = panel?.sessionContext;
return panel?.context?.isReady && session?.isReady && session.session?.kernel?.status == 'idle'
       && document.querySelectorAll('.jp-Notebook .jp-CodeCell').length > 2"""
# anywidget gives the code of a widget two seconds to load, and afterwards drops all messages to that widget. Five
# megabytes of plotly take longer where the machine is busy, and the figure would stay empty.
PATIENCE = """const timeout = AbortSignal.timeout.bind(AbortSignal);
AbortSignal.timeout = milliseconds => timeout(Math.max(milliseconds, 600000));"""
WIDGETS = (
    NOTEBOOK
    + """
const isWidget = output => output.data['application/vnd.jupyter.widget-view+json'];
const isProgress = node => node.querySelector('.progress-bar') && !node.querySelector('.maestlib');
return notebook.widgets.flatMap((cell, index) => cell.model.type != 'code' ? [] :
    cell.outputArea.widgets.flatMap((node, i) => {
        const model = cell.outputArea.model.get(i);
        const shown = node.node.querySelector('.jp-OutputArea-output') || node.node;  // without the prompt
        return model && isWidget(model) && !isProgress(node.node) ? [[index, shown]] : [];
    }))"""
)
GRAPH = "const gd = document.querySelector(arguments[0]); "  # the plotly figure of a selector
START_CLOCK = """window.pressed = window.drawn = 0; if (!window.clocked) { window.clocked = true;
document.addEventListener('keydown', () => { window.pressed = performance.now(); window.drawn = 0 }, true) } """
STOP_CLOCK = """window.watched = gd; for (const e of ['afterplot', 'relayout'])
gd.on('plotly_' + e, () => { if (window.watched == gd) window.drawn ||= performance.now() })"""
FIGURE_STATE = (
    GRAPH
    + """
const sum = (v, i) => Array.from(v?.length ? v : [v ?? 0]).reduce((a, b) => a + (+b || 0) * (1 + i % 7), 0);
const data = t => [t.z, t.x, t.y].flatMap(a => [...(a || [])]).flat().reduce((s, v, i) => s + sum(v, i), 0);
return gd && gd.data ? JSON.stringify([gd.data.map(data), gd.data.map(t => t.marker?.line?.width),
                                       gd.layout.title, gd.layout.shapes]) : null"""
)


def until(condition: Callable, what: str, timeout_s: float = TIMEOUT_S):
    "Wait for `condition()` to be true and return it. Raises `AssertionError`, naming `what`, after the timeout."
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {timeout_s:g} s")


@contextlib.contextmanager
def serve(
    folder: Path,
    missing: Path | None = None,  # the page that is sent where there is no file
):
    "A server of static files. Yields its address and the list of paths that it was asked for."

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _, *arguments):
            asked.append(str(arguments[0]))

        def send_error(self, code, *details):
            if code != 404 or missing is None:
                return super().send_error(code, *details)
            self.send_response(404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(missing.read_bytes() if self.command == "GET" else b"")

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


class Lab:
    "A JupyterLab server on a copy of `nbs/` in a folder of its own, and a browser that shows it."

    load_strategy = "normal"  # `get` returns when a page is loaded

    def __init__(
        self,
        folder: Path,  # to be created: notebooks, settings, logs
        theme: str = "JupyterLab Light",  # or JupyterLab Dark
        window: tuple[int, int] = (1600, 1400),  # pixels
    ):
        self.folder, self.driver = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*"))
        self._write_settings(theme)
        self._link_caches()
        self.server = self._start_server()
        try:
            until(self._answers, "JupyterLab starts")
            self.driver = self._start_browser(window)
            self.js = self.driver.execute_script
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _write_settings(self, theme: str):
        settings = {
            "apputils-extension/themes": {"theme": theme},
            "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
        }
        for name, values in settings.items():
            path = self.folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))

    def _link_caches(self):
        "Share what is expensive to make; the caches of probes start empty."
        (self.folder / "cache").mkdir()
        for name in ("tunes", "mels", "embeddings", "speed"):
            cache_path(name).mkdir(exist_ok=True)
            (self.folder / "cache" / name).symlink_to(cache_path(name))

    def _start_server(self) -> subprocess.Popen:
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        environment = os.environ | {name: str(self.folder / name.lower()) for name in names}
        environment["JUPYTERLAB_SETTINGS_DIR"] = str(self.folder / "settings")
        environment["MAESTLIB_CACHE"] = str(self.folder / "cache")
        environment["MAESTLIB_RUNS"] = str(self.folder / "runs")  # none of other tests: the bundled model is shown
        environment["IPYTHONDIR"] = str(self.folder / "ipython")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(self.folder / "lab.log", "w") as log:
            return subprocess.Popen(self._command(), stdout=log, stderr=log, env=environment, cwd=self.folder)

    def _command(self) -> list[str]:
        port = self.url.rsplit(":")[-1]
        options = {"token": "", "password": "", "root_dir": self.folder / "nbs", "port": port, "port_retries": 0}
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += ["--LabApp.expose_app_in_browser=True"]  # to run its commands
        return command + [f"--ServerApp.{name}={value}" for name, value in options.items()]

    def _answers(self) -> bool:
        assert self.server.poll() is None, "JupyterLab ended: see lab.log"
        try:
            return urllib.request.urlopen(f"{self.url}/api").status == 200
        except OSError:
            return False

    def _start_browser(self, window: tuple[int, int]) -> webdriver.Chrome:
        options = webdriver.ChromeOptions()
        options.binary_location, options.page_load_strategy = CHROME, self.load_strategy
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        arguments = ["headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"]
        arguments += ["disable-dev-shm-usage", f"window-size={window[0]},{window[1]}"]
        arguments += [f"user-data-dir={self.folder / 'chrome'}"]
        for argument in arguments:
            options.add_argument(f"--{argument}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PATIENCE})
        driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # else no widget is the current
        driver.set_script_timeout(TIMEOUT_S)
        driver.set_page_load_timeout(TIMEOUT_S)
        return driver

    def run_all(
        self,
        name: str,  # a path below nbs/, without .ipynb
        timeout_s: float = RUN_TIMEOUT_S,
    ):
        "Open a notebook, run all its cells, wait for the end, and assert that every cell ran without an error."
        self.js("window.jupyterapp?.serviceManager.sessions.shutdownAll()")
        self.driver.get(f"{self.url}/lab/tree/{name}.ipynb?reset")
        until(lambda: self.js(IS_READY), f"{name} and its kernel are ready")
        self.js("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        until(lambda: self.js(COUNT_BUSY) or self.js(COUNT_NOT_RUN) == 0, "cells start")
        until(lambda: not self.js(COUNT_BUSY) or self.js(ERRORS), f"{name} ends", timeout_s)
        assert self.js(ERRORS) == [] and self.js(COUNT_NOT_RUN) == 0

    def bring(self, selector: str) -> WebElement:
        "Wait for an element and scroll it into view."
        element = until(lambda: self.driver.find_elements("css selector", selector), f"{selector} is shown")[0]
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def choose(self, dropdown: str, index: int):
        "Choose an entry of a menu, counted from 0."
        select = """arguments[0].selectedIndex = arguments[1];
        arguments[0].dispatchEvent(new Event('change', {bubbles: true}))"""
        self.js(select, self.bring(f"{dropdown} select"), index)

    def state(self, figure: str) -> str | None:
        "Summarize what a plotly figure shows, so that two states can be compared; None where it is not drawn."
        return self.js(FIGURE_STATE, figure)

    def changes(self, slider: str, figure: str, key: str = RIGHT) -> float:  # ms from key press to redraw
        "Move a slider by an arrow key, and wait until the figure shows something else."
        self.bring(figure)
        before = until(lambda: self.state(figure), f"{figure} is drawn")
        self.js(START_CLOCK + GRAPH + STOP_CLOCK, figure)
        self.driver.find_element("css selector", f"{slider} .noUi-handle").send_keys(key)
        until(lambda: self.state(figure) != before, f"{slider} changes {figure}")
        return self.js("return window.drawn - window.pressed")

    def outputs(self) -> list[tuple[int, WebElement]]:  # index among all cells of the notebook, and the output
        "List the outputs of the open notebook that hold a widget; progress bars of tqdm do not count."
        return [(index, element) for index, element in self.js(WIDGETS)]

    def screenshot(
        self,
        element: str | WebElement,  # a CSS selector, or an element as of `outputs`
        path: str | Path,  # the PNG file to write
    ):
        "Save the picture of one element, in full: the window grows for it where it is too small."
        element = self.bring(element) if isinstance(element, str) else element
        size = self.driver.get_window_size()
        height = self.js("return arguments[0].getBoundingClientRect().height", element) + 400  # of the window's bars
        try:
            self.driver.set_window_size(size["width"], max(size["height"], int(height)))
            self.js("document.activeElement?.blur()")
            self.js("arguments[0].scrollIntoView({block: 'center'})", element)
            time.sleep(1)  # plotly's transitions and the browser's own painting
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(element.screenshot_as_png)
        finally:
            self.driver.set_window_size(size["width"], size["height"])

    def errors(self) -> list[str]:
        "Read what was logged on the browser's console as an error since the last call."
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def picture(self, name: str):
        "Save the whole window under runs/screenshots."
        folder = ROOT / "runs/screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(folder / f"{name}.png"))

    def close(self):
        "End browser and server."
        if self.driver is not None:
            self.driver.quit()
        self.server.terminate()
        try:
            self.server.wait(60)
        except subprocess.TimeoutExpired:
            self.server.kill()


class App(Lab):
    "A notebook of the top folder as an app, made by Voilà, on a server and in a browser like those of `Lab`."

    load_strategy = "none"  # a page is loaded when all cells have run

    def _command(self) -> list[str]:
        notebook, port = self.folder / "nbs/explore.ipynb", self.url.rsplit(":")[-1]
        return [sys.executable, "-m", "voila", str(notebook), "--no-browser", f"--port={port}"]

    def _answers(self) -> bool:
        assert self.server.poll() is None, "Voilà ended: see lab.log"
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", int(self.url.rsplit(":")[-1]))) == 0
