"""The page that tags music, in a real browser and offline: its tags are Python's, and nothing leaves the machine.

Needs the extra `onnx`, Chromium, and onnxruntime-web in the cache or npm to fetch it.
"""

import csv
import io
import re
import shutil
import urllib.request

import numpy as np
import pytest
import soundfile
import torch

for package, extra in (("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("selenium.webdriver", "dev")):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[{extra}]'")

from lab import CHROME, DRIVER, ROOT, serve, until  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.webdriver import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

from maestlib.audio.mel import load_audio  # noqa: E402
from maestlib.collection.page import RUNTIME, RUNTIME_VERSION, export_page  # noqa: E402
from maestlib.core.files import asset_path, cache_path  # noqa: E402
from maestlib.inference.embedding import tag  # noqa: E402
from maestlib.inference.windows import iter_windows  # noqa: E402
from maestlib.models.checkpoint import load_model  # noqa: E402
from maestlib.models.cost import count_flops  # noqa: E402
from maestlib.models.patchout import Patchout  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROME and DRIVER), reason="no Chromium with chromedriver on the PATH"),
    pytest.mark.skipif(
        not (shutil.which("npm") or cache_path("npm", f"{RUNTIME}-{RUNTIME_VERSION}.tgz").exists()),
        reason=f"{RUNTIME} is not in the cache, and there is no npm to fetch it",
    ),
]
# asks another origin from a worker that is started as the page starts its own, and from the page
ASK = """const [url, done] = arguments;
const ask = `fetch("${url}", {mode: "no-cors"}).then(() => postMessage("answered"), () => postMessage("refused"))`;
const worker = new Worker(URL.createObjectURL(new Blob([ask])));
worker.onmessage = ({data}) =>
    fetch(url, {mode: "no-cors"}).then(() => done(["answered", data]), () => done(["refused", data]))"""
READ_TABLE = """const done = arguments[0];
fetch(document.getElementById("save").href).then(answer => answer.text()).then(done)"""
PRETEND_WEBGPU = "navigator.gpu.requestAdapter = async () => ({info: {}})"  # the worker, where it matters, has none
REQUESTED = "return performance.getEntriesByType('resource').map(entry => entry.name)"


class Page:
    "The page in a browser that cannot reach any other host, whose microphone plays a file."

    def __init__(self, url, folder, microphone):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROME
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        arguments = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1300"]
        arguments += ["disable-background-networking", "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        arguments += ["use-fake-ui-for-media-stream", "use-fake-device-for-media-stream"]
        arguments += [f"use-file-for-fake-audio-capture={microphone}", f"user-data-dir={folder / 'chrome'}"]
        for argument in arguments:
            options.add_argument(f"--{argument}")
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(600)
        self.js, self.url = self.driver.execute_script, url
        self.load()

    def load(self):
        self.driver.get(f"{self.url}/index.html")
        until(lambda: self.text("status") == "Ready.", "the model is loaded")

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, name):
        return self.find(f"#{name}").text

    def upload(self, path):
        self.find("#file").send_keys(str(path))

    def tag(self, act, name):
        "Do something, and wait until the page has tagged the recording of this name. Returns its status."
        self.js("document.getElementById('status').textContent = ''")
        act()
        done = re.compile(rf"Tagged \d+:\d\d of “{re.escape(name)}” in [\d.]+ s by .*")
        status = until(lambda: done.fullmatch(self.text("status")), f"{name} is tagged")
        assert not self.find("#error").is_displayed()
        return status[0]

    def press(self, clip):
        button = self.find(f"[data-clip={clip}]")
        return self.tag(button.click, button.text)

    def table(self):  # {label: activations: whole, then each window}
        rows = list(csv.reader(io.StringIO(self.driver.execute_async_script(READ_TABLE))))
        return {row[0]: [float(value) for value in row[2:]] for row in rows[1:]}

    def set_size(self, width, theme="light"):
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": width, "height": 1300, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hear")
    assert export_page(folder / "page") == folder / "page/index.html"
    soundfile.write(folder / "microphone.wav", load_audio(asset_path("hear/clips/reel.mp3"))[: 16_000 * 12], 16_000)
    with serve(folder / "page") as (url, _):
        page = Page(url, folder, folder / "microphone.wav")
        yield page
        page.driver.quit()


def assert_same_tags(page, path, model):
    expected = dict(tag(path, model, top=None, dtype="float32").rows())  # bfloat16 differs by .005
    table = page.table()
    assert table.keys() == expected.keys()
    assert max(abs(table[label][0] - value) for label, value in expected.items()) < 1e-3


@pytest.mark.parametrize("clip", ["jig", "song", "reel", "lofi"])
def test_tags_of_a_shipped_tune(page, model, clip):
    print(page.press(clip))
    assert_same_tags(page, asset_path(f"hear/clips/{clip}.mp3"), model)
    assert len(next(iter(page.table().values()))) == 1 + 5, "the whole, and windows that overlap by half"
    assert page.errors() == []


def test_tags_of_an_mp3_in_stereo(page, model, tmp_path):
    left, right = (load_audio(asset_path(f"hear/clips/{clip}.mp3"), sample_rate=44_100) for clip in ("song", "jig"))
    path = tmp_path / "two songs.mp3"
    soundfile.write(path, np.stack([left, right], 1)[: 44_100 * 17], 44_100, format="MP3")
    print(page.tag(lambda: page.upload(path), path.name))
    assert_same_tags(page, path, model)
    assert page.errors() == []


def test_the_slider_leaves_patches_out(page, model):
    page.press("jig")
    slider, before = page.find("#every"), page.text("sentence")
    assert before.startswith("The model sees all 549 patches")
    window = load_audio(asset_path("hear/clips/jig.mp3"), duration_s=10)
    for every in (2, 3):
        slider.send_keys(Keys.ARROW_RIGHT)
        cost, all_patches = count_flops(model.config, Patchout(every)), count_flops(model.config)
        until(lambda: page.text("tokens") == f"{cost['tokens']} of {cost['total_tokens']}", "the tokens")  # noqa: B023
        assert page.text("gflop") == f"{cost['gflop']:.2f} of {all_patches['gflop']:.2f} GFLOP"
        assert f"{cost['tokens'] - 2} of 549 patches" in page.find("#grid").get_attribute("aria-label")
        expected = {label.split("---")[-1]: 100 * a for label, a in tag(window, model, patchout=Patchout(every)).rows()}
        bars = page.driver.find_elements("css selector", "#bars li:not(.gone)")
        shown = {bar.find_element("css selector", ".label").text.split("\n")[0]: bar for bar in bars}
        assert len(bars) == 10
        for label, bar in shown.items():
            name = next(name for name in sorted(expected, key=len, reverse=True) if label.startswith(name))
            assert abs(float(bar.find_element("css selector", ".value").text.split()[0]) - expected[name]) <= 1.5
    print(page.text("sentence"), page.text("ms"))
    sentence = r"The model now sees 189 of 549 patches, runs \d+\.\d.×.faster, and (all|\d) of its 10 first tags stay\."
    assert re.fullmatch(sentence, page.text("sentence"))
    page.find("#rows").send_keys(Keys.SPACE)
    tokens = count_flops(model.config, Patchout(3, (0, 7, 8)))["tokens"]
    until(lambda: page.text("tokens") == f"{tokens} of 551", "rows are dropped, too")
    page.find("#rows").click()
    slider.send_keys(Keys.HOME)
    until(lambda: page.text("sentence") == before, "all patches again")
    assert page.errors() == []


def heard(page):  # (samples,) at 16 kHz, of the player of what is left
    script = """const done = arguments[0];
    fetch(document.getElementById("left").src).then((r) => r.arrayBuffer()).then((bytes) =>
      done(Array.from(new Int16Array(bytes, 44))))"""
    return np.array(page.driver.execute_async_script(script), np.float32) / 32767


def test_what_is_left_can_be_heard(page):
    page.press("jig")
    wave = load_audio(asset_path("hear/clips/jig.mp3"), duration_s=10).numpy()
    until(lambda: len(heard(page)) == len(wave) // 256 * 256, "the whole window")
    all_of_it = heard(page)
    assert abs(all_of_it - wave[: len(all_of_it)]).mean() < 1e-3, "but for peaks above full scale"
    for _ in range(3):
        page.find("#every").send_keys(Keys.ARROW_RIGHT)
    page.find("#rows").send_keys(Keys.SPACE)
    until(lambda: "now sees 96 of 549" in page.text("sentence"), "six rows of one column in four")
    frames = np.square(heard(page)).reshape(-1, 256).mean(1)
    is_kept = (np.arange(len(frames)) % 40 < 16) & (np.arange(len(frames)) < 616)
    assert frames[~is_kept].max() < 1e-9 < frames[is_kept].mean(), "gaps where no column is left"
    left = torch.from_numpy(heard(page)[10240:14336])  # of the second column
    power = torch.stft(left, 512, 256, window=torch.hann_window(512), return_complex=True).abs().square().mean(1)
    assert power[:2].max() < power[20:80].max() / 100 > power[200:].max(), "neither low nor high frequencies"
    page.find("#rows").click()
    page.find("#every").send_keys(Keys.HOME)
    page.js("document.getElementById('left').play()")
    until(lambda: page.js("return document.getElementById('left').currentTime") > 0.5, "it plays")
    page.find("#every").send_keys(Keys.ARROW_RIGHT)
    until(lambda: "now sees" in page.text("sentence"), "half of the columns")
    assert page.js("return document.getElementById('left').currentTime") > 0.4, "it goes on where it was"
    page.js("document.getElementById('player').play()")
    until(lambda: page.js("return document.getElementById('left').paused"), "one player plays at a time")
    page.js("document.getElementById('player').pause()")
    page.find("#every").send_keys(Keys.HOME)
    assert page.errors() == []


def test_windows_are_those_of_python(page, model, tmp_path):
    wave = load_audio(asset_path("hear/clips/song.mp3"))
    for seconds, count in ((30, 5), (15.1, 2), (15.3, 3), (4, 1)):  # 0.1 s is not worth a window
        path = tmp_path / f"{seconds} s.wav"
        soundfile.write(path, wave[: int(16_000 * seconds)], 16_000)
        page.tag(lambda: page.upload(path), path.name)  # noqa: B023
        assert_same_tags(page, path, model)
        config = model.config
        windows = list(iter_windows(path, config.mel, config.num_frames, config.num_frames // 2))
        values = np.array([model(mel[None]).sigmoid()[0].detach().numpy() for *_, mel in windows])
        table = page.table()
        assert len(windows) == count == len(next(iter(table.values()))) - 1
        shown = np.array([table[label][1:] for label in config.labels]).T
        assert abs(shown - values).max() < 1e-3, "each window, too"


def test_a_long_file_can_be_stopped(page, tmp_path):
    wave = load_audio(asset_path("hear/clips/reel.mp3"))
    soundfile.write(tmp_path / "long.wav", np.tile(wave, 12), 16_000)
    page.upload(tmp_path / "long.wav")
    stop = page.find("#stop")
    until(lambda: stop.is_displayed() and page.text("name") == "long.wav", "its first window is shown")
    stop.click()
    until(lambda: page.text("status").startswith("Stopped after "), "it stops")
    count = len(next(iter(page.table().values()))) - 1
    assert 1 <= count < 70 and not stop.is_displayed() and not page.find("#progress").is_displayed()
    buttons = page.driver.find_elements("css selector", "#time thead button")
    assert len(buttons) == count, "what was tagged stays"
    buttons[-1].click()
    page.press("jig")
    assert page.errors() == []


def test_times_are_compared_warm(page):
    page.press("reel")
    before = float(page.text("ms").split()[2])
    page.find("#every").send_keys(Keys.ARROW_RIGHT)
    until(lambda: "now sees" in page.text("sentence"), "half of the columns")
    page.find("#every").send_keys(Keys.HOME)
    until(lambda: page.text("sentence").startswith("The model sees all"), "all patches again")
    assert float(page.text("ms").split()[2]) == before, "the time of all patches was measured before the slider moved"


def test_another_window_and_where_the_model_looks(page, model):
    page.press("song")
    drawn = "return document.getElementById('spectrogram').toDataURL()"
    first = page.js(drawn)
    page.driver.find_elements("css selector", "#time thead button")[2].send_keys(Keys.ENTER)
    until(lambda: page.text("window-name") == "0:10 to 0:20", "the third window")
    pressed = [b.get_attribute("aria-pressed") for b in page.driver.find_elements("css selector", "#time thead button")]
    assert pressed == ["false", "false", "true", "false", "false"] and page.js(drawn) != first
    views = {page.js(drawn)}
    page.find("[value=attention]").send_keys(Keys.SPACE)
    for block in (str(model.config.depth - 1), "0"):
        Select(page.find("#block")).select_by_value(block)
        views.add(page.js(drawn))
        assert f"attention of block {block}" in page.find("#spectrogram").get_attribute("aria-label")
    assert len(views) == 3, "patches, and two blocks"
    page.find("[value=patches]").click()
    assert page.errors() == []


def test_files_that_cannot_be_read_are_reported(page, tmp_path):
    page.press("song")
    (tmp_path / "broken.mp3").write_text("not music")
    soundfile.write(tmp_path / "short.wav", np.zeros(1600), 16_000)
    for name, problem in (("broken.mp3", "cannot read it as audio"), ("short.wav", "shorter than 0.5 s")):
        page.upload(tmp_path / name)
        until(lambda: page.text("error").startswith(f"{name}: ") and problem in page.text("error"), name)  # noqa: B023
        assert "Song, sung" in page.text("status") and page.text("name") == "Song, sung"
    page.press("reel")
    assert page.errors() == []


def test_a_recording(page):
    page.find("#record").click()
    until(lambda: page.text("record") == "Stop", "it records")
    page.js("window.began = performance.now()")
    until(lambda: page.js("return performance.now() - window.began > 2500"), "two seconds pass")
    print(page.tag(page.find("#record").click, "Your recording"))
    assert page.text("record") == "Record" and page.errors() == []


def test_nothing_leaves_the_machine(page, tmp_path):
    (tmp_path / "index.html").write_text("another origin")
    with serve(tmp_path) as (other, asked):
        assert page.driver.execute_async_script(ASK, other) == ["refused", "refused"] and asked == []
        assert urllib.request.urlopen(other).status == 200 and len(asked) == 1, "it would have answered"
    assert any("Content Security Policy" in error for error in page.errors())
    assert all(name.startswith((page.url, f"blob:{page.url}")) for name in page.js(REQUESTED))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_widths_and_names(page, theme):
    page.press("jig")
    folder = ROOT / "runs/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    for width in (1280, 390):
        page.set_size(width, theme)
        assert page.js("return document.documentElement.scrollWidth") <= width, "nothing is cut off"
        page.driver.save_screenshot(str(folder / f"hear-{theme}-{width}.png"))
    light = page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 248)"
    assert light == (theme == "light")
    assert page.js("return getComputedStyle(document.querySelector('.now')).transitionDuration") == "0s"
    controls = page.driver.find_elements("css selector", "button, input, select, audio, canvas, table, a")
    nameless = [control.get_attribute("outerHTML")[:80] for control in controls
                if control.is_displayed() and control.tag_name != "audio" and not control.accessible_name]  # fmt: skip
    assert len(controls) > 20 and nameless == []
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_webassembly_takes_over_where_webgpu_fails(page):
    pretend = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PRETEND_WEBGPU})
    page.load()
    page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", pretend)
    assert any("WebAssembly instead of WebGPU" in entry["message"] for entry in page.driver.get_log("browser"))
    assert "by WebAssembly" in page.press("jig")
