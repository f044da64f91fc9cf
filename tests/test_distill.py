"""Distillation: mixtures remain music, teachers answer about what the student hears, runs are repeated and resumed."""

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from maestlib.audio.extract import extract_mels
from maestlib.audio.mel import MelConfig
from maestlib.audio.store import MelStore
from maestlib.models.musicnn import MusiCNN
from maestlib.models.musicnn_fast import FastMusiCNN
from maestlib.training import distill, mixtures


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    return [FastMusiCNN(MusiCNN([f"{name} {i}" for i in range(50)])) for name in ("MSD", "MTT")]


def load_wave(path, duration_s=None, center=False, sample_rate=16000):
    return torch.from_numpy(np.random.default_rng(len(str(path))).normal(0, 0.1, sample_rate * 14).astype(np.float32))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "store"
    table = pl.DataFrame({"track_id": ["a", "b", "c"], "path": ["a.wav", "bb.wav", "ccc.wav"]})
    extract_mels(table, folder, seconds=None, num_workers=0, load=load_wave)
    return MelStore(folder)


@pytest.fixture(scope="module")
def shards(store, teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    distill.write_targets(store, teachers, folder, 2, batch=4, batches=2)
    return folder


def test_powers_come_back_and_a_shift_transposes():
    mel = 3 * torch.rand(4, 96, 50, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mixtures.from_power(mixtures.to_power(mel)), mel, atol=1e-4)
    up = mixtures.warp_bands(mel, torch.full((4,), -3.0), torch.ones(4))
    assert torch.equal(up[:, 3:], mel[:, :-3]) and not up[:, :3].any()


@pytest.mark.parametrize("name", sorted(mixtures.CHANCES))
def test_each_alteration_alters_and_without_any_only_the_gain_is_drawn(name):
    mel = 3 * torch.rand(6, 96, 40, generator=torch.Generator().manual_seed(0))

    def draw(**chances):
        chances = dict.fromkeys(mixtures.CHANCES, 0.0) | chances
        return mixtures.draw_mixtures(mel, torch.Generator().manual_seed(1), chances)

    gain = (mixtures.to_power(draw()) / mixtures.to_power(mel)).flatten(1)
    spread = gain.quantile(0.9, 1) / gain.quantile(0.1, 1)
    assert spread.max() < 1.01 and 0.25 < gain.median() < 4, "6 dB at most"
    altered = draw(**{name: 1.0})
    assert not torch.allclose(altered, draw(), atol=1e-3) and altered.isfinite().all() and altered.min() >= 0


def test_teachers_answer_about_each_patch_of_what_the_student_hears(teachers):
    mels = 3 * torch.rand(2, 96, 625, generator=torch.Generator().manual_seed(0))
    targets = distill.ask_teachers(teachers, mels, patches_at_once=5)
    logits, hidden = zip(*[teacher(mels[1:, :, 219:406]) for teacher in teachers], strict=True)
    assert torch.allclose(targets.hidden[1, 1], torch.cat(hidden, 1)[0], atol=1e-2)
    alone = [t(mels[:1, :, start : start + 187])[0].sigmoid() for t in teachers for start in (0, 219, 438)]
    assert torch.allclose(targets.tags[0, :50], torch.cat(alone[:3]).mean(0), atol=1e-2) and len(logits) == 2


def test_shards_depend_on_seed_and_number_alone(store, teachers, shards, tmp_path):
    distill.write_targets(store, teachers, tmp_path, 2, part=(1, 2), batch=4, batches=2)
    assert [p.name for p in tmp_path.iterdir()] == ["00001.safetensors"]
    one, other = load_file(tmp_path / "00001.safetensors"), load_file(shards / "00001.safetensors")
    assert one["mel"].shape == (8, 96, 625) and all(torch.equal(one[name], other[name]) for name in other)
    first = load_file(shards / "00000.safetensors")
    assert not torch.equal(first["mel"], one["mel"]), "new mixtures in every shard"
    written = (shards / "00000.safetensors").stat().st_mtime_ns
    distill.write_targets(store, teachers, shards, 2, batch=4, batches=2)
    assert (shards / "00000.safetensors").stat().st_mtime_ns == written, "what exists is kept"


def test_a_store_of_another_front_end_is_refused(teachers, tmp_path):
    table = pl.DataFrame({"track_id": ["a"], "path": ["a.wav"]})
    extract_mels(table, tmp_path / "s", seconds=None, num_workers=0, load=load_wave, config=MelConfig(gain=1e3))
    with pytest.raises(ValueError, match="MusiCNN"):
        distill.write_targets(MelStore(tmp_path / "s"), teachers, tmp_path / "t", 1)


@pytest.mark.slow  # Muon multiplies in bf16, which is emulated on some processors
def test_a_student_learns_and_a_run_is_repeated_and_resumed(teachers, shards, tmp_path):
    table = load_file(shards / "00000.safetensors")
    mels, targets = table["mel"].float(), distill.Targets(table["hidden"].float(), table["tags"].float())
    statistics = distill.target_statistics(targets)
    labels = [label for teacher in teachers for label in teacher.labels]
    config = distill.DistillConfig(size="tiny", depth=2, clips=96, batch_size=8, columns=6, last_columns=12)
    arguments = (shards, statistics, labels)
    student = distill.distill(*arguments, tmp_path / "whole.pt", config)
    distill.distill(*arguments, tmp_path / "part.pt", config, stop_at=5)
    resumed = distill.distill(*arguments, tmp_path / "part.pt", config)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))
    untrained = distill.distill(*arguments, tmp_path / "none.pt", config, stop_at=1)
    scores = [distill.score_student(s, mels, targets, statistics) for s in (student, untrained)]
    assert scores[0]["r2, block 1"] > scores[1]["r2, block 1"]
    assert student.model.config.labels == tuple(labels) and not student.training
    with pytest.raises(ValueError, match="labels: 3, the teachers have 100 tags"):
        distill.distill(shards, statistics, labels[:3], tmp_path / "x.pt", config)
    with pytest.raises(FileNotFoundError, match="no targets in it"):
        distill.distill(tmp_path, statistics, labels, tmp_path / "x.pt", config)
