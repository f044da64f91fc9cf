"""Frames: `embed(tokens="f")` against the model itself, all lengths, streaming, HEAR; scores against mir_eval."""

import numpy as np
import polars as pl
import pytest
import torch
from helpers import every_kill, one_thread, recording, tiny_model, write_music  # noqa: F401
from polars.testing import assert_frame_equal

from maestlib.audio.mel import logmel, normalize
from maestlib.inference import frames as hear
from maestlib.inference.embedding import embed
from maestlib.inference.windows import iter_windows
from maestlib.models.checkpoint import save_checkpoint
from maestlib.models.patchout import Patchout
from maestlib.models.reduction import ReducedMAEST
from maestlib.probing.frames import (
    Frames,
    answer_columns,
    answer_events,
    events_to_columns,
    pick_events,
    score_events,
    spans_to_columns,
)
from maestlib.stats.metrics import evaluate

HOP = 0.16  # seconds from column to column


@pytest.fixture(scope="module")
def model():
    return tiny_model()  # 312 frames, 30 columns, of which 306 frames are in a patch


def exact_frames(source, model, **options):
    return embed(source, model, tokens="f", dtype="float32", **options)


def of_model(mel: torch.Tensor, model, block: int) -> np.ndarray:  # (n_mels, frames) → (columns, embed_dim)
    "The mean of each column of patches, from the tokens themselves."
    with torch.inference_mode():
        *_, (x, rows) = (step for _, step in zip(range(block + 1), model.iter_blocks(mel[None]), strict=False))
    return x[0, 2:].reshape(rows, -1, x.shape[-1]).mean(0).numpy()


LENGTHS = (0.05, 0.3, 3, 4.991, 5, 5.06, 5.2, 7.5, 12.345, 31.3)  # shorter than a patch, …, of a window, …


@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("hop_s", [None, 1.0, 5.0])
def test_times_are_regular_and_complete(model, seconds, hop_s):
    table = exact_frames(recording(seconds), model, hop_s=hop_s)
    num_frames = max(16, int(seconds * 16000) // 256)
    starts = table["start_s"].to_numpy()
    assert len(starts) == (num_frames - 16) // 10 + 1, "all columns of the recording"
    np.testing.assert_allclose(starts, HOP * np.arange(len(starts)), atol=1e-9)
    np.testing.assert_allclose(table["end_s"].to_numpy() - starts, 0.256, atol=1e-9)
    assert table.columns == ["path", "start_s", "end_s", "embedding"]
    assert table["embedding"].dtype == pl.Array(pl.Float32, model.config.embed_dim)


@pytest.mark.parametrize("seconds", [0.3, 3, 5])
def test_one_window_is_the_model_itself(model, seconds):
    wave = recording(seconds)
    mel = normalize(logmel(wave)[:, : len(wave) // 256])
    for block in (0, 3):
        found = exact_frames(wave, model, block=block)["embedding"].to_numpy()
        np.testing.assert_allclose(found, of_model(mel, model, block), atol=1e-4)


def test_every_column_is_of_the_window_in_whose_middle_it_lies(model):
    wave = recording(17.3)
    mel = normalize(logmel(wave)[:, : len(wave) // 256])
    windows = list(iter_windows(torch.tensor(wave), model.config.mel, 312, 156, columns=True))
    firsts = [round(start / HOP) for start, *_ in windows]
    assert [first * HOP for first in firsts] == pytest.approx([start for start, *_ in windows]), "all at a column"
    assert firsts[:3] == [0, 15, 30] and firsts[-1] + 30 == (mel.shape[1] - 16) // 10 + 1, "the last one ends the grid"
    found = exact_frames(wave, model, block=1)["embedding"].to_numpy()
    for column, vector in enumerate(found):
        distances = [abs(column + 0.5 - (first + 15)) for first in firsts]
        nearest = [first for first, d in zip(firsts, distances, strict=True) if d <= min(distances) + 1e-9]
        expected = [of_model(mel[:, 10 * f : 10 * f + 306], model, 1)[column - f] for f in nearest]
        assert min(np.abs(vector - e).max() for e in expected) < 1e-4, column


def test_rows_may_be_dropped_and_blocks_are_in_order(model):
    wave, patchout = recording(9), Patchout(drop_rows=(0, 8))
    both = exact_frames(wave, model, block=(3, 1), patchout=patchout)
    for block in (3, 1):
        alone = exact_frames(wave, model, block=block, patchout=patchout)
        of_both = both.filter(block=block)
        assert of_both["start_s"].to_list() == alone["start_s"].to_list()
        np.testing.assert_allclose(of_both["embedding"].to_numpy(), alone["embedding"].to_numpy(), atol=1e-5)
    assert both["block"].to_list()[:2] == [3, 3] and both.columns[3] == "block"
    whole = exact_frames(wave, model, block=3)["embedding"].to_numpy()
    assert np.abs(whole - both.filter(block=3)["embedding"].to_numpy()).max() > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("frames")
    for i, seconds in enumerate((0.3, 4, 5, 23.4, 61)):
        write_music(root / f"{i}.wav", seconds, i)
    (root / "text.mp3").write_text("not music")
    return root


@pytest.mark.parametrize("block", [1, (1, 3)])
def test_a_stream_is_the_table_in_memory(folder, model, tmp_path, block):
    expected = exact_frames(sorted(folder.glob("*.wav")), model, block=block)
    streamed = exact_frames(folder, model, block=block, out=tmp_path / "frames.parquet")
    assert_frame_equal(streamed.collect(), expected)
    chunks = exact_frames(folder, model, block=block, out=tmp_path / "folder").collect()
    assert_frame_equal(
        chunks.sort("path", "start_s", maintain_order=True), expected.sort("path", "start_s", maintain_order=True)
    )
    assert len(pl.read_parquet(tmp_path / "frames.report.parquet")) == 1
    assert_frame_equal(exact_frames(folder, model, block=block, out=tmp_path / "frames.parquet").collect(), expected)
    with pytest.raises(ValueError, match="other settings"):
        embed(folder, model, block=block, tokens="t", dtype="float32", out=tmp_path / "frames.parquet")


def test_every_kill_is_resumed(folder, model, tmp_path):
    files = [folder / "0.wav", folder / "3.wav"]

    def run(target):
        exact_frames(files, model, out=target / "frames.parquet", num_workers=1)

    targets = []
    for target in every_kill(run, tmp_path):
        run(target)
        targets.append(target)
        assert_frame_equal(pl.read_parquet(target / "frames.parquet"), exact_frames(files, model))
    assert len(targets) > 2


def test_what_has_no_columns_is_refused(model):
    wave, wrong = recording(1), [dict(average=True), dict(patchout=Patchout(keep_every=2)), dict(tokens="cf")]
    for options in [*wrong, dict(patchout=Patchout(random_columns=1)), dict(patchout=Patchout(drop_rows=(9,)))]:
        with pytest.raises(ValueError, match="tokens|drop_rows"):
            embed(wave, model, **{"tokens": "f"} | options)
    for reduced in (ReducedMAEST(model, merge=0.1), ReducedMAEST(model, keep_rate=0.5)):
        with pytest.raises(ValueError, match="merged or dropped"):
            embed(wave, reduced, tokens="f")
    assert len(embed(wave, model, tokens="f", dtype="int8")) == 5


@pytest.mark.parametrize("seconds", [1.07, 1.98, 4.0, 13.0])
def test_hear(model, seconds):
    "What HEAR's validator asks for: attributes, shapes, dtype, regular times from near the start to near the end."
    asked = hear.load_model(model)
    assert isinstance(asked, torch.nn.Module) and asked.sample_rate == 16000
    assert isinstance(asked.scene_embedding_size, int) and isinstance(asked.timestamp_embedding_size, int)
    audio = torch.tensor(np.stack([recording(seconds, i) for i in range(2)]))
    scenes, (vectors, times) = hear.get_scene_embeddings(audio, asked), hear.get_timestamp_embeddings(audio, asked)
    assert scenes.dtype == vectors.dtype == torch.float32 and scenes.shape == (2, asked.scene_embedding_size)
    assert vectors.shape == (*times.shape, asked.timestamp_embedding_size) and times.ndim == 2
    hops = times.diff()
    assert (hops - hops.mean()).abs().max() < 0.1 and abs(hops.mean() - 160) < 0.1
    assert times.min() < 160 and 1000 * seconds - 2 * 160 < times.max() < 1000 * seconds
    for wave, scene, of_columns in zip(audio, scenes, vectors, strict=True):
        np.testing.assert_allclose(scene, embed(wave, model, average=True)["embedding"][0].to_numpy(), atol=1e-4)
        np.testing.assert_allclose(of_columns, embed(wave, model, tokens="f")["embedding"].to_numpy(), atol=1e-4)


def test_hear_loads_a_file(model, tmp_path):
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert hear.load_model(str(tmp_path / "m.safetensors")).timestamp_embedding_size == model.config.embed_dim
    assert hear.load_model("").sample_rate == 16000, "the bundled model"
    with pytest.raises(ValueError, match="block"):
        hear.load_model(model, block=4)


# tasks in time


def synthetic_tracks(count=12, columns=90, seed=0):
    "Vectors that hold, in noise, whether the column has an event, and where; and the events."
    rng, starts = np.random.default_rng(seed), HOP * np.arange(columns)
    vectors, times = [], []
    for _ in range(count):
        events = np.sort(rng.uniform(0.2, starts[-1], 30))
        events = events[np.diff(events, prepend=-1) > 0.2]
        known = events_to_columns(events, starts, starts + 0.256)
        signal = np.stack([np.isfinite(known), np.nan_to_num(known) * 10], 1)
        x = np.concatenate([signal, rng.normal(size=(columns, 6))], 1) + 0.05 * rng.normal(size=(columns, 8))
        vectors.append(x.astype(np.float32))
        times.append(events)
    artists = [f"artist {i // 2}" for i in range(count)]
    return Frames(vectors, [starts] * count, [starts + 0.256] * count, artists), times


def test_each_event_is_in_the_column_that_is_nearest():
    starts = HOP * np.arange(60)
    events = np.sort(np.random.default_rng(1).uniform(0, 9.6, 25))
    known = events_to_columns(events, starts, starts + 0.256)
    middles = starts + 0.128
    nearest = np.abs(events[:, None] - middles).argmin(1)
    assert np.isfinite(known).sum() == len(set(nearest))
    for column in set(nearest):
        mine = events[nearest == column] - middles[column]
        assert known[column] == pytest.approx(min(mine, key=abs))
    for outside, count in (([], 0), ([-0.1, 0.0, 99], 1)):
        assert np.isfinite(events_to_columns(outside, starts, starts + 0.256)).sum() == count
    assert events_to_columns([0.1], starts[:1], starts[:1] + 0.256)[0] == pytest.approx(-0.028), "one column"


def test_f1_is_that_of_mir_eval():
    mir_eval, rng = pytest.importorskip("mir_eval"), np.random.default_rng(0)
    times = [np.sort(rng.uniform(0, 30, n)) for n in (5, 40, 80, 7)]
    found = [np.sort(t[: len(t) // 2] + rng.normal(0, 0.06, len(t) // 2)) for t in times[:3]] + [np.array([])]
    table = score_events(times, found, list("aabc"), n_bootstrap=50)
    expected = [mir_eval.beat.f_measure(*pair, 0.07) for pair in zip(times[:3], found, strict=False)] + [0]
    assert table["value"][0] == pytest.approx(np.mean(expected))
    precision, recall = (np.mean([len(mir_eval.util.match_events(t, f, 0.07)) / max(1, len((f, t)[k]))
                                  for t, f in zip(times, found, strict=True)]) for k in (0, 1))  # fmt: skip
    assert table["value"][1:].to_list() == pytest.approx([precision, recall])
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_a_probe_detects_events_of_other_artists_and_offsets_place_them():
    pytest.importorskip("mir_eval")
    frames, times = synthetic_tracks()
    folds = frames.folds(3)
    for fold in folds:
        parts = [{frames.artists[i] for i in part} for part in fold]
        assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
    f1 = {}
    for offsets in (False, True):
        detected = answer_events(frames, times, folds, offsets, tolerance_s=0.03)
        f1[offsets] = score_events(times, detected, frames.artists, 0.03, 20)["value"][0]
    assert f1[True] > 0.9 and f1[False] < 0.6, f1
    only_one = answer_events(frames, times, folds[:1])
    assert [i for i, d in enumerate(only_one) if d is not None] == folds[0].test.tolist()


def test_labels_of_columns_are_ranked_and_scored_as_scikit_learn_does():
    metrics = pytest.importorskip("sklearn.metrics")
    frames, _ = synthetic_tracks()
    targets = [np.stack([x[:, 0] > 0.5, x[:, 2] + x[:, 3] > 0.8], 1).astype(np.float32) for x in frames.vectors]
    scores = np.concatenate(answer_columns(frames, targets, frames.folds(3)))
    y = np.concatenate(targets)
    clusters = np.repeat(frames.artists, [len(target) for target in targets])
    table = evaluate(y, scores, ["Sound---a", "Sound---b"], 20, clusters=clusters)
    assert table.filter(level="macro")["map"][0] == pytest.approx(metrics.average_precision_score(y, scores))
    assert table.filter(level="macro")["map"][0] > 0.9 > table.filter(level="macro")["map_chance"][0] + 0.3


def test_spans_and_peaks():
    starts = HOP * np.arange(10)
    spans = np.random.default_rng(0).uniform(0, 1.5, (8, 2)).cumsum(1)
    found = spans_to_columns(spans, list("abababab"), ("a", "b"), starts, starts + 0.256)
    for column, start in enumerate(starts):
        for k in range(2):
            sounds = [min(e, start + 0.256) - max(s, start) >= 0.05 for s, e in spans[k::2]]
            assert found[column, k] == any(sounds)
    scores = np.random.default_rng(2).normal(size=40)
    peaks = pick_events(scores, HOP * np.arange(40), 0.0, only_peaks=True)
    padded = np.pad(scores, 1, constant_values=-np.inf)
    expected = [i for i in range(40) if scores[i] >= max(0, padded[i], padded[i + 2])]
    assert (peaks / HOP).round().astype(int).tolist() == expected
    assert len(pick_events(scores, np.zeros(40), -9)) == 1, "of times that coincide one is kept"


def test_frames_of_a_table(model):
    waves = {"a": recording(3, 1), "b": recording(4, 2)}
    tables = [exact_frames(wave, model).with_columns(path=pl.lit(name)) for name, wave in waves.items()]
    frames = Frames.from_table(pl.concat(tables), {"b": "x", "a": "y"})
    assert frames.artists == ["x", "y"] and [len(v) for v in frames.vectors] == [len(t) for t in tables[::-1]]
    own = tables[1]["embedding"].to_numpy()
    np.testing.assert_array_equal(frames.vectors[0][3], np.concatenate([own[2], own[3], own[4]]))
    np.testing.assert_array_equal(frames.vectors[0][0], np.concatenate([own[0], own[0], own[1]]))
    with pytest.raises(ValueError, match="c is not in the table"):
        Frames.from_table(pl.concat(tables), {"c": "x"})
    with pytest.raises(ValueError, match="several blocks"):
        Frames.from_table(exact_frames(waves["a"], model, block=(0, 1)), {})
