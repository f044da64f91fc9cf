"""Runs that start from the weights of another model, or learn from it."""

import pytest
import torch
from helpers import one_thread  # noqa: F401
from training_runs import folder, small  # noqa: F401

from maestlib.models.checkpoint import SCORES_MODEL, load_model
from maestlib.training.loop import fit


@pytest.mark.parametrize(
    "settings, n_blocks, is_scores",
    [
        ({}, 3, True),
        ({"depth": 2}, 2, False),
        ({"init": "random"}, 3, False),
        ({"init": SCORES_MODEL}, 8, True),
        ({"init": SCORES_MODEL, "depth": 4}, 4, True),
    ],
)
def test_a_small_model_starts_from_the_first_blocks_of_maest_10s_scores(small, tmp_path, settings, n_blocks, is_scores):
    _, corpus, model = small(out_dir=str(tmp_path / "run"), **settings)
    assert (len(model.blocks), model.config.depth) == (n_blocks, n_blocks)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, load_model(SCORES_MODEL).blocks[1].mlp.fc1.weight) == is_scores
    assert list(model.config.labels) == corpus.labels and corpus.mel == model.config.mel


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


def test_teacher_trains_the_dist_head(small, tmp_path):
    fit(*small(out_dir=str(tmp_path / "teacher")))
    config, corpus, student = small(out_dir=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), max_steps=2)
    before = student.head_dist.weight.detach().clone()
    fit(config, corpus, student, load_model(config.teacher))
    assert student.config.separate_heads and not torch.equal(before, student.head_dist.weight)
    assert load_model(tmp_path / "student").config.separate_heads
