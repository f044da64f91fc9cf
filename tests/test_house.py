"""The structure of the package: direction of imports, sizes, names, and the form and links of the notebooks.

Everything is read from the sources with `ast` and `json`; nothing is imported. A failure lists `file:line: problem`.
"""

import ast
import json
import re
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
LIBRARY = "core stats audio datasets models inference training probing speed paper widgets".split()
APPLICATIONS = ["demo", "collection"]  # import the library; nothing of the library imports them
FLOORS = [*LIBRARY, *APPLICATIONS, "top"]
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_EXPORT_CELL_LINES, MEDIAN_EXPORT_CELL_LINES, MAX_PROSE_WORDS = 40, 15, 120
LONG_EXPORT_CELLS, LONG_PROSE_CELLS = 0, 0  # how many exceed it today; may only fall
MAX_LIBRARY_LINES, MAX_LINES = 18_110, 23_840  # exported, without and with the applications; may only fall
TOP_NOTEBOOKS = {"index", "train", "explore", "paper"}

MODULES = {
    ".".join(path.relative_to(TOP).with_suffix("").parts): path
    for path in sorted(TOP.glob("maestlib/**/*.py"))
    if path.name not in ("__init__.py", "_modidx.py")  # hand-written and lazy; an index of nbdev
}
TREES = {name: ast.parse(path.read_text(encoding="utf8"), str(path)) for name, path in MODULES.items()}
NOTEBOOKS = {
    path: json.loads(path.read_text(encoding="utf8"))
    for path in sorted(TOP.glob("nbs/**/*.ipynb"))
    if ".ipynb_checkpoints" not in path.parts
}


def at(path: Path, line: int, problem: str) -> str:
    return f"{path.relative_to(TOP)}:{line}: {problem}"


def report(problems: list[str]):
    if problems:
        pytest.fail("\n".join([f"{len(problems)} to mend", *problems]), pytrace=False)


def floor(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else "top"


def absolute_name(node: ast.ImportFrom, module: str) -> str:  # of the module or package that is imported from
    if not node.level:
        return node.module or ""
    return ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])


def imported_names(tree: ast.AST, module: str):
    "Yield `(node, imported module, name, local name)` of every import of maestlib, in functions too; name may be None."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "maestlib":
                    yield node, alias.name, None, alias.asname
        elif isinstance(node, ast.ImportFrom):
            source = absolute_name(node, module)
            if source.split(".")[0] != "maestlib":
                continue
            for alias in node.names:
                local = alias.asname or alias.name
                if f"{source}.{alias.name}" in MODULES:
                    yield node, f"{source}.{alias.name}", None, local
                else:
                    yield node, source, alias.name, local


def source_lines(cell: dict) -> list[str]:
    return "".join(cell["source"]).splitlines()


def code_tree(cell: dict) -> ast.Module:  # of a code cell, without its magics
    lines = ["pass" if re.match(r"\s*[%!]", line) else line for line in source_lines(cell)]
    return ast.parse("\n".join(lines))


def cell_line(path: Path, cell: dict, line: int = 1) -> int:
    "The line in the notebook's file of a line of a cell's source."
    lines = path.read_text(encoding="utf8").splitlines()
    start = next((i for i, text in enumerate(lines) if f'"id": "{cell.get("id")}"' in text), 0)
    source = next((i for i in range(start, len(lines)) if lines[i].strip() == '"source": ['), start)
    return source + 1 + line


def private_uses(tree: ast.AST, module: str):
    "Yield `(line, name)` of private names that are imported from, or read as an attribute of, another module."
    local_modules = {}
    for node, source, name, local in imported_names(tree, module):
        if name is None and local:
            local_modules[local] = source
        elif name and name.startswith("_") and not name.startswith("__") and source != module:
            yield node.lineno, f"{source}.{name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in local_modules:
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                yield node.lineno, f"{local_modules[node.value.id]}.{node.attr}"


def private_patches(tree: ast.AST):
    "Yield `(line, name)` of private names of maestlib that `setattr` is called with."
    modules = {local for *_, name, local in imported_names(tree, "tests") if name is None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            owner = node.args[0].id if isinstance(node.args[0], ast.Name) else ""
            for text in texts:
                is_ours = text.startswith("maestlib.") or owner in modules
                if is_ours and re.match("_[^_]", text.split(".")[-1]):
                    yield node.lineno, f"{owner} {text}".strip()


def test_every_module_is_on_a_floor():
    report(
        [at(MODULES[m], 1, f"{floor(m)} is no floor of {', '.join(FLOORS)}") for m in MODULES if floor(m) not in FLOORS]
    )


def test_modules_import_only_from_their_own_floor_or_those_before():
    problems = []
    for module, tree in TREES.items():
        for node, source, _, _ in imported_names(tree, module):
            if FLOORS.index(floor(source)) > FLOORS.index(floor(module)):
                where = at(MODULES[module], node.lineno, f"{floor(module)} imports from {floor(source)}: {source}")
                problems.append(where)
    report(problems)


def test_there_is_no_import_circle():
    edges = {module: {} for module in TREES}  # module → {imported module: line}
    for module, tree in TREES.items():
        for node, source, _, _ in imported_names(tree, module):
            if source in TREES and source != module:
                edges[module].setdefault(source, node.lineno)
    problems, finished = set(), set()

    def visit(module, path):
        if module in path:
            circle = path[path.index(module) :]
            first = circle.index(min(circle))
            circle = circle[first:] + circle[:first]
            line = edges[circle[0]][circle[1 % len(circle)]]
            problems.add(at(MODULES[circle[0]], line, " → ".join([*circle, circle[0]])))
        elif module not in finished:
            for source in edges[module]:
                visit(source, [*path, module])
            finished.add(module)

    for module in edges:
        visit(module, [])
    report(sorted(problems))


def test_modules_use_no_private_name_of_another():
    problems = []
    for module, tree in TREES.items():
        problems += [at(MODULES[module], line, f"private name {name}") for line, name in private_uses(tree, module)]
    report(problems)


def test_notebook_cells_import_no_private_name():
    problems = []
    for path, notebook in NOTEBOOKS.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            for line, name in private_uses(code_tree(cell), "notebook"):
                problems.append(at(path, cell_line(path, cell, line), f"private name {name}"))
    report(problems)


def test_tests_use_no_private_name():
    "Imported, read as an attribute of a module, or replaced by monkeypatch under its name."
    problems = []
    for path in sorted((TOP / "tests").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf8"))
        problems += [at(path, line, f"private name {name}") for line, name in private_uses(tree, "tests")]
        problems += [at(path, line, f"private name {name}") for line, name in private_patches(tree)]
    report(problems)


def test_modules_are_short():
    problems = []
    for path in MODULES.values():
        lines = len(path.read_text(encoding="utf8").splitlines())
        if lines > MAX_MODULE_LINES:
            problems.append(at(path, lines, f"{lines} lines; at most {MAX_MODULE_LINES}: split the notebook"))
    report(problems)


def test_functions_are_short():
    problems = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problem = f"{node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"
                    problems.append(at(MODULES[module], node.lineno, problem))
    report(problems)


def export_cells():
    "Yield `(path, cell, lines of source)` of every exported cell."
    for path, notebook in NOTEBOOKS.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and re.match(r"#\|\s*export", "".join(cell["source"])):
                yield path, cell, len(source_lines(cell))


def test_exported_cells_are_short():
    cells = list(export_cells())
    long = [(path, cell, lines) for path, cell, lines in cells if lines > MAX_EXPORT_CELL_LINES]
    if len(long) > LONG_EXPORT_CELLS:
        report(
            [at(p, cell_line(p, c), f"{n} lines; at most {MAX_EXPORT_CELL_LINES}: split the cell") for p, c, n in long]
        )
    assert sorted(lines for *_, lines in cells)[len(cells) // 2] <= MEDIAN_EXPORT_CELL_LINES


def test_prose_is_short():
    long = []
    for path, notebook in NOTEBOOKS.items():
        for cell in notebook["cells"]:
            words = len("".join(cell["source"]).split())
            if cell["cell_type"] == "markdown" and words > MAX_PROSE_WORDS:
                long.append(at(path, cell_line(path, cell), f"{words} words; at most {MAX_PROSE_WORDS}"))
    if len(long) > LONG_PROSE_CELLS:
        report(long)


def test_the_library_is_small():
    lines = {module: len(path.read_text(encoding="utf8").splitlines()) for module, path in MODULES.items()}
    library = sum(n for module, n in lines.items() if floor(module) not in APPLICATIONS)
    assert library <= MAX_LIBRARY_LINES and sum(lines.values()) <= MAX_LINES, (library, sum(lines.values()))


def test_paths_of_tables_are_no_patterns():
    "A folder may be called `Live [2020]`, where polars looks for a character between brackets."
    calls = [(module, node) for module, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    readers = {f"pl.{verb}_{kind}" for verb in ("read", "scan") for kind in ("parquet", "csv")}
    found = [call for call in calls if ast.unparse(call[1].func) in readers]
    assert found
    report(
        [
            at(MODULES[module], call.lineno, "give glob=False")
            for module, call in found
            if not any(k.arg == "glob" for k in call.keywords)
        ]
    )


def test_no_public_name_is_defined_in_two_modules():
    places = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                for item in node.value.elts:
                    places.setdefault(item.value, []).append(at(MODULES[module], item.lineno, item.value))
    places.pop("main")  # the entry point of a program, by convention
    report([line for lines in places.values() if len(lines) > 1 for line in lines])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(TOP)))
def test_a_notebook_opens_with_a_title_and_a_summary(path):
    cell = NOTEBOOKS[path]["cells"][0]
    lines = source_lines(cell)
    problems = []
    if cell["cell_type"] != "markdown" or not lines or not lines[0].startswith("# "):
        problems.append(at(path, cell_line(path, cell), "the first cell does not start with a title, `# …`"))
    elif lines[0].startswith(f"# {path.stem} —"):
        problems.append(at(path, cell_line(path, cell), f"the title starts with the module's name: {lines[0]}"))
    summary = [(i, line) for i, line in enumerate(lines, 1) if line.startswith("> ")]
    if not summary:
        problems.append(at(path, cell_line(path, cell), "the first cell has no summary, `> …`"))
    elif "TODO" in summary[0][1]:
        problems.append(at(path, cell_line(path, cell, summary[0][0]), "the summary is still to be written"))
    report(problems)


def link_targets(text: str):
    "Yield the relative targets of Markdown links and images and of HTML's `src` and `href`, without code and anchors."
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```", "", text))
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", text):
        target = next(filter(None, target))
        if not re.match(r"[a-z]+:|#|/", target):
            yield target.split("#")[0]


def test_relative_links_lead_to_a_file():
    problems = []
    readme = TOP / "README.md"
    for number, line in enumerate(readme.read_text(encoding="utf8").splitlines(), 1):
        problems += [at(readme, number, f"no file {t}") for t in link_targets(line) if not (TOP / t).exists()]
    for path, notebook in NOTEBOOKS.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            for target in link_targets("".join(cell["source"])):
                if target.startswith("attachment:") or (path.parent / target).exists():
                    continue
                lines = source_lines(cell)
                number = next((i for i, line in enumerate(lines, 1) if target in line), 1)
                problems.append(at(path, cell_line(path, cell, number), f"no file {target}"))
    report(problems)


def test_the_top_folder_has_only_the_notebooks_to_open_first():
    problems = []
    for path in NOTEBOOKS:
        if path.parent == TOP / "nbs" and path.stem not in TOP_NOTEBOOKS:
            problems.append(at(path, 1, f"belongs on a floor; nbs/ has only {', '.join(sorted(TOP_NOTEBOOKS))}"))
    report(problems)


def output_texts(output: dict):
    "Yield the texts of a cell's output; pictures are left out."
    yield "".join(output.get("text", []))
    yield "\n".join(output.get("traceback", []))
    for mime, data in output.get("data", {}).items():
        if not mime.startswith("image/"):
            yield "".join(data) if isinstance(data, list) else data if isinstance(data, str) else json.dumps(data)


def test_no_notebook_mentions_an_absolute_path():
    problems = []
    pattern = re.compile(r"(?<![\w.~])/(?:home|root|tmp)/[\w.\-/]*")
    for path, notebook in NOTEBOOKS.items():
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                for text in output_texts(output):
                    for match in pattern.finditer(text):
                        problems.append(at(path, cell_line(path, cell), f"{match[0]} in an output of this cell"))
            if cell["cell_type"] == "markdown":
                for number, line in enumerate(source_lines(cell), 1):
                    for match in pattern.finditer(line):
                        problems.append(at(path, cell_line(path, cell, number), match[0]))
    report(problems)


def test_the_checks_find_what_they_look_for():
    "The readers of imports, links and outputs on sources that break the rules, and that there is something to check."
    assert len(MODULES) > 30 and len(NOTEBOOKS) > 30
    tree = ast.parse("def f():\n    from ..models import maest\n    return maest._grid\nfrom .trainer import _save\n")
    module = "maestlib.training.evaluation"
    assert [(s, n) for _, s, n, _ in imported_names(tree, module)] == [
        ("maestlib.training.trainer", "_save"),
        ("maestlib.models.maest", None),
    ]
    assert sorted(private_uses(tree, module)) == [
        (3, "maestlib.models.maest._grid"),
        (4, "maestlib.training.trainer._save"),
    ]
    patched = ast.parse('from maestlib.audio import mel\np.setattr(mel, "_a", 1)\np.setattr("maestlib.x._b", 1)')
    assert sorted(private_patches(patched)) == [(2, "mel _a"), (3, "maestlib.x._b")]
    assert list(link_targets("[a](b.ipynb#c) ![d](e.png) `[x](y)` [f](https://g) [h](#i)")) == ["b.ipynb", "e.png"]
    assert floor("maestlib.train") == "top" and floor("maestlib.core.files") == "core"
    assert list(output_texts({"data": {"image/png": "/tmp/x", "text/plain": ["/tmp/", "y"]}}))[-1] == "/tmp/y"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(TOP)))
def test_outputs_are_committed_small_and_without_errors(path):
    notebook = NOTEBOOKS[path]
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert outputs, f"{path}: no outputs; run .ci/outputs {path.relative_to(TOP)}"
    assert not any(output["output_type"] == "error" for output in outputs), f"{path}: a cell failed"
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds, f"{path}: holds a live widget"
    assert "widgets" not in notebook["metadata"] and path.stat().st_size < 1.5e6


def test_outputs_are_small_in_all():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 15e6
