"""What is learned beside labels: pairs in a batch, a run that is resumed, and what is refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from maestlib.datasets import batches
from maestlib.training import loop
from maestlib.training.config import TrainConfig
from maestlib.training.objectives import Objectives, check_objectives, hidden_columns
from maestlib.training.trainer import Trainer, create_model

ALL = {"contrast_weight": 0.1, "masked_weight": 0.1, "number_weight": 0.1}


@pytest.fixture(scope="module")
def corpus():
    options = {"clips": 120, "works": 8, "fonts": ("TimGM6mb",)}  # those of nbs/training/objectives.ipynb
    return batches.load_corpus("scores", columns=True, numbers=True, quiet=True, **options)


def make_trainer(corpus, out, **settings):
    common = dict(
        preset="bundled", depth=2, batch_size=8, max_steps=6, num_validations=1, dtype="float32", init="random"
    )
    config = TrainConfig(**common | settings, out_dir=str(out)).resolve_auto()
    trainer = Trainer(config, corpus, create_model(config, corpus))
    trainer.model.train()
    return trainer


def take_steps(trainer, steps):
    for _, batch in zip(range(steps), trainer.load_batches(), strict=False):
        trainer.train_step(*batch)
    return [[float(loss), float(norm)] for loss, norm, _ in trainer.pending_metrics[-steps:]]


def test_a_performance_stands_two_places_from_the_other_one(corpus):
    sampler = batches.EpochSampler(corpus, seed=3, paired=True)
    pair = corpus.table["pair"].to_numpy()
    order = sampler.epoch_order(0)
    assert len(order) % 4 == 0 and len(set(order)) == len(order) and set(order) <= set(corpus.indices("train"))
    partner = np.arange(len(order)) ^ 2
    assert (pair[order] == pair[order[partner]]).all() and (order != order[partner]).all()
    assert (pair[order] != pair[order[np.arange(len(order)) ^ 1]]).all(), "mixup's partner plays something else"
    counts = np.unique(pair[corpus.indices("train")], return_counts=True)[1]
    assert len(order) >= 2 * (counts == 2).sum() - 2, "all complete pairs but one at most"
    assert not np.array_equal(order, sampler.epoch_order(1))


def test_numbers_are_counted_in_deviations(corpus):
    train = corpus.numbers[corpus.indices("train")].astype(float)
    assert np.abs(train.mean(0) - 128).max() < 2 and np.abs(train.std(0) - batches.NUMBER_SCALE).max() < 2
    unknown = batches._standardize(np.array([[1.0], [3.0], [np.nan]]), np.array([0, 1, 2]))
    assert unknown[:, 0].tolist() == [96, 160, 128]


@pytest.mark.parametrize("scope", ["batch", "clip"])
def test_a_resumed_run_takes_the_same_steps(scope, corpus, tmp_path):
    whole = take_steps(make_trainer(corpus, tmp_path / "whole", patchout_scope=scope, **ALL), 6)
    first = make_trainer(corpus, tmp_path / "run", patchout_scope=scope, **ALL)
    (tmp_path / "run").mkdir()
    assert take_steps(first, 3) == whole[:3]
    loop._flush_metrics(first)
    loop._save_checkpoint(first)
    second = make_trainer(corpus, tmp_path / "run", patchout_scope=scope, **ALL)
    loop._load_checkpoint(second)
    assert second.step == 3 and take_steps(second, 3) == whole[3:]


def test_every_head_is_trained_and_none_is_shipped(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path / "run", **ALL)
    before = {name: value.clone() for name, value in trainer.objectives.heads.named_parameters()}
    take_steps(trainer, 2)
    for name, value in trainer.objectives.heads.named_parameters():
        assert not torch.equal(before[name], value), name
    alone = make_trainer(corpus, tmp_path / "labels", column_weight=0)
    assert alone.objectives is None
    assert {name for name, _ in trainer.model.named_parameters()} == {
        name for name, _ in alone.model.named_parameters()
    }


def test_without_a_weight_nothing_changes(corpus, tmp_path):
    columns_alone = make_trainer(corpus, tmp_path / "a")
    crops, targets = columns_alone.batches[0]
    patches = columns_alone.draw(0).patches
    assert set(columns_alone.objectives.each_loss(crops.float(), targets.float(), patches)) == {"labels", "column"}
    assert list(columns_alone.objectives.heads.parameters()) == []


def test_the_contrast_is_of_the_right_clips():
    "Vectors that are one-hot by clip, or by music: the loss is small, and large for others."
    objectives = object.__new__(Objectives)
    torch.nn.Module.__init__(objectives)
    objectives.heads = torch.nn.ModuleDict({"clip": torch.nn.Identity(), "music": torch.nn.Identity()})
    clip, music = torch.eye(8), torch.eye(8)[torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])]
    right = torch.stack([clip, music], 1).repeat(2, 1, 1)
    assert objectives._contrast(right) < 1e-2
    assert objectives._contrast(torch.stack([clip, music.roll(1, 0)], 1).repeat(2, 1, 1)) > 2, "other music"
    assert objectives._contrast(torch.stack([music, music], 1).repeat(2, 1, 1)) > 0.3, "two clips cannot be told apart"
    assert objectives._contrast(torch.stack([clip, clip], 1).repeat(2, 1, 1)) > 0.9, "players alone"


def test_hidden_columns_are_new_ones_in_every_step():
    drawn = [torch.randperm(61, generator=torch.Generator().manual_seed(i))[:14].sort().values for i in range(50)]
    hidden = [hidden_columns(columns, 61) for columns in drawn]
    assert all(
        not set(a.tolist()) & set(b.tolist()) and len(set(b.tolist())) == 14 for a, b in zip(drawn, hidden, strict=True)
    )
    counts = torch.bincount(torch.cat(hidden), minlength=61)
    assert counts.min() > 2 and counts.max() < 25


def test_what_cannot_be_learned_is_refused(corpus, tmp_path):
    config = TrainConfig(preset="bundled", out_dir=str(tmp_path / "run")).resolve_auto()
    for changes, message in (
        ({"contrast_weight": 1, "batch_size": 6}, "contrast_weight: 6 clips"),
        ({"contrast_weight": 1, "patchout_columns": 60}, "patchout_columns=60: a contrast needs two"),
        ({"masked_weight": 1, "patchout_columns": 0}, "masked_weight: no columns"),
    ):
        changed = replace(config, **changes)
        with pytest.raises(ValueError, match=message):
            check_objectives(changed, corpus, 625, changed.batch_size)
    with pytest.raises(ValueError, match="number_weight=1: not with a teacher"):
        TrainConfig(number_weight=1, teacher="maest-10s-scores").resolve_auto()
    with pytest.raises(ValueError, match="masked_weight=0.1: effnet-b0"):
        TrainConfig(masked_weight=0.1, model="effnet-b0").resolve_auto()
    with pytest.raises(ValueError, match="masked_weight=-1: give a number"):
        TrainConfig(masked_weight=-1)
    tunes = batches.load_corpus("tunes", quiet=True, first=20)
    with pytest.raises(ValueError, match="no column `pair`"):
        batches.EpochSampler(tunes, paired=True)
    with pytest.raises(ValueError, match="dataset=tunes: numbers"):
        batches.load_corpus("tunes", numbers=True, first=20)


TWO_PROCESSES = """
import sys
import torch
from maestlib.datasets.batches import load_corpus
from maestlib.training.config import TrainConfig
from maestlib.training.trainer import Trainer, create_model
torch.distributed.init_process_group("gloo")
corpus = load_corpus("scores", columns=True, numbers=True, quiet=True, clips=120, works=8, fonts=("TimGM6mb",))
config = TrainConfig(preset="bundled", depth=2, batch_size=8, max_steps=2, init="random", contrast_weight=0.1,
                     masked_weight=0.1, number_weight=0.1, out_dir=sys.argv[1]).resolve_auto()
trainer = Trainer(config, corpus, create_model(config, corpus))
trainer.model.train()
for batch in trainer.load_batches():
    assert len(batch[0]) == 4
    trainer.train_step(*batch)
total = sum(float(p.detach().double().abs().sum()) for p in trainer.objectives.parameters())
totals = [None, None]
torch.distributed.all_gather_object(totals, total)
if trainer.rank == 0:
    print(*totals)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_keep_the_same_weights(corpus, tmp_path):
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "train.py"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    first, second = map(float, done.stdout.split()[-2:])
    assert first == second and np.isfinite(first)
