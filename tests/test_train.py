"""Whole runs, as a user starts them: papermill, a folder of one's own, the same numbers twice, bad parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile

from maestlib import datasets
from maestlib.files import resolve
from maestlib.metrics import evaluate
from maestlib.store import extract
from maestlib.train import TrainConfig, fit, prepare, run_test, start, windows

TOP = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "30 short files: steady tones and pulsed ones, high and low; one of them is text."
    folder = tmp_path_factory.mktemp("catalogue")
    draw, t, rows = np.random.default_rng(0), np.arange(8 * 16000) / 16000, []
    for i in range(30):
        high, pulsed = i % 2, i // 2 % 2
        wave = np.sin(2 * np.pi * (2000 if high else 300) * draw.uniform(0.9, 1.1) * t)
        wave = wave * (np.sin(2 * np.pi * 3 * t) > 0 if pulsed else 0.5) + 0.01 * draw.normal(size=len(t))
        soundfile.write(folder / f"{i:02}.wav", (0.5 * wave).astype(np.float32), 16000)
        split = ("train", "train", "train", "validation", "test")[i // 4 % 5]
        rows.append({"path": f"{i:02}.wav", "labels": f"Pitch---{high};Rhythm---{pulsed}", "split": split})
    (folder / "00.wav").write_text("not audio")
    pl.DataFrame(rows).write_csv(folder / "tags.csv")
    return folder


def papermill(folder, out, *arguments, to=None):
    "Run the training notebook on the folder from another folder than the project's."
    settings = {"dataset": folder, "out": out, "seconds": 5, "batch_size": 4, "patchout_columns": 10}
    parameters = [x for k, v in settings.items() for x in ("-p", k, str(v))]
    files = [TOP / "nbs/train.ipynb", to] if to else [TOP / "nbs/train.ipynb"]
    command = [sys.executable, "-m", "papermill", *files, *parameters, *arguments]
    env = os.environ | {"MAESTLIB_CACHE": str(folder.parent / "cache")}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder.parent, timeout=280)


def test_the_same_seed_gives_the_same_numbers(folder, tmp_path, monkeypatch):
    first = papermill(folder, tmp_path / "one", "-p", "steps", "6", to=tmp_path / "one.ipynb")
    assert first.returncode == 0, first.stderr[-3000:]
    assert "tokens kept" in first.stderr and "clips/s" in first.stderr and "ROC-AUC" in first.stderr
    second = papermill(folder, tmp_path / "two", "-p", "steps", "6")  # no output path: the notebook is printed
    assert second.returncode == 0, second.stderr[-3000:]
    assert len(second.stdout) < 1_000_000 and json.loads(second.stdout)["cells"]

    one, two = (pl.read_parquet(tmp_path / run / "metrics.parquet") for run in ("one", "two"))
    same = ["step", "clips", "loss", "learning_rate", "roc_auc", "map"]
    assert one.select(same).equals(two.select(same)) and one["step"][-1] == 6
    stored = pl.read_parquet(tmp_path / "one/test.parquet")
    assert stored.equals(pl.read_parquet(tmp_path / "two/test.parquet"))

    monkeypatch.setenv("MAESTLIB_CACHE", str(folder.parent / "cache"))
    corpus = prepare(str(folder))
    assert len(corpus.table) == 29  # the text file is left out
    again = evaluate(corpus.targets[corpus.split("test")], run_test(tmp_path / "one", corpus), corpus.labels)
    assert again.equals(stored)


def test_a_store_is_a_dataset(folder, tmp_path):
    store = tmp_path / "store"
    report = extract(datasets.load(folder), store, seconds=5, workers=0)
    assert len(report) == 1  # the text file
    out = tmp_path / "run"
    config = TrainConfig(seconds=5, dataset=str(store), size="tiny", steps=2, batch_size=4, out=str(out)).settle()
    corpus = prepare(config.dataset)
    metrics = fit(config, corpus, start(config, corpus))
    assert metrics["step"][-1] == 2 and len(corpus.table) == 29
    assert run_test(out, corpus).shape == (len(corpus.split("test")), 4)


def test_bad_parameters_end_before_anything_is_built(folder, tmp_path):
    ended = papermill(folder, tmp_path / "x", "-p", "dataset", "nowhere", to=tmp_path / "x.ipynb")
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode != 0 and "nowhere" in last and "tunes" in last, ended.stderr[-500:]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seconds": -3}, "seconds=-3"),
        ({"seconds": 400}, "seconds=400"),
        ({"seconds": "ten"}, "seconds=ten"),
        ({"size": "huge"}, "size='huge'.*tiny"),
        ({"patchout_columns": 186}, "patchout_columns=186: nothing is kept of 186"),
        ({"seconds": 5, "patchout_columns": 30}, "patchout_columns=30: nothing is kept of 30"),
        ({"patchout_rows": 9}, "patchout_rows=9"),
        ({"patchout_rows": -1}, "patchout_rows=-1"),
        ({"minutes": 0}, "minutes=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"init": "runs/nowhere"}, "runs/nowhere"),
        ({"dataset": "nowhere"}, "nowhere"),
    ],
)
def test_bad_parameters_are_named(wrong, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        TrainConfig(**wrong).settle()


def test_defaults_follow_the_paper_on_a_gpu(monkeypatch):
    import torch

    monkeypatch.setattr("maestlib.train.best_device", lambda: torch.device("cuda"))
    for seconds, columns in {5: 15, 10: 30, 20: 60, 30: 90}.items():
        config = TrainConfig(seconds=seconds).settle()
        assert (config.size, config.patchout_rows, config.patchout_columns) == ("base", 3, columns)
        assert config.minutes is None


def test_windows_cover_every_frame():
    for length in (1, 311, 312, 313, 1875, 1876, 10_000):
        seen = np.zeros(length, bool)
        for first in windows(length, 312):
            seen[first : first + 312] = True
        assert seen.all()


def test_run_folders_do_not_overwrite(tmp_path, monkeypatch):
    monkeypatch.setattr("maestlib.files._TOP", tmp_path)
    assert TrainConfig().settle().out == "runs/maest-30s-tunes"
    (tmp_path / "runs/maest-30s-tunes").mkdir(parents=True)
    assert TrainConfig().settle().out == "runs/maest-30s-tunes-2"
    assert resolve("runs").is_absolute()
