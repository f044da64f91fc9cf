"""Build the documentation: `python .ci/site` writes it to site/. Open site/index.html, or serve the folder.

The notebooks by floor with the outputs that they are committed with, the reference made from the sources, and the page
that tags music in the browser. Needs the extra `site`; nothing is executed, nothing is downloaded.
"""

import argparse
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import mkdocs.commands.build
import mkdocs.config
from pages import NOTEBOOKS, PROJECT, convert_notebook, module_of, prose, read_cells, reading_order, source
from reference import FLOORS, Writer

HERE = Path(__file__).resolve().parent
PAGE = "Tag your music"
CARD = "studies/model_card.ipynb"  # has a tab of its own
HOW = "tag train probe compare paper slurm ray dataset encoder cite".split()  # pages of docs/how


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def paper_page(names: dict[str, str]) -> str:
    "The mapping of the paper's sections to commands and notebooks, and where each is mentioned."
    order = [entry for entries in reading_order().values() for entry in entries]
    mapping = prose((HERE / "paper.md").read_text(encoding="utf8"), names, "../")
    mentions = {}
    for title, path in order:
        text = "\n".join(source(c) for c in read_cells(NOTEBOOKS / path))
        for section in set(re.findall(r"§(\d\.\d)", text)):
            mentions.setdefault(section, []).append(f"[{title}]({path.removesuffix('.ipynb')}.md)")
    rows = [f"| §{section} | {' · '.join(links)} |" for section, links in sorted(mentions.items())]
    return "\n".join([
        "---", "hide: [navigation]", "---", "", "# The paper and its notebooks", "",
        "*Efficient Supervised Training of Audio Transformers for Music Representation Learning* "
        "([ISMIR 2023](https://arxiv.org/abs/2309.16418)): which command runs what, and how far it was run here.", "",
        mapping, "", "## Notebooks by section", "", "| section | mentioned in |", "|---|---|", *rows, "",
    ])  # fmt: skip


def write_pages(docs: Path) -> list:  # the navigation
    "Write all pages as Markdown."
    writer = Writer()
    names, floors = writer.names, reading_order()
    shutil.copytree(HERE / "docs", docs)
    shutil.copytree(NOTEBOOKS / "images", docs / "notebooks/images")
    convert_notebook(NOTEBOOKS / "index.ipynb", docs / "notebooks/index.md", names, None, "../")
    notebooks, navigation = {}, {}
    for floor, entries in floors.items():
        for title, name in entries:
            page = f"notebooks/{name.removesuffix('.ipynb')}.md"
            top = "../" * page.count("/")
            module = module_of(read_cells(NOTEBOOKS / name))
            api = writer.address(module)
            convert_notebook(NOTEBOOKS / name, docs / page, names, api, top)
            if name != CARD:
                navigation.setdefault(floor, []).append({title.replace("`", ""): page})
            if api:
                notebooks[module] = (title, page.removeprefix("notebooks/"))
    write(docs / "notebooks/mapping.md", paper_page(names))
    for floor in FLOORS:
        write(docs / f"reference/{floor}.md", writer.floor(floor, floor.capitalize(), notebooks))
    overview = (
        "# Reference\n\n`import maestlib as ml` offers these names; the pages of the floors describe every module.\n"
    )
    write(docs / "reference/index.md", f"{overview}\n{writer.overview()}\n")
    return [
        {"Home": "index.md"},
        {"Notebooks": ["notebooks/index.md", *({floor: entries} for floor, entries in navigation.items())]},
        {"Reference": ["reference/index.md", *({f.capitalize(): f"reference/{f}.md"} for f in FLOORS)]},
        {"Paper": "notebooks/mapping.md"},
        {"Model card": f"notebooks/{CARD.removesuffix('.ipynb')}.md"},
        {"How to": ["how/index.md", *(f"how/{name}.md" for name in HOW)]},
        {"Questions": "faq.md"},
        {"For a class": "class.md"},
        {"Changelog": "changelog.md"},
    ]


def front_page(docs: Path, with_page: bool):
    "Complete the front page: its buttons, and what README says was measured."
    readme = (PROJECT / "README.md").read_text(encoding="utf8")
    measured = readme.split("<!-- measured -->\n")[1].split("<!-- end measured -->")[0]
    measured = re.sub(r"\]\(nbs/([^)]+)\.ipynb\)", r"](notebooks/\1.md)", measured)
    targets = {"Read the notebooks": "notebooks/index.md", "Reference": "reference/index.md"}
    if with_page:
        targets = {PAGE: "hear/index.html"} | targets
    buttons = [f"[{title}]({target}){{ .md-button }}" for title, target in targets.items()]
    buttons[0] = buttons[0].replace(".md-button", ".md-button .md-button--primary")
    text = (docs / "index.md").read_text(encoding="utf8")
    write(
        docs / "index.md", text.replace("<!-- measured -->", measured).replace("<!-- buttons -->", "\n".join(buttons))
    )


def make_config(docs: Path, out: Path, navigation: list) -> dict:
    repository = os.environ.get("GITHUB_REPOSITORY")  # where a workflow runs
    return mkdocs.config.load_config(
        str(HERE / "mkdocs.yml"),
        docs_dir=str(docs),
        site_dir=str(out),
        nav=navigation,
        strict=True,
        repo_url=f"{os.environ['GITHUB_SERVER_URL']}/{repository}" if repository else None,
    )


def build(out: Path, with_page: bool):
    docs = PROJECT / "build/site"
    shutil.rmtree(docs, ignore_errors=True)
    navigation = write_pages(docs)
    front_page(docs, with_page)
    if with_page:
        from maestlib.collection.page import export_page  # needs torch, unlike all other pages

        navigation.insert(1, {PAGE: "hear/index.html"})
        page = export_page(docs / "hear")
        home = '<p><a href="../index.html">← maestlib</a></p>'  # a page that is served alone has no site around it
        write(page, page.read_text(encoding="utf8").replace("<header>", f"<header>\n  {home}", 1))
    mkdocs.commands.build.build(make_config(docs, out, navigation))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=PROJECT / "site", help="default: site/")
    parser.add_argument("--without-page", action="store_true", help="leave out the page that tags music in the browser")
    arguments = parser.parse_args()
    sys.path.append(str(PROJECT))
    with_page = not arguments.without_page and find_spec("maestlib.collection.page") is not None
    build(arguments.out.resolve(), with_page)
    print(f"{arguments.out}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
