"""The loss of the columns' labels: a run that is resumed, two processes, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import run_ranks

from maestlib.datasets import batches
from maestlib.training.config import TrainConfig
from maestlib.training.loop import fit
from maestlib.training.losses import TrainingLoss
from maestlib.training.trainer import Trainer, create_model

CLIPS = {"clips": 40, "works": 8, "fonts": ("TimGM6mb",)}  # those of nbs/training/losses.ipynb


@pytest.fixture(scope="module")
def corpus():
    return batches.load_corpus("scores", columns=True, quiet=True, **CLIPS)


def configure(out, **settings):
    common = dict(preset="bundled", depth=2, batch_size=8, max_steps=6, num_validations=1, dtype="float32")
    return TrainConfig(**common | {"init": "random", "out_dir": str(out)} | settings).resolve_auto()


def make_trainer(corpus, out, **settings):
    config = configure(out, **settings)
    trainer = Trainer(config, corpus, create_model(config, corpus))
    trainer.model.train()
    return trainer


def take_steps(trainer, steps):
    for _, batch in zip(range(steps), trainer.load_batches(), strict=False):
        trainer.train_step(*batch)
    return [[float(loss), float(norm)] for loss, norm, _ in trainer.pending_metrics[-steps:]]


@pytest.mark.parametrize("scope", ["batch", "clip"])
def test_columns_are_learned_and_micro_batches_give_the_same_loss(scope, corpus, tmp_path):
    whole = make_trainer(corpus, tmp_path / "whole", patchout_scope=scope)
    before = whole.model.column_head[1].weight.detach().clone()
    steps = take_steps(whole, 2)
    assert not torch.equal(before, whole.model.column_head[1].weight)
    parts = take_steps(make_trainer(corpus, tmp_path / "parts", patchout_scope=scope, micro_batch_size=2), 2)
    np.testing.assert_allclose(steps, parts, rtol=1e-3)


def test_without_a_weight_the_columns_change_nothing(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path / "labels", column_weight=0)
    assert not trainer.model.column_head[1].weight.requires_grad
    crops, targets = trainer.batches[0]
    mel, targets, patches = crops.float(), targets.float(), trainer.draw(0).patches
    with torch.no_grad():
        of_labels = TrainingLoss(trainer.model)(mel, targets[:, : len(corpus.labels)], patches)
        assert torch.equal(TrainingLoss(trainer.model)(mel, targets, patches), of_labels)


def test_what_cannot_be_learned_is_refused(corpus, tmp_path):
    config = configure(tmp_path / "run", seconds=5)
    with pytest.raises(ValueError, match="column_weight: the labels of columns are known for whole clips only"):
        fit(config, corpus, create_model(config, corpus))
    with pytest.raises(ValueError, match="column_weight=1: not with a teacher"):
        TrainConfig(column_weight=1, teacher="maest-10s-scores").resolve_auto()
    with pytest.raises(ValueError, match="column_weight=0.1: effnet-b0"):
        TrainConfig(column_weight=0.1, model="effnet-b0").resolve_auto()
    with pytest.raises(ValueError, match="column_weight=-1: give a number of 0 or more"):
        TrainConfig(column_weight=-1)


def train_on_columns(out):  # in each of two processes → the sum of all weights
    torch.distributed.init_process_group("gloo")
    corpus = batches.load_corpus("scores", columns=True, quiet=True, **CLIPS)
    trainer = make_trainer(corpus, out, max_steps=2)
    for batch in trainer.load_batches():
        assert len(batch[0]) == 4
        trainer.train_step(*batch)
    torch.distributed.destroy_process_group()
    return sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())


@pytest.mark.slow
def test_two_processes_keep_the_same_weights(corpus, tmp_path):
    first, second = run_ranks(train_on_columns, tmp_path / "run")
    assert first == second and np.isfinite(first)
