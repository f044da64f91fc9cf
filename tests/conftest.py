"""Environment of all tests. nbval runs the notebooks with their own parameters; only training time is cut here.

`pytest` leaves out what is marked `slow`; `pytest -m slow` runs that alone, `pytest -m "slow or not slow"` everything.
What is named by a path is run, slow or not.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import use_forked_kernels

RUNS = Path(__file__).resolve().parent.parent / "runs/tests"  # not beside the user's own runs
if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
os.environ["MAESTLIB_RUNS"] = str(RUNS)
os.environ.setdefault("MAESTLIB_MINUTES", "0.1")  # of training, unless a notebook says otherwise
os.environ.setdefault("TQDM_MININTERVAL", "2")  # nbval reads no message before a cell ends; ZeroMQ drops the 2,000th
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers share the cores; oversubscribed threads are slow
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
use_forked_kernels()

SLOW_NOTEBOOKS = """
    nbs/train.ipynb nbs/inference/ray.ipynb nbs/probing/musicnn.ipynb nbs/demo/heldout.ipynb nbs/speed/tradeoff.ipynb
    nbs/paper.ipynb nbs/paper/runs.ipynb nbs/paper/fig3.ipynb nbs/studies/damaged_files.ipynb
    nbs/studies/retrieval.ipynb nbs/demo/columns.ipynb nbs/speed/benchmark.ipynb nbs/probing/frames.ipynb
    nbs/explore.ipynb
""".split()  # a cell cannot be marked where it is written
LONGEST = [  # they start first, so that no worker is idle at the end
    *"""tests/test_browser.py tests/test_train.py tests/test_resume.py tests/test_distributed.py tests/test_paper.py
    tests/test_ray.py tests/test_datasets.py tests/test_portable.py tests/test_public.py""".split(),
    *SLOW_NOTEBOOKS,
    *"""tests/test_store.py tests/test_embed.py nbs/audio/extract.ipynb nbs/inference/embedding.ipynb
    nbs/collection/search.ipynb nbs/probing/layers.ipynb
    nbs/training/evaluation.ipynb nbs/datasets/discogs.ipynb""".split(),
]


NEEDS = {"nbs/datasets/mirdata.ipynb": "mirdata"}  # a package that `dev` leaves out, because it brings 45 others


def pytest_configure(config):
    if config.args_source != pytest.Config.ArgsSource.ARGS and not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_collection_modifyitems(config, items):
    slow = {config.rootpath / name for name in SLOW_NOTEBOOKS}
    missing = {config.rootpath / name: package for name, package in NEEDS.items() if find_spec(package) is None}
    for item in items:
        if item.path in slow:
            item.add_marker("slow")
        if item.path in missing:
            item.add_marker(pytest.mark.skip(reason=f"{missing[item.path]} is not installed"))
    order = {config.rootpath / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_xdist_auto_num_workers(config):
    "One worker more than cores: browsers, clusters and processes that start or end are waited for."
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) + 1


def pytest_sessionstart(session):
    "Before a run of all files, render the corpora on all cores: a notebook that renders one keeps others waiting."
    if "PYTEST_XDIST_WORKER" in os.environ or session.config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return
    try:
        from maestlib.datasets.registry import load_dataset

        load_dataset("tunes")
        if session.config.option.markexpr != "not slow":  # only slow notebooks need the second
            load_dataset("tunes-confirmation")
    except ImportError as error:  # without the extra `demo`, tests of the corpus are skipped
        print(error)


@pytest.fixture
def crash_on(tmp_path, monkeypatch):
    "A function: from now on, decoder processes die of a signal where they open a file with this in its path."
    from maestlib.audio import isolated

    decoders = isolated.DecoderProcesses()

    def crash_on(part):
        (tmp_path / "sitecustomize.py").write_text(
            "import os, soundfile\n"
            "class SoundFile(soundfile.SoundFile):\n"
            "    def __init__(self, file, *args, **options):\n"
            f"        os.abort() if {part!r} in str(file) else super().__init__(file, *args, **options)\n"
            "soundfile.SoundFile = SoundFile\n"
        )
        for module in ("inference.windows", "collection.scan", "collection.plan", "audio.isolated"):
            monkeypatch.setattr(f"maestlib.{module}.decoder_processes", lambda: decoders)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{RUNS.parents[1]}")

    yield crash_on
    decoders.close()
