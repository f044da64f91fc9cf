"""The corpus `tunes` and the uniform table: what a notebook cannot show about files, processes and bad input."""

import difflib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile

from maestlib.datasets import abc, registry, synth
from maestlib.datasets.table import label_vocabulary, multi_hot

CLIPS = 24


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.flac"))}


@pytest.fixture(scope="module")
def catalogue():
    return abc.catalogue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAESTLIB_CACHE", str(home))
        table = registry.load_dataset("tunes", clips=CLIPS)
    return table, Path(table["path"][0]).parent


@pytest.mark.parametrize(
    "field, key",
    [
        ("G", (7, 1, "Major")), ("F#m", (6, 3, "Minor")), ("Bb", (10, -2, "Major")), ("A Dorian", (9, 1, "Dorian")),
        ("AMix", (9, 2, "Mixolydian")), ("Ador", (9, 1, "Dorian")), ("HP", (9, 2, "Mixolydian")),
        ("Glyd", (7, 2, "Lydian")), ("Ebmaj", (3, -3, "Major")), ("Bn", None), ("", None), ("none", None),
    ],
)  # fmt: skip
def test_keys(field, key):
    assert abc.key_of(field) == key


@pytest.mark.parametrize(
    "fields, collection, dance",
    [
        ({"R": "slipjig"}, "airdsAirs", "Slip Jig"), ({"R": " JIG ", "M": "9/8"}, "ryansMammoth", "Slip Jig"),
        ({"R": "double jig", "T": "The Hornpipe"}, "oneills1850", "Jig"),
        ({"T": "Strathsy. Reel"}, "airdsAirs", "Strathspey"),
        ({"T": "The Fairy Reelers"}, "airdsAirs", None), ({"R": "", "T": "x", "X": "0620"}, "oneills1850", "Air"),
        ({"T": "Jigs"}, "airdsAirs", "Jig"), ({"T": "x", "X": "1790"}, "oneills1850", None),
    ],
)  # fmt: skip
def test_dances(fields, collection, dance):
    assert abc.dance_of(fields, collection) == dance


def test_header_takes_the_first_value_and_no_comment():
    text = "X:7\nT:First % note\nT:Second\nR:\nM: C|\nK: G % sharp\nc2\nK:D\n"
    assert abc.parse_header(text) == {"X": "7", "T": "First", "M": "C|", "K": "G"}


@pytest.mark.parametrize(
    "body, pitches",
    [
        ('"Am"c2 {fg}d2 !trill!e2 ~f2|', [72, 74, 76, 77]), ("^c2 c2 =c2 c,2|", [73, 73, 72, 60]),
        ("[ceg]2 z2 (3def g2|", [72, 74, 76, 77, 79]), ("c2-c2 d2-e2|", [72, 74, 76]),
        ("c4 d4|1 e8:|2 f8|]", [72, 74, 77]), ("c2d2e2f2g2a2|", [72, 74, 76, 77]),
    ],
)  # fmt: skip
def test_bars_are_read_and_fit(body, pitches):
    bars = abc.melody(f"X:1\nM:4/4\nL:1/8\nK:C\n{body}\n")
    assert [pitch for bar in bars for *_, pitch in bar] == pitches
    assert all(start + length <= 1 + 1e-4 for bar in bars for start, length, _ in bar)


def test_unreadable_tunes_have_no_bars():
    assert abc.melody("X:1\nT:x\nM:C\n") == [] and abc.melody("X:1\nM:free\nK:C\ncde|") == []


def test_notes_agree_with_an_independent_reader():
    "symusic plays repeats and both endings of a tune, and chords whole: the marks of repeats are taken away before."
    import symusic

    same = []
    for _, text in abc.read_abc()[1000:1400:10]:
        head, body = text.split("\nK:", 1)
        head = "\n".join(line for line in head.splitlines() if line[:2] in ("X:", "M:", "L:"))
        body = body.replace("|:", "|").replace(":|", "|").replace("::", "|")
        text = f"{head}\nK:{body}"
        score = symusic.Score.from_abc(text)
        ours = [pitch for bar in abc.melody(text) for *_, pitch in bar]
        theirs = [note.pitch for note in sorted(score.tracks[0].notes, key=lambda n: n.start)]
        same.append(difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio())
    assert len(same) == 40 and np.mean(same) > 0.97 and min(same) > 0.9, f"{np.mean(same):.1%} of the notes agree"


def test_a_tune_in_another_key_is_family():
    tune = "X:1\nM:6/8\nL:1/8\nK:{}\n"
    d = abc.melody(tune.format("D") + "d2d f2a|b2a f2d|e2e g2b|a2f d3|")
    g = abc.melody(tune.format("G") + "GAG B2d|e2d B2G|ABA c2e|d2B G3|")  # a fourth up, two notes decorated
    other = abc.melody(tune.format("D") + "a2f e2d|c2e a2g|f2d B2A|G2E D3|")
    marks = [abc.melodic_skeletons(bars, "6/8") for bars in (d, g, other)]
    assert abc.group_duplicates(marks) == [0, 0, 2]


def test_no_title_or_melody_straddles_a_split(catalogue):
    draws = {}
    for title, bars, metre, family in catalogue.select("title", "bars", "metre", "family").rows():
        for mark in abc.melodic_skeletons(json.loads(bars), metre) | ({abc.normalize_title(title)} - {""}):
            assert draws.setdefault(mark, family) == family
    assert catalogue["family"].n_unique() > 2500


def test_a_longer_corpus_begins_with_the_shorter_one(catalogue):
    a, b = synth.sampling_order(catalogue, 0), synth.sampling_order(catalogue, 1)
    assert sorted(a) == sorted(b) == list(range(len(catalogue))) and a != b
    row = catalogue.row(a[3], named=True)
    assert synth.plan_clip(3, row, 0) == synth.plan_clip(3, row, 0) != synth.plan_clip(3, row, 1)


def test_every_plan_fills_thirty_seconds_at_safe_pitches(catalogue):
    order = synth.sampling_order(catalogue, 5)
    for clip in range(0, 300, 3):
        layers = synth.arrange(synth.plan_clip(clip, catalogue.row(order[clip], named=True), 5))
        assert max(start for start, *_ in layers["lead"]) > synth.SECONDS - 5
        assert all(0 <= start <= synth.SECONDS + 1 and pitch <= synth.HIGHEST
                   for name, notes in layers.items() if name != "drums" for start, _, pitch, _ in notes)  # fmt: skip


def test_the_table_and_its_clips(corpus):
    table, folder = corpus
    assert len(table) == CLIPS and len(digests(folder)) == CLIPS
    for path in table["path"][:4]:
        wave, rate = soundfile.read(path)
        assert rate == 16000 and wave.shape == (480000,) and np.isfinite(wave).all() and 0.01 < np.abs(wave).max() <= 1


def test_one_clip_is_the_same_bytes_here_and_there(corpus, catalogue):
    table, _ = corpus
    clip = 5
    plan = synth.plan_clip(clip, catalogue.row(synth.sampling_order(catalogue, 0)[clip], named=True), 0)
    here = synth.render(plan)
    assert np.array_equal(here, synth.render(plan))
    there, _ = soundfile.read(table["path"][clip], dtype="float32")
    assert np.abs(here - there).max() <= 1 / 32768


def test_a_killed_build_goes_on(corpus, tmp_path, monkeypatch):
    table, folder = corpus
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    code = f"import maestlib as ml; ml.load_dataset('tunes', clips={CLIPS})"
    # a session of its own, so that the whole group can be killed
    build = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    audio = tmp_path / folder.relative_to(folder.parents[2])
    deadline = time.time() + 240
    try:
        while len(list(audio.glob("*.flac"))) < 5:
            assert time.time() < deadline and build.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(build.pid, signal.SIGKILL)
        build.wait()
    before = {f.name: f.stat().st_mtime_ns for f in audio.glob("*.flac")}
    assert 5 <= len(before) < CLIPS and not list(audio.parent.glob("*.parquet"))
    again = registry.load_dataset("tunes", clips=CLIPS)
    assert digests(audio) == digests(folder)
    assert {name: (audio / name).stat().st_mtime_ns for name in before} == before, "what was there is kept"
    assert again.drop("path").equals(table.drop("path"))


@pytest.fixture
def three(tmp_path, catalogue):
    plans = [
        synth.plan_clip(i, catalogue.row(t, named=True), 0)
        for i, t in enumerate(synth.sampling_order(catalogue, 0)[:3])
    ]
    return [plan | {"path": str(tmp_path / f"{plan['clip']}.flac")} for plan in plans]


def test_a_clip_that_never_comes_back_is_left_out(tmp_path, monkeypatch, three):
    "A cello far too high: the font's loops are shorter than the synthesiser's step, and native code never returns."
    child = f"from maestlib.datasets import synth as p; p.RENDER_TIMEOUT_S, p.HIGHEST = 2, 127; {synth._CHILD}"
    monkeypatch.setattr(synth, "_CHILD", child)
    three[1] |= {"lead": "Cello", "second": None, "octave": 4}
    failed = synth._render_all(three, 1)
    assert list(failed) == [1] and "clip 1: native code" in failed[1]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.flac", "2.flac"]


def test_an_error_of_ours_is_raised(three):
    three[0]["lead"] = "no such instrument"
    with pytest.raises(RuntimeError, match="clip 0: not rendered"):
        synth._render_all(three, 2)


@pytest.mark.parametrize("clips", [3, 2.5, "many"])
def test_bad_clips(clips):
    with pytest.raises(ValueError, match="clips="):
        registry.load_dataset("tunes", clips=clips)


def test_a_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(abc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "maestlib\[demo\]"'):
        abc.read_abc()


def make_folder(path: Path, rows: list[str], songs=("a.wav", "b.wav", "sub/c.ogg")) -> Path:
    for song in songs:
        (path / song).parent.mkdir(exist_ok=True)
        soundfile.write(path / song, np.zeros(800), 16000)
    (path / "tags.csv").write_text("\n".join(rows) + "\n")
    return path


def test_folder_reports_what_is_not_there(tmp_path, capsys):
    mine = make_folder(tmp_path, ["path,labels", "a.wav,rock; pop;rock", "gone.wav,pop", "sub/c.ogg,"])
    table = registry.load_dataset(mine)
    said = capsys.readouterr().out
    assert table["track_id"].to_list() == ["a.wav", "sub/c.ogg"] == table["artist"].to_list()
    assert table["labels"].to_list() == [["pop", "rock"], []]
    assert all(Path(p).is_absolute() and Path(p).exists() for p in table["path"])
    assert "missing" in said and "gone.wav" in said and "b.wav" in said and "no label" in said and "sub/c.ogg" in said


def test_folder_splits(tmp_path):
    songs = [f"{i}.wav" for i in range(40)]
    mine = make_folder(tmp_path, ["path,artist,labels", *(f"{s},band {i // 4},x" for i, s in enumerate(songs))], songs)
    table = registry.load_folder(mine, validation=0.2, test=0.2)
    assert table.group_by("artist").agg(pl.col("split").n_unique())["split"].max() == 1
    assert dict(table["split"].value_counts().rows()) == {"train": 24, "validation": 8, "test": 8}
    assert table.equals(registry.load_folder(mine, validation=0.2, test=0.2))
    assert not table.equals(registry.load_folder(mine, validation=0.2, test=0.2, seed=1))
    given = table.with_columns(split=pl.lit("test"), path=pl.col("track_id"))
    given.write_parquet(mine / "own.parquet")
    assert set(registry.load_dataset(mine / "own.parquet")["split"]) == {"test"}


@pytest.mark.parametrize(
    "rows, message",
    [
        (["path,tags", "a.wav,rock"], "no column labels"), (["path,labels", "gone.wav,rock"], "none of its files"),
        (["path,labels,split", "a.wav,rock,dev"], "split dev"), (["path,labels", "a.wav,x", "a.wav,y"], "twice"),
    ],
)  # fmt: skip
def test_bad_tags(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        registry.load_dataset(make_folder(tmp_path, rows))


def test_bad_names_and_shares(tmp_path):
    with pytest.raises(ValueError, match="dataset=nowhere: give tunes, .*or a path"):
        registry.load_dataset("nowhere")
    with pytest.raises(ValueError, match="no tags.csv"):
        registry.load_dataset(tmp_path)
    (tmp_path / "song.txt").write_text("la")
    with pytest.raises(ValueError, match=r"song.txt: give tunes, .*or a path"):
        registry.load_dataset(tmp_path / "song.txt")
    with pytest.raises(ValueError, match="validation=0.5, test=0.5"):
        registry.load_dataset(make_folder(tmp_path, ["path,labels", "a.wav,x"]), validation=0.5, test=0.5)


def test_a_mel_store_is_its_table(tmp_path, corpus):
    table, _ = corpus
    table.write_parquet(tmp_path / "tracks.parquet")
    pl.DataFrame({"track_id": []}).write_parquet(tmp_path / "index.parquet")
    assert registry.load_dataset(tmp_path).equals(table)


def test_multihot():
    table = pl.DataFrame({"labels": [["b", "a"], [], ["b"]]})
    assert label_vocabulary(table) == ["a", "b"]
    target = multi_hot(table, ["a", "b", "c"])
    assert target.dtype == np.float32 and target.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(ValueError, match="not in the vocabulary: b"):
        multi_hot(table, ["a"])


def test_the_first_tunes_are_those_of_the_whole(tmp_path, monkeypatch):
    pytest.importorskip("symusic", reason="the demo extra is not installed: pip install -e '.[demo]'")
    from maestlib.datasets.synth import build_tunes

    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    some = build_tunes(60, first=20)
    assert len(list(tmp_path.rglob("*.flac"))) == len(some) == 20
    whole = build_tunes(60)
    assert whole[:20].equals(some) and build_tunes(60, first=30).equals(whole[:30])
    with pytest.raises(ValueError, match="first=3"):
        build_tunes(60, first=3)
