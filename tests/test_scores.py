"""The corpora `scores` and `heldout`: exact labels, the same clips from the same seed, nothing shared between them."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from maestlib.audio.store import MelStore, verify_store
from maestlib.datasets import batches, registry
from maestlib.demo import heldout, scores, sounds, tunes, works
from maestlib.demo.abc import tune_catalogue
from maestlib.training import trainer
from maestlib.training.config import TrainConfig

FONTS = ("TimGM6mb",)
pytestmark = pytest.mark.skipif(
    not all(find_spec(name) for name in ("music21", "symusic", "pretty_midi")), reason="needs the extra `demo`"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAESTLIB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def table(cache):
    return works.training_works(4, workers=1)


def test_labels_are_what_is_played(table):
    from pretty_midi import program_to_instrument_name

    for clip in range(12):
        plan = scores.plan_score_clip(clip, table, FONTS)
        played = {p["program"] for p in plan["players"].values() if not p["voice"] and not p["is_drum"]}
        named = {f"Instrument---{program_to_instrument_name(program)}" for program in played}
        drums = {"Instrument---Drum kit"} if any(p["is_drum"] for p in plan["players"].values()) else set()
        assert {label for label in plan["labels"] if label.startswith("Instrument")} == named | drums
        channels = {label.removeprefix("Channel---") for label in plan["labels"] if label.startswith("Channel")}
        assert channels == set(plan["channels"])


def test_a_pair_plays_the_same_bars_by_other_players(table):
    first, second = (scores.plan_score_clip(clip, table, FONTS) for clip in (8, 9))
    assert first["work"] == second["work"] and first["facts"] == second["facts"]
    assert all(np.array_equal(notes, second["parts"][part]) for part, notes in first["parts"].items())
    assert first["players"] != second["players"]


def test_texture_and_players_are_independent_of_the_tune(table):
    plans = [scores.plan_score_clip(clip, table, FONTS) for clip in range(0, 400, 2)]
    textures = pl.Series([plan["facts"]["texture"] for plan in plans if plan["work"]["bars"]]).value_counts()
    assert len(textures) == 13 and textures["count"].max() < 4 * textures["count"].mean()


@pytest.mark.slow
def test_a_corpus_is_built_by_any_number_of_workers_and_not_built_twice(cache):
    options = {"clips": 24, "works": 4, "fonts": FONTS}
    one = MelStore(scores.build_scores(**options, workers=1))
    checksums = one.index["checksum"].to_list()
    verify_store(one.path)
    before = one.path.stat().st_mtime_ns
    assert scores.build_scores(**options) == one.path and one.path.stat().st_mtime_ns == before
    (one.path / "SHA256SUMS").unlink()
    for file in one.path.iterdir():
        if file.is_file():
            file.unlink()
    again = MelStore(scores.build_scores(**options, workers=2))
    assert again.index["checksum"].to_list() == checksums


def test_nothing_held_out_is_trained_on(table):
    trained = {path.parts[-2] for path in works.score_files((works.TRAINING_COMPOSER,))}
    assert not trained & set(works.PERIODS) and not {"bach", "handel"} & (trained | set(works.PERIODS))
    assert heldout.HELD_OUT_FONT not in scores.TRAINING_FONTS


def test_tunes_that_others_are_tested_with_are_left_out(table):
    held_out = tunes.held_out_families(tune_catalogue())
    assert held_out and not set(table["family"]) & {f"tune-{family}" for family in held_out}


RENDER = """
import hashlib, numpy as np
from maestlib.demo.sounds import play_font
notes = np.array([[0.2 * i, 0.5, 35 + 6 * i, 90] for i in range(9)])
print([hashlib.sha256(play_font(notes, p, shift=s, seconds=2)).hexdigest() for p in (19, 48, 65, 94) for s in (0, 4)])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc fills memory, where it is told to")
def test_sounds_do_not_depend_on_what_memory_holds():
    filled = [os.environ | {"MALLOC_PERTURB_": value} for value in ("85", "190")]
    first, second = (subprocess.check_output([sys.executable, "-c", RENDER], env=env, text=True) for env in filled)
    assert first == second
    with pytest.raises(ValueError, match="program=78"):
        sounds.play_font(np.array([[0, 1, 60, 90]]), 78)


@pytest.mark.slow
def test_what_sounds_in_each_column_is_learned(cache, tmp_path, monkeypatch):
    load, splits = registry.load_dataset, pl.Series("split", ["train"] * 22 + ["validation", "test"])  # all three
    monkeypatch.setattr(registry, "load_dataset", lambda *a, **o: load(*a, **o).with_columns(splits))
    corpus = batches.load_corpus("scores", columns=True, quiet=True, clips=24, works=4, fonts=FONTS)
    names, clip = corpus.column_labels, corpus.batch_targets(np.array([0]))[0, len(corpus.labels) :].view(61, -1)
    families = {name for name, active in zip(names, clip.any(0), strict=True) if active and name.startswith("Family")}
    plan = scores.plan_score_clip(int(corpus.table["track_id"][0].split("-")[1]), works.training_works(4), FONTS)
    assert families == {label for label in plan["labels"] if label.startswith("Family")}

    for scope in ("batch", "clip"):
        settings = TrainConfig(preset="bundled", max_steps=2, batch_size=4, mixup=0, equalizer=0, patchout_scope=scope)
        config = replace(settings, out_dir=str(tmp_path / scope)).resolve_auto()
        training = trainer.Trainer(config, corpus, trainer.create_model(config, corpus))
        crops, targets = training.batches[0]
        mel = (crops.float() - corpus.mel.mean) / corpus.mel.std / 2
        patches = training.draw(0).patches
        loss = trainer.compute_loss(training, mel, targets.float(), patches)
        logits, heard = training.model.forward_columns(mel, patches)
        wanted = targets[:, len(corpus.labels) :].view(4, 61, -1).float()
        columns = patches.columns.expand(4, -1)
        kept = torch.stack([clip[column] for clip, column in zip(wanted, columns, strict=True)])
        bce = F.binary_cross_entropy_with_logits
        expected = bce(logits, targets[:, : len(corpus.labels)].float()) + config.column_weight * bce(heard, kept)
        assert torch.allclose(loss, expected, rtol=1e-4)
        training.train_step(*training.batches[0])
        assert training.optimizer.state[training.model.column_head[1].weight], "its head is trained"


def test_columns_are_asked_only_of_a_corpus_that_knows_them(tmp_path):
    with pytest.raises(ValueError, match="dataset=tunes: only scores has targets"):
        batches.load_corpus("tunes", columns=True, first=20)
    with pytest.raises(ValueError, match="column_weight=1: not with a teacher"):
        TrainConfig(column_weight=1, teacher="maest-10s-scores").resolve_auto()


def test_notes_are_measured_over_the_whole_excerpt():
    low_then_high = np.array([[t, 0.9, 50 if t < 10 else 70, 80] for t in range(20)], float)
    measured = scores.measure_notes({"melody": low_then_high}, heldout.HELD_OUT_S)
    assert (measured["Density"], measured["Polyphony"]) == (1, 1) and measured["Register"] == pytest.approx(60)


def test_excerpts_of_a_composer_are_few_and_instruments_are_drawn_without_regard_to_the_period(cache):
    read = works.read_scores(works.score_files(("chopin", "lusitano", "weber")), "three", workers=1)
    excerpts = heldout.plan_excerpts(read)
    assert excerpts["track_id"].n_unique() == len(excerpts) and set(excerpts["artist"]) <= set(works.PERIODS)
    assert excerpts.equals(heldout.plan_excerpts(read))


def test_a_missing_font_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(sounds, "FONT_FOLDERS", ())
    monkeypatch.setenv("MAESTLIB_SOUND_FONTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt install opl3-soundfont"):
        scores.build_scores(24)
    with pytest.raises(ValueError, match="FluidR3"):
        sounds.find_font("FluidR3")


def test_high_notes_are_played_an_octave_lower_and_long_ones_end():
    note = np.array([[0.1, 30.0, 100.0, 90.0]])
    for shift in (-4, 0, 4):
        wave = sounds.play_font(note, 73, shift=shift)
        assert np.isfinite(wave).all() and np.abs(wave[:16000]).max() > 1e-3
        assert np.abs(wave[-16000:]).max() < 1e-3, "it ends after six seconds"


def test_a_score_without_notes_is_named(tmp_path):
    file = tmp_path / "empty.krn"
    file.write_text("**kern\n*-\n", encoding="utf8")
    with pytest.raises(ValueError, match=r"empty\.krn"):
        works.read_score(file)


def test_the_bundled_preset_names_its_corpus():
    config = TrainConfig(preset="bundled").resolve_auto()
    assert (config.dataset, config.seconds, config.depth) == ("scores", 10, 8)
    assert TrainConfig(max_steps=10).resolve_auto().dataset == "tunes"
