"""What a paper needs beside its main table: thresholds, retrieval, robustness, transfer and errors, on made-up data."""

import numpy as np
import polars as pl
import pytest
import torch

from maestlib.audio.channels import encode_decode
from maestlib.collection.cli import main
from maestlib.core.files import asset_path
from maestlib.datasets.batches import Corpus
from maestlib.inference.embedding import tag
from maestlib.models.checkpoint import load_model, read_tensors, save_checkpoint
from maestlib.models.effnet import EffNet, EffNetConfig
from maestlib.models.reduction import ReducedMAEST, quantize_int8
from maestlib.probing.embeddings import Embeddings
from maestlib.probing.probe import ProbeConfig
from maestlib.studies.errors import confusions, hardest_tracks
from maestlib.studies.retrieval import hubness, k_occurrence, label_relevance, rank_neighbors, retrieval_scores
from maestlib.studies.robustness import TRANSFORMS
from maestlib.studies.transfer import join_splits, map_labels, read_tag_map, run_transfer
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


def test_a_hub_is_found_by_all():
    corners = np.vstack([np.eye(20), np.ones((1, 20))])
    ranks = rank_neighbors(corners, center=False)
    assert k_occurrence(ranks, 1)[-1] == 20
    one_each = hubness(np.ones(30, int))
    assert one_each == {"skewness": 0.0, "anti_hubs": 0.0, "largest": 1}
    assert hubness(k_occurrence(ranks, 1))["anti_hubs"] == pytest.approx(19 / 21)


def test_neighbors_of_the_same_artist_do_not_count():
    points = np.array([[0, 1], [0.01, 1], [1, 0], [1, 0.01]])
    artists, targets = np.array(["a", "a", "b", "b"]), np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    relevance = label_relevance(targets)
    unfiltered = retrieval_scores(rank_neighbors(points), relevance, k=1)
    filtered = retrieval_scores(rank_neighbors(points, artists), relevance, k=1)
    assert unfiltered["precision"].mean() == 1 and filtered["precision"].mean() == 0
    assert filtered["ap"].null_count() == 4, "no relevant track is left"
    with pytest.raises(ValueError, match="k=3"):
        retrieval_scores(rank_neighbors(points, artists), relevance, k=3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_deterministic_and_keep_the_length(name):
    wave = 0.1 * torch.sin(torch.arange(24_007) * 0.2) * torch.linspace(1, 0.2, 24_007)
    original = wave.clone()
    first, second = TRANSFORMS[name](wave), TRANSFORMS[name](wave)
    assert first.equal(second) and wave.equal(original) and first.dtype == torch.float32
    assert first.isfinite().all() and not first.equal(wave)
    ratio = float(name.split("×")[1]) if name.startswith("tempo") else 1
    assert len(first) == round(len(wave) / ratio)


def test_an_unknown_codec_is_named():
    with pytest.raises(ValueError, match="codec='speex'"):
        encode_decode(torch.zeros(16_000), "speex", 16)


def make_corpus(labels, targets, splits, name):
    n = len(splits)
    ids = [f"{name}-{i}" for i in range(n)]
    columns = {"track_id": ids, "artist": ids, "path": ids, "labels": [[]] * n, "split": splits}
    table = pl.DataFrame(columns, schema_overrides={"labels": pl.List(pl.String)})
    return Corpus(table, None, np.arange(n), labels, np.asarray(targets, np.uint8), None)


def test_labels_with_one_counterpart_are_merged_by_the_maximum():
    corpus = make_corpus(["bass", "guitar", "sitar"], [[1, 0, 0], [0, 1, 1], [0, 0, 1]], ["train"] * 3, "a")
    mapped = map_labels(corpus, {"bass": "strings", "guitar": "strings"})
    assert mapped.labels == ["strings"] and mapped.targets.tolist() == [[1], [1], [0]]
    assert corpus.targets.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]], "the corpus is not changed"
    with pytest.raises(ValueError, match="none of its labels"):
        map_labels(corpus, {"voice": "vocals"})


def test_a_transfer_tests_on_the_other_corpus_only():
    rng = np.random.default_rng(0)
    splits = ["train"] * 60 + ["validation"] * 20 + ["test"] * 30
    targets = (rng.random((2, 110, 2)) < 0.4).astype(int)
    values = [np.float16(np.concatenate([t, rng.normal(size=(110, 6))], 1)[:, None, None]) for t in targets]
    embeddings = [Embeddings(v, {"model": "x"}) for v in values]
    source = make_corpus(["a", "b"], targets[0], splits, "source")
    target = make_corpus(["A", "B"], targets[1], splits, "target")
    joined, _ = join_splits(map_labels(source, {"a": "A", "b": "B"}), target, *embeddings)
    test = joined.table.filter(split="test")["track_id"]
    assert test.to_list() == target.table.filter(split="test")["track_id"].to_list()
    options = dict(blocks=(0,), tokens="e", config=ProbeConfig(learning_rate=1e-2), n_bootstrap=20)
    table = run_transfer(source, target, *embeddings, {"a": "A", "b": "B"}, **options)
    crossed = run_transfer(source, target, *embeddings, {"a": "B", "b": "A"}, **options)
    assert table["source_positives"].to_list()[-2:] == targets[0][:60].sum(0).tolist()
    assert table["roc_auc_transfer"][0] > 0.8 > crossed["roc_auc_transfer"][0], "the map decides what is learned"
    with pytest.raises(ValueError, match="no label C"):
        run_transfer(source, target, *embeddings, {"a": "C"})
    with pytest.raises(ValueError, match="two models"):
        join_splits(target, target, embeddings[0], Embeddings(values[1], {"model": "y"}))


def test_shipped_tag_maps(tmp_path):
    paths = sorted(asset_path("benchmarks/tag_maps").glob("*.csv"))
    assert len(paths) == 7
    msd = asset_path("benchmarks/msd/tags.txt").read_text(encoding="utf8").splitlines()
    for path in paths:
        targets = set(read_tag_map(path.stem).values())
        assert not path.stem.endswith("msd") or targets <= set(msd)
    (tmp_path / "twice.csv").write_text("source,target\na,b\na,c\n")
    with pytest.raises(ValueError, match="a is mapped twice"):
        read_tag_map(tmp_path / "twice.csv")


def test_confusions_and_hard_tracks():
    targets = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 0]])
    scores = np.array([[0.1, 0.9, 0.8], [0.8, 0.1, 0.2], [0.2, 0.9, 0.1]])
    table = confusions(targets, scores, 0.5, LABELS)
    assert table.rows() == [("Genre", "Genre---Jazz", "Genre---Rock", 1, 0.5)]
    tracks = pl.DataFrame({"track_id": ["x", "y", "z"], "path": ["x", "y", "z"]})
    hard = hardest_tracks(tracks, targets, scores, LABELS, top=1).row(0, named=True)
    assert hard["track_id"] == "x" and not hard["annotated"] == (hard["surprise"] == "Genre---Rock")
