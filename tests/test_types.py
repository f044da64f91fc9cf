"""The public interface has types: `typed_program.py` passes `mypy --strict`, and mistakes in it are found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import maestlib as ml

pytest.importorskip("mypy", reason="mypy is not installed: pip install -e '.[dev]'")
PROGRAM = Path(__file__).with_name("typed_program.py")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    "A function: what `mypy --strict` says about a program."
    cache = tmp_path_factory.mktemp("mypy")

    def check(program: Path) -> list[str]:
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", cache, program]
        environment = os.environ | {"MYPYPATH": str(PROGRAM.parents[1])}
        done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
        assert done.returncode < 2, done.stderr
        return [line for line in done.stdout.splitlines() if ": error:" in line]

    return check


@pytest.mark.slow
def test_a_program_passes_and_its_mistakes_are_found(check, tmp_path):
    assert check(PROGRAM) == []
    wrong = tmp_path / "wrong.py"
    lines = ['x: int = ml.tag("a.mp3")', 'ml.tag("a.mp3", tops=3)', "ml.tagg", "ml.Patchout(keep_every='3')"]
    wrong.write_text("\n".join(["import maestlib as ml", *lines]))
    codes = ["assignment", "call-arg", "attr-defined", "arg-type"]
    assert [error.rpartition("[")[2].rstrip("]") for error in check(wrong)] == codes


def test_the_program_uses_every_public_name():
    floors = {path.name for path in (PROGRAM.parents[1] / "maestlib").iterdir() if path.is_dir()}
    text = PROGRAM.read_text(encoding="utf8")
    assert not [name for name in set(dir(ml)) - floors if f"ml.{name}" not in text]
