"""What only a GPU shows: numbers, waits, memory, half precision, compiled and distributed steps."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import kill_when, run_ranks

from maestlib.audio.mel import MEL, logmel, normalize
from maestlib.audio.store import INDEX_SCHEMA, shard_path, table_checksums
from maestlib.core.files import asset_path, write_json
from maestlib.datasets.batches import load_corpus
from maestlib.models.checkpoint import SCORES_MODEL, load_model
from maestlib.models.patchout import Patchout
from maestlib.training.config import TrainConfig
from maestlib.training.evaluation import predict
from maestlib.training.loop import fit
from maestlib.training.trainer import Trainer, create_model, distribute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ESSENTIA = np.load(asset_path("essentia.npz"))
CUDA = torch.device("cuda:0")


def write_noise_store(
    folder: str | Path,  # is made
    tracks: int,
    seconds: float = 30,  # of each
    labels: int = 400,  # the level of a track's noise says which it has
) -> Path:  # the folder
    "Write a mel store of noise in the three splits, to measure or to test with."
    folder, frames, rng = Path(folder), MEL.num_frames(seconds), np.random.default_rng(0)
    folder.mkdir(parents=True)
    noise = rng.normal(2, 1, (64, frames, MEL.n_mels)).astype(np.float16)
    label = rng.integers(0, labels, tracks)
    with open(shard_path(folder, 0), "wb") as file:
        for i in range(tracks):
            file.write((noise[i % 64] + np.float16(label[i] / labels)).tobytes())
    ids = [f"track-{i:07}" for i in range(tracks)]
    places = dict(shard=[0] * tracks, start=np.arange(tracks) * frames, frames=[frames] * tracks, checksum=[0] * tracks)
    index = pl.DataFrame({"track_id": ids} | places, schema={"track_id": pl.String} | INDEX_SCHEMA)
    split = [("test", "validation", *["train"] * 8)[i % 10] for i in range(tracks)]
    names = [[f"Level---{x:03}", f"Parity---{x % 2}"] for x in label]
    table = pl.DataFrame({"track_id": ids, "artist": ids, "path": ids, "labels": names, "split": split})
    report = table[:0].select("track_id", "path", error="path")
    for name, contents in {"index": index, "tracks": table, "report": report}.items():
        contents.write_parquet(folder / f"{name}.parquet")
    write_json(folder / "meta.json", {"seconds": seconds, "config": MEL.to_dict()})
    (folder / "SHA256SUMS").write_bytes(table_checksums(folder).encode())
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_noise_store(tmp_path_factory.mktemp("gpu") / "store", 400, labels=20)


@pytest.fixture(scope="module")
def corpus(store):
    return load_corpus(str(store), quiet=True)


def make_config(store, tmp_path, **settings):
    defaults = dict(preset="maest-5s", seconds=5, size="tiny", batch_size=16, max_steps=8, num_workers=2, compile=False)
    settings = defaults | dict(num_validations=1, dtype="float32", swa=False, tracks_per_epoch=160) | settings
    return TrainConfig(dataset=str(store), out_dir=str(tmp_path / "run"), **settings).resolve_auto()


def losses(config, corpus, steps=3):
    "Losses and gradient norms of the first steps."
    trainer = Trainer(config, corpus, create_model(config, corpus))
    trainer.model.train()
    for _, batch in zip(range(steps), trainer.load_batches(), strict=False):
        trainer.train_step(*batch)
    return np.array([[float(loss), float(norm)] for loss, norm, _ in trainer.pending_metrics])


def test_the_numbers_of_the_cpu():
    mels = normalize(torch.stack([logmel(torch.randn(30 * 16000) / 10)[:, :1875] for _ in range(2)]))
    model = load_model(SCORES_MODEL)
    with torch.no_grad():
        expected, tags = model.embed(mels, (0, 4, 7)), model(mels)
        model, mels = model.to(CUDA), mels.to(CUDA)
        assert torch.cosine_similarity(model.embed(mels, (0, 4, 7)).cpu(), expected, -1).min() > 0.99999
        torch.testing.assert_close(model(mels).cpu(), tags, atol=2e-3, rtol=2e-3)
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.cosine_similarity(model.embed(mels, (0, 4, 7)).float().cpu(), expected, -1).min() > 0.999


def test_the_front_end_equals_essentia():
    signal_, expected = torch.from_numpy(ESSENTIA["signal"]), logmel(ESSENTIA["signal"])
    torch.testing.assert_close(logmel(signal_.to(CUDA)).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_steps_of_cpu_gpu_and_compiled(store, corpus, tmp_path, monkeypatch):
    config = make_config(store, tmp_path)
    on_gpu = losses(config, corpus)
    for compile in (True, "cuda-graphs"):
        np.testing.assert_allclose(losses(replace(config, compile=compile), corpus), on_gpu, rtol=2e-3)
    halves = replace(config, micro_batch_size=8)
    for compile in (False, True):
        np.testing.assert_allclose(losses(replace(halves, compile=compile), corpus), on_gpu, rtol=2e-3)
    with pytest.raises(ValueError, match="micro_batch_size=8: not with compile=cuda-graphs"):
        losses(replace(halves, compile="cuda-graphs"), corpus)
    in_bf16 = losses(replace(config, dtype="bfloat16"), corpus)
    np.testing.assert_allclose(in_bf16[:, 0], on_gpu[:, 0], rtol=0.02)
    monkeypatch.setenv("MAESTLIB_DEVICE", "cpu")
    np.testing.assert_allclose(losses(config, corpus), on_gpu, rtol=2e-3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"patchout_scope": "clip"}, {"model": "effnet-b0"}, {"dtype": "float16"}, {"compile": True}],
    ids=str,
)
def test_a_step_does_not_wait(settings, store, corpus, tmp_path):
    config = make_config(store, tmp_path, **{"dtype": "bfloat16"} | settings)
    trainer = Trainer(config, corpus, create_model(config, corpus))
    trainer.model.train()
    for step, batch in enumerate(trainer.load_batches()):
        torch.cuda.set_sync_debug_mode("error" if step >= 4 else "default")
        try:
            trainer.train_step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    values = np.array([float(loss) for loss, _, _ in trainer.pending_metrics])
    assert len(values) == 8 and np.isfinite(values).all()


def test_a_run_learns_in_float16(store, corpus, tmp_path):
    config = make_config(store, tmp_path, dtype="float16", max_steps=80, learning_rate=1e-3, schedule="cosine")
    history = fit(config, corpus, create_model(config, corpus))
    steps = pl.read_parquet(tmp_path / "run/steps.parquet")["loss"].to_numpy()
    assert np.isfinite(steps).all() and steps[-10:].mean() < steps[:10].mean() and history["roc_auc"][-1] > 0.5


def test_effnet_is_averaged(store, corpus, tmp_path):
    config = make_config(store, tmp_path, model="effnet-b0", swa=True, batch_size=8, num_validations=2)
    fit(config, corpus, create_model(config, corpus))
    assert (tmp_path / "run/swa.safetensors").exists()


def test_out_of_memory_halves_the_micro_batch(store, corpus, tmp_path):
    config = make_config(store, tmp_path, size="small", batch_size=64, patchout_columns=0, patchout_rows=0, max_steps=2)
    expected = losses(config, corpus, 2)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5e9) / total)
    try:
        trainer = Trainer(config, corpus, create_model(config, corpus))
        trainer.model.train()
        for batch in trainer.load_batches():
            trainer.train_step(*batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.micro_batch_size < 64
    np.testing.assert_allclose([float(loss) for loss, _, _ in trainer.pending_metrics], expected[:, 0], rtol=2e-3)


def test_predict_agrees_with_the_cpu(store, corpus, tmp_path):
    model = create_model(make_config(store, tmp_path), corpus)
    indices = corpus.indices("test")[:7]
    expected = predict(model, corpus, indices, Patchout(keep_every=2), torch.float32)
    found = predict(model.to(CUDA), corpus, indices, Patchout(keep_every=2), torch.float32, 16, num_workers=2)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def start_training(store, out):
    command = [sys.executable, "-m", "maestlib.train", "--dataset", store, "--out-dir", out, "--preset", "maest-5s"]
    command += ["--size", "tiny", "--seconds", 5, "--batch-size", 16, "--num-workers", 2, "--max-steps", 400]
    command += ["--num-validations", 4, "--tracks-per-epoch", 160, "--compile", False]
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_run_resumes(store, tmp_path):
    whole = start_training(store, tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stdout.read()
    first = start_training(store, tmp_path / "killed")
    kill_when(first, (tmp_path / "killed/state.pt").exists)
    command = [sys.executable, "-m", "maestlib.train", "--resume", str(tmp_path / "killed")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0 and "resumes at step" in second.stdout, second.stdout + second.stderr
    one, two = (pl.read_parquet(tmp_path / name / "steps.parquet")["loss"].to_numpy() for name in ("whole", "killed"))
    assert len(one) == len(two) == 400
    np.testing.assert_allclose(two, one, rtol=0.1)  # sums on a GPU have no fixed order


def train_in_a_group(store, out, backend, compile):  # → the mean loss of each step
    os.environ["LOCAL_RANK"] = "0"  # all on the first GPU, which NCCL refuses and gloo does not
    torch.distributed.init_process_group(backend)
    corpus = load_corpus(str(store), quiet=True)
    config = make_config(store, out, max_steps=4, num_workers=0, compile=compile)
    trainer = Trainer(config, corpus, create_model(config, corpus))
    if trainer.world_size == 1:
        trainer.loss = distribute(trainer.loss, config, 2)  # gradients go through NCCL all the same
    trainer.model.train()
    losses = []
    for batch in trainer.load_batches():
        trainer.train_step(*batch)
        loss = trainer.pending_metrics[-1][0].clone()
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / trainer.world_size)
    torch.distributed.destroy_process_group()
    return losses


@pytest.mark.parametrize(
    "processes, backend, compile", [(1, "nccl", True), (2, "gloo", True), (2, "gloo", "cuda-graphs")]
)
def test_several_processes(processes, backend, compile, store, corpus, tmp_path):
    found, *_ = run_ranks(train_in_a_group, store, tmp_path / "group", backend, compile, processes=processes)
    config = make_config(store, tmp_path, max_steps=4)
    np.testing.assert_allclose(found, losses(config, corpus, 4)[:, 0], rtol=2e-3)
