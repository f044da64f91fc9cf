"""The committed outputs of every notebook are those of its code, and of the results in data/ that it shows."""

import importlib.machinery
import importlib.util
import io
import json
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
loader = importlib.machinery.SourceFileLoader("outputs", str(TOP / ".ci/outputs"))
outputs = importlib.util.module_from_spec(importlib.util.spec_from_loader("outputs", loader))
loader.exec_module(outputs)


@pytest.mark.parametrize("path", outputs.notebooks(), ids=lambda path: str(path.relative_to(TOP)))
def test_outputs_are_as_old_as_the_code(path):
    name = path.relative_to(TOP).as_posix()
    assert not outputs.is_stale(path), f"{name}: its outputs are older than its code; run `.ci/outputs {name}`"


def test_code_and_results_make_outputs_stale_and_prose_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PROJECT", tmp_path)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.parquet").write_bytes(b"1")
    path = tmp_path / "nbs/a.ipynb"

    def fingerprint(prose="# A", code="read('a.parquet')"):
        cells = [{"cell_type": "markdown", "source": [prose]}, {"cell_type": "code", "source": [code]}]
        path.write_text(json.dumps({"cells": cells, "metadata": {}}))
        return outputs.fingerprint(path)

    first = fingerprint()
    assert outputs.is_stale(path), "it has none"
    assert fingerprint(prose="# B") == first == fingerprint(code="read('a.parquet')\n"), "prose and white space"
    assert fingerprint(code="read('a.parquet', 2)") != first
    fingerprint()
    (tmp_path / "data/a.parquet").write_bytes(b"2")
    assert outputs.fingerprint(path) != first, "a result that is shown has changed"


def test_a_transparent_picture_lies_on_white():
    image, png = pytest.importorskip("PIL.Image"), io.BytesIO()
    image.new("RGBA", (1200, 10), (0, 0, 0, 0)).save(png, "png")
    packed = image.open(io.BytesIO(outputs.smaller(png.getvalue()))).convert("RGB")
    assert packed.width == 1000 and packed.getpixel((500, 5)) == (255, 255, 255)
