"""What the notebooks attention, controls, pictures and explore cannot show: bad input, a backlog, other models."""

import threading
import time
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
from maestlib.widgets import attention, figures
from maestlib.widgets.controls import LatestOnlyWorker, TrackPicker, load_for_playback
from maestlib.widgets.explorers import AttentionExplorer, LayerExplorer, PatchoutExplorer, TagExplorer

LABELS = tuple(f"Group---{c}" for c in "ABCDEFGHIJ")


def small(labels=LABELS, seconds=3):
    return MAEST(MAESTConfig(embed_dim=48, num_heads=3, depth=4, seconds=seconds, labels=labels)).init_weights(0).eval()


def sound(path, seconds, rate=16000):
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(seconds * rate)).astype(np.float32), rate)
    return str(path)


@pytest.fixture
def tunes(tmp_path):
    return {n: sound(tmp_path / f"{n}.wav", s) for n, s in (("long", 8), ("short", 1))}


def test_watched_gives_back_after_an_error():
    model = small()
    with pytest.raises(RuntimeError, match="seen enough"):
        with attention.capture_qk(model, lambda *_: (_ for _ in ()).throw(RuntimeError("seen enough"))):
            model(torch.zeros(1, 96, 187))
    assert all("attend" not in vars(b.attn) for b in model.blocks)


@pytest.mark.parametrize("patchout", [None, Patchout(keep_every=3, drop_rows=(0, 8))])
def test_looks_are_the_weights_that_the_model_uses(patchout):
    model, mel = small(), torch.randn(96, 187, generator=torch.Generator().manual_seed(0))
    found, x = attention.attention_maps(model, mel, patchout), model.embed_patches(mel[None], patchout)
    rows, columns = select_patches(patch_grid(187), patchout)
    assert found.rows.tolist() == rows.tolist() and found.columns.tolist() == columns.tolist()
    with torch.inference_mode():
        for i, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            full = (q @ k.mT / 4).softmax(-1)[0]  # 16 channels
            mine = torch.from_numpy(found.weights[i]).flatten(-2)
            torch.testing.assert_close(mine, full[:, :2, 2:])
            torch.testing.assert_close(full @ v[0], torch.nn.functional.scaled_dot_product_attention(q, k, v)[0])
            x = block(x)


def test_reach_against_loops():
    rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1, 4])
    look = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1)).softmax(-1)
    places = [(r, c) for r in rows.tolist() for c in columns.tolist()]
    for head, found in zip(look, attention.attention_distance(look, rows, columns), strict=True):
        weight = head[2:, 2:] / head[2:, 2:].sum(-1, keepdim=True)
        far = [[(abs(c - e), abs(r - d)) for d, e in places] for r, c in places]
        torch.testing.assert_close(found, (weight[..., None] * torch.tensor(far)).sum(1).mean(0))


def test_the_veil_lies_where_no_kept_patch_is():
    rows, columns = select_patches((9, 17), Patchout.random(rows=4, columns=9), torch.Generator().manual_seed(3))
    x, y, z = figures.coverage_mask((96, 187), rows, columns)
    seen = np.zeros((96, 187), bool)
    for r in rows:
        for c in columns:
            seen[r * 10 : r * 10 + 16, c * 10 : c * 10 + 16] = True
    drawn = np.repeat(np.repeat(z, np.diff(y), 0), np.diff(x), 1)
    assert np.array_equal(drawn, ~seen)


def test_neighbours_against_loops():
    values = np.random.default_rng(0).normal(size=(30, 3, 3, 6)).astype(np.float16)
    values[7, 2] = values[4, 2]  # twins in the last block
    near = figures.nearest_per_block(Embeddings(values, {}), 4, "cd", 3)
    assert near.filter(block=2, rank=0)["track"].item() == 7 and near.filter(block=2, rank=0)["cosine"].item() > 0.999
    x = figures.block_vectors(Embeddings(values, {}), 0, "cd")
    cosine = [x[4] @ v / np.linalg.norm(x[4]) / np.linalg.norm(v) for v in x]
    assert near.filter(block=0)["track"].to_list() == [i for i in np.argsort(cosine)[::-1] if i != 4][:3]
    table = pl.DataFrame({"track_id": [f"<{i}>" for i in range(30)], "labels": [["a"]] * 30})
    assert "&lt;4&gt;" in figures.plot_neighbours(near, table, 4).layout.title.text, "titles are text, not markup"


def test_a_clip_that_is_gone_is_said_and_the_map_stays(tunes):
    paths = [*tunes.values(), "gone.wav", *tunes.values()]
    rows = {"track_id": list("abcde"), "path": paths, "labels": [["Group---A"]] * 5}
    corpus = SimpleNamespace(table=pl.DataFrame(rows), labels=["Group---A"])
    values = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float16)
    explorer = LayerExplorer(corpus, Embeddings(values, {}))
    assert len(explorer.tune.options) == 5 and not explorer.player.sound
    explorer.tune.value = 1
    sound, title = explorer.player.sound, explorer.ranks.layout.title.text
    assert explorer.chosen == 1 and sound and "b" in title
    explorer.tune.value = 2
    assert "gone.wav" in explorer.says.value and explorer.tune.value == explorer.chosen == 1
    assert explorer.player.sound == sound and explorer.ranks.layout.title.text == title
    explorer.tune.value = 3
    assert explorer.says.value == "" and explorer.chosen == 3


def test_tags_of_a_song_end_with_it_and_a_model_without_labels_says_so():
    mel = torch.randn(96, 437, generator=torch.Generator().manual_seed(0))
    parts = list(figures.sliding_tags(mel, small(), 2.0, batch=3))
    middles, said = (np.concatenate(side) for side in zip(*parts, strict=True))
    assert len(parts) > 1 and said.shape == (len(middles), 10)
    assert middles[0] == 1 and abs(middles[-1] + 1 - 437 / 62.5) < 1e-9, "the last window ends with the song"
    ((one, _),) = figures.sliding_tags(mel[:, :100], small(), 2.0)
    assert one.tolist() == [0.8], "shorter than the window"
    with pytest.raises(ValueError, match="no labels"):
        list(figures.sliding_tags(mel, small(())))
    with pytest.raises(ValueError, match="window_s=9"):
        list(figures.sliding_tags(mel, small(), 9))


def test_no_backlog_and_an_error_does_not_end_it():
    done, failed, gate = [], [], threading.Event()

    def work(n):
        gate.wait(5)
        if n == 0:
            raise ValueError("zero")
        done.append(n)

    latest = LatestOnlyWorker(work, failed.append)
    latest(0)
    time.sleep(0.05)
    for n in range(1, 200):
        latest(n)
    gate.set()
    latest.wait()
    assert done == [199] and str(failed[0]) == "zero"


def test_hours_are_cut_and_moments_refused(tmp_path):
    path = tmp_path / "hours.wav"
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_U8") as file:
        for _ in range(180):
            file.write(np.zeros(8000 * 60, np.int16))
    start = time.perf_counter()
    wave, says = load_for_playback(path, limit_s=30)
    assert len(wave) == 480_000 and "180 min" in says and time.perf_counter() - start < 5
    with pytest.raises(ValueError, match="shorter than one patch"):
        load_for_playback(sound(tmp_path / "moment.wav", 0.2))


def send(upload, name, content, piece=100_000):
    "As the browser does: piece by piece."
    for at in range(0, max(len(content), 1), piece):
        message = {"name": name, "first": at == 0, "last": at + piece >= len(content)}
        upload._handle_custom_msg(message, [memoryview(content)[at : at + piece]])


def test_what_cannot_be_read_is_said_and_changes_nothing(tmp_path, tunes):
    (tmp_path / "words.mp3").write_text("not music")
    heard = []
    track = TrackPicker(tunes, MEL, 30, heard.append)
    for path in (tmp_path / "words.mp3", tmp_path / "none.wav", tmp_path, sound(tmp_path / "moment.wav", 0.1)):
        track.path.value = str(path)
        assert track.says.value.startswith("⚠") and not heard, path
    send(track.upload, "<b>.mp3", b"not music")
    assert "&lt;b&gt;.mp3" in track.says.value and "/" not in track.says.value.split(":")[0] and not heard
    send(track.upload, "empty.mp3", b"")
    assert "empty.mp3" in track.says.value and not heard
    send(track.upload, "a.wav", Path(tunes["long"]).read_bytes())
    assert len(heard) == 1 and track.says.value == "" and track.player.sound[:4] == b"fLaC"


def test_the_menu_names_what_is_heard_or_nothing(tunes):
    heard = []
    track = TrackPicker(tunes, MEL, 30, heard.append)
    for name in ("long", "short"):
        track.pick.value = name
    track.path.value = tunes["long"]
    assert track.pick.value is None and track.path.value == tunes["long"] and len(heard) == 3
    track.pick.value = "short"
    assert track.path.value == "" and len(heard) == 4, "the same tune can be chosen again"
    send(track.upload, "a.wav", Path(tunes["long"]).read_bytes())
    assert track.pick.value is None and len(heard) == 5


@pytest.mark.parametrize("kind", [PatchoutExplorer, AttentionExplorer, TagExplorer])
@pytest.mark.parametrize("labels", [LABELS, ()])
def test_explorers_take_every_track_and_a_model_without_labels(kind, labels, tunes):
    explorer = kind(small(labels), tunes)
    works = [v for v in vars(explorer).values() if isinstance(v, LatestOnlyWorker)]
    for name in ("short", "long"):
        explorer.track.pick.value = name
        for one in works:
            one.wait()
        expected = "no labels" if not labels and kind is not AttentionExplorer else ""
        assert expected in explorer.track.says.value and (expected or explorer.figure.data)


def test_every_pattern_can_be_dragged_through(tunes):
    explorer = PatchoutExplorer(small(), tunes)
    for pattern in ("training", "inference"):
        explorer.pattern.value = pattern
        for value in (explorer.time.min, explorer.time.max):
            for rows in (0, 8):
                explorer.time.value, explorer.frequency.value = value, rows
                explorer.seed.value = 7
                explorer.hear.wait()
                assert "⚠" not in explorer.track.says.value and "…" not in explorer.numbers.value
    hints = explorer.box.children[-1]
    names = {f"maestlib-{n}" for n in ("track", "path", "upload", "pattern", "time", "frequency", "seed")}
    assert set(hints.tips) == names and "so many" in hints.tips["maestlib-time"] and all(hints.tips.values())
    explorer.pattern.value = "training"
    assert "at random" in hints.tips["maestlib-time"] and explorer.time.description == "time: drop"
