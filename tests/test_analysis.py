"""Thresholds, changes of the signal and maps of tags, on made-up data."""

import numpy as np
import polars as pl
import pytest
import torch

from maestlib.collection.cli import main
from maestlib.core.files import asset_path
from maestlib.demo import channels
from maestlib.inference.embedding import tag
from maestlib.models.checkpoint import load_model, read_tensors, save_checkpoint
from maestlib.models.effnet import EffNet, EffNetConfig
from maestlib.models.reduction import ReducedMAEST, quantize_int8
from maestlib.training.thresholds import fit_thresholds, store_thresholds, threshold_scores

LABELS = ["Genre---Jazz", "Genre---Rock", "Instrument---Guitar"]


@pytest.fixture
def checkpoint(tmp_path):
    model = load_model("random", size="tiny", seconds=5, labels=LABELS)
    save_checkpoint(model, tmp_path / "best.safetensors", run="a note")
    return tmp_path / "best.safetensors"


def test_thresholds_travel_with_the_weights(checkpoint, tmp_path):
    before, header = read_tensors(checkpoint)
    assert load_model(checkpoint).thresholds is None, "a file without thresholds loads as before"
    store_thresholds(tmp_path, [0.1, 0.2, 0.3])  # a run folder
    model = load_model(checkpoint)
    after, new_header = read_tensors(checkpoint)
    assert model.thresholds == (0.1, 0.2, 0.3)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert {k: v for k, v in new_header.items() if k != "thresholds"} == header
    save_checkpoint(model.half(), tmp_path / "copy.safetensors")
    assert load_model(tmp_path / "copy.safetensors").thresholds == model.thresholds
    assert load_model(checkpoint, labels=["a", "b"], new_head=True).thresholds is None, "another head has none"
    assert ReducedMAEST(load_model(checkpoint), merge=0.1).thresholds == model.thresholds
    assert quantize_int8(load_model(checkpoint)).thresholds == model.thresholds
    with pytest.raises(ValueError, match="2 thresholds for 3 labels"):
        store_thresholds(checkpoint, [0.1, 0.2])


def test_thresholds_of_the_cnn_baseline(tmp_path):
    model = EffNet(EffNetConfig(labels=tuple(LABELS)))
    save_checkpoint(model, tmp_path / "cnn.safetensors")
    store_thresholds(tmp_path / "cnn.safetensors", [0.5, 0.25, 0.125])
    assert load_model(tmp_path / "cnn.safetensors").thresholds == (0.5, 0.25, 0.125)


def test_tag_assigns_by_calibrated_thresholds(checkpoint):
    wave = 0.1 * torch.randn(80_000, generator=torch.Generator().manual_seed(0))
    activation = dict(tag(wave, checkpoint).iter_rows())
    with pytest.raises(ValueError, match="no thresholds"):
        tag(wave, checkpoint, threshold="calibrated")
    with pytest.raises(ValueError, match="threshold=2"):
        tag(wave, checkpoint, threshold=2)
    store_thresholds(checkpoint, [activation[LABELS[0]] - 0.01, activation[LABELS[1]] + 0.01, 0.0])
    assert set(tag(wave, checkpoint, threshold="calibrated")["label"]) == {LABELS[0], LABELS[2]}
    assert tag(wave, checkpoint, threshold=1.0).is_empty()
    with pytest.raises(SystemExit):
        main(["tag", "a.wav", "--threshold", "high"])


def test_rare_labels_share_a_threshold():
    targets = np.zeros((100, 2), int)
    targets[:20, 0] = targets[:2, 1] = 1
    scores = np.stack([np.linspace(0.9, 0.1, 100), np.linspace(0.3, 0.0, 100)], 1)
    table = fit_thresholds(targets, scores, ["G---a", "G---b"], min_positives=10)
    assert table["shared"].to_list() == [False, True]
    assert scores[20, 0] < table["threshold"][0] < scores[19, 0] and table["f1"][0] == 1
    decisions = threshold_scores(targets, scores, table["threshold"], ["G---a", "G---b"], n_bootstrap=50)
    assert decisions.filter(name="G---a")["f1"][0] == 1 and decisions.filter(name="G---a")["assigned"][0] == 20
    with pytest.raises(ValueError, match="no positive"):
        fit_thresholds(0 * targets, scores, ["G---a", "G---b"])


CHANGES = {
    "codec": lambda wave: channels.encode_decode(wave, "libopus", 16),
    "noise": lambda wave: channels.add_white_noise(wave, snr_db=10),
    "band": lambda wave: channels.limit_band(wave, low_hz=300, high_hz=3400),
    "clipping": lambda wave: channels.clip_peaks(wave, db=12),
    "room": lambda wave: channels.add_reverb(wave, rt60_s=0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_deterministic_and_keep_the_length(name):
    wave = 0.1 * torch.sin(torch.arange(24_007) * 0.2) * torch.linspace(1, 0.2, 24_007)
    original = wave.clone()
    first, second = CHANGES[name](wave), CHANGES[name](wave)
    assert first.equal(second) and wave.equal(original) and first.dtype == torch.float32
    assert first.isfinite().all() and not first.equal(wave)
    assert len(first) == len(wave)


def test_an_unknown_codec_is_named():
    with pytest.raises(ValueError, match="codec='speex'"):
        channels.encode_decode(torch.zeros(16_000), "speex", 16)


def test_shipped_tag_maps():
    paths = sorted(asset_path("benchmarks/tag_maps").glob("*.csv"))
    assert len(paths) == 7
    msd = asset_path("benchmarks/msd/tags.txt").read_text(encoding="utf8").splitlines()
    for path in paths:
        table = pl.read_csv(path, infer_schema=False)
        assert table.columns == ["source", "target"] and not table.null_count().sum_horizontal()[0]
        assert not table["source"].is_duplicated().any(), "a label has one counterpart"
        assert not path.stem.endswith("msd") or set(table["target"]) <= set(msd)
