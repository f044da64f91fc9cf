"""Training runs: the notebook and the command line, little memory, full disks, averaged weights."""

import dataclasses
import itertools
import json
import re
import types
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from helpers import one_thread  # noqa: F401
from safetensors.torch import load_file
from training_runs import folder, options, run_notebook, small  # noqa: F401

from maestlib.audio.extract import extract_mels
from maestlib.collection.cli import main
from maestlib.datasets import registry
from maestlib.datasets.batches import load_corpus
from maestlib.stats.metrics import evaluate
from maestlib.train import train_from_command_line
from maestlib.training import trainer as trainer_module
from maestlib.training.config import TrainConfig
from maestlib.training.evaluation import compare_runs, predict_test
from maestlib.training.loop import fit
from maestlib.training.trainer import create_model

NOTEBOOK_PARAMETERS = {"seconds": 5, "batch_size": 4, "patchout_columns": 10}


def test_same_seed_gives_same_metrics(folder, tmp_path):
    "In the notebook and from the command line."
    settings = NOTEBOOK_PARAMETERS | {"dataset": folder, "out_dir": tmp_path / "two", "max_steps": 6}
    code, out, err = run_notebook(settings | {"out_dir": tmp_path / "one"})  # no output path: it is printed
    assert code == 0, err[-3000:]
    assert "tokens kept" in err and "clips/s" in err and "ROC-AUC" in err
    assert len(out) < 1_000_000 and json.loads(out)["cells"]
    assert train_from_command_line(options(settings)) == 0
    files = [sorted(path.name for path in (tmp_path / run).iterdir() if path.is_file()) for run in ("one", "two")]
    assert files[0] == files[1] and "predictions.parquet" in files[0]

    one, two = (pl.read_parquet(tmp_path / run / "metrics.parquet") for run in ("one", "two"))
    columns = ["step", "clips", "loss", "learning_rate", "roc_auc", "map"]
    assert one.select(columns).equals(two.select(columns)) and one["step"][-1] == 6

    corpus = load_corpus(str(folder))
    assert len(corpus.table) == 29  # the text file is left out
    stored, test = pl.read_parquet(tmp_path / "one/test.parquet"), corpus.indices("test")
    for run in ("one", "two"):
        scores = predict_test(tmp_path / run, corpus)
        assert evaluate(corpus.targets[test], scores, corpus.labels, clusters=corpus.artists("test")).equals(stored)


def test_a_store_is_a_dataset(folder, tmp_path):
    store = tmp_path / "store"
    report = extract_mels(registry.load_dataset(folder), store, seconds=5, num_workers=0)
    assert len(report) == 1  # the text file
    out = tmp_path / "run"
    config = TrainConfig(
        seconds=5, dataset=str(store), size="tiny", max_steps=2, batch_size=4, out_dir=str(out)
    ).resolve_auto()
    corpus = load_corpus(config.dataset)
    metrics = fit(config, corpus, create_model(config, corpus))
    assert metrics["step"][-1] == 2 and len(corpus.table) == 29
    assert predict_test(out, corpus).shape == (len(corpus.indices("test")), 4)
    longer = TrainConfig(seconds=10, dataset=str(store), max_steps=2, out_dir=str(tmp_path / "x")).resolve_auto()
    with pytest.raises(ValueError, match="seconds=10: the store holds 5"):
        fit(longer, corpus, create_model(longer, corpus))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), RuntimeError("you: can't allocate memory: 9 bytes")])
def test_out_of_memory_halves_the_micro_batch(error, small, tmp_path, monkeypatch, capsys):
    plain = fit(*small(out_dir=str(tmp_path / "plain"), mixup=0.3))
    original = trainer_module.compute_loss

    def small_memory(trainer, mel, *rest):
        if trainer.micro_batch_size > 2:  # threads see parts of it
            raise error
        return original(trainer, mel, *rest)

    monkeypatch.setattr(trainer_module, "compute_loss", small_memory)
    short = fit(*small(out_dir=str(tmp_path / "short"), mixup=0.3))
    assert "micro_batch_size=2 from here on, batch_size=4 as before" in capsys.readouterr().out
    np.testing.assert_allclose(short["loss"].to_numpy(), plain["loss"].to_numpy(), rtol=1e-4)


def test_gradients_in_float16_are_those_in_float32(small, tmp_path):
    steps = []
    for dtype in ("float32", "float16"):
        fit(*small(out_dir=str(tmp_path / dtype), dtype=dtype))
        steps.append(pl.read_parquet(tmp_path / dtype / "steps.parquet").select("loss", "gradient_norm").to_numpy())
    np.testing.assert_allclose(*steps, rtol=0.05)


def test_averaged_weights_are_scored_when_they_changed(small, tmp_path, monkeypatch):
    scored = []

    def count(model, corpus, indices, *_, **options):
        scored.append(model)
        return np.random.default_rng(len(scored)).random((len(indices), len(corpus.labels)))

    monkeypatch.setattr("maestlib.training.loop.predict", count)
    settings = {"max_steps": 52, "num_validations": 52, "swa": True, "schedule": "recipe", "depth": 1}
    history = fit(*small(out_dir=str(tmp_path / "run"), **settings))
    updates = history["swa_updates"].n_unique() - 1  # without 0
    assert updates == 17 and len(scored) == 52 + updates
    for (before, after), (n_before, n_after) in zip(
        pairwise(history["swa_map"]), pairwise(history["swa_updates"]), strict=True
    ):
        assert (before == after) == (n_before == n_after)


def test_integer_buffers_are_averaged_as_on_a_gpu(small, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.optim.swa_utils._get_foreach_kernels_supported_devices", lambda: ["cpu", "cuda"])
    run = tmp_path / "run"
    fit(*small(out_dir=str(run), model="effnet-b0", max_steps=3, swa=True, schedule="recipe"))
    last, averaged = (load_file(run / f"{name}.safetensors") for name in ("last", "swa"))
    counters = [name for name in last if name.endswith("num_batches_tracked")]
    assert counters and all(torch.equal(last[name], averaged[name]) for name in counters)
    assert not torch.equal(last["head.weight"], averaged["head.weight"])


def test_nan_loss_ends_the_run(small, tmp_path, monkeypatch):
    def nan_loss(trainer, mel, *_):
        return (trainer.model(mel) * torch.nan).sum()

    monkeypatch.setattr(trainer_module, "compute_loss", nan_loss)
    with pytest.raises(FloatingPointError, match="at step 0: give a smaller learning_rate"):
        fit(*small(out_dir=str(tmp_path / "nan")))
    assert not (tmp_path / "nan/best.safetensors").exists()


def test_a_full_disk_does_not_end_the_run(small, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as once:
        once.setattr("maestlib.training.loop.torch.save", full)
        metrics = fit(*small(out_dir=str(tmp_path / "full"), max_steps=8, num_validations=4))
    assert metrics["step"][-1] == 8 and "make room" in capsys.readouterr().out
    assert (tmp_path / "full/last.safetensors").exists()


def test_effnet_is_trained_by_the_same_loop(small, tmp_path):
    config, corpus, model = small(out_dir=str(tmp_path / "cnn"), model="effnet-b0", max_steps=2, swa=True)
    fit(config, corpus, model)
    assert predict_test(tmp_path / "cnn", corpus).shape == (len(corpus.indices("test")), 4)
    assert "effnet-b0" in (tmp_path / "cnn/config.json").read_text()


@pytest.fixture
def clock(monkeypatch):
    "A function: from now on, each step of a run takes so many seconds, by a clock that only steps move."
    now = [0.0]

    def set_clock(step_s):  # a function of the step
        steps = itertools.count()

        def perf_counter():
            now[0] += step_s(next(steps))
            return now[0]

        monkeypatch.setattr("maestlib.training.loop.time", types.SimpleNamespace(perf_counter=perf_counter))

    return set_clock


def test_a_small_folder_is_told_what_will_happen_and_keeps_what_did(small, tmp_path, capsys):
    config, *rest = small(out_dir=str(tmp_path / "run"), max_steps=2900, epochs=2, depth=1)
    metrics, steps = fit(config, *rest), len(rest[0].indices("train")) // 4
    out = capsys.readouterr().out
    assert f"{2 * steps} steps: 2 epochs of {steps} steps; epochs=2 ends the run before max_steps=2900" in out
    assert "4 test tracks are too few to decide anything" in out
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["max_steps"] == metrics["step"][-1] == 2 * steps
    assert kept | {"max_steps": 2900} == dataclasses.asdict(config)


def test_the_shortest_run_takes_one_step(small, tmp_path):
    config, *rest = small(out_dir=str(tmp_path / "run"), max_steps=0, epochs=0.01, depth=1)
    assert fit(config, *rest)["step"][-1] == 1


def test_a_busy_machine_changes_no_step(small, tmp_path, clock, capsys):
    settings = {"max_steps": 24, "depth": 1, "slow_minutes": 1.5, "num_validations": 1}
    losses = []
    for name, step_s in (("idle", lambda _: 0.1), ("busy", lambda step: 9.0 if step < 3 else 1.0)):
        clock(step_s)
        fit(*small(out_dir=str(tmp_path / name), **settings))
        losses.append(pl.read_parquet(tmp_path / name / "steps.parquet"))
    assert len(losses[0]) == 24 and losses[0].equals(losses[1]) and "too slow" not in capsys.readouterr().out


def test_a_run_that_proves_far_too_slow_is_shortened(small, tmp_path, clock, capsys):
    clock(lambda _: 3.0)
    fit(*small(out_dir=str(tmp_path / "slow"), max_steps=200, depth=1, slow_minutes=1.5, num_validations=1))
    out, steps = capsys.readouterr().out, pl.read_parquet(tmp_path / "slow/steps.parquet")
    shortened = "too slow, shortened to end at 1.5 min with lower scores; slow_minutes=none trains to the end"
    assert f"step 20 of 200 after 63 s of training; {shortened}" in out, out
    assert f"step 29 of 200 after 1.5 min of training; {shortened}" in out, out
    assert len(steps) == json.loads((tmp_path / "slow/config.json").read_text())["max_steps"] == 29
    rates = steps["learning_rate"].to_list()
    assert rates[-1] < max(rates) / 2, "the schedule is gone through"


def test_forecasts_are_corrected_and_compared_with_the_truth(small, tmp_path, clock, capsys):
    clock(lambda step: 30.0 if step < 5 else 1.0 if step < 80 else 2.0)
    fit(*small(out_dir=str(tmp_path / "run"), max_steps=160, depth=1, num_validations=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3, lines
    first, corrected, last = lines
    assert first == "step 60 of 160 after 3.0 min of training, about 1.7 min left"
    assert corrected == "step 80 of 160 after 3.3 min of training, about 84 s left", "of 1 s, and some of 30 s"
    assert last == "step 160 of 160 after 6.0 min of training, 4.6 min forecast"


def test_a_run_below_the_mel_baseline_ends_with_that(folder, tmp_path, monkeypatch, capsys):
    def perfect(corpus):
        return corpus.targets[corpus.indices("test")].astype(float)

    monkeypatch.setattr("maestlib.training.evaluation.mel_baseline", perfect)
    settings = NOTEBOOK_PARAMETERS | {"dataset": folder, "out_dir": tmp_path / "run", "max_steps": 2, "depth": 1}
    assert train_from_command_line(options(settings)) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("below the baseline of mel statistics in "), last


def write_run(path, seed=0, tracks=40, labels=("Dance---Jig", "Dance---Reel"), artist=str, noise=1.0):
    "A run folder with predictions of a test split."
    rng, rows = np.random.default_rng(seed), []
    for i in range(tracks):
        present = [labels[i % 2]]
        activations = {label: float(label in present) + rng.normal(0, noise) for label in labels}
        rows.append({"track_id": f"{i:02}", "artist": artist(i // 2), "labels": present, "activations": activations})
    path.mkdir()
    pl.DataFrame(rows).write_parquet(path / "predictions.parquet")
    return path


def test_two_runs_are_compared_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Compare the test scores of two training runs" in capsys.readouterr().out
    better, worse = write_run(tmp_path / "better", noise=0.1), write_run(tmp_path / "worse", noise=3)
    shuffled = pl.read_parquet(worse / "predictions.parquet").sample(fraction=1, shuffle=True, seed=0)
    shuffled.write_parquet(worse / "predictions.parquet")
    assert main(["compare", str(better), str(worse), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["map_a"] == 1 and row["map_b"] < 0.9 and row["map_low"] > 0
    table = compare_runs(worse, better)
    assert table["map_difference"][0] == -row["map_difference"] and table["map_p"][0] == row["map_p"]
    assert main(["compare", str(better), str(worse), "--labels"]) == 0
    out = capsys.readouterr().out
    assert "Dance---Jig" in out and "mAP, difference" in out and "1.000 - " in out
    few = write_run(tmp_path / "few", tracks=20), write_run(tmp_path / "few too", tracks=20)
    assert main(["compare", *map(str, few)]) == 0
    assert "20 test tracks are too few to decide anything" in capsys.readouterr().err


def test_runs_that_were_tested_on_something_else_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "untested").mkdir()
    damaged = write_run(tmp_path / "damaged")
    (damaged / "predictions.parquet").write_bytes(b"PAR1 no")
    foreign = write_run(tmp_path / "foreign")
    pl.DataFrame({"a": [1]}).write_parquet(foreign / "predictions.parquet")
    for other, message in (
        (write_run(tmp_path / "tracks", tracks=42), r"tested on other tracks \(2 differ, such as 40\)"),
        (
            write_run(tmp_path / "labels", labels=("Dance---Jig", "Dance---Waltz")),
            "tested on other labels .*Dance---Reel",
        ),
        (
            write_run(tmp_path / "artists", artist=lambda i: f"family {i}"),
            "tested on other artists or labels of tracks",
        ),
        (tmp_path / "untested", "no predictions of test tracks; test it by python -m maestlib.train --resume"),
        (tmp_path / "nowhere", "no predictions of test tracks; give a run folder"),
        (damaged, "not the predictions of a run, or damaged"),
        (foreign, "not the predictions of a run, or damaged"),
    ):
        assert main(["compare", str(run), str(other)]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and str(other) in error and error.count("\n") == 1, error
