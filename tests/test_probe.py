"""Probing where the notebooks do not go: bad input, interrupted extraction, many probes against one."""

import numpy as np
import polars as pl
import pytest
import torch
from helpers import tiny_model
from sklearn.metrics import average_precision_score, roc_auc_score

from maestlib.audio.mel import MEL
from maestlib.datasets.batches import Corpus
from maestlib.probing import embeddings as embeddings_module
from maestlib.probing import layers
from maestlib.probing.embeddings import Embeddings, extract_embeddings
from maestlib.probing.layers import paired_differences, summarize
from maestlib.probing.probe import Probe, ProbeConfig, train_probes
from maestlib.probing.study import (
    STUDY_SCHEMA,
    TOKEN_STACKS,
    data_id,
    probe_settings,
    resample_study,
    run_study,
)
from maestlib.stats.metrics import evaluate
from maestlib.stats.significance import paired_bootstrap

LABELS = ["Band---A", "Band---B", "Key---C"]
SHORT = dict(labels=(), embed_dim=24, num_heads=2, depth=2, seconds=1)


class Store:
    "A mel store in memory."

    def __init__(self, n, frames=100):
        rng = np.random.default_rng(0)
        self.mels = rng.random((n, frames, 96)).astype(np.float16)
        self.config, self.seconds = MEL, None
        self.index = pl.DataFrame(
            {"track_id": [f"t{i}" for i in range(n)], "frames": [frames] * n, "checksum": range(n)}
        )

    def read(self, row, start=0, frames=None):
        return self.mels[row][start : None if frames is None else start + frames]


def make_corpus(n=90):
    "A corpus whose labels can be read from its embeddings."
    rng = np.random.default_rng(1)
    targets = (rng.random((n, 3)) < 0.4).astype(np.float32)
    split = np.array(["train"] * (n - 40) + ["validation"] * 20 + ["test"] * 20)
    names = [[x for x, y in zip(LABELS, row, strict=True) if y] for row in targets]
    ids = [f"t{i}" for i in range(n)]
    table = pl.DataFrame({"track_id": ids, "artist": [f"a{i // 2}" for i in range(n)], "labels": names, "split": split})
    corpus = Corpus(table, Store(n), np.arange(n), LABELS, targets, MEL)
    values = rng.normal(size=(n, 2, 3, 8))
    values[..., 1, 1, :3] += 3 * targets  # block 1, dist
    return corpus, Embeddings(values.astype(np.float16), {"model": "made"})


CONFIG = ProbeConfig(learning_rate=1e-2, epochs=6, batch_size=16, hidden_dim=32)


def test_an_interrupted_extraction_resumes(tmp_path, monkeypatch):
    corpus, _ = make_corpus(60)
    model = tiny_model(**SHORT)
    expected = extract_embeddings(corpus, model, tmp_path / "complete", tracks_per_file=16)
    embed_tracks, calls = embeddings_module.embed_tracks, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_tracks(*args)

    monkeypatch.setattr(embeddings_module, "embed_tracks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_embeddings(corpus, model, tmp_path / "killed", tracks_per_file=16)
    resumed = extract_embeddings(corpus, model, tmp_path / "killed", tracks_per_file=16)
    assert np.array_equal(resumed.values, expected.values) and len(calls) == 3 + 2  # two files were kept
    corpus.store.index = corpus.store.index.with_columns(checksum=pl.col("checksum") + (pl.col("track_id") == "t3"))
    extract_embeddings(corpus, model, tmp_path / "killed", tracks_per_file=16)
    assert len(calls) == 6, "only the track whose mel has changed"


def test_another_model_is_refused(tmp_path):
    corpus, _ = make_corpus(60)
    extract_embeddings(corpus, tiny_model(**SHORT), tmp_path)
    with pytest.raises(ValueError, match="another model"):
        extract_embeddings(corpus, tiny_model(seed=1, **SHORT), tmp_path)


def test_not_finite(tmp_path):
    corpus, embeddings = make_corpus()
    embeddings.values[3, 1, 0, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        train_probes(embeddings, corpus, [Probe((0,), CONFIG)])
    model = tiny_model(**SHORT)
    with torch.no_grad():
        model.cls_token.fill_(1e5)
    with pytest.raises(ValueError, match="t0.* not finite"):
        extract_embeddings(corpus, model, tmp_path)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("probes_per_network", [1, 3, 100])
def test_a_probe_does_not_depend_on_its_network(probes_per_network):
    corpus, embeddings = make_corpus()
    shared = dict(epochs=5, batch_size=16, hidden_dim=32)
    variants = [  # blocks, tokens, learning rate, dropout, seed
        ((1,), "d", 1e-2, 0.5, 0),
        ((0,), "d", 1e-2, 0.5, 1),
        ((1,), "c", 1e-3, 0.0, 0),
        ((0, 1), "cdt", 1e-2, 0.75, 2),
        ((1,), "dt", 1e-2, 0.5, 0),
    ]
    probes = [
        Probe(embeddings.source_indices(b, t), ProbeConfig(learning_rate=r, dropout=d, seed=s, **shared))
        for b, t, r, d, s in variants
    ]
    alone = [train_probes(embeddings, corpus, [p], dtype="float32")[0] for p in probes]
    together = train_probes(embeddings, corpus, probes, probes_per_network=probes_per_network, dtype="float32")
    for a, b in zip(alone, together, strict=True):
        assert a.epoch == b.epoch and np.allclose(a.scores, b.scores, atol=1e-4)


def test_study_finds_the_informative_source_and_scores_like_scikit_learn(tmp_path):
    corpus, embeddings = make_corpus(300)
    configs = [CONFIG, ProbeConfig(**vars(CONFIG) | {"seed": 1})]
    table = run_study(
        corpus,
        embeddings,
        "made",
        probe_settings(embeddings),
        configs,
        ("mlp", "linear", "knn"),
        tmp_path / "s.parquet",
    )
    study = resample_study(table, corpus, n_bootstrap=500)
    scores = summarize(study)
    for method in ("mlp", "linear", "knn"):
        best = scores.filter(method=method).sort("val_roc_auc").row(-1, named=True)
        assert best["blocks"] == "1" and "d" in best["tokens"] and best["roc_auc"] > 0.85
    with_dist, without = dict(blocks="1", tokens="d", method="mlp"), dict(blocks="0", tokens="d", method="mlp")
    gain = paired_differences(study, {"with - without": (with_dist, without)}).row(0, named=True)
    assert gain["simultaneous_low"] > 0 and gain["p"] < 0.02
    result = train_probes(embeddings, corpus, [Probe(embeddings.source_indices((1,), "d"), CONFIG)])[0]
    targets, rows = corpus.targets[corpus.indices("test")], table.filter(**with_dist, seed=0)
    for metric, reference in (("roc_auc", roc_auc_score), ("map", average_precision_score)):
        expected = [reference(targets[:, i], result.scores[:, i]) for i in range(3)]
        assert np.abs(rows[metric].to_numpy() - expected).max() < 1e-9
    more = run_study(corpus, embeddings, "made", [((0, 1), "cd")], configs, out=tmp_path / "s.parquet")
    assert set(more["blocks"]) == {"0+1"} and len(pl.read_parquet(tmp_path / "s.parquet")) == len(table) + len(more)


def test_a_label_with_no_positive(capsys):
    corpus, embeddings = make_corpus()
    corpus.targets[corpus.indices("test"), 0] = 0
    corpus.targets[corpus.indices("validation"), 1] = 0
    corpus.targets[corpus.indices("train"), 2] = 0
    table = run_study(corpus, embeddings, "made", [((1,), "d")], [CONFIG])
    logged = capsys.readouterr().out
    assert all(f"no positive in {s}" in logged for s in ("train", "validation", "test"))
    assert table["label"].to_list() == LABELS[:2] and table["map"].null_count() == 1
    study = resample_study(table, corpus, n_bootstrap=20)
    assert summarize(study)["map"][0] == pytest.approx(table["map"][1])
    assert summarize(study, LABELS[0])["map"][0] is None
    with pytest.raises(ValueError, match="no score"):
        paired_differences(study, {"itself": ({}, {})}, LABELS[0])
    corpus.targets[corpus.indices("validation")] = 0
    with pytest.raises(ValueError, match="validation: no label"):
        train_probes(embeddings, corpus, [Probe((0,), CONFIG)])


@pytest.mark.parametrize(
    "wrong", [dict(blocks=(5,), tokens="c"), dict(blocks=(0,), tokens="x"), dict(blocks=(0,), tokens="")]
)
def test_unknown_blocks_and_tokens(wrong):
    with pytest.raises(ValueError, match=r"blocks=|tokens="):
        make_corpus()[1].source_indices(**wrong)


def test_config_and_methods_are_checked():
    for wrong in (dict(dropout=1.0), dict(epochs=0), dict(learning_rate=0.0)):
        with pytest.raises(ValueError):
            ProbeConfig(**wrong)
    with pytest.raises(ValueError, match="methods"):
        run_study(*make_corpus(), "made", [((0,), "c")], methods=("svm",))


def test_figures_without_a_browser():
    corpus, embeddings = make_corpus()
    table = run_study(corpus, embeddings, "made", probe_settings(embeddings), [CONFIG])
    study = resample_study(table, corpus, n_bootstrap=20)
    curves = [trace.name for trace in layers.plot_layers(summarize(study), "made").data if trace.name]
    assert curves == list(TOKEN_STACKS)
    assert sum(len(t.x) for t in layers.plot_map(corpus, embeddings, (1,), "d", "Band").data) == 90
    assert layers.best_setting(table, "made")["blocks"] == "1"


def test_embeddings_belong_to_their_tracks(tmp_path):
    corpus, embeddings = make_corpus(100)
    with pytest.raises(ValueError, match="embeddings of 100 tracks: the corpus has 60"):
        run_study(embeddings_module.subset_corpus(corpus, 60), embeddings, "made", [((0,), "c")], [CONFIG])
    model = tiny_model(**SHORT)
    extracted, out = extract_embeddings(corpus, model, tmp_path / "store"), tmp_path / "study.parquet"
    reversed_corpus = Corpus(
        corpus.table.reverse(), corpus.store, corpus.store_rows[::-1], LABELS, corpus.targets[::-1].copy(), MEL
    )
    with pytest.raises(ValueError, match="embeddings of t0: the corpus has t99 there"):
        train_probes(extracted, reversed_corpus, [Probe((0,), CONFIG)])
    first = run_study(corpus, extracted, "m", [((0,), "c")], [CONFIG], out=out)
    corpus.store.mels[:] = 1 - corpus.store.mels
    corpus.store.index = corpus.store.index.with_columns(checksum=pl.col("checksum") + 1)
    again = run_study(
        corpus, extract_embeddings(corpus, model, tmp_path / "store"), "m", [((0,), "c")], [CONFIG], out=out
    )
    assert not again["map"].equals(first["map"]), "other mels, other scores"
    renamed = Corpus(corpus.table, corpus.store, corpus.store_rows, list("XYZ"), corpus.targets, MEL)
    assert set(run_study(renamed, extracted, "m", [((0,), "c")], [CONFIG], out=out)["label"]) == set("XYZ")
    next((tmp_path / "store").glob("*.npz")).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"npz: not a whole file"):
        extract_embeddings(corpus, model, tmp_path / "store")


def test_a_track_shorter_than_a_patch(tmp_path):
    corpus, _ = make_corpus(60)
    corpus.store.index = corpus.store.index.with_columns(
        frames=pl.when(pl.col("track_id") == "t3").then(1).otherwise(100)
    )
    model = tiny_model(**SHORT)
    for target in (model, "mel"):
        assert np.isfinite(extract_embeddings(corpus, target, tmp_path / str(target)[:3]).values[3]).all()


def test_a_study_is_kept_and_another_version_is_refused(tmp_path):
    corpus, embeddings = make_corpus()
    file, old = tmp_path / "s.parquet", tmp_path / "old.parquet"
    empty = run_study(corpus, embeddings, "made", [], out=file)
    assert empty.schema == STUDY_SCHEMA and len(summarize(resample_study(empty, corpus, 10))) == 0
    rows = run_study(corpus, embeddings, "made", [((1,), "d")], [CONFIG], out=file)
    trained = []
    again = run_study(
        corpus, embeddings, "made", [((1,), "d"), ((0,), "c")], [CONFIG], out=file, on_progress=trained.append
    )
    assert sum(trained) == CONFIG.epochs, "only the new probe"
    assert again.filter(blocks="1").equals(rows) and pl.read_parquet(file).equals(again)
    rows.drop("scores", "val_map").write_parquet(old)
    with pytest.raises(ValueError, match=r"old.parquet: other columns .* another out"):
        run_study(corpus, embeddings, "made", [((1,), "d")], [CONFIG], out=old)


def test_stored_scores_are_those_of_the_metrics():
    "Intervals from a stored study are those that `evaluate` gives for the scores of the runs."
    corpus, embeddings = make_corpus(300)
    configs = [CONFIG, ProbeConfig(**vars(CONFIG) | {"seed": 1})]
    table = run_study(corpus, embeddings, "made", [((1,), "d")], configs)
    row = summarize(resample_study(table, corpus, n_bootstrap=300)).row(0, named=True)
    results = train_probes(embeddings, corpus, [Probe(embeddings.source_indices((1,), "d"), c) for c in configs])
    test, runs = corpus.indices("test"), np.stack([r.scores for r in results])
    options = dict(n_bootstrap=300, clusters=corpus.artists("test"))
    expected = evaluate(corpus.targets[test], runs, LABELS, **options).row(0, named=True)
    for name in ("map", "map_low", "map_high", "roc_auc", "roc_auc_low"):
        assert row[name] == pytest.approx(expected[name], abs=1e-5), name
    validation = [evaluate(corpus.targets[corpus.indices("validation")], r.val_scores, LABELS, 0) for r in results]
    assert row["val_map"] == pytest.approx(np.mean([v["map"][0] for v in validation]))


def test_studies_of_two_datasets_join():
    corpus, embeddings = make_corpus()
    other, others = make_corpus(120)
    tables = [run_study(c, e, "made", [((1,), "d")], [CONFIG]) for c, e in ((corpus, embeddings), (other, others))]
    both = pl.concat(tables)
    assert both["data"].n_unique() == 2 and data_id(corpus) == tables[0]["data"][0]
    for table, of in zip(tables, (corpus, other), strict=True):
        joined, alone = (resample_study(t, of, n_bootstrap=20) for t in (both, table))
        assert np.array_equal(joined.values, alone.values)
    with pytest.raises(ValueError, match="lacks labels"):
        resample_study(pl.concat([tables[0], tables[0].with_columns(tokens=pl.lit("c"))[:2]]), corpus, 20)


def test_artists_are_resampled():
    "Tracks that an artist repeats say nothing new: the interval does not narrow, as it would over tracks."
    corpus, embeddings = make_corpus(200)
    table = run_study(corpus, embeddings, "made", [((0,), "d")], [CONFIG])
    test = corpus.indices("test")
    repeated = np.concatenate([np.arange(len(corpus.table)), np.repeat(test, 3)])
    corpus.table = corpus.table.with_columns(artist=pl.col("track_id"))
    larger = Corpus(
        corpus.table[repeated], corpus.store, corpus.store_rows, LABELS, corpus.targets[repeated], corpus.mel
    )
    scores = [np.concatenate([row, np.repeat(row, 3)]) for row in table["scores"].to_numpy()]
    copies = table.with_columns(scores=pl.Series(scores, dtype=pl.List(pl.Float32)), data=pl.lit(data_id(larger)))
    once, fourfold = (summarize(resample_study(t, c, n_bootstrap=1000)) for t, c in ((table, corpus), (copies, larger)))
    larger.table = larger.table.with_columns(artist=pl.int_range(pl.len()).cast(pl.String))
    over_tracks = summarize(resample_study(copies, larger, n_bootstrap=1000))
    width, same, narrow = (row["roc_auc_high"][0] - row["roc_auc_low"][0] for row in (once, fourfold, over_tracks))
    assert same == pytest.approx(width, rel=0.02) and narrow < 0.7 * width


def test_a_track_without_an_artist_stands_alone():
    corpus, _ = make_corpus()
    corpus.table = corpus.table.with_columns(artist=pl.when(pl.col("track_id") != "t89").then("artist"))
    assert corpus.artists("test")[-3:].tolist() == ["a43", "a44", "t89"]


def test_a_split_without_tracks():
    corpus, embeddings = make_corpus()
    for split in ("validation", "test"):
        emptied = pl.when(pl.col("split") == split).then(pl.lit("train")).otherwise("split").alias("split")
        bare = Corpus(corpus.table.with_columns(emptied), corpus.store, corpus.store_rows, LABELS, corpus.targets, MEL)
        for method in ("mlp", "linear", "knn"):
            with pytest.raises(ValueError, match=f"{split}: the split is empty"):
                run_study(bare, embeddings, "made", [((0,), "c")], [CONFIG], (method,))


def test_a_difference_in_one_track_is_no_difference():
    "Two settings differ in one track of forty: it is not in a third of the resamples."
    target = np.arange(40) < 8
    perfect = target.astype(float)
    slip = perfect.copy()
    slip[20] = 2
    options = dict(labels=["x"], n_bootstrap=2000)
    row = paired_bootstrap(target[:, None], perfect[:, None], slip[:, None], **options).row(0, named=True)
    assert row["map_difference"] > 0.1 and row["map_p"] > 0.05 and not row["map_significant"]


def test_the_best_of_many_is_no_finding():
    "Of twenty labels without a difference, single intervals find some, and the family none in most of the cases."
    rng, labels = np.random.default_rng(0), [f"x{i}" for i in range(20)]
    single, together = [], []
    for seed in range(12):
        targets = rng.random((100, 20)) < 0.3
        a, b = (targets + rng.normal(size=targets.shape) for _ in range(2))
        rows = paired_bootstrap(targets, a, b, labels, n_bootstrap=400, seed=seed).filter(level="label")
        single.append(((rows["map_low"] > 0) | (rows["map_high"] < 0)).any())
        together.append(rows["map_significant"].any())
    assert sum(single) >= 5 and sum(together) <= 3, (single, together)
