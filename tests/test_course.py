"""The exercises of the course: each check fails for the unsolved cell and passes for the solution.

A notebook is run once in a kernel of its own, as a student would run it, without its exercises; then follow, for each
exercise, the unsolved cell and its check, and the solution and its check.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from maestlib.collection.course import COURSE

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
KINDS = ["exercise", "solution", "check"]
QUESTION = re.compile(r"(?m)^\*\*Question\.\*\* [^\n]+\?$")
SLOW = {"audio/mel", "demo/tunes", "train", "inference/embedding", "speed/tradeoff", "explore"}  # most of a minute


def kind(cell) -> str:  # exercise, solution, check, or the type of a cell of the notebook itself
    return next((tag for tag in cell["metadata"].get("tags", []) if tag in KINDS), cell["cell_type"])


def read(name: str) -> tuple[list, list[list]]:  # its own cells; the exercises: [question, exercise, solution, check]
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    start = next((i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises")), len(cells))
    return cells[:start], [cells[i : i + 4] for i in range(start, len(cells), 4)]


@pytest.mark.parametrize("name", COURSE)
def test_a_notebook_of_the_course_asks_and_has_exercises(name):
    own, exercises = read(name)
    assert QUESTION.search(own[0].source), "its first cell has no line `**Question.** …?`"
    assert 3 <= len(exercises) <= 5 and not any(kind(cell) in KINDS for cell in own)
    for number, cells in enumerate(exercises, 1):
        question, _, solution, check = cells
        assert [kind(cell) for cell in cells] == ["markdown", *KINDS] and f"**{number}.**" in question.source
        assert solution.metadata["jupyter"]["source_hidden"] and "assert " in check.source


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in COURSE])
def test_a_check_fails_before_the_solution_and_passes_after_it(name):
    own, exercises = read(name)
    notebook = nbformat.v4.new_notebook(cells=[cell for cell in own if cell.cell_type == "code"])
    notebook.cells += [cell for _, *cells in exercises for cell in cells]
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str((NOTEBOOKS / name).parent)}})
    with client.setup_kernel():

        def run(cell):
            client.execute_cell(cell, notebook.cells.index(cell))

        for cell in notebook.cells[: -3 * len(exercises)]:
            if "nbval-skip" not in cell.metadata.get("tags", []):
                run(cell)
        for number, (_, exercise, solution, check) in enumerate(exercises, 1):
            run(exercise)
            with pytest.raises(CellExecutionError) as failed:
                run(check)
            assert failed.value.ename == "AssertionError", f"exercise {number}: {failed.value}"
            run(solution)
            run(check)
