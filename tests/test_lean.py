"""What `pip install maestlib` brings suffices for inference: a child process in which the extras cannot be imported."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
LEAN = {"torch", "torchaudio", "numpy", "polars", "safetensors", "soundfile", "av", "tqdm", "filelock", "lazy_loader"}
LEAN |= {"fastcore"}
BLOCKED = """
    timm torchvision huggingface_hub sklearn scipy joblib lxml PIL plotly jupyterlab ipykernel IPython ipywidgets
    anywidget traitlets papermill nbformat nbclient music21 symusic pretty_midi matplotlib pandas onnx onnxscript
    onnxruntime tensorboard ray pyarrow mutagen
""".split()

PREFIX = f"""
import sys
BLOCKED = set({BLOCKED!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run(code: str, cwd: Path) -> str:  # what the child printed
    code = PREFIX + textwrap.dedent(code)
    child = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code], cwd=cwd, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def test_the_base_lists_what_inference_imports():
    base = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["dependencies"]
    everywhere = [requirement for requirement in base if "sys_platform" not in requirement]
    assert {requirement.split(">")[0].strip() for requirement in everywhere} == LEAN


def test_inference_without_the_extras(tmp_path):
    printed = run(
        """
        import contextlib, io, pydoc
        import numpy as np, soundfile
        import maestlib as ml
        from maestlib.collection.cli import main

        rng = np.random.default_rng(0)
        for name in ("a.wav", "b.wav"):
            soundfile.write(name, 0.1 * rng.normal(size=16000 * 6), 16000)
        model = ml.load_model("maest-30s-tunes")
        mel = ml.normalize(ml.logmel(ml.load_audio("a.wav")))
        assert model(mel[None], patchout=ml.Patchout(keep_every=2)).shape == (1, len(model.config.labels))
        assert ml.tag("a.wav", model, top=3).shape[0] == 3
        table = ml.embed(["a.wav", "b.wav"], model, block=1, tokens="cdt", out="e.parquet").collect()
        assert ml.nearest(table.head(1), "e.parquet", k=1).height >= 1
        for name in ("embed", "tag", "nearest", "load_model", "MAEST"):
            assert "Parameters" in pydoc.render_doc(getattr(ml, name)), name
        ml.save_checkpoint, ml.MelStore, ml.extract_mels, ml.evaluate, ml.list_models
        assert main(["models"]) == 0
        assert main(["tag", "a.wav", "--model", "maest-30s-tunes", "--top", "2"]) == 0
        for arguments in (["--help"], ["embed", "--help"]):
            with contextlib.suppress(SystemExit):
                main(arguments)
        print("imported:", sorted(BLOCKED & {name.split(".")[0] for name in sys.modules}))
        """,
        tmp_path,
    )
    assert "imported: []" in printed and "maest-10s-recordings" in printed and "usage: maestlib embed" in printed


def test_every_module_imports_or_names_the_extra(tmp_path):
    printed = run(
        f"""
        import importlib
        from pathlib import Path

        for path in sorted(Path({str(TOP)!r}, "maestlib").rglob("*.py")):
            name = ".".join(path.relative_to({str(TOP)!r}).with_suffix("").parts).removesuffix(".__init__")
            try:
                importlib.import_module(name)
            except ImportError as error:
                print(name, error, sep=": ")
            else:
                print(name, "imported", sep=": ")
        """,
        tmp_path,
    )
    outcomes = dict(line.split(": ", 1) for line in printed.splitlines() if line.startswith("maestlib"))
    assert len(outcomes) > 50
    for module, outcome in outcomes.items():
        if outcome != "imported":
            assert outcome.endswith(' is not installed: pip install "maestlib[demo]"'), f"{module}: {outcome}"
    floors = ("core", "audio", "models", "inference")
    unusable = [m for m, o in outcomes.items() if o != "imported" and m.split(".")[1] in floors]
    assert not unusable, unusable
    assert outcomes["maestlib.widgets.controls"] != "imported", "the packages were not blocked"


MISSING = [  # a call, and what it must name
    ("from maestlib.audio.mel import plot_mel; plot_mel(torch.zeros(96, 9))", "plotly", "demo"),
    ("from maestlib.models.effnet import EffNet, EffNetConfig; EffNet(EffNetConfig())", "timm", "demo"),
    ("import maestlib.datasets.discogs", "lxml", "demo"),
    ("import maestlib as ml; ml.recommend", "scipy", "demo"),
    ("from maestlib.collection.write_tags import read_fields; read_fields('a.mp3')", "mutagen", "tags"),
    ("from maestlib.models.export import export_onnx; export_onnx(None, 'a.onnx')", "onnx", "onnx"),
    (
        "from maestlib.inference.ray import embed_with_ray; embed_with_ray('a.wav', 'maest-30s-tunes', 'out')",
        "ray",
        "ray",
    ),
]


def test_what_is_missing_is_named_in_one_line(tmp_path):
    code = "import torch\n"
    for call, _, _ in MISSING:
        code += f"try:\n    {call}\n    print('nothing was missing')\nexcept ImportError as error:\n    print(error)\n"
    lines = run(code, tmp_path).splitlines()
    assert lines == [f'{package} is not installed: pip install "maestlib[{extra}]"' for _, package, extra in MISSING]
