"""The documentation site: what is on it, and its pages in a real browser that is offline.

The fast lane reads the sources; the slow lane builds the site, checks every link and opens every page.
"""

import ast
import html
import html.parser
import inspect
import json
import re
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
from fastcore.docments import docments

import maestlib as ml

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / ".ci/site"))
pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install -e '.[site]'")

from pages import convert_notebook, link_names, prose, reading_order  # noqa: E402
from reference import lazy_names, modules  # noqa: E402

PAGES = (
    "index",
    "class",
    "faq",
    "how/tag",
    "notebooks/index",
    "notebooks/explore",
    "notebooks/stats/metrics",
    "reference/inference",
)
ENTITIES = {
    "a": "href",
    "link": "href",
    "img": "src",
    "script": "src",
    "iframe": "src",
    "source": "src",
    "image": "href",
}


def test_every_notebook_is_in_the_navigation():
    notebooks = {str(p.relative_to(ROOT / "nbs").as_posix()) for p in ROOT.glob("nbs/**/*.ipynb")}
    notebooks = {name for name in notebooks if ".ipynb_checkpoints" not in name} - {"index.ipynb"}
    listed = [path for entries in reading_order().values() for _, path in entries]
    assert sorted(listed) == sorted(notebooks)


def test_every_exported_module_is_in_the_reference():
    text = "\n".join(path.read_text(encoding="utf8") for path in ROOT.glob("nbs/*/*.ipynb"))
    exported = {line.split()[2].split("\\n")[0].strip('",') for line in text.splitlines() if "#| default_exp" in line}
    assert len(exported) > 80 and set(modules()) == exported


@pytest.mark.parametrize("where, name", [(where, name) for where, names in lazy_names().items() for name in names])
def test_the_reference_shows_the_comments_that_help_shows(where, name):
    module, item = modules()[where], getattr(ml, name)
    node = module.definitions[name]
    parameters = module.class_parameters(node) if inspect.isclass(item) else module.parameters(node)
    shown = {p.name: p.comment for p in parameters}
    expected = {n: (d["docment"] or "").split("\n")[0] for n, d in docments(item, full=True).items() if n != "self"}
    if isinstance(node, ast.FunctionDef) and not node.args.kwarg:
        shown["return"] = module.returned(node)[1]
    else:
        del expected["return"]  # of a class; and fastcore takes the comment of `**options` for that of the result
    if isinstance(node, ast.FunctionDef) and node.args.kwarg:
        del expected[node.args.kwarg.arg], shown[node.args.kwarg.arg]
    assert shown == expected and any(shown.values())


def test_prose_becomes_markdown_of_the_site():
    names = {
        "load_model": "reference/models.md#checkpoint.load_model",
        "embed": "reference/inference.md#embedding.embed",
    }
    assert prose("[a](../x/y.ipynb) `[b](c.ipynb)`", names, "../") == "[a](../x/y.md) `[b](c.ipynb)`"
    assert link_names("`load_model`, `embed`, `ml.embed`", names, "../") == (
        "[`load_model`](../reference/models.md#checkpoint.load_model), `embed`, "
        "[`ml.embed`](../reference/inference.md#embedding.embed)"
    ), "a word of plain English is no link"
    assert "<msup>" in prose("about $n^3$ operations", names, "") and prose("`$HOME`", names, "") == "`$HOME`"


def test_a_notebook_becomes_a_page(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n\n", "> A page. **You will learn** much. **Takes** long."]},
        {"cell_type": "code", "source": ["#| default_exp core.files"], "metadata": {}, "outputs": []},
        {"cell_type": "code", "source": ["#| export\n", "import os"], "metadata": {}, "outputs": []},
        {"cell_type": "code", "source": ["1 < 2"], "metadata": {}, "outputs": [
            {"output_type": "stream", "text": ["<b>&\n"]},
            {"output_type": "execute_result", "data": {"text/html": ["<style>x</style><table border=\"1\"></table>"]}},
            {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}},
        ]},
    ]  # fmt: skip
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf8")
    convert_notebook(tmp_path / "a.ipynb", tmp_path / "a.md", {}, "reference/core.md#files", "../")
    page = (tmp_path / "a.md").read_text(encoding="utf8")
    assert "**You will learn** much.\n\n**Takes** long." in page and "> " not in page
    assert "[`maestlib.core.files`](../reference/core.md#files)" in page and "default_exp" not in page
    assert "<summary>Imports</summary>" in page and "#| export" not in page
    assert (
        "&lt;b&gt;&amp;</pre>" in page and "<table></table>" in page and "![Output: A title](figures/a-1.png)" in page
    )
    assert (tmp_path / "figures/a-1.png").read_bytes() == b"\x89PNG\r\n\x1a\n"


class Page(html.parser.HTMLParser):
    "The addresses and the anchors of a page."

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors = [], {"", "__skip"}
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[k] for k in ("id", "name") if attributes.get(k)}
        if target := attributes.get(ENTITIES.get(tag)):
            self.links.append((tag, target))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, str(ROOT / ".ci/site"), "--out", str(folder), "--without-page"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 110
    problems = []
    for path, page in pages.items():
        for tag, target in page.links:
            address = urllib.parse.urlsplit(target)
            if address.scheme or target.startswith("//"):
                if tag != "a" and address.scheme != "data":
                    problems.append(f"{path.relative_to(site)} loads {target}")
                continue
            if address.path.startswith("/"):
                problems.append(f"{path.relative_to(site)}: {target} breaks below the top of a server")
            file = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                problems.append(f"{path.relative_to(site)}: no file {target}")
            elif file in pages and urllib.parse.unquote(address.fragment) not in pages[file].anchors:
                problems.append(f"{path.relative_to(site)}: no anchor {target}")
    assert not problems, "\n".join(sorted(set(problems)))


@pytest.mark.slow
def test_the_search_finds_every_question_and_task(site):
    entries = json.loads((site / "search/search_index.json").read_text(encoding="utf8"))["docs"]
    titles = {html.unescape(entry["title"]) for entry in entries}
    questions = re.findall(r"(?m)^## (.+)", (ROOT / ".ci/site/docs/faq.md").read_text(encoding="utf8"))
    tasks = [path.read_text(encoding="utf8").split("\n")[0][2:] for path in ROOT.glob(".ci/site/docs/how/*.md")]
    assert len(questions) >= 12 and len(tasks) >= 10 and not {*questions, *tasks} - titles


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
    lab = pytest.importorskip("lab")
    if not (lab.CHROME and lab.DRIVER):
        pytest.skip("no Chromium with chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = lab.CHROME
    folder = tmp_path_factory.mktemp("chrome")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                     "disable-background-networking", f"user-data-dir={folder}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(lab.DRIVER))
    driver.set_page_load_timeout(lab.TIMEOUT_S)
    yield driver
    driver.quit()


def requested(browser) -> set[str]:
    "The addresses that were asked for since the last call."
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url for url in sent if not url.startswith(("data:", "blob:"))}


def show(browser, site: Path, page: str, width: int = 1360, dark: bool = False):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get((site / f"{page}.html").as_uri())


@pytest.mark.slow
def test_no_page_has_an_error_in_the_console_or_asks_the_network(site, browser):
    names = sorted(str(p.relative_to(site).with_suffix("").as_posix()) for p in site.rglob("*.html"))
    problems = []
    for name in names:
        show(browser, site, name)
        problems += [f"{name}: {entry['message']}" for entry in browser.get_log("browser")]
        own = ("file:", "chrome:", "chrome-untrusted:")  # the browser's first tab is a page of its own
        problems += [f"{name}: asks {url}" for url in requested(browser) if not url.startswith(own)]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_a_missing_page_leads_home_from_any_folder(site, browser, tmp_path):
    from lab import serve, until

    (tmp_path / "project").symlink_to(site)
    with serve(tmp_path, missing=site / "404.html") as (url, _):
        for address in ("nothing.html", "notebooks/audio/nothing/at/all.html"):
            browser.get(f"{url}/project/{address}")
            home = browser.find_element("css selector", "#home")
            until(lambda: home.get_attribute("href") == f"{url}/project/index.html", address)  # noqa: B023
    browser.get_log("browser")  # where nothing is found is logged


@pytest.mark.slow
@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("width", (1360, 390))
def test_pages_fit_in_both_themes(site, browser, width, dark):
    folder = ROOT / "runs/screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        show(browser, site, page, width, dark)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page
        scheme = browser.execute_script("return document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default"), page
        browser.save_screenshot(str(folder / f"site-{page.replace('/', '-')}-{width}{'-dark' if dark else ''}.png"))


@pytest.mark.slow
def test_the_slider_and_the_search_work_from_a_folder(site, browser):
    from lab import until
    from selenium.webdriver import Keys

    show(browser, site, "index")
    text = browser.find_element("css selector", ".patchout output")
    slider = browser.find_element("css selector", ".patchout input")
    slider.send_keys(Keys.HOME)
    assert "549 of 549" in text.text
    slider.send_keys(Keys.ARROW_RIGHT)
    assert "279 of 549" in text.text, "31 of 61 columns"
    browser.find_element("css selector", ".md-search__input").send_keys("patchout")
    found = ".md-search-result__link"
    links = until(lambda: browser.find_elements("css selector", found), "something is found")
    addresses = [link.get_attribute("href") for link in links]
    assert any("models/patchout.html" in address for address in addresses), addresses
    time.sleep(0.5)
    assert not browser.get_log("browser")
