"""The wheel alone: built, installed into a fresh environment, and used from an empty folder.

The environment borrows the packages of this one, but never the repository: what the wheel lacks is missing.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from maestlib.collection.course import COURSE

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
NOTEBOOKS = [f"{name}.ipynb" for name in (*COURSE, "studies/model_card")]
CLI = ("-m", "maestlib.collection.cli")
SOURCES = "maestlib data nbs pyproject.toml README.md LICENSE MANIFEST.in".split()


def run(*command: object, cwd: Path, **variables: str) -> str:  # what was printed
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_package_lists_every_room_and_the_notebooks_of_the_course():
    setuptools = PROJECT["tool"]["setuptools"]
    rooms = {f"maestlib.{path.parent.name}" for path in ROOT.glob("maestlib/*/*.py")}
    assert rooms | {"maestlib", "maestlib.assets", "maestlib.nbs"} == set(setuptools["packages"])
    listed = {name for name in setuptools["package-data"]["maestlib.nbs"] if name.endswith(".ipynb")}
    assert listed == set(NOTEBOOKS)


def test_binder_installs_extras_that_there_are():
    [extras] = re.findall(r"(?m)^-e \.\[(.+)\]$", (ROOT / ".binder/requirements.txt").read_text(encoding="utf8"))
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Built from a copy, so that no earlier build is in it, by way of the sdist; the sdist lies beside it."
    pytest.importorskip("build", reason="build is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("cache", "__pycache__")} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, folder / name, **options)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=folder)
    [built] = folder.glob("dist/*.whl")
    return built


@pytest.mark.slow
def test_the_shelf_accepts_what_was_built(wheel):
    pytest.importorskip("twine", reason="twine is not installed: pip install -e '.[dev]'")
    files = list(wheel.parent.iterdir())
    assert len(files) == 2
    printed = run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=wheel.parent, COLUMNS="300")
    assert printed.count("PASSED") == 2
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.stat().st_size < 40e6 and "maestlib/py.typed" in names and "maestlib/__init__.pyi" in names
    assert not [name for name in names if re.search("confirmation|ablations|throughput|conftest|test_|cache/", name)]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "A function that runs the environment's Python in an empty folder."
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    paths = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=folder)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf8")  # a .pth of a .pth is not read
    (folder / "empty").mkdir()
    own = {
        "PYTHONPATH": "",
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),
        "MAESTLIB_CACHE": str(folder / "cache"),
        "MAESTLIB_RUNS": "",
        "OMP_NUM_THREADS": "1",
    }

    def python(*arguments: object) -> str:
        return run(scripts / "python", *arguments, cwd=folder / "empty", **own)

    return python


@pytest.mark.slow
def test_every_module_and_every_file_that_one_names_is_in_the_wheel(python):
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("maestlib/**/*.py")]
    modules = [name.removesuffix(".__init__") for name in modules]
    readers = [*ROOT.glob("maestlib/*/*.py"), *(ROOT / f"nbs/{name}" for name in NOTEBOOKS)]
    text = "".join(path.read_text(encoding="utf8") for path in readers)
    files = set(re.findall(r'asset_path\(\\?"([^"{}\\]+)\\?"\)', text))
    files |= {f"widgets/{name}" for name in re.findall(r'_read_asset\("(.+?)"\)', text)}
    assert {"hear", "essentia.npz", "scores-test.parquet", "recordings-sources.csv", "widgets/upload.js"} <= files
    code = f"""
import importlib.util, maestlib
from maestlib.core.files import asset_path
assert {str(ROOT)!r} not in maestlib.__file__, maestlib.__file__
missing = [name for name in {modules!r} if importlib.util.find_spec(name) is None]
assert not missing, missing
print(*map(asset_path, {sorted(files)!r}))
"""
    python("-c", code)


@pytest.mark.slow
def test_models_clips_and_cards(python):
    code = """
import maestlib as ml
from maestlib.core.files import asset_path
from maestlib.datasets.recordings import list_recording_sources
from maestlib.models.checkpoint import BUNDLED_MODELS
from maestlib.models.hub import label_names

assert all(ml.load_model(name).config.labels for name in BUNDLED_MODELS) and len(BUNDLED_MODELS) == 3
assert len(list_recording_sources()) > 50 and len(label_names(400)) == 400 and len(label_names(519)) == 519
print(asset_path("hear/clips/lofi.mp3"))
"""
    clip = python("-c", code).strip()
    assert "Genre---" in python(*CLI, "tag", clip, "--top", "5") and python(*CLI, "--version").startswith("maestlib 0.")


@pytest.mark.slow
def test_the_course_is_copied_and_runs(python):
    pytest.importorskip("papermill")
    assert len(python(*CLI, "notebooks", "course").splitlines()) == len(NOTEBOOKS)
    with pytest.raises(AssertionError, match="--force"):
        python(*CLI, "notebooks", "course")
    code = """
import sys, papermill
from jupyter_client.kernelspec import KernelSpecManager

program = KernelSpecManager().get_kernel_spec("python3").argv[0]
assert program in ("python", sys.executable), f"{program}: not the Python of this environment"
for name in ("studies/which_layer", "studies/model_card", "audio/mel"):
    options = dict(cwd=f"course/{name.split('/')[0]}", kernel_name="python3", progress_bar=False)
    papermill.execute_notebook(f"course/{name}.ipynb", "out.ipynb", **options)
"""
    python("-c", code)
