"""Short training runs, which several files of tests start."""

import os

import numpy as np
import polars as pl
import pytest
from helpers import PROJECT, write_tone
from processes import start_python

from maestlib.datasets.batches import load_corpus
from maestlib.training.config import TrainConfig
from maestlib.training.trainer import create_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "30 short files, steady or pulsed tones, high or low; one of them is not audio."
    folder = tmp_path_factory.mktemp("catalogue")
    rows = []
    for i in range(30):
        high, pulsed = i % 2, i // 2 % 2
        write_tone(folder / f"{i:02}.wav", 8, high, i, pulsed)
        split = ("train", "train", "train", "validation", "test")[i // 4 % 5]
        rows.append({"path": f"{i:02}.wav", "labels": f"Pitch---{high};Rhythm---{pulsed}", "split": split})
    (folder / "00.wav").write_text("not audio")
    pl.DataFrame(rows).write_csv(folder / "tags.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAESTLIB_CACHE", str(folder.parent / "cache"))
        yield folder


@pytest.fixture
def small(folder):
    "A function: configuration, corpus and model of a run of few steps."

    def small(**settings):
        given = {"seconds": 5, "dataset": str(folder), "max_steps": 4, "batch_size": 4, "dtype": "float32"}
        config = TrainConfig(**given | settings).resolve_auto()
        corpus = load_corpus(config.dataset)
        return config, corpus, create_model(config, corpus)

    return small


def once_more(run):
    "As `small`, of a run to resume."
    config = TrainConfig.from_params({"resume": run})
    corpus = load_corpus(config.dataset)
    return config, corpus, create_model(config, corpus)


FULL_RECIPE = {
    "seconds": 5, "max_steps": 12, "num_validations": 3, "batch_size": 4, "patchout_columns": 20, "mixup": 0.3,
    "time_masks": 20, "frequency_masks": 5, "balanced_sampling": True, "swa": True, "schedule": "recipe",
    "dtype": "float32", "num_workers": 0,
}  # fmt: skip


def options(settings):
    "Of the command line."
    return [str(x) for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", v)]


def start(*arguments):
    "Start a Python program of one thread, such as a module and its options, in another folder than the project's."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    return start_python(arguments, PROJECT.parent, env)


def run_notebook(parameters):  # → exit code, stdout, stderr
    "Run the training notebook by papermill."
    arguments = [x for k, v in parameters.items() for x in ("-p", k, v)]
    process = start("papermill", PROJECT / "nbs/train.ipynb", *arguments)
    printed, errors = process.communicate()
    return process.returncode, printed, errors


SCORES = ["step", "clips", "loss", "roc_auc", "map", "swa_updates", "swa_roc_auc", "swa_map"]


def read_without_times(run, name):
    return pl.read_parquet(run / f"{name}.parquet").drop("elapsed_s", "clips_per_s", strict=False)


def assert_close_runs(run, reference, names=("steps", "metrics")):
    "The same to the precision of sums in another order."
    for name in names:
        one, two = read_without_times(run, name), read_without_times(reference, name)
        assert one.columns == two.columns and len(one) == len(two)
        for column in one.columns:
            values = one[column].to_numpy(), two[column].to_numpy()
            np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-5, err_msg=column)
