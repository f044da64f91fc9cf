"""Pages of the site from notebooks: Markdown as MkDocs reads it, pictures beside it, outputs as they were committed."""

import ast
import base64
import html
import json
import re
from pathlib import Path

from latex2mathml.converter import convert

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = PROJECT / "nbs"
ROW = re.compile(r"^\| \[(.+?)\]\((\S+?\.ipynb)\) \| (.+) \|$", re.M)  # of the tables in the outputs of index.ipynb
SUMMARY = re.compile(r"^> (.+?)(?= \*\*You will learn\*\*|$)(.*)$", re.M)
CODE = re.compile(r"(?ms)(^```.*?^```$|`[^`\n]+`)")  # what is not prose


def read_cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def reading_order() -> dict[str, list[tuple[str, str]]]:  # heading → [(title, path below nbs/)]
    "The notebooks by room, as the outputs of `index.ipynb` list them; the course is a choice of them."
    rooms = {}
    for cell in read_cells(NOTEBOOKS / "index.ipynb"):
        for item in cell.get("outputs", []):
            text = "".join(item.get("data", {}).get("text/markdown", []))
            heading = re.match(r"## (.+)", text)
            if heading and not heading[1].startswith("A course"):
                rooms[heading[1]] = [(title, path) for title, path, _ in ROW.findall(text)]
    return rooms


def module_of(cells: list[dict]) -> str | None:  # such as audio.mel
    "The module that a notebook exports."
    for cell in cells:
        if found := re.match(r"#\| default_exp (\S+)", source(cell)):
            return found[1]
    return None


def math(text: str) -> str:
    "Replace TeX between dollars by MathML, which browsers show without a script."
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), text, flags=re.S)
    return re.sub(r"\$([^$\n]+)\$", lambda m: convert(m[1]), text)


def link_names(text: str, names: dict[str, str], top: str) -> str:  # Markdown
    "Link `names` in backticks to their place in the reference. Words that are also plain English are left alone."

    def replace(found):
        name = re.sub(r"^(ml|maestlib)\.|\(\)$", "", found[1])
        is_distinct = name != found[1] or "_" in name or not name.islower()
        return f"[{found[0]}]({top}{names[name]})" if is_distinct and name in names else found[0]

    return re.sub(r"(?<!\[)`([\w.]+(?:\(\))?)`(?!\])", replace, text)


def page_links(text: str) -> str:
    "Let the links to notebooks lead to their pages."
    return re.sub(r"(\]\([^)\s:]+)\.ipynb(#[^)]*)?\)", r"\1.md\2)", text)


def prose(text: str, names: dict[str, str], top: str) -> str:
    "Markdown of a cell: math becomes MathML, links to notebooks lead to their pages."
    parts = CODE.split(text)  # every second is code
    parts[::2] = [math(page_links(part)) for part in parts[::2]]
    return link_names("".join(parts), names, top)


def summary(found: re.Match) -> str:
    "The block under a notebook's title: what it is, what is learned, what it needs and takes."
    rest = re.sub(r" \*\*(You will learn|Needs|Takes)\*\* ", r"\n\n**\1** ", found[2])
    return f'<div class="summary" markdown>\n\n{found[1]}{rest}\n\n</div>'


def only_imports(body: list[ast.stmt]) -> bool:
    return all(
        isinstance(n, ast.Import | ast.ImportFrom) or isinstance(n, ast.With) and only_imports(n.body) for n in body
    )


def code(cell: dict) -> str:
    text = source(cell)
    if re.match(r"#\| (default_exp|hide)", text):
        return ""
    is_exported = text.startswith("#| export")
    text = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip()
    if not text:
        return ""
    tags = cell["metadata"].get("tags", [])
    title = ' title="parameters"' if "parameters" in tags else ""
    block = f"``` {{ .python .{'export' if is_exported else 'example'}{title} }}\n{text}\n```"
    if is_exported and only_imports(ast.parse(text).body):
        return f"<details markdown>\n<summary>Imports</summary>\n\n{block}\n\n</details>"
    if "solution" in tags:
        return f"<details markdown>\n<summary>Solution</summary>\n\n{block}\n\n</details>"
    return block


def output(data: dict, text: str, alt: str, save) -> str:
    "One output of a cell as HTML or Markdown. `save(png)` stores a picture and returns its address."
    if "image/png" in data:
        address = save(base64.b64decode("".join(data["image/png"])))
        return f'<figure class="output" markdown>\n![{alt}]({address}){{ loading=lazy }}\n</figure>'
    if "text/html" in data:
        table = re.sub(r"(?s)<style>.*?</style>|\s*border=\"1\"", "", "".join(data["text/html"])).replace("\n", " ")
        return f'<div class="output" data-search-exclude>{table}</div>'
    if "text/markdown" in data:
        text = page_links("".join(data["text/markdown"]))
        return f'<div class="output" data-search-exclude markdown>\n\n{text}\n\n</div>'
    text = "".join(data.get("text/plain", text)).rstrip()
    return f'<pre class="output" data-search-exclude>{html.escape(text)}</pre>' if text else ""


def convert_notebook(path: Path, page: Path, names: dict[str, str], api: str | None, top: str):
    "Write one notebook as Markdown, and its pictures beside it."
    pictures = []

    def save(png: bytes) -> str:
        pictures.append(page.parent / "figures" / f"{page.stem}-{len(pictures) + 1}.png")
        pictures[-1].parent.mkdir(parents=True, exist_ok=True)
        pictures[-1].write_bytes(png)
        return f"figures/{pictures[-1].name}"

    cells = read_cells(path)
    title = source(cells[0]).splitlines()[0].removeprefix("# ")
    parts, heading = [], title
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            text = prose(source(cell), names, top)
            heading = (re.findall(r"^#+ (.+)", source(cell), re.M) or [heading])[-1].replace("`", "")
            if number == 0:
                text = SUMMARY.sub(summary, text, count=1)
                if api:
                    link = f"[`maestlib.{module_of(cells)}`]({top}{api})"
                    text += f"\n\nCells with a colored edge are the source of {link}.\n{{ .module }}"
            parts.append(text)
            continue
        parts.append(code(cell))
        for item in cell["outputs"]:
            alt = html.escape(re.sub(r"[\[\]]", "", f"Output: {heading}"))
            parts.append(output(item.get("data", {}), item.get("text", ""), alt, save))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf8")
