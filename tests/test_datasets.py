"""The corpus `tunes` and dataset tables: files, clips that hang, full disks, and bad input."""

import difflib
import errno
import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile

from maestlib.audio import extract
from maestlib.audio.isolated import time_limit
from maestlib.datasets import registry
from maestlib.datasets.table import label_vocabulary, multi_hot
from maestlib.demo import abc, sounds, synth, tunes

CLIPS = 20


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.flac"))}


@pytest.fixture(scope="module")
def catalogue():
    return abc.tune_catalogue()


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
def test_parse_key(field, key):
    assert abc.parse_key(field) == key


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
def test_infer_dance(fields, collection, dance):
    assert abc.infer_dance(fields, collection) == dance


def test_parse_header_keeps_first_values_without_comments():
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
def test_parse_melody(body, pitches):
    bars = abc.parse_melody(f"X:1\nM:4/4\nL:1/8\nK:C\n{body}\n")
    assert [pitch for bar in bars for *_, pitch in bar] == pitches
    assert all(start + length <= 1 + 1e-4 for bar in bars for start, length, _ in bar)


def test_parse_melody_of_an_unreadable_tune_is_empty():
    assert abc.parse_melody("X:1\nT:x\nM:C\n") == [] and abc.parse_melody("X:1\nM:free\nK:C\ncde|") == []


def test_parse_melody_agrees_with_symusic():
    "symusic plays repeats, both endings and all notes of a chord, so repeat marks are removed first."
    import symusic

    similarity = []
    for _, text in abc.read_abc()[1000:1400:10]:
        head, body = text.split("\nK:", 1)
        head = "\n".join(line for line in head.splitlines() if line[:2] in ("X:", "M:", "L:"))
        body = body.replace("|:", "|").replace(":|", "|").replace("::", "|")
        text = f"{head}\nK:{body}"
        score = symusic.Score.from_abc(text)
        pitches = [pitch for bar in abc.parse_melody(text) for *_, pitch in bar]
        expected = [note.pitch for note in sorted(score.tracks[0].notes, key=lambda n: n.start)]
        similarity.append(difflib.SequenceMatcher(None, pitches, expected, autojunk=False).ratio())
    assert len(similarity) == 40 and min(similarity) > 0.9
    assert np.mean(similarity) > 0.97, f"{np.mean(similarity):.1%} of the notes agree"


def test_transposed_tunes_are_grouped():
    tune = "X:1\nM:6/8\nL:1/8\nK:{}\n"
    d = abc.parse_melody(tune.format("D") + "d2d f2a|b2a f2d|e2e g2b|a2f d3|")
    g = abc.parse_melody(tune.format("G") + "GAG B2d|e2d B2G|ABA c2e|d2B G3|")  # a fourth up, two notes decorated
    other = abc.parse_melody(tune.format("D") + "a2f e2d|c2e a2g|f2d B2A|G2E D3|")
    keys = [abc.melodic_skeletons(bars, "6/8") for bars in (d, g, other)]
    assert abc.group_duplicates(keys) == [0, 0, 2]


def test_no_title_or_melody_is_in_two_families(catalogue):
    family_of = {}
    for title, bars, metre, family in catalogue.select("title", "bars", "metre", "family").rows():
        for key in abc.melodic_skeletons(json.loads(bars), metre) | ({abc.normalize_title(title)} - {""}):
            assert family_of.setdefault(key, family) == family
    assert catalogue["family"].n_unique() > 2500


def test_a_longer_corpus_begins_with_the_shorter_one(catalogue):
    a, b = synth.sampling_order(catalogue, 0), synth.sampling_order(catalogue, 1)
    assert sorted(a) == sorted(b) == list(range(len(catalogue))) and a != b
    row = catalogue.row(a[3], named=True)
    assert synth.plan_clip(3, row, 0) == synth.plan_clip(3, row, 0) != synth.plan_clip(3, row, 1)


def test_a_plain_arrangement_tells_neither_dance_nor_region_nor_mode(catalogue):
    row = catalogue.filter(dance="Hornpipe", mode="Major").row(0, named=True)
    other = row | {"dance": "March", "region": "Scotland", "mode": "Dorian"}
    drawn = ("lead", "second", "accompaniment", "bar_s", "bpm", "transpose", "octave")
    for clip in range(40):
        one, two = (synth.plan_clip(clip, tune, 0, plain=True) for tune in (row, other))
        assert [one[name] for name in drawn] == [two[name] for name in drawn]
        if one["accompaniment"] in ("None", "Drone", "Drums"):  # chords are those of the mode
            assert synth.arrange(one) == synth.arrange(two)
    planted = [[synth.plan_clip(clip, tune, 0)["bar_s"] for tune in (row, other)] for clip in range(3)]
    assert all(one != two for one, two in planted)


def test_a_confirmation_by_a_font_that_is_not_known_or_not_there(monkeypatch):
    with pytest.raises(ValueError, match="font='FluidR3': give one of"):
        tunes.build_confirmation(font="FluidR3")
    monkeypatch.setattr(sounds, "FONT_FOLDERS", ())
    with pytest.raises(FileNotFoundError, match="csound-soundfont"):
        tunes.build_confirmation(font="Csound", plain=True)


def test_arrangements_fill_the_clip_below_the_highest_pitch(catalogue):
    order = synth.sampling_order(catalogue, 5)
    for clip in range(0, 300, 3):
        layers = synth.arrange(synth.plan_clip(clip, catalogue.row(order[clip], named=True), 5))
        assert max(start for start, *_ in layers["lead"]) > synth.CLIP_S - 5
        assert all(0 <= start <= synth.CLIP_S + 1 and pitch <= synth.MAX_PITCH
                   for name, notes in layers.items() if name != "drums" for start, _, pitch, _ in notes)  # fmt: skip


def test_build_tunes_writes_every_clip(corpus):
    table, folder = corpus
    assert len(table) == CLIPS and len(digests(folder)) == CLIPS
    for path in table["path"][:4]:
        wave, rate = soundfile.read(path)
        assert rate == 16000 and wave.shape == (480000,) and np.isfinite(wave).all() and 0.01 < np.abs(wave).max() <= 1


def test_render_is_deterministic_across_processes(corpus, catalogue):
    table, _ = corpus
    clip = 5
    plan = synth.plan_clip(clip, catalogue.row(synth.sampling_order(catalogue, 0)[clip], named=True), 0)
    wave = synth.render(plan)
    assert np.array_equal(wave, synth.render(plan))
    from_child, _ = soundfile.read(table["path"][clip], dtype="float32")
    assert np.abs(wave - from_child).max() <= 1 / 32768


def test_the_mels_are_those_of_the_files(corpus, tmp_path):
    table, folder = corpus
    store = folder.parent / str(CLIPS)
    extract.extract_mels(pl.read_parquet(store / "tracks.parquet"), tmp_path / "decoded", num_workers=0)
    assert {f.name for f in store.iterdir()} == {f.name for f in (tmp_path / "decoded").iterdir()}
    for file in store.iterdir():
        assert file.read_bytes() == (tmp_path / "decoded" / file.name).read_bytes(), file.name


@pytest.fixture
def three_plans(catalogue):
    order = synth.sampling_order(catalogue, 0)
    plans = [synth.plan_clip(i, catalogue.row(order[i], named=True), 0) for i in range(3)]
    return [plan | {"track_id": f"{plan['clip']}", "split": "train"} for plan in plans]


def _render_any_pitch(path, plans, **options):  # in a worker process
    synth.MAX_PITCH = 127
    with time_limit(2 if path.endswith("1.flac") else 60):  # the clip of that file never ends
        return tunes.load_or_render(path, plans)


@pytest.mark.slow
def test_a_clip_that_hangs_is_left_out(tmp_path, monkeypatch, three_plans):
    "On a cello note this high the font's loop is shorter than the synthesizer's step, and native code never returns."
    three_plans[1] |= {"lead": "Cello", "second": None, "octave": 4}
    monkeypatch.setattr(tunes, "load_or_render", _render_any_pitch)
    with pytest.raises(RuntimeError, match=r"1 of 3 clips could not be rendered .*1\.flac"):
        tunes.fill_store(tmp_path / "store", three_plans, workers=1)
    assert sorted(f.name for f in (tmp_path / "audio").iterdir()) == ["0.flac", "2.flac"]


def test_a_bug_is_not_taken_for_clips_without_sound(tmp_path, three_plans, capsys):
    three_plans[0]["lead"] = "no such instrument"
    with pytest.raises(RuntimeError, match="1 of 3 clips could not be rendered .'no such instrument'"):
        tunes.fill_store(tmp_path / "store", three_plans, workers=0)
    assert not (tmp_path / "store").exists() and "left out: 'no such instrument'" in capsys.readouterr().out


@pytest.fixture
def noise_for_music(monkeypatch, catalogue):
    "Tests of which clips are rendered need not hear them."
    noise = {clip: np.random.default_rng(clip).normal(0, 0.1, 480_000).clip(-1, 1) for clip in range(3)}
    monkeypatch.setattr(tunes, "render", lambda plan: noise[plan["clip"] % 3])
    monkeypatch.setattr(tunes, "tune_catalogue", lambda: catalogue)


def test_a_full_disk_loses_nothing(noise_for_music, tmp_path, monkeypatch):
    "Nor does a kill; one process of torchrun goes on for all."
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "whole"))
    table = registry.load_dataset("tunes", clips=CLIPS, workers=0)
    folder = Path(table["path"][0]).parent
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "full"))
    write = tunes.atomic_write

    def full(path):
        if Path(path).stem == "tune-00005":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left.*make room and run it again"):
        patch.setattr(tunes, "atomic_write", full)
        registry.load_dataset("tunes", clips=CLIPS, workers=0)
    audio = tmp_path / "full" / folder.relative_to(tmp_path / "whole")
    before = {f.name: f.stat().st_mtime_ns for f in audio.glob("*.flac")}
    assert sorted(before) == [f"tune-0000{clip}.flac" for clip in range(5)]
    assert not list(audio.parent.glob("*/SHA256SUMS"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert registry.load_dataset("tunes", clips=CLIPS, workers=0).drop("path").equals(table.drop("path"))
    assert digests(audio) == digests(folder)
    assert {name: (audio / name).stat().st_mtime_ns for name in before} == before


def test_a_cache_that_cannot_be_written(corpus, tmp_path, monkeypatch):
    table, folder = corpus

    def read_only(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "unlink"):
            patch.setattr(os, name, read_only)
        patch.setenv("MAESTLIB_CACHE", str(folder.parents[2]))
        assert registry.load_dataset("tunes", clips=CLIPS).equals(table), "what is there is read"
        patch.setenv("MAESTLIB_CACHE", str(tmp_path / "elsewhere"))
        with pytest.raises(OSError, match="elsewhere.*cannot be written.*; set MAESTLIB_CACHE"):
            registry.load_dataset("tunes", clips=CLIPS)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="chooses a core as Linux does")
def test_one_core_and_little_memory(tmp_path):
    code = """if True:
        import os
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        from maestlib.core.device import worker_count
        from maestlib.datasets import registry
        assert worker_count() == 1
        registry.load_dataset("tunes", first=20, workers=0)  # this process does what a worker does
        status = open("/proc/self/status", encoding="utf8").read()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024)"""  # ru_maxrss counts the parent's, too
    environment = os.environ | {"MAESTLIB_CACHE": str(tmp_path)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True).stdout
    assert int(output.split()[-1]) < 1.2e9, "with a server and a worker like it, less than 4 GB"


@pytest.mark.parametrize("package", ["symusic", "pretty_midi", "music21"])
def test_building_without_a_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    find = abc.importlib.util.find_spec
    monkeypatch.setattr(abc.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    abc.tune_catalogue.cache_clear()
    with pytest.raises(ImportError, match=rf'{package} is not installed: pip install "maestlib\[demo\]"'):
        registry.load_dataset("tunes")


def test_building_without_the_sound_font_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(sounds, "package_dir", lambda name: tmp_path)
    with pytest.raises(ImportError, match=r"TimGM6mb.sf2 is missing: pip install .*maestlib\[demo\]"):
        registry.load_dataset("tunes")


@pytest.mark.parametrize("clips", [3, 2.5, "many"])
def test_build_tunes_checks_clips(clips):
    with pytest.raises(ValueError, match="clips="):
        registry.load_dataset("tunes", clips=clips)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(abc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "maestlib\[demo\]"'):
        abc.read_abc()


def make_folder(path: Path, rows: list[str], songs=("a.wav", "b.wav", "sub/c.ogg")) -> Path:
    for song in songs:
        (path / song).parent.mkdir(exist_ok=True, parents=True)
        soundfile.write(path / song, np.zeros(800), 16000)
    (path / "tags.csv").write_text("\n".join(rows) + "\n")
    return path


def test_load_folder_logs_missing_files_and_labels(tmp_path, capsys):
    folder = make_folder(tmp_path, ["path,labels", "a.wav,rock; pop;rock", "gone.wav,pop", "sub/c.ogg,"])
    table = registry.load_dataset(folder)
    output = capsys.readouterr().out
    assert table["track_id"].to_list() == ["a.wav", "sub/c.ogg"] == table["artist"].to_list()
    assert table["labels"].to_list() == [["pop", "rock"], []]
    assert all(Path(p).is_absolute() and Path(p).exists() for p in table["path"])
    assert all(text in output for text in ("missing", "gone.wav", "b.wav", "no label", "sub/c.ogg"))


def test_load_folder_splits_by_artist(tmp_path):
    songs = [f"{i}.wav" for i in range(40)]
    folder = make_folder(
        tmp_path, ["path,artist,labels", *(f"{s},band {i // 4},x" for i, s in enumerate(songs))], songs
    )
    table = registry.load_folder(folder, validation=0.2, test=0.2)
    assert table.group_by("artist").agg(pl.col("split").n_unique())["split"].max() == 1
    assert dict(table["split"].value_counts().rows()) == {"train": 24, "validation": 8, "test": 8}
    assert table.equals(registry.load_folder(folder, validation=0.2, test=0.2))
    assert not table.equals(registry.load_folder(folder, validation=0.2, test=0.2, seed=1))
    given = table.with_columns(split=pl.lit("test"), path=pl.col("track_id"))
    given.write_parquet(folder / "own.parquet")
    assert set(registry.load_dataset(folder / "own.parquet")["split"]) == {"test"}


def test_load_folder_reports_artists_in_two_given_splits(tmp_path, capsys):
    rows = ["a.wav,Nina,x,train", "b.wav,Nina,x,test", "sub/c.ogg,Ella,x,train"]
    registry.load_dataset(make_folder(tmp_path, ["path,artist,labels,split", *rows]))
    output = capsys.readouterr().out
    assert "1 artists are in more than one split: Nina" in output and "Ella" not in output


def test_characters_of_tables(tmp_path, caplog, monkeypatch):
    "One artist in two forms of Unicode is one; a file name may hold the character of a bad unzip."
    forms = [unicodedata.normalize(form, "Beyoncé") for form in ("NFC", "NFD")]
    folder = make_folder(tmp_path / "tunes", ["path,labels", "caf\ufffd.wav,x"], ["caf\ufffd.wav", "b.wav"])
    assert registry.load_dataset(folder)["track_id"].to_list() == ["caf\ufffd.wav"]
    rows = {"path": ["caf\ufffd.wav", "b.wav"], "artist": forms, "labels": [[forms[0]], [forms[1], ""]]}
    pl.DataFrame(rows).write_parquet(folder / "own.parquet")
    table = registry.load_dataset(folder / "own.parquet")
    assert table["artist"].n_unique() == 1 == len(label_vocabulary(table))
    (folder / "tags.csv").rename(folder / "TAGS.CSV")
    assert len(registry.load_dataset(folder / "TAGS.CSV")) == 1
    (folder / "TAGS.CSV").rename(folder / "tags.csv")
    monkeypatch.setattr("maestlib.core.files.project_root", lambda: tmp_path)
    monkeypatch.setitem(registry.RENDERED, "tunes", "maestlib.datasets.registry:load_folder")
    with pytest.raises(TypeError):  # of the replacement; nothing is rendered
        registry.load_dataset("tunes")
    assert "give ./tunes" in caplog.text


def test_labels_of_a_parquet_file_may_be_numbers(tmp_path):
    folder = make_folder(tmp_path, ["path,labels"])
    for labels in ([1, 2, None], [[1], [2], []]):
        pl.DataFrame({"path": ["a.wav", "b.wav", "sub/c.ogg"], "labels": labels}).write_parquet(folder / "n.parquet")
        assert registry.load_dataset(folder / "n.parquet")["labels"].to_list() == [["1"], ["2"], []]
    artists = pl.DataFrame({"path": ["a.wav"], "labels": ["x"], "artist": [{"name": "Nina"}]})
    artists.with_columns(artist=pl.concat_list("artist")).write_parquet(folder / "n.parquet")
    with pytest.raises(ValueError, match="n.parquet: a column has another type"):
        registry.load_dataset(folder / "n.parquet")


@pytest.mark.parametrize(
    "rows, message",
    [
        (["path,tags", "a.wav,rock"], "no column labels"), (["path,labels", "gone.wav,rock"], "none of its files"),
        (["path,labels,split", "a.wav,rock,dev"], "split dev"), (["path,labels,track_id", "a.wav,x,"], "missing or"),
        (["path,labels", "a.wav,x", "a.wav,y"], "'a.wav' and 'a.wav' are the same"), (["path,labels"], "has no rows"),
    ],
)  # fmt: skip
def test_load_folder_checks_tags(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        registry.load_dataset(make_folder(tmp_path, rows))


ROWS = "path,labels\na.wav,rock;loud\nb.wav,pop\nsub/c.ogg,rock\n"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_of_tags_is_read_as_it_is_saved(encoding, line_end, tmp_path):
    folder = make_folder(tmp_path, [], ("a.wav", "été.wav", "sub/c.ogg"))
    rows = "# by hand\n\n" + ROWS.replace("b.wav,pop", '"été.wav","pop;\ncalm" \n,,').replace('" \n', '",\n')
    (folder / "tags.csv").write_bytes(rows.replace("\n", line_end).encode(encoding))
    table = registry.load_dataset(folder)
    assert table["labels"].to_list() == [["loud", "rock"], ["calm", "pop"], ["rock"]]
    assert table["track_id"].to_list() == ["a.wav", "été.wav", "sub/c.ogg"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("b.wav,pop", "b.wav,pop, rock", "line 3 has 3 fields, not 2"), ("b.wav,pop", "b.wav", "line 3 has 1 fields"),
        ("b.wav,pop", 'b.wav,"pop', "quotes in line 3"), ("b.wav,pop", 'b.wav,"pop"s', "quotes in line 3"),
        ("b.wav,pop", 'b.wav,"pop\nx.wav,"', "line break"), ("path,labels", "path;labels", "not by ';'"),
        ("path,labels", "path\tlabels", r"not by '\\t'"), ("path,labels", "path,labels,labels", "two columns .*labels"),
        ("pop", "caf\xe9", "line 3 is not UTF-8"), ("pop", "p\0p", "line 3 is not UTF-8"),
        (ROWS, "", "is empty"), (ROWS, "\n# made by hand\n\n", "is empty"), ("b.wav,pop", "b.wav;pop", "line 3 has 1"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_with_its_line(old, new, message, tmp_path):
    folder = make_folder(tmp_path, [])
    (folder / "tags.csv").write_bytes(ROWS.replace(old, new, 1).encode("latin-1"))
    with pytest.raises(ValueError, match=rf"tags\.csv: .*{message}") as error:
        registry.load_dataset(folder)
    assert "\n" not in str(error.value)


def test_every_name_of_a_file_is_the_same_file(tmp_path, capsys):
    composed, decomposed = (unicodedata.normalize(form, "é/é.wav") for form in ("NFC", "NFD"))
    folder = make_folder(tmp_path, [], ("a.wav", composed, "b.wav"))
    names = ["sub/../a.wav", decomposed, str(folder / "b.wav")]
    spelled = ["e\u0301", "\xe9", "\xe9"]
    rows = [f"{name},{letter},{letter}" for name, letter in zip(names, spelled, strict=True)]
    (folder / "tags.csv").write_text("\n".join(["path,labels,artist", *rows]))
    table = registry.load_dataset(folder)
    assert len(table) == 3 and "no row" not in capsys.readouterr().out
    assert set(table["artist"]) == {"\xe9"} == set(label_vocabulary(table)) and table["split"].n_unique() == 1
    for name in ("./a.wav", composed, str(folder / "sub" / ".." / "b.wav")):
        (folder / "tags.csv").write_text("\n".join(["path,labels", *(f"{n},x" for n in [*names, name])]))
        with pytest.raises(ValueError, match="are the same file; keep one of the rows"):
            registry.load_dataset(folder)


def test_the_links_of_each_path_are_resolved_once(tmp_path, monkeypatch):
    folder, calls, realpath = make_folder(tmp_path, ["path,labels", "a.wav,x", "b.wav,x"]), [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **options: calls.append(path) or realpath(path, **options))
    registry.load_dataset(folder)
    assert len(calls) == 3 + 2, "of each file in the folder, and of each row"


def test_load_dataset_checks_names_and_fractions(tmp_path):
    with pytest.raises(ValueError, match="dataset=nowhere: give tunes, .*or a path"):
        registry.load_dataset("nowhere")
    with pytest.raises(ValueError, match="no tags.csv"):
        registry.load_dataset(tmp_path)
    (tmp_path / "song.txt").write_text("la")
    with pytest.raises(ValueError, match=r"song.txt: give tunes, .*or a path"):
        registry.load_dataset(tmp_path / "song.txt")
    with pytest.raises(ValueError, match="validation=0.5, test=0.5"):
        registry.load_dataset(make_folder(tmp_path, ["path,labels", "a.wav,x"]), validation=0.5, test=0.5)


def test_load_dataset_reads_the_table_of_a_mel_store(tmp_path, corpus):
    table, _ = corpus
    table.write_parquet(tmp_path / "tracks.parquet")
    pl.DataFrame({"track_id": []}).write_parquet(tmp_path / "index.parquet")
    assert registry.load_dataset(tmp_path).equals(table)


def test_multi_hot():
    table = pl.DataFrame({"labels": [["b", "a"], [], ["b"]]})
    assert label_vocabulary(table) == ["a", "b"]
    target = multi_hot(table, ["a", "b", "c"])
    assert target.dtype == np.uint8 and target.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(ValueError, match="not in the vocabulary: b"):
        multi_hot(table, ["a"])


def test_the_first_tunes_are_those_of_the_full_corpus(noise_for_music, tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    first = registry.load_dataset("tunes", clips=30, first=20, workers=0)
    assert len(list(tmp_path.rglob("*.flac"))) == len(first) == 20
    full = registry.load_dataset("tunes", clips=30, workers=0)
    assert full[:20].equals(first) and registry.load_dataset("tunes", clips=30, first=25).equals(full[:25])
    with pytest.raises(ValueError, match="first=3"):
        registry.load_dataset("tunes", clips=30, first=3)


@pytest.mark.slow
def test_the_confirmation_corpus_shares_no_tune_and_no_family(tmp_path, monkeypatch, catalogue):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "Café & 音楽"))
    monkeypatch.setattr(tunes, "tune_catalogue", lambda: catalogue)
    family_of = dict(catalogue.select("tune", "family").rows())
    used = {family_of[tune] for tune in catalogue["tune"].gather(synth.sampling_order(catalogue, 0)[:1200])}
    first = registry.load_dataset("tunes-confirmation", first=20)
    plans = tunes.plan_confirmation(catalogue)
    assert len(plans) == 1200 and plans == tunes.plan_confirmation(catalogue)
    assert first["tune"].to_list() == [plan["tune"] for plan in plans[:20]]
    assert first["labels"].to_list() == [plan["labels"] for plan in plans[:20]]
    assert not used & {family_of[plan["tune"]] for plan in plans}
    assert len({(plan["family"], plan["split"]) for plan in plans}) == len({plan["family"] for plan in plans})
    assert not list(tmp_path.glob("*/tunes/*")), "the other corpus is not rendered for it"
    assert first["track_id"][0] == "confirmation-00000" and soundfile.info(first["path"][0]).frames == 480000


def test_blanks_around_paths_labels_and_artists_do_not_count(tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(16000), 16000)
    (tmp_path / "tags.csv").write_text("path , artist,labels\n a.wav , Ada ,rock ; pop\nb.wav,Ada, pop\n")
    table = registry.load_folder(tmp_path)
    assert table["path"].to_list() == [str(tmp_path / f"{name}.wav") for name in "ab"]
    assert table["artist"].to_list() == ["Ada", "Ada"] and table["labels"].to_list() == [["pop", "rock"], ["pop"]]
