"""What the notebooks of the library explorer cannot show: broken files, two notebooks, many songs, two models."""

import html
import threading
from concurrent.futures import Future

import numpy as np
import polars as pl
import pytest
import soundfile
from test_explore import send_upload, small_model

from maestlib.collection.explore_library import LibraryExplorer
from maestlib.collection.library import Library, LibrarySettings, song_table
from maestlib.collection.library_controls import open_library
from maestlib.collection.library_map import SongSpaces
from maestlib.collection.my_tags import MyTags
from maestlib.collection.scan import scan
from maestlib.models.checkpoint import save_checkpoint


def vectors_library(folder, count, model="model", seed=0, blocks=(2, 5), dim=16):
    "A library of random vectors, without audio."
    labels = ["Mood---Calm (slow)", "Mood---Wild"]
    library = Library.create(folder, LibrarySettings(model), "", blocks=blocks, dim=dim, labels=labels)
    values = np.random.default_rng(seed).normal(size=(count, len(labels) + len(blocks) * dim))
    with library.writing():
        library.append_vectors([str(i) for i in range(count)], [30.0] * count, values)
        rows = [(f"/music/{i}.mp3", 1, 1, str(i), 30.0, f"<b>{i % 7}", None, f"song {i}", None) for i in range(count)]
        library.save_songs(song_table(rows))
    return library


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    "A library of eight short files, read by a small model."
    folder = tmp_path_factory.mktemp("songs")
    for i in range(8):
        tone = np.sin(np.arange(16000 * 4) * 0.05 * (i + 1)) + 0.01 * np.random.default_rng(i).normal(size=64000)
        (folder / "music").mkdir(exist_ok=True)
        soundfile.write(folder / "music" / f"tone {i}.wav", 0.5 * tone, 16000)
    save_checkpoint(small_model(), folder / "small.safetensors")
    scan(
        folder / "music", folder / "library", folder / "small.safetensors", block=(1, 3), num_workers=1, progress=False
    )
    return folder


def test_ten_thousand_songs_are_drawn_by_webgl_and_selected(tmp_path):
    explorer = LibraryExplorer(vectors_library(tmp_path, 10_000))
    explorer.layouts.worker.latest.cancel()
    explorer.controls.method.value = "PCA"
    dots = explorer.maps[0].figure.data[0]
    assert dots.type == "scattergl" and len(dots.x) == 10_000 and np.isfinite(dots.x).all()
    explorer.controls.glide.value = 50
    first, second = explorer.layouts.get("PCA", *explorer.spaces.titles)
    np.testing.assert_allclose(dots.x, (first[:, 0] + second[:, 0]) / 2, rtol=1e-5)
    explorer.select(range(5000))
    assert "5,000 songs" in explorer.message.value and len(explorer.controls.songs.options) < 1000
    explorer.save_playlist()
    assert len((tmp_path / "playlists/my songs.m3u8").read_text(encoding="utf8").splitlines()) == 10_001


def test_two_notebooks_label_one_library(tmp_path):
    library = vectors_library(tmp_path, 40)
    tags = [MyTags(Library(tmp_path)) for _ in range(4)]

    def label(k):
        for i in range(10):
            tags[k].label(f"tag {k}", library.songs[[10 * k + i]], True)

    threads = [threading.Thread(target=label, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tags[0].table) == 40 and tags[0].names == [f"tag {k}" for k in range(4)]
    assert np.nansum(tags[0].labels("tag 2", library.songs)) == 10


@pytest.mark.parametrize("content", [b"tag,is_positive\na,perhaps\n", b"\xff\xfe\x00", b"x\n1,2,3,4,5,6\n"])
def test_a_broken_table_of_labels_is_named_and_kept(tmp_path, content):
    library = vectors_library(tmp_path, 20)
    (tmp_path / "my_tags.csv").write_bytes(content)
    with pytest.raises(ValueError, match="my_tags.csv: "):
        MyTags(library).label("calm", library.songs[:2], True)
    assert (tmp_path / "my_tags.csv").read_bytes() == content


def test_labels_say_what_is_missing_and_survive(tmp_path):
    vectors_library(tmp_path, 40)
    explorer = LibraryExplorer(tmp_path)
    explorer.label(True)
    assert "select songs first" in explorer.message.value
    explorer.select([1, 2, 3])
    explorer.label(True)
    assert "give your tag a name" in explorer.message.value
    explorer.controls.tag.value = "<b>rainy"
    explorer.label(True)
    explorer.worker.wait()
    assert "3 yes, 0 no" in explorer.score.value and "<b>" not in explorer.score.value
    explorer.select_likeliest()
    assert "label some songs first" in explorer.message.value and explorer.selected == [1, 2, 3]
    fitted, explorer.worker.latest = explorer.worker.latest, Future()
    explorer.select_likeliest()
    assert "still being fitted" in explorer.message.value
    explorer.worker.latest = fitted
    explorer.select([4, 5])
    explorer.label(False)
    explorer.worker.wait()
    assert "3 yes, 2 no" in explorer.score.value and "pairs" in explorer.score.value
    again = LibraryExplorer(tmp_path)
    assert again.controls.tag.options == ("<b>rainy",)
    again.controls.tag.value = "<b>rainy"
    again.worker.wait()
    assert again.score.value == explorer.score.value
    again.controls.first.value = again.spaces.titles[1]
    again.worker.wait()
    assert again.score.value != explorer.score.value, "a tag is fitted in the space that is shown"


def report(figure, event_type, songs, selector=None):
    "Send what a browser reports of a figure."
    points = {"trace_indexes": [0] * len(songs), "point_indexes": songs, "xs": [0] * len(songs), "ys": [0] * len(songs)}
    figure._js2py_pointsCallback = {"event_type": event_type, "points": points, "selector": selector}


LASSO = {"type": "lasso", "selector_state": {"xs": [0, 1, 1], "ys": [0, 0, 1]}}


def test_a_selection_stays_until_there_is_another(tmp_path):
    explorer = LibraryExplorer(vectors_library(tmp_path, 40))
    figure = explorer.maps[0].figure
    sent = []
    figure.observe(lambda change: change.new and sent.append(change.new["relayout_data"]), "_py2js_relayout")
    report(figure, "plotly_selected", [3, 7, 9], LASSO)
    outline = {"selections": [dict(type="path", path="M0,0L1,0Z")]}
    figure._js2py_relayout = {"relayout_data": outline, "source_view_id": ""}
    assert sent[-1] == {"selections": []}, "the lasso is removed in the browser"
    report(figure, "plotly_selected", [])  # the echo of that
    assert figure.data[0].selectedpoints == (3, 7, 9) and explorer.selected == [3, 7, 9]
    assert [value for _, value in explorer.controls.songs.options] == [-1, 3, 7, 9]
    explorer.controls.glide.value = 40
    explorer.controls.color.value = "artist"
    assert figure.data[0].selectedpoints == (3, 7, 9), "songs glide and change their colors"
    report(figure, "plotly_selected", [], LASSO)
    assert figure.data[0].selectedpoints is None and explorer.selected == [], "a lasso around nothing"


def test_a_click_selects_one_song_and_a_button_its_nearest(tmp_path):
    explorer = LibraryExplorer(vectors_library(tmp_path, 40))
    explorer.select_nearest()
    assert "choose one song first" in explorer.message.value
    for song in (5, 6):  # the second one, too, although songs are selected
        report(explorer.maps[0].figure, "plotly_click", [song])
        assert explorer.selected == explorer.chosen == [song]
        assert explorer.maps[0].figure.data[0].selectedpoints == (song,)
    explorer.controls.nearest.click()
    assert (
        explorer.selected == [6, *explorer.spaces.nearest(explorer.spaces.titles[0], 6)] and len(explorer.chosen) == 11
    )


def test_one_song_of_the_list_is_labeled_alone_and_labels_are_removed(tmp_path):
    explorer = LibraryExplorer(vectors_library(tmp_path, 40))
    explorer.controls.tag.value = "rainy"
    explorer.select([1, 2, 3])
    explorer.controls.songs.value = 2
    assert explorer.maps[0].figure.data[0].selectedpoints == (2,)
    explorer.label(True)
    assert "1 song: yes" in explorer.message.value
    labels = explorer.colors.tags.labels("rainy", explorer.spaces.songs)
    assert np.flatnonzero(labels == 1).tolist() == [2] and np.isnan(labels).sum() == 39
    explorer.controls.songs.value = -1
    explorer.label(False)
    explorer.worker.wait()
    assert "3 songs: no" in explorer.message.value and explorer.controls.color.value == "my:rainy"
    assert len(set(explorer.maps[0].figure.data[0].marker.color)) == 2, "labeled songs have a color"
    explorer.label(None)
    explorer.worker.wait()
    colors, dots = explorer.controls.color, explorer.maps[0].figure.data[0]
    assert colors.value == "none" and "my:rainy" not in dict(colors.options).values()
    assert isinstance(dots.marker.color, str) and explorer.score.value == "", "no color is left of the tag"


def test_songs_have_the_titles_of_a_dataset(scanned):
    rows = [f"tone {i}.wav,Group---A,{'' if i == 7 else f'The <i>{i}</i> of June'}" for i in range(8)]
    (scanned / "music/tags.csv").write_text("\n".join(["path,labels,title", *rows]), encoding="utf8")
    explorer = LibraryExplorer(scanned / "library", dataset=str(scanned / "music"))
    explorer.find("3</i> of june")
    assert [label for label, _ in explorer.controls.songs.options] == ["1 song selected", "The <i>3</i> of June"]
    titles = dict(explorer.spaces.songs.select("path", "title").iter_rows())
    assert titles[str(scanned / "music/tone 7.wav")] in (None, ""), "where there is a title"


def test_names_of_playlists_stay_in_the_library(tmp_path):
    vectors_library(tmp_path, 10)
    explorer = LibraryExplorer(tmp_path)
    explorer.save_playlist()
    assert "select songs first" in explorer.message.value
    explorer.select([3])
    for name in ("../../evil", "a/b", "", ".hidden", "Ä: ü?"):
        explorer.controls.name.value = name
        explorer.save_playlist()
        assert ".m3u8" in explorer.message.value and "⚠" not in explorer.message.value
    names = sorted(file.name for file in (tmp_path / "playlists").iterdir())
    assert len(names) == 5 and "my songs.m3u8" in names and "Ä  ü.m3u8" in names
    explorer.save_playlist()
    assert "replaced" in explorer.message.value


def test_find_by_text_by_tags_and_not_at_all(tmp_path):
    vectors_library(tmp_path, 30)
    explorer = LibraryExplorer(tmp_path)
    explorer.find("SONG 2")
    assert len(explorer.selected) == 11
    explorer.find("wild & !nonsense")
    assert "nonsense" in explorer.message.value and len(explorer.selected) == 11
    explorer.find("wild")
    activations = explorer.spaces.activations[:, 1]
    assert activations[explorer.selected[0]] == activations.max()
    explorer.controls.color.value = "tag:Mood---Calm (slow)"  # brackets are not an expression
    assert explorer.maps[0].figure.data[0].marker.showscale
    assert all("<b>" not in (text or "") for text in explorer.maps[0].figure.data[0].text)


def test_models_are_compared_by_the_songs_that_both_have(tmp_path):
    one, two = vectors_library(tmp_path / "one", 30, "a"), vectors_library(tmp_path / "two", 20, "b", 1, (7,), 8)
    spaces = SongSpaces(one, two)
    assert spaces.titles == ["a, block 2", "a, block 5", "b, block 7"] and len(spaces.songs) == 20
    explorer = LibraryExplorer(one, two)
    explorer.controls.beside.value = True
    assert explorer.figures.children == tuple(songs.figure for songs in explorer.maps)
    explorer.maps[1].on_select([4])
    assert explorer.maps[0].figure.data[0].selectedpoints == (4,), "what is selected in one is selected in both"
    with pytest.raises(ValueError, match="no song in common"):
        other = vectors_library(tmp_path / "three", 5)
        other.save_songs(other.songs.with_columns(content="x" + pl.col("content")))
        SongSpaces(one, other)


def test_a_dropped_file_finds_its_place(scanned, tmp_path):
    explorer = LibraryExplorer(scanned / "library")
    explorer.controls.method.value = "PCA"
    upload = explorer.controls.upload
    send_upload(upload, "<i>mine.wav", (scanned / "music/tone 5.wav").read_bytes())
    song = explorer.spaces.songs["path"].to_list().index(str(scanned / "music/tone 5.wav"))
    assert explorer.selected[0] == song and "&lt;i&gt;mine.wav" in explorer.message.value
    star, dots = explorer.maps[0].figure.data[1], explorer.maps[0].figure.data[0]
    assert np.hypot(star.x[0] - dots.x[song], star.y[0] - dots.y[song]) < np.ptp(dots.x) / 4
    assert explorer.player.flac[:4] == b"fLaC"
    before = explorer.selected
    for name, content in (("broken.mp3", b"not music"), ("empty.wav", b"")):
        send_upload(upload, name, content)
        assert name in explorer.message.value and "/" not in explorer.message.value and explorer.selected == before


def test_a_song_that_is_gone_is_named(scanned):
    explorer = LibraryExplorer(scanned / "library")
    gone = explorer.spaces.songs["path"][3]
    flac = explorer.player.flac
    (scanned / "away").mkdir()
    moved = (scanned / "music/tone 3.wav").rename(scanned / "away/tone 3.wav")
    try:
        explorer.choose(3)
        assert gone in html.unescape(explorer.message.value) and explorer.player.flac == flac
    finally:
        moved.rename(gone)
    explorer.controls.songs.value = 3
    assert explorer.player.flac != flac and "tone 3" in explorer.title.value


def test_a_folder_is_scanned_once(scanned, tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_RUNS", str(tmp_path))
    first = open_library(scanned / "music", model=str(scanned / "small.safetensors"))
    assert first.folder.is_relative_to(tmp_path) and len(first.songs) == 8 and first.blocks == (2, 3)
    again = open_library(scanned / "music", model=str(scanned / "small.safetensors"))
    assert again.folder == first.folder and len(list((first.folder / "vectors").iterdir())) == 1
    assert open_library(scanned / "library").blocks == (1, 3), "a library is only opened"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_library(tmp_path / "nowhere")
