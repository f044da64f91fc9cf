"""What `import maestlib as ml` offers: light, small, and documented."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fastcore.docments import docments

import maestlib as ml

FLOORS = set("core stats audio datasets models inference training probing speed paper widgets demo collection".split())
NAMES = [name for name in dir(ml) if name not in FLOORS]


def test_it_offers_few_names_and_the_floors():
    assert FLOORS <= set(dir(ml)) and len(NAMES) <= 30
    assert not any(name.startswith("_") for name in dir(ml))


def test_importing_it_imports_no_torch():
    code = "import sys, maestlib; dir(maestlib); sys.exit('torch' in sys.modules or 'polars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_what_the_signature_says(name):
    item = getattr(ml, name)
    public = [m for n, m in vars(item).items() if inspect.isfunction(m) and not n.startswith("_")]
    for documented in [item, *(public if inspect.isclass(item) else [])]:
        text = inspect.getdoc(documented)
        assert text and text == inspect.cleandoc(documented.__doc__)
        for parameter, described in docments(documented, full=True).items():
            if parameter not in ("self", "cls", "return") and described["kind"] != inspect.Parameter.VAR_KEYWORD:
                assert described["docment"], f"{name}: {documented.__name__}({parameter}) has no comment"
                assert described["docment"].splitlines()[0] in text, f"{name}: {parameter} is not in help"


def test_a_relative_path_means_the_current_folder(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "tone.wav", np.zeros(16000, np.float32), 16000)
    monkeypatch.chdir(tmp_path)
    assert len(ml.load_audio("tone.wav")) == 16000
    monkeypatch.chdir(Path(__file__).resolve().parent.parent / "nbs")
    with pytest.raises(FileNotFoundError, match="tone.wav"):
        ml.load_audio("tone.wav")
