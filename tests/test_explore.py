"""What the notebooks of `nbs/widgets` cannot show: invalid input, a backlog of requests, models without labels."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from maestlib.audio.mel import MEL
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.patchout import Patchout, patch_grid, select_patches
from maestlib.probing.embeddings import Embeddings
from maestlib.probing.layers import block_vectors
from maestlib.widgets import attention, figures
from maestlib.widgets.controls import LatestOnlyWorker, TrackPicker, load_for_playback
from maestlib.widgets.explore_attention import AttentionExplorer
from maestlib.widgets.explore_layers import LayerExplorer
from maestlib.widgets.explore_patchout import PatchoutExplorer
from maestlib.widgets.explore_tags import TagExplorer

LABELS = tuple(f"Group---{c}" for c in "ABCDEFGHIJ")


def small_model(labels=LABELS, seconds=3):
    return MAEST(MAESTConfig(embed_dim=48, num_heads=3, depth=4, seconds=seconds, labels=labels)).init_weights(0).eval()


def write_noise(path, seconds, sample_rate=16000):
    noise = np.random.default_rng(0).normal(0, 0.1, int(seconds * sample_rate)).astype(np.float32)
    soundfile.write(path, noise, sample_rate)
    return str(path)


@pytest.fixture
def tracks(tmp_path):
    return {name: write_noise(tmp_path / f"{name}.wav", seconds) for name, seconds in (("long", 8), ("short", 1))}


def test_capture_qk_restores_the_model_after_an_error():
    model = small_model()

    def fail(*_):
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"):
        with attention.capture_qk(model, fail):
            model(torch.zeros(1, 96, 187))
    assert all("attend" not in vars(block.attn) for block in model.blocks)


@pytest.mark.parametrize("patchout", [None, Patchout(keep_every=3, drop_rows=(0, 8))])
def test_attention_maps_are_the_weights_that_the_model_uses(patchout):
    model, mel = small_model(), torch.randn(96, 187, generator=torch.Generator().manual_seed(0))
    maps, x = attention.attention_maps(model, mel, patchout), model.embed_patches(mel[None], patchout)[0]
    rows, columns = select_patches(patch_grid(187), patchout)
    assert maps.rows.tolist() == rows.tolist() and maps.columns.tolist() == columns.tolist()
    with torch.inference_mode():
        for i, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            full = (q @ k.mT / 4).softmax(-1)[0]  # 16 channels
            torch.testing.assert_close(torch.from_numpy(maps.weights[i]).flatten(-2), full[:, :2, 2:])
            torch.testing.assert_close(full @ v[0], torch.nn.functional.scaled_dot_product_attention(q, k, v)[0])
            x = block(x)


def test_attention_maps_refuse_a_pattern_that_they_cannot_know():
    with pytest.raises(ValueError, match="give a fixed pattern"):
        attention.attention_maps(small_model(), torch.zeros(96, 187), Patchout.random(columns=3))


def test_attention_spread_counts_columns_and_rows():
    weights = np.zeros((4, 9, 61))
    weights[0, 3, 20] = 0.2  # one patch; the rest of the attention is to cls and dist
    weights[1, 2] = 1 / 61  # a band all the time
    weights[2, :, :30] = 1  # half of the time
    weights[3, ::3, 7] = 0.5  # three rows of one column
    expected = [[1 / 61, 1 / 9], [1, 1 / 9], [30 / 61, 1], [1 / 61, 3 / 9]]
    np.testing.assert_allclose(attention.attention_spread(weights), expected, rtol=1e-6)


def test_a_click_on_a_head_shows_its_attention(tracks):
    explorer = AttentionExplorer(small_model(), tracks)
    explorer.worker.wait()
    points = {"trace_indexes": [0], "point_indexes": [7], "xs": [1.0], "ys": [1.0]}  # four blocks of three heads
    explorer.spread._js2py_pointsCallback = {"event_type": "plotly_click", "points": points}
    assert (explorer.controls.block.value, explorer.controls.head.value) == (2, 1)
    assert "block 2, head 1" in explorer.figure.layout.title.text
    assert np.flatnonzero(np.array(explorer.spread.data[0].marker.line.width) > 1).tolist() == [7]


def test_coverage_mask_is_where_no_kept_patch_is():
    rows, columns = select_patches((9, 17), Patchout.random(rows=4, columns=9), torch.Generator().manual_seed(3))
    x, y, mask = figures.coverage_mask((96, 187), rows, columns)
    covered = np.zeros((96, 187), bool)
    for r in rows:
        for c in columns:
            covered[r * 10 : r * 10 + 16, c * 10 : c * 10 + 16] = True
    drawn = np.repeat(np.repeat(mask, np.diff(y), 0), np.diff(x), 1)
    assert np.array_equal(drawn, ~covered)


def test_neighbors_against_loops():
    values = np.random.default_rng(0).normal(size=(30, 3, 3, 6)).astype(np.float16)
    values[7, 2] = values[4, 2]  # twins in the last block
    neighbors = figures.nearest_per_block(Embeddings(values, {}), 4, "cd", 3)
    twin = neighbors.filter(block=2, rank=0)
    assert twin["track"].item() == 7 and twin["cosine"].item() > 0.999
    x = block_vectors(Embeddings(values, {}), (0,), "cd")
    cosine = [x[4] @ v / np.linalg.norm(x[4]) / np.linalg.norm(v) for v in x]
    assert neighbors.filter(block=0)["track"].to_list() == [i for i in np.argsort(cosine)[::-1] if i != 4][:3]
    table = pl.DataFrame({"track_id": [f"<{i}>" for i in range(30)], "labels": [["a"]] * 30})
    title = figures.plot_neighbors(neighbors, table, 4).layout.title.text
    assert "&lt;4&gt;" in title, "titles are text, not markup"


def test_a_missing_clip_is_reported_and_the_map_stays(tracks):
    paths = [*tracks.values(), "gone.wav", *tracks.values()]
    rows = {"track_id": list("abcde"), "path": paths, "labels": [["Group---A"]] * 5}
    corpus = SimpleNamespace(table=pl.DataFrame(rows), labels=["Group---A"])
    values = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float16)
    explorer = LayerExplorer(corpus, Embeddings(values, {}))
    menu = explorer.controls.track
    assert len(menu.options) == 5 and not explorer.player.flac
    menu.value = 1
    flac, title = explorer.player.flac, explorer.neighbors.figure.layout.title.text
    assert explorer.chosen == 1 and flac and "b" in title
    menu.value = 2
    assert "gone.wav" in explorer.message.value and menu.value == explorer.chosen == 1
    assert explorer.player.flac == flac and explorer.neighbors.figure.layout.title.text == title
    menu.value = 3
    assert explorer.message.value == "" and explorer.chosen == 3


def test_sliding_tags_cover_a_recording_and_refuse_a_model_without_labels():
    mel = torch.randn(96, 440, generator=torch.Generator().manual_seed(0))
    centers, activations = figures.sliding_tags(mel, small_model(), 2.0, batch_size=3)
    assert len(centers) > 3 and activations.shape == (len(centers), 10)
    assert centers[0] == 1 and abs(centers[-1] + 1 - 440 / 62.5) < 1e-9, "the last window ends with the recording"
    center, _ = figures.sliding_tags(mel[:, :100], small_model(), 2.0)
    assert center.tolist() == [0.8], "shorter than the window"
    with pytest.raises(ValueError, match="no labels"):
        figures.sliding_tags(mel, small_model(()))
    with pytest.raises(ValueError, match="window_s=9"):
        figures.sliding_tags(mel, small_model(), 9)


def test_a_worker_has_no_backlog_and_survives_an_error():
    done, errors, started, submitted = [], [], threading.Event(), threading.Event()

    def work(n):
        started.set()
        submitted.wait()
        if n == 0:
            raise ValueError("zero")
        done.append(n)

    worker = LatestOnlyWorker(work, errors.append)
    worker(0)
    started.wait()
    for n in range(1, 200):
        worker(n)
    submitted.set()
    worker.wait()
    assert done == [199] and str(errors[0]) == "zero"


def test_long_files_are_cut_without_decoding_them_and_short_ones_refused(tmp_path, monkeypatch):
    path = tmp_path / "hours.wav"
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_U8") as file:
        for _ in range(180):
            file.write(np.zeros(8000 * 60, np.int16))
    frames_read, read = [], soundfile.SoundFile.read

    def count_frames(self, *args, **options):
        data = read(self, *args, **options)
        frames_read.append(len(data))
        return data

    monkeypatch.setattr(soundfile.SoundFile, "read", count_frames)
    wave, note = load_for_playback(path, limit_s=30)
    assert len(wave) == 480_000 and "180 min" in note
    assert 30 * 8000 <= sum(frames_read) <= 60 * 8000, "three hours are not decoded for half a minute"
    with pytest.raises(ValueError, match="shorter than one patch"):
        load_for_playback(write_noise(tmp_path / "moment.wav", 0.2))


def send_upload(upload, name, content, chunk_size=100_000):
    "Send a file in chunks, as the browser does."
    for start in range(0, max(len(content), 1), chunk_size):
        end = start + chunk_size
        message = {"name": name, "first": start == 0, "last": end >= len(content)}
        upload._handle_custom_msg(message, [memoryview(content)[start:end]])


def test_an_unreadable_file_is_reported_and_changes_nothing(tmp_path, tracks):
    (tmp_path / "words.mp3").write_text("not music")
    loaded = []
    picker = TrackPicker(tracks, MEL, 30, loaded.append)
    too_short = write_noise(tmp_path / "moment.wav", 0.1)
    for path in (tmp_path / "words.mp3", tmp_path / "none.wav", tmp_path, too_short):
        picker.path.value = str(path)
        assert picker.message.value.startswith("⚠") and not loaded, path
    send_upload(picker.upload, "<b>.mp3", b"not music")
    message = picker.message.value
    assert "&lt;b&gt;.mp3" in message and "/" not in message.split(":")[0] and not loaded
    send_upload(picker.upload, "empty.mp3", b"")
    assert "empty.mp3" in picker.message.value and not loaded
    send_upload(picker.upload, "a.wav", Path(tracks["long"]).read_bytes())
    assert len(loaded) == 1 and picker.message.value == "a.wav." and picker.player.flac[:4] == b"fLaC"
    picker.path.value = too_short
    assert "moment.wav: frames=6" in picker.message.value, "what is too short is named"


def test_the_menu_names_the_loaded_track_or_nothing(tracks):
    loaded = []
    picker = TrackPicker(tracks, MEL, 30, loaded.append)
    for name in ("long", "short"):
        picker.menu.value = name
    picker.path.value = tracks["long"]
    assert picker.menu.value is None and picker.path.value == tracks["long"] and len(loaded) == 3
    picker.menu.value = "short"
    assert picker.path.value == "" and len(loaded) == 4, "the same tune can be chosen again"
    send_upload(picker.upload, "a.wav", Path(tracks["long"]).read_bytes())
    assert picker.menu.value is None and len(loaded) == 5


@pytest.mark.parametrize("explorer_class", [PatchoutExplorer, AttentionExplorer, TagExplorer])
@pytest.mark.parametrize("labels", [LABELS, ()])
def test_explorers_take_every_track_and_a_model_without_labels(explorer_class, labels, tracks):
    explorer = explorer_class(small_model(labels), tracks)
    for name in ("short", "long"):
        explorer.track.menu.value = name
        explorer.worker.wait()
        expected = "no labels" if not labels and explorer_class is not AttentionExplorer else ""
        assert expected in explorer.track.message.value and (expected or explorer.figure.data)


def test_all_positions_of_the_patchout_sliders(tracks):
    explorer = PatchoutExplorer(small_model(), tracks)
    controls, message = explorer.controls, explorer.track.message
    for pattern in ("training", "inference"):
        controls.pattern.value = pattern
        for columns in (controls.time.min, controls.time.max):
            for rows in (0, 8):
                controls.time.value, controls.frequency.value = columns, rows
                controls.seed.value = 7
                explorer.worker.wait()
                assert "⚠" not in message.value and "…" not in explorer.numbers.value
    tooltips = explorer.box.children[-1]
    names = {f"maestlib-{n}" for n in ("track", "path", "upload", "pattern", "time", "frequency", "seed", "sound")}
    assert set(tooltips.tips) == names and "so many" in tooltips.tips["maestlib-time"] and all(tooltips.tips.values())
    controls.time.value, controls.frequency.value = 3, 2
    for name in ("short", "long"):
        explorer.track.menu.value = name
        assert (controls.time.value, controls.frequency.value) == (3, 2), "another track keeps the sliders"
    controls.pattern.value = "training"
    assert "at random" in tooltips.tips["maestlib-time"] and controls.time.description == "time: drop"


def test_tsne_of_few_tracks_is_refused_and_others_resemble_the_pca_map(tracks):
    values = np.random.default_rng(0).normal(size=(24, 2, 3, 4)).astype(np.float16)
    for count, message in ((4, "⚠ 4 tracks: t-SNE needs at least 5; use pca_map"), (24, "")):
        rows = {"track_id": [str(i) for i in range(count)], "path": [tracks["short"]] * count}
        table = pl.DataFrame(rows | {"labels": [["Group---A"]] * count})
        explorer = LayerExplorer(SimpleNamespace(table=table, labels=["Group---A"]), Embeddings(values[:count], {}))
        explorer.controls.method.value = "t-SNE"
        explorer.maps.worker.wait()
        assert explorer.message.value == message
    pca, tsne = (explorer.maps.get(method, ("cdt", 1))[0] for method in ("PCA", "t-SNE"))
    assert "t-SNE" in explorer.map.figure.layout.title.text and np.isclose(tsne.std(), 1, atol=1e-5)
    assert np.linalg.norm(tsne - pca) <= min(np.linalg.norm(tsne * signs - pca) for signs in ((-1, 1), (1, -1)))
