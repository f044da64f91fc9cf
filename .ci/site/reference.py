"""The reference, from the sources: signatures, the comments of parameters, docstrings and what they say is raised."""

import ast
import functools
import html
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

from pages import PROJECT

PACKAGE = PROJECT / "maestlib"
FLOORS = "core stats audio datasets models inference training probing speed paper widgets demo collection".split()


@dataclass
class Parameter:
    name: str
    annotation: str
    default: str
    comment: str


class Module:
    "One module: its syntax tree, and the comments of its lines."

    def __init__(self, path: Path):
        text = path.read_text(encoding="utf8")
        self.tree = ast.parse(text)
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        self.definitions = {n.name: n for n in self.tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        self.values = {}  # name → the statement that assigns it
        for node in self.tree.body:
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    self.values[target.id] = node
        self.exported = ast.literal_eval(self.values["__all__"].value) if "__all__" in self.values else []

    def annotation(self, node: ast.AST | None) -> str:
        "As written; a private name is replaced by what it stands for."
        text = unparse(node)
        return unparse(self.values[text].value) if text.startswith("_") and text in self.values else text

    def parameters(self, function: ast.FunctionDef, is_method: bool = False) -> list[Parameter]:
        arguments = function.args
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
        pairs = [*zip(plain, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        pairs += [(a, None) for a in (arguments.vararg, arguments.kwarg) if a]
        last = {argument.lineno: argument for argument, _ in pairs}  # a comment is that of the last one in its line
        if function.returns and not (function.returns.end_lineno != function.lineno or len(last) > 1):
            last.clear()  # all in one line: its comment is that of the returned value
        found = []
        for argument, default in pairs[is_method:]:
            text = self.comments.get(argument.lineno, "") if last.get(argument.lineno) is argument else ""
            found.append(Parameter(argument.arg, self.annotation(argument.annotation), unparse(default), text))
        return found

    def returned(self, function: ast.FunctionDef) -> tuple[str, str]:  # annotation, comment
        if not function.returns:
            return "", ""
        return self.annotation(function.returns), self.comments.get(function.returns.end_lineno, "")

    def lineage(self, node: ast.ClassDef) -> list[ast.ClassDef]:
        "A class and those that it inherits from in this module, the class first."
        bases = [self.definitions[unparse(base)] for base in node.bases if unparse(base) in self.definitions]
        return [node, *(ancestor for base in bases for ancestor in self.lineage(base))]

    def class_parameters(self, node: ast.ClassDef) -> list[Parameter]:
        "Of the constructor, which may be inherited; of a dataclass, its fields and those that it inherits."
        for ancestor in self.lineage(node):
            for method in ancestor.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    return self.parameters(method, is_method=True)
        if "dataclass" not in decorators(node):
            return []
        body = [n for ancestor in reversed(self.lineage(node)) for n in ancestor.body if isinstance(n, ast.AnnAssign)]
        return [
            Parameter(n.target.id, self.annotation(n.annotation), unparse(n.value), self.comments.get(n.lineno, ""))
            for n in body
        ]


def unparse(node: ast.AST | None) -> str:
    return ast.unparse(node) if node else ""


def decorators(node) -> list[str]:
    return [unparse(d).split("(")[0] for d in node.decorator_list]


@functools.cache
def modules() -> dict[str, Module]:  # such as audio.mel, floor by floor
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in sorted(PACKAGE.glob("*/*.py"))}
    found = {".".join(name.parts): Module(path) for name, path in paths.items() if name.name != "__init__"}
    return {name: module for name, module in found.items() if name.split(".")[0] in FLOORS and module.exported}


def public_methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def addresses() -> dict[str, str]:  # name → reference/audio.md#mel.logmel
    "Where each public name is described; names are unique in the package."
    found = {}
    for name, module in modules().items():
        floor, short = name.split(".")
        for item in module.exported:
            found[item] = f"reference/{floor}.md#{short}.{item}"
            node = module.definitions.get(item)
            for method in public_methods(node) if isinstance(node, ast.ClassDef) else []:
                found[f"{item}.{method.name}"] = f"reference/{floor}.md#{short}.{item}"
    return found


def lazy_names() -> dict[str, list[str]]:  # module → names that `import maestlib as ml` offers
    body = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf8")).body
    return {n.module: [a.name for a in n.names] for n in body if isinstance(n, ast.ImportFrom) and n.module}


class Writer:
    "Markdown of the reference, in which names link to each other."

    def __init__(self):
        self.modules, self.names = modules(), addresses()

    def address(self, module: str | None) -> str | None:
        return "reference/{}.md#{}".format(*module.split(".")) if module in self.modules else None

    def inline(self, text: str) -> str:  # HTML
        def replace(found):
            name = re.sub(r"^(ml|maestlib)\.|\(\)$", "", found[1])
            item = f"<code>{found[1]}</code>"
            if name not in self.names:
                return item
            return f'<a href="{self.names[name].removeprefix("reference/").replace(".md#", ".html#")}">{item}</a>'

        text = re.sub(r"`([^`]+)`", replace, html.escape(text, quote=False))
        return re.sub(r"(?<![\w*])\*(\w[^*\n]*)\*", r"<em>\1</em>", text)

    def docstring(self, node) -> str:
        paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
        lines = []
        for paragraph in filter(None, paragraphs):
            before, *raises = re.split(r"(?:^|(?<=[.;]\s))Raises\b", paragraph, maxsplit=1)
            if before.strip():
                lines.append(f"<p>{self.inline(before.strip())}</p>")
            lines += [f'<p class="raises"><strong>Raises</strong>{self.inline(text)}</p>' for text in raises]
        return "\n".join(lines)

    def table(self, parameters: list[Parameter]) -> str:
        rows = []
        for p in parameters:
            default = f" <code>= {html.escape(p.default, quote=False)}</code>" if p.default else ""
            kind = f'<span class="type">{html.escape(p.annotation, quote=False)}</span>' if p.annotation else ""
            rows.append(f"<dt><code>{p.name}</code> {kind}{default}</dt><dd>{self.inline(p.comment)}</dd>")
        return f'<dl class="parameters">{"".join(rows)}</dl>' if rows else ""

    def function(self, module: Module, node: ast.FunctionDef, name: str, is_method: bool = False) -> str:
        parameters = module.parameters(node, is_method and "staticmethod" not in decorators(node))
        kind, comment = module.returned(node)
        returned = f"<dt>returns</dt><dd>{self.inline(comment)}</dd>" if comment else ""
        table = self.table([p for p in parameters if p.comment or p.annotation])
        if returned:
            table = (table or '<dl class="parameters"></dl>').replace("</dl>", f"{returned}</dl>")
        if "property" in decorators(node):
            signature = f"{name}: {kind}" if kind else name
        else:
            signature = call(name, [f"{p.name}={p.default}" if p.default else p.name for p in parameters], kind)
        return f"```python\n{signature}\n```\n\n{self.docstring(node)}\n{table}"

    def class_(self, module: Module, node: ast.ClassDef) -> str:
        parameters = module.class_parameters(node)
        arguments = [f"{p.name}={p.default}" if p.default else p.name for p in parameters]
        parts = [f"```python\n{call(node.name, arguments, '')}\n```", self.docstring(node), self.table(parameters)]
        methods = {m.name: m for ancestor in reversed(module.lineage(node)) for m in public_methods(ancestor)}
        for method in methods.values():
            text = self.function(module, method, method.name, is_method=True)
            parts.append(f'<div class="method" markdown>\n\n{text}\n\n</div>')
        return "\n\n".join(filter(None, parts))

    def value(self, module: Module, name: str) -> str:
        node = module.values.get(name)
        if node is None:
            return ""
        text = unparse(node.value)
        text = f"{name} = {text}" if len(text) < 300 else f"{name} = …  # {len(text)} characters of source"
        comment = module.comments.get(node.lineno, "")
        return f"```python\n{text}\n```" + (f"\n\n<p>{self.inline(comment)}</p>" if comment else "")

    def floor(self, floor: str, title: str, notebooks: dict[str, tuple[str, str]]) -> str:
        parts = [f"# {title}: reference"]
        for name, (heading, path) in notebooks.items():  # in reading order
            if name.split(".")[0] != floor:
                continue
            module, short = self.modules[name], name.split(".")[1]
            parts.append(f"## `{name}` {{ #{short} }}\n\n[{heading}](../notebooks/{path})\n{{ .module }}")
            for item in module.exported:
                node = module.definitions.get(item)
                parts.append(f'### `{item}` {{ #{short}.{item} data-toc-label="{item}" }}')
                if isinstance(node, ast.ClassDef):
                    parts.append(self.class_(module, node))
                elif node:
                    parts.append(self.function(module, node, item))
                else:
                    parts.append(self.value(module, item))
        return "\n\n".join(parts) + "\n"

    def overview(self) -> str:
        "What `import maestlib as ml` offers, each with the first sentence of its docstring."
        rows = []
        for module, names in lazy_names().items():
            for name in names:
                node = self.modules[module].definitions[name]
                first = re.split(r"(?<=\.)\s|\n\n", ast.get_docstring(node) or "")[0].replace("\n", " ")
                rows.append(f"| [`ml.{name}`]({self.names[name].removeprefix('reference/')}) | {first} |")
        return "\n".join(["| name | |", "|---|---|", *rows])


def call(name: str, arguments: list[str], returned: str) -> str:
    arrow = f" -> {returned}" if returned else ""
    line = f"{name}({', '.join(arguments)}){arrow}"
    if len(line) <= 90:
        return line
    return f"{name}(\n" + "".join(f"    {a},\n" for a in arguments) + f"){arrow}"
