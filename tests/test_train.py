"""Training runs: papermill, a folder of audio, reproducibility, resuming, several processes, invalid parameters."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from processes import start_python
from safetensors.torch import load_file

from maestlib.audio.extract import extract_mels
from maestlib.core.docs import parameter_comments
from maestlib.core.files import resolve_path
from maestlib.datasets import registry
from maestlib.datasets.batches import BatchDataset, load_corpus
from maestlib.models.checkpoint import BUNDLED_MODEL, load_model
from maestlib.stats.metrics import evaluate
from maestlib.training import trainer as trainer_module
from maestlib.training.calibration import limit_steps
from maestlib.training.config import TrainConfig
from maestlib.training.evaluation import predict, predict_test
from maestlib.training.loop import TrainingInterrupted, fit
from maestlib.training.trainer import create_model

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "30 short files, steady or pulsed tones, high or low; one of them is not audio."
    folder = tmp_path_factory.mktemp("catalogue")
    rng, t = np.random.default_rng(0), np.arange(8 * 16000) / 16000
    rows = []
    for i in range(30):
        high, pulsed = i % 2, i // 2 % 2
        wave = np.sin(2 * np.pi * (2000 if high else 300) * rng.uniform(0.9, 1.1) * t)
        wave = wave * (np.sin(2 * np.pi * 3 * t) > 0 if pulsed else 0.5) + 0.01 * rng.normal(size=len(t))
        soundfile.write(folder / f"{i:02}.wav", (0.5 * wave).astype(np.float32), 16000)
        split = ("train", "train", "train", "validation", "test")[i // 4 % 5]
        rows.append({"path": f"{i:02}.wav", "labels": f"Pitch---{high};Rhythm---{pulsed}", "split": split})
    (folder / "00.wav").write_text("not audio")
    pl.DataFrame(rows).write_csv(folder / "tags.csv")
    return folder


NOTEBOOK_PARAMETERS = {"seconds": 5, "batch_size": 4, "patchout_columns": 10}


def run_notebook(folder, parameters):
    "Run the training notebook by papermill, with another current folder than the project's."
    arguments = [x for k, v in parameters.items() for x in ("-p", k, v)]
    env = os.environ | {"MAESTLIB_CACHE": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"}
    return finish(start_python(["papermill", PROJECT / "nbs/train.ipynb", *arguments], folder.parent, env))


def papermill(folder, out, **parameters):
    return run_notebook(folder, NOTEBOOK_PARAMETERS | {"dataset": folder, "out_dir": out} | parameters)


def test_same_seed_gives_same_metrics(folder, tmp_path, monkeypatch):
    "In the notebook and from the command line."
    code, out, err = papermill(folder, tmp_path / "one", max_steps=6)  # no output path: it is printed
    assert code == 0, err[-3000:]
    assert "tokens kept" in err and "clips/s" in err and "ROC-AUC" in err
    assert len(out) < 1_000_000 and json.loads(out)["cells"]
    settings = NOTEBOOK_PARAMETERS | {"dataset": folder, "out_dir": tmp_path / "two", "max_steps": 6}
    code, out, err = finish(start(folder, *options(settings)))
    assert code == 0, err[-3000:]

    one, two = (pl.read_parquet(tmp_path / run / "metrics.parquet") for run in ("one", "two"))
    columns = ["step", "clips", "loss", "learning_rate", "roc_auc", "map"]
    assert one.select(columns).equals(two.select(columns)) and one["step"][-1] == 6

    monkeypatch.setenv("MAESTLIB_CACHE", str(folder.parent / "cache"))
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


FULL_RECIPE = {
    "seconds": 5, "max_steps": 24, "batch_size": 4, "patchout_columns": 20, "mixup": 0.3, "time_masks": 20,
    "frequency_masks": 5, "balanced_sampling": True, "swa": True, "schedule": "recipe", "dtype": "float32",
}  # fmt: skip


def options(settings):
    return [str(x) for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", v)]


def start(folder, *arguments, processes=0, program=("-m", "maestlib.train")):
    "Start `python -m maestlib.train`, or it or another program in several processes through torchrun."
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, *program]
    env = os.environ | {"MAESTLIB_CACHE": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(PROJECT)
    return start_python([*(torchrun if processes else ["maestlib.train"]), *arguments], PROJECT, env)


def finish(process):  # → exit code, stdout, stderr
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def read_without_times(run, name):
    return pl.read_parquet(run / f"{name}.parquet").drop("elapsed_s", "clips_per_s", strict=False)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, out, err = finish(
        start(folder, *options(FULL_RECIPE | {"dataset": folder, "num_validations": 6, "out_dir": run}))
    )
    assert code == 0, err[-2000:]
    return run


def test_killed_and_resumed_run_gives_the_same_losses(folder, undisturbed, tmp_path):
    run, rng, kills = tmp_path / "killed", np.random.default_rng(0), 0
    params = options(FULL_RECIPE | {"dataset": folder, "num_validations": 6, "out_dir": run})
    while not (run / "last.safetensors").exists():
        has_started = (run / "config.json").exists()
        process = start(folder, *(["--resume", run] if has_started else params))
        while not kills and process.poll() is None and not (run / "metrics.parquet").exists():
            time.sleep(0.02)  # the first time, kill it in the middle
        try:
            output = process.communicate(timeout=rng.uniform(1, 3) * 1.5**kills if kills else 0.1)
            assert process.returncode == 0, output[1][-2000:]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            assert kills < 12
    assert kills > 0
    for name in ("steps", "metrics"):
        assert read_without_times(run, name).equals(read_without_times(undisturbed, name)), name
    for name in ("best", "last", "swa"):
        assert (run / f"{name}.safetensors").stat().st_size == (undisturbed / f"{name}.safetensors").stat().st_size
    assert not (run / "state.pt").exists()


def test_the_notebook_resumes_a_run(folder, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    code, out, err = run_notebook(folder, {"resume": run})
    assert code == 0 and "finished already" in err and "ROC-AUC" in err, err[-3000:]


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_sigterm_saves_and_the_run_resumes(folder, undisturbed, tmp_path):
    run = tmp_path / "stopped"
    process = start(folder, *options(FULL_RECIPE | {"dataset": folder, "num_validations": 6, "out_dir": run}))
    while not (run / "metrics.parquet").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err[-2000:]
    assert f"resume with -p resume {run}" in out and (run / "state.pt").exists(), out
    code, out, err = finish(start(folder, "--resume", run))
    assert code == 0 and "resumes at step" in out, err[-2000:]
    assert read_without_times(run, "steps").equals(read_without_times(undisturbed, "steps"))
    code, out, err = finish(start(folder, "--resume", run, "--size", "base"))
    assert code == 1 and "size=base: the run to resume has tiny" in err


def test_two_processes_give_the_losses_of_one(folder, undisturbed, tmp_path, monkeypatch):
    "Started one by one with torchrun's variables: torchrun imports torch anew in each."
    run = tmp_path / "two"
    settings = options(FULL_RECIPE | {"dataset": folder, "num_validations": 6, "out_dir": run})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free.getsockname()[1],
        }
    processes = []
    for rank in range(2):
        for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, str(value))
        processes.append(start(folder, *settings))
    for process in processes:
        code, out, err = finish(process)
        assert code == 0, err[-2000:]
    assert json.loads((run / "config.json").read_text())["gpus"] == 2
    for name in ("steps", "metrics"):
        one, two = read_without_times(undisturbed, name), read_without_times(run, name)
        assert one.columns == two.columns and len(one) == len(two)
        for column in one.columns:
            np.testing.assert_allclose(
                one[column].to_numpy(), two[column].to_numpy(), rtol=2e-3, atol=1e-5, err_msg=column
            )


UNREADABLE = """
import os, sys
from maestlib.datasets.batches import _CropReader
from maestlib.train import train_from_command_line

read = _CropReader.__getitem__

def fail(self, item):
    if os.environ["RANK"] == "1" and item[0] == 5:
        raise OSError("mels.000.f16: input/output error")
    return read(self, item)

_CropReader.__getitem__ = fail
sys.exit(train_from_command_line())
"""
KILLS = int(os.environ.get("MAESTLIB_KILLS", "1"))
THREE = FULL_RECIPE | {
    "batch_size": 12, "num_validations": 5 * KILLS, "max_steps": 5 + 15 * KILLS, "patchout_columns": 26,
    "balanced_sampling": False, "mixup": 0,  # a quarter of the batch is three clips, one without a partner
}  # fmt: skip


def assert_same_steps(run, reference):
    steps, expected = (pl.read_parquet(folder / "steps.parquet") for folder in (run, reference))
    assert steps["step"].equals(expected["step"])
    for column in ("loss", "learning_rate"):
        np.testing.assert_allclose(steps[column], expected[column], rtol=2e-3, err_msg=column)


@pytest.fixture(scope="module")
def undisturbed_three(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, out, err = finish(start(folder, *options(THREE | {"dataset": folder, "out_dir": run})))
    assert code == 0, err[-2000:]
    return run


@pytest.mark.slow
def test_a_process_that_cannot_read_ends_the_run_on_all(folder, undisturbed_three, tmp_path):
    run, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(UNREADABLE)
    process = start(folder, *options(THREE | {"dataset": folder, "out_dir": run}), processes=3, program=[program])
    code, out, err = finish(process)
    assert code != 0 and "maestlib.train: mels.000.f16: input/output error; saved at step 5: fix the file" in err, err
    assert "another process could not read its batch; saved at step 5" in out and "Connection closed" not in err, err
    assert pl.read_parquet(run / "steps.parquet")["step"].to_list() == list(range(5))
    code, out, err = finish(start(folder, "--resume", run, processes=2))
    assert code == 0 and "resumes at step 5" in out, err[-2000:]
    assert_same_steps(run, undisturbed_three)
    assert read_without_times(run, "metrics").columns == read_without_times(undisturbed_three, "metrics").columns


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_process_loses_no_batch_whatever_their_number_is(folder, undisturbed_three, tmp_path):
    "Of three processes one is killed at random moments, MAESTLIB_KILLS times; then two and four processes go on."
    psutil = pytest.importorskip("psutil")
    run, rng = tmp_path / "run", np.random.default_rng(0)
    saved = run / "config.json"  # written when training begins
    for kill in range(KILLS):
        before = saved.stat().st_mtime_ns if kill else 0
        params = ["--resume", run] if kill else options(THREE | {"dataset": folder, "out_dir": run})
        process = start(folder, *params, processes=3)
        while process.poll() is None and not (saved.exists() and saved.stat().st_mtime_ns > before):
            time.sleep(0.02)
        assert process.poll() is None, finish(process)[2][-2000:]
        deadline = time.monotonic() + rng.uniform(0, 5 if kill else 1)
        while time.monotonic() < deadline and not (run / "last.safetensors").exists():
            time.sleep(0.02)
        if (run / "last.safetensors").exists():
            break
        children = psutil.Process(process.pid).children()
        rng.choice([child for child in children if "maestlib.train" in child.cmdline()]).kill()
        code, out, err = finish(process)
        assert code != 0 and "SIGKILL" in err, err[-2000:]
        print(f"kill {kill + 1}: {re.findall('resumes at step.*', out)}")
    assert kill > 0 or not (run / "last.safetensors").exists()
    for processes in (2, 4) if KILLS > 1 else (4,):
        copy = tmp_path / f"on-{processes}"
        shutil.copytree(run, copy)
        code, out, err = finish(start(folder, "--resume", copy, processes=processes))
        assert code == 0, err[-2000:]
        print(f"on {processes}: {re.findall('resumes at step.*', out)}")
        assert_same_steps(copy, undisturbed_three)
        assert json.loads((copy / "config.json").read_text())["gpus"] == processes


def test_processes_share_each_batch(folder, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(folder.parent / "cache"))
    corpus = load_corpus(str(folder))
    whole = BatchDataset(corpus, 5, 12)[3]
    for processes in (2, 3, 4):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        parts = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(BatchDataset(corpus, 5, 12)[3])
        for expected, *shares in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat(shares), expected)
    with pytest.raises(ValueError, match="batch_size=5: give a multiple of the 4 processes"):
        BatchDataset(corpus, 5, 5)


@pytest.fixture
def small(folder, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(folder.parent / "cache"))

    def small(**settings):
        given = {"seconds": 5, "dataset": str(folder), "max_steps": 4, "batch_size": 4, "dtype": "float32"}
        config = TrainConfig(**given | settings).resolve_auto()
        corpus = load_corpus(config.dataset)
        return config, corpus, create_model(config, corpus)

    return small


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


def test_out_of_memory_in_several_processes_asks_for_a_smaller_micro_batch(small, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no")

    trainer = trainer_module.Trainer(*small(out_dir=str(tmp_path / "x")))
    trainer.world_size = 2
    monkeypatch.setattr(trainer_module, "compute_loss", no_memory)
    with pytest.raises(MemoryError, match="micro_batch_size=4: out of memory; resume with 2 or fewer"):
        trainer.train_step(*trainer.batches[0])


def test_gradients_can_be_sent_in_bf16(small, tmp_path, monkeypatch):
    sent = {}

    def keep_gradients(trainer, lr):
        is_bf16 = [
            torch.equal(p.grad, p.grad.bfloat16().float()) for p in trainer.model.parameters() if p.requires_grad
        ]
        sent[trainer.config.gradient_compression] = all(is_bf16)
        return torch.zeros(())

    monkeypatch.setattr(trainer_module, "optimizer_step", keep_gradients)
    runs = [small(out_dir=str(tmp_path / str(flag)), gradient_compression=flag) for flag in (False, True)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for run in runs:
            trainer = trainer_module.Trainer(*run)
            trainer.train_step(*trainer.batches[0])
    finally:
        torch.distributed.destroy_process_group()
    assert sent == {False: False, True: True}


SCORES = ["step", "clips", "loss", "roc_auc", "map", "swa_updates", "swa_roc_auc", "swa_map"]


def test_a_stop_during_validation_loses_nothing(small, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "num_validations": 2, "swa": True, "schedule": "recipe", "model": "effnet-b0"}
    whole = fit(*small(out_dir=str(tmp_path / "whole"), **settings))
    calls = []

    def predict_then_stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # in the second validation
            signal.raise_signal(signal.SIGTERM)
        return predict(*arguments, **options)

    with monkeypatch.context() as once, pytest.raises(TrainingInterrupted, match="saved at step 4; resume with"):
        once.setattr("maestlib.training.loop.predict", predict_then_stop)
        fit(*small(out_dir=str(tmp_path / "stopped"), **settings))
    assert len(pl.read_parquet(tmp_path / "stopped/metrics.parquet")) == 1
    resumed = fit(*once_more(tmp_path / "stopped"))
    assert resumed.select(SCORES).equals(whole.select(SCORES))


@pytest.mark.parametrize(
    "settings, n_blocks, is_bundled",
    [
        ({}, 3, True),
        ({"depth": 2}, 2, False),
        ({"init": "random"}, 3, False),
        ({"init": BUNDLED_MODEL}, 8, True),
        ({"init": BUNDLED_MODEL, "depth": 4}, 4, True),
    ],
)
def test_a_small_model_starts_from_the_first_blocks_of_the_bundled_one(small, tmp_path, settings, n_blocks, is_bundled):
    _, corpus, model = small(out_dir=str(tmp_path / "run"), **settings)
    assert (len(model.blocks), model.config.depth) == (n_blocks, n_blocks)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, load_model().blocks[1].mlp.fc1.weight) == is_bundled
    assert list(model.config.labels) == corpus.labels and corpus.mel == model.config.mel


def once_more(run):
    config = TrainConfig.from_params({"resume": run})
    corpus = load_corpus(config.dataset)
    return config, corpus, create_model(config, corpus)


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


def test_teacher_trains_the_dist_head(small, tmp_path):
    fit(*small(out_dir=str(tmp_path / "teacher")))
    config, corpus, student = small(out_dir=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), max_steps=2)
    before = student.head_dist.weight.detach().clone()
    fit(config, corpus, student, load_model(config.teacher))
    assert student.config.separate_heads and not torch.equal(before, student.head_dist.weight)
    assert load_model(tmp_path / "student").config.separate_heads


def test_fine_tuning_starts_from_a_run(small, tmp_path):
    fit(*small(out_dir=str(tmp_path / "first")))
    config, corpus, model = small(
        out_dir=str(tmp_path / "second"), init=str(tmp_path / "first"), freeze_blocks=2, layer_decay=0.8
    )
    first = load_model(tmp_path / "first")
    assert torch.equal(model.head[1].weight, first.head[1].weight)
    fit(config, corpus, model)
    same = [torch.equal(a.attn.qkv.weight, b.attn.qkv.weight) for a, b in zip(model.blocks, first.blocks, strict=True)]
    assert same == [True] * 2 + [False]
    with pytest.raises(ValueError, match="it is tiny, not small; give size=tiny"):
        small(out_dir=str(tmp_path / "x"), init=str(tmp_path / "first"), size="small")


def test_effnet_is_trained_by_the_same_loop(small, tmp_path):
    config, corpus, model = small(out_dir=str(tmp_path / "cnn"), model="effnet-b0", max_steps=2, swa=True)
    fit(config, corpus, model)
    assert predict_test(tmp_path / "cnn", corpus).shape == (len(corpus.indices("test")), 4)
    assert "effnet-b0" in (tmp_path / "cnn/config.json").read_text()


def test_invalid_parameters_end_before_anything_is_built(folder, tmp_path):
    code, out, err = papermill(folder, tmp_path / "x", dataset="nowhere")
    last = err.strip().splitlines()[-1]
    assert code != 0 and "nowhere" in last and "tunes" in last, err[-500:]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seconds": -3}, "seconds=-3"),
        ({"seconds": 400}, "seconds=400"),
        ({"seconds": "ten"}, "seconds='ten': give a number or auto"),
        ({"size": "huge"}, "size='huge'.*tiny"),
        ({"patchout_columns": 186}, "patchout_columns=186: nothing is kept of 186"),
        ({"seconds": 5, "patchout_columns": 30}, "patchout_columns=30: nothing is kept of 30"),
        ({"patchout_rows": 9}, "patchout_rows=9"),
        ({"patchout_rows": -1}, "patchout_rows=-1"),
        ({"max_minutes": 0}, "minutes=0"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"depth": 0}, "depth=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"preset": "maest-7s"}, "preset='maest-7s'.*maest-5s"),
        ({"model": "effnet-b0", "patchout_rows": 3}, "patchout_rows=3.*effnet-b0"),
        ({"gpus": 99}, "gpus=99"),
        ({"schedule": "steps"}, "schedule='steps'"),
        ({"teacher": "runs/nobody"}, "teacher=runs/nobody"),
        ({"init": "runs/nowhere"}, "runs/nowhere"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"dataset": "mtt"}, "audio=: give the folder with the audio of mtt"),
        ({"audio": "music"}, "audio=music: dataset=tunes has its own"),
    ],
)
def test_errors_name_the_invalid_parameter(wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TrainConfig(**wrong).resolve_auto()


def parameters_cell():
    cells = json.loads((PROJECT / "nbs/train.ipynb").read_text(encoding="utf8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])))


def test_parameters_cell_sets_fields_to_their_defaults():
    defaults, values = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | {"resume": ""}, {}
    exec(parameters_cell(), values)
    del values["__builtins__"]
    assert values == {name: defaults[name] for name in values} and {"preset", "dataset", "resume"} <= set(values)


def test_every_field_is_described():
    comments = parameter_comments(TrainConfig)
    assert list(comments) == [f.name for f in dataclasses.fields(TrainConfig)] and "" not in comments.values()


def test_text_becomes_parameters():
    config = TrainConfig.from_params(
        {"seconds": "5", "swa": "true", "max_minutes": "none", "learning_rate": "1e-3", "audio": "", "batch_size": 8.0}
    )
    assert (config.seconds, config.swa, config.max_minutes) == (5, True, None)
    assert (config.learning_rate, config.batch_size) == (1e-3, 8)


def test_runs_of_older_versions_are_resumed_or_refused(small, tmp_path):
    config, corpus, model = small(out_dir=str(tmp_path / "run"), max_steps=2, num_validations=1)
    fit(config, corpus, model)
    old = json.loads((tmp_path / "run/config.json").read_text()) | {"contrast_weight": 0, "number_weight": 0.0}
    (tmp_path / "run/config.json").write_text(json.dumps(old))
    assert TrainConfig.from_params({"resume": str(tmp_path / "run")}) == config
    for name, value, message in (
        ("masked_weight", 0.1, "masked_weight=0.1, a loss of older versions"),
        ("number_of_wheels", 3, "number_of_wheels: there is no such parameter"),
    ):
        (tmp_path / "run/config.json").write_text(json.dumps(old | {name: value}))
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_params({"resume": str(tmp_path / "run")})


def test_defaults_follow_the_paper_on_a_gpu(monkeypatch):
    monkeypatch.setattr("maestlib.training.config.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("maestlib.training.config.default_dtype", lambda device, training: torch.bfloat16)
    for seconds, columns in {5: 15, 10: 30, 20: 60, 30: 90}.items():
        config = TrainConfig(seconds=seconds).resolve_auto()
        assert (config.size, config.patchout_rows, config.patchout_columns) == ("base", 3, columns)
        assert config.max_minutes is None
        assert (config.mixup, config.time_masks, config.frequency_masks, config.balanced_sampling) == (0.3, 20, 5, True)
        assert config.swa and config.schedule == "recipe" and config.epochs == 130
        same = TrainConfig(preset=f"maest-{seconds}s").resolve_auto()
        assert (same.seconds, same.patchout_columns) == (seconds, columns)


@pytest.mark.parametrize(("step_s", "steps"), [(0.001, 2900), (0.16, 2900), (0.96, 500), (60, 290)])
def test_steps_follow_the_preset_unless_the_machine_is_slow(step_s, steps, monkeypatch, caplog):
    monkeypatch.delenv("MAESTLIB_MINUTES")
    monkeypatch.setattr("maestlib.training.config.default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("maestlib.training.calibration.measure_step_s", lambda *arguments: step_s)
    monkeypatch.setattr(logging.getLogger("maestlib"), "propagate", True)
    with caplog.at_level(logging.INFO, "maestlib"):
        config = TrainConfig().resolve_auto(limit_steps)
    assert (config.max_steps, config.max_minutes) == (steps, None)
    assert TrainConfig().resolve_auto().max_steps == 2900, "without a measurement"
    assert f"{steps:,} steps" in caplog.text and ("max_steps=2900" in caplog.text) == (steps < 2900)
    for chosen in ({"max_steps": 7}, {"max_steps": 0}):
        assert TrainConfig(**chosen).resolve_auto(limit_steps).max_steps == chosen["max_steps"]
    for other_limit in ({"epochs": 2}, {"max_minutes": 3}):
        assert TrainConfig(**other_limit).resolve_auto(limit_steps).max_steps == 0


def test_run_folders_do_not_overwrite(tmp_path, monkeypatch):
    monkeypatch.setattr("maestlib.core.files.project_root", lambda: tmp_path)
    monkeypatch.delenv("MAESTLIB_RUNS")
    assert TrainConfig().resolve_auto().out_dir == "runs/maest-30s-tunes"
    (tmp_path / "runs/maest-30s-tunes").mkdir(parents=True)
    assert TrainConfig().resolve_auto().out_dir == "runs/maest-30s-tunes-2"
    assert resolve_path("runs").is_absolute()
