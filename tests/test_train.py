"""Training runs: the notebook and the command line, little memory, full disks, averaged weights."""

import json
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from helpers import one_thread  # noqa: F401
from safetensors.torch import load_file
from training_runs import folder, options, run_notebook, small  # noqa: F401

from maestlib.audio.extract import extract_mels
from maestlib.datasets import registry
from maestlib.datasets.batches import load_corpus
from maestlib.stats.metrics import evaluate
from maestlib.train import train_from_command_line
from maestlib.training import trainer as trainer_module
from maestlib.training.config import TrainConfig
from maestlib.training.evaluation import predict_test
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


def test_out_of_memory_halves_the_micro_batch(small, tmp_path, monkeypatch, capsys):
    plain = fit(*small(out_dir=str(tmp_path / "plain"), mixup=0.3))
    original = trainer_module.compute_loss

    def small_memory(trainer, mel, *rest):
        if len(mel) > 2:
            raise torch.OutOfMemoryError("no")
        return original(trainer, mel, *rest)

    monkeypatch.setattr(trainer_module, "compute_loss", small_memory)
    short = fit(*small(out_dir=str(tmp_path / "short"), mixup=0.3))
    assert "micro_batch_size=2 from here on, batch_size=4 as before" in capsys.readouterr().out
    np.testing.assert_allclose(short["loss"].to_numpy(), plain["loss"].to_numpy(), rtol=1e-4)


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
