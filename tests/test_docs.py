"""README and the site's pages: short, their Python calls what there is, their commands and parameters exist."""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import maestlib as ml
from maestlib.collection.cli import build_parser
from maestlib.paper.scales import PaperConfig
from maestlib.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / ".ci/site/docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TRAINING = {field.name for field in fields(TrainConfig)}


def name_of(path: Path) -> str:
    return path.stem if path.parent != DOCS / "how" else f"how/{path.stem}"


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def wrong_calls(tree: ast.Module) -> list[str]:
    "Imports of names that there are not, and calls of them with arguments that they do not take."
    names, problems = {}, []
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        if isinstance(node, ast.Import | ast.ImportFrom) and modules[0].startswith("maestlib"):
            module = importlib.import_module(modules[0])
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(module, alias.name, module)
                if isinstance(node, ast.ImportFrom) and not hasattr(module, alias.name):
                    problems.append(f"{modules[0]} has no {alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "ml" and node.attr not in dir(ml):
            problems.append(f"ml.{node.attr} does not exist")
        elif isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            called = (
                names.get(text) or getattr(ml, text.removeprefix("ml."), None) if "ml." in text else names.get(text)
            )
            if called is not None:
                try:
                    keywords = {k.arg: None for k in node.keywords}
                    inspect.signature(called).bind(*node.args, **keywords)
                except TypeError as error:
                    problems.append(f"{ast.unparse(node)}: {error}")
    return problems


def commands(text: str) -> list[list[str]]:
    "The commands of a page's shell blocks, up to a pipe or a redirection."
    found = []
    for block in fences(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r" && ", line):
                words = shlex.split(part, comments=True)
                end = next((i for i, word in enumerate(words) if word in (">", "|")), len(words))
                found += [words[:end]] if end else []
    return found


def wrong_command(words: list[str]) -> str | None:
    "What is wrong with a command of this package, or None."
    text = " ".join(words)
    if words[0] == "maestlib":
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                build_parser().parse_args(words[1:])
        except SystemExit as end:
            return f"{text}: {errors.getvalue().splitlines()[-1]}" if end.code else None
    if words[0].endswith("papermill"):
        notebook = ROOT / words[1]
        if not notebook.exists():
            return f"{text}: no {words[1]}"
        known = {"train": TRAINING, "paper": {f.name for f in fields(PaperConfig)}}.get(notebook.stem, set())
        unknown = [
            b for a, b in zip(words, words[1:], strict=False) if a == "-p" and b not in known | parameters(notebook)
        ]
        return f"{text}: {words[1]} has no {unknown[0]}" if unknown else None
    if "maestlib.train" in text:
        options = re.findall(r" --([\w-]+)", text.split("maestlib.train")[1])
        unknown = [option for option in options if option.replace("-", "_") not in TRAINING]
        return f"{text}: maestlib.train has no --{unknown[0]}" if unknown else None
    return None


def parameters(notebook: Path) -> set[str]:
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    [source] = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {node.targets[0].id for node in ast.parse(source).body}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_compiles_and_calls_what_there_is(path):
    blocks = fences(path.read_text(encoding="utf8"), "python")
    problems = wrong_calls(ast.parse("\n".join(blocks)))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_and_parameters_exist(path):
    text = path.read_text(encoding="utf8")
    problems = [wrong for words in commands(text) if (wrong := wrong_command(words))]
    [subparsers] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    problems += [name for name in re.findall(r"`maestlib ([a-z][\w-]*)", text) if name not in subparsers.choices]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", sorted((DOCS / "how").glob("*.md")), ids=name_of)
def test_a_task_is_a_short_page_with_lines_that_run(path):
    text = path.read_text(encoding="utf8")
    assert len(text.split()) <= 300 and (fences(text, "bash") or fences(text, "python"))


def test_questions_have_short_answers():
    answers = re.split(r"(?m)^## ", (DOCS / "faq.md").read_text(encoding="utf8"))[1:]
    assert len(answers) >= 12 and all(answer.partition("\n")[0].endswith("?") for answer in answers)
    assert max(len(answer.split()) for answer in answers) <= 100


def test_the_version_is_the_same_everywhere():
    for path in (ROOT / "README.md", DOCS / "how/cite.md"):
        assert f"version = {{{ml.__version__}}}" in path.read_text(encoding="utf8"), path
    assert f"\n## {ml.__version__}\n" in (DOCS / "changelog.md").read_text(encoding="utf8")


def test_the_checks_find_what_they_look_for():
    page = "```bash\nmaestlib tag a.mp3 --topp 3 > x\npapermill nbs/explore.ipynb o.ipynb -p lib x\n```\n"
    assert [bool(wrong_command(words)) for words in commands(page)] == [True, True]
    assert wrong_command("torchrun -m maestlib.train --pre a".split()) and not wrong_command("ls -p".split())
    assert not wrong_command(shlex.split("maestlib search --tags 'a & b'")) and not wrong_command(
        ["maestlib", "--version"]
    )
    lines = ["import maestlib as ml", "from maestlib.core.files import nothing, read_json"]
    lines += ["ml.tagg", "ml.tag('a', tops=1)", "read_json()"]
    assert len(wrong_calls(ast.parse("\n".join(lines)))) == 4
