"""A library of songs: bad files, kills, full disks, two scans, the command line. What a notebook cannot show."""

import errno
import io
import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
from helpers import (  # noqa: F401
    audio_folder,
    every_kill,
    kill_when,
    one_thread,
    recording,
    tiny_model,
    write_broken_files,
    write_music,
)
from processes import start_python

from maestlib.audio.decode import list_audio
from maestlib.collection import files as collection
from maestlib.collection import write_tags
from maestlib.collection.cli import main
from maestlib.collection.clusters import cluster_songs
from maestlib.collection.files import read_identity
from maestlib.collection.library import Library
from maestlib.collection.library_controls import SongColors
from maestlib.collection.library_map import SongSpaces
from maestlib.collection.scan import scan
from maestlib.collection.search import SongIndex
from maestlib.collection.vectors import VectorIndex
from maestlib.inference.embedding import embed
from maestlib.inference.presets import SPEED_PRESETS
from maestlib.models.checkpoint import save_checkpoint
from maestlib.models.patchout import Patchout

PROJECT = Path(__file__).parents[1]
LABELS = ["Jazz---Bop", "Jazz---Cool", "Rock---Surf", "Mood---calm"]
POSIX = pytest.mark.skipif(os.name != "posix", reason="such names and links exist on POSIX")


@pytest.fixture(scope="module")
def model():
    model = tiny_model(LABELS)
    model.thresholds = (0.5, 0.5, 0.5, 0.5)
    return model


@pytest.fixture(scope="module")
def music(tmp_path_factory, model):
    "Twelve good files; a checkpoint beside them."
    root = tmp_path_factory.mktemp("music")
    audio_folder(root, 12)
    save_checkpoint(model, root / "m.safetensors")
    return root


@pytest.fixture(scope="module")
def undisturbed(music, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert scan(music, out, model, progress=False).read == 12
    return Library(out)


def assert_complete(library, undisturbed):
    "Nothing is lost, and nothing is there twice."
    assert library.songs.drop("mtime_ns").equals(undisturbed.songs.drop("mtime_ns"))
    chunks = [pl.read_parquet(file) for file in sorted((library.folder / "vectors").glob("*.parquet"))]
    contents = pl.concat(chunks)["content"]
    assert contents.is_unique().all() and set(contents) == undisturbed.contents()
    assert np.allclose(library.vectors()[1], undisturbed.vectors()[1], atol=2e-3)
    assert np.allclose(library.activations()[1], undisturbed.activations()[1], atol=2e-3)


@pytest.mark.parametrize("tokens, drop_rows", [("cdtrs", ()), ("rs", (0, 7, 8))])
def test_rows_of_patches_are_scanned_as_they_are_embedded(music, model, tmp_path, monkeypatch, tokens, drop_rows):
    "A row of patches is a vector: search, clusters and the map read what a scan with r and s writes."
    pytest.importorskip("sklearn")
    settings = dict(block=(1, 3), tokens=tokens, drop_rows=drop_rows)
    scan(music / "album 0", tmp_path / "library", model, progress=False, **settings)
    library = Library(tmp_path / "library")
    songs, vectors = library.vectors(3)
    patchout = Patchout(drop_rows=drop_rows)
    expected = embed(songs["path"].to_list(), model, 3, tokens, patchout, average=True)["embedding"].to_numpy()
    assert np.allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-3)
    assert len(SongIndex(library).nearest([songs["path"][0]], k=3)) == 3
    assert cluster_songs(library, 2)["cluster"].n_unique() == 2
    spaces = SongSpaces(library)
    assert spaces.vectors("block 1").shape == vectors.shape
    monkeypatch.setattr("maestlib.collection.scan.load_library_model", lambda library: model)
    row = spaces.songs["path"].to_list().index(songs["path"][0])
    for title, vector in spaces.read(songs["path"][0])[0].items():
        assert vector @ spaces.vectors(title)[row] > 0.99, "a file is read as the songs of the library were"


def test_bad_files_are_named_once(music, model, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    write_music(folder / "short.wav", 0.1)
    write_music(folder / "high.wav", 1, rate=192_000)
    write_music(folder / "eight.flac", 1, channels=8)
    bad = write_broken_files(folder)
    if os.name == "posix":
        shutil.copy(folder / "short.wav", folder / "two\nlines.wav")
        shutil.copy(folder / "short.wav", os.fsencode(folder) + b"/caf\xe9.wav")
    report = scan(folder, tmp_path / "library", model, progress=False)
    assert sorted(Path(path).name for path, _ in report.failed) == sorted(bad)
    assert min(len(error) for _, error in report.failed) > 5
    names = {Path(path).name for path in Library(tmp_path / "library").songs["path"]}
    assert os.name != "posix" or {"two\nlines.wav", "caf\\xe9.wav"} <= names
    again = scan(folder, tmp_path / "library", progress=False)
    assert (again.planned, again.failed_before) == (0, 4), "what is broken is not tried again"
    write_music(folder / "empty.wav", 1, 9)
    mended = scan(folder, tmp_path / "library", model, progress=False)
    assert mended.read == 1 and Library(tmp_path / "library").songs.filter(pl.col("error").is_not_null()).height == 3


@POSIX
def test_a_name_that_is_not_utf8(music, model, tmp_path, capsys):
    "It is shown with escapes, found by its own name, played by a playlist, and its tags are written."
    pytest.importorskip("mutagen")
    folder, library = tmp_path / "music", str(tmp_path / "library")
    shutil.copytree(music / "album 1", folder)
    name = os.fsencode(folder) + b"/caf\xe9.flac"
    os.rename(next(folder.glob("*.flac")), name)
    scan(folder, library, model, progress=False)
    assert main(["playlist", os.fsdecode(name), "--library", library, "--out", f"{tmp_path}/a.m3u8"]) == 0
    lines = (tmp_path / "a.m3u8").read_bytes().splitlines()
    assert lines[2] == b"music/caf\xe9.flac" and len(lines) == 1 + 2 * 4
    assert main(["write-tags", "--library", library, "--threshold", "0", "--write"]) == 0
    assert {path.name for path in folder.iterdir()} == {os.fsdecode(os.path.basename(name))} | {
        Path(path).name for path in Library(library).songs["path"] if "caf" not in path
    }
    assert scan(folder, library, progress=False).unchanged == 4


def test_a_decoder_that_crashes(music, model, undisturbed, tmp_path, crash_on):
    "A process that dies of a signal costs the file that it reads, which is named once."
    folder = tmp_path / "music"
    shutil.copytree(music, folder)
    write_music(folder / "boom.ogg", 1, 99)
    crash_on("boom.ogg")
    report = scan(folder, tmp_path / "library", model, num_workers=2, progress=False)
    assert [Path(path).name for path, _ in report.failed] == ["boom.ogg"] and "crashed" in report.failed[0][1]
    assert Library(tmp_path / "library").contents() == undisturbed.contents()
    assert scan(folder, tmp_path / "library", progress=False).failed_before == 1


def test_a_folder_vanishes_and_a_disk_is_missing(music, model, undisturbed, tmp_path, monkeypatch, caplog):
    copy, out = tmp_path / "music", tmp_path / "library"
    shutil.copytree(music, copy)
    scan(copy, out, model, progress=False)
    scandir = os.scandir

    def vanished(path):
        if str(path).endswith("album 1"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return scandir(path)

    monkeypatch.setattr(collection.os, "scandir", vanished)
    report = scan(copy, out, prune=True, force=True, progress=False)
    assert report.failed[0][0].endswith("album 1") and report.pruned == report.gone == 0
    monkeypatch.undo()
    shutil.rmtree(copy / "album 1")
    report = scan(copy, out, prune=True, progress=False)
    assert (report.pruned, report.gone) == (0, 4), "a third of the library is more than a tenth"
    assert scan(copy, out, prune=True, force=True, progress=False).pruned == 4
    assert len(Library(out).contents()) == 8
    shutil.rmtree(copy)
    with pytest.raises(FileNotFoundError, match="is its disk connected"):
        scan(copy, out, prune=True, force=True)
    assert len(Library(out).songs) == 8


def test_a_full_disk(music, model, undisturbed, tmp_path, monkeypatch, capsys):
    "What was written before is kept, and the next scan goes on."
    append, calls = Library.append_vectors, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *arguments)

    monkeypatch.setattr(Library, "append_vectors", full)
    with pytest.raises(OSError, match="No space left"):
        scan(music, tmp_path, model, batch_size=1, flush_s=0, progress=False)
    monkeypatch.undo()
    assert 0 < len(Library(tmp_path).songs) < 12
    assert scan(music, tmp_path, model, progress=False).unchanged > 0
    assert_complete(Library(tmp_path), undisturbed)


SCAN_OFTEN = dict(batch_size=1, num_workers=1, flush_s=0, progress=False)
PROGRAM = f"""
import sys
from maestlib.collection.scan import scan
scan(sys.argv[1], sys.argv[2], sys.argv[1] + "/m.safetensors", **{SCAN_OFTEN})
"""


def test_goes_on_after_sigkill(music, undisturbed, tmp_path):
    "Killed once a chunk is there; the next scan takes over the claim at once."
    program, out = tmp_path / "program.py", tmp_path / "library"
    program.write_text(PROGRAM)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    kill_when(start_python([program, music, out], PROJECT, env), lambda: list(out.rglob("*.parquet")))
    scan(music, out, str(music / "m.safetensors"), progress=False)
    assert_complete(Library(out), undisturbed)
    assert not list(out.glob("*claim*"))


def test_every_state_that_a_kill_can_leave(music, model, undisturbed, tmp_path):
    "A scan that is stopped before any of its renames and deletions is finished by the next one."
    folder, states = music / "album 0", 0
    expected = dict(zip(undisturbed.vectors()[0]["path"], undisturbed.vectors()[1], strict=True))
    for out in every_kill(lambda out: scan(folder, out, model, **SCAN_OFTEN), tmp_path):
        if (out / "library.json").exists():
            assert set(Library(out).songs["content"]) <= Library(out).contents(), "vectors come before their songs"
        scan(folder, out, model, progress=False)
        songs, vectors = Library(out).vectors()
        assert len(songs) == 4 and Library(out).contents() == set(songs["content"])
        assert np.allclose(vectors, [expected[path] for path in songs["path"]], atol=2e-3)
        states += 1
    assert states > 4


def test_two_scans_at_once(music, model, undisturbed, tmp_path, capsys):
    scan(music / "album 0", tmp_path, model, progress=False)
    with Library(tmp_path).writing():
        assert main(["scan", str(music), "--out", str(tmp_path)]) == 2
    assert "another scan" in capsys.readouterr().err
    scan(music, tmp_path, model, progress=False)
    assert_complete(Library(tmp_path), undisturbed)


def test_command_line(music, tmp_path, capsys, monkeypatch):
    library = str(tmp_path / "library")
    command = ["scan", "--out", library, "--model", str(music / "m.safetensors"), "--excerpt", "2", "--json", "--quiet"]
    (tmp_path / "text.mp3").write_text("no music")
    listed = b"\0".join(os.fsencode(path) for path in (music, tmp_path / "text.mp3"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert main([*command, "--files-from", "-", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["planned"] == 13 and not Path(library).exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert main([*command, "--files-from", "-"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["read"], len(report["failed"])) == (12, 1) and "text.mp3" in printed.err
    assert main([*command, str(music)]) == 0 and json.loads(capsys.readouterr().out)["unchanged"] == 12
    assert main(["scan", str(music), "--out", library, "--excerpt", "3"]) == 2
    assert "excerpt_s=2" in capsys.readouterr().err
    assert main(["scan", str(tmp_path / "nowhere"), "--out", library]) == 2
    assert main(["search", "00", "--library", library, "-k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    assert main(["search", "--tags", "jaz", "--library", library]) == 2
    assert "did you mean jazz" in capsys.readouterr().err
    assert main(["playlist", "00", "--to", "05", "-k", "4", "--library", library, "--out", f"{tmp_path}/a.m3u8"]) == 0
    lines = [line for line in (tmp_path / "a.m3u8").read_text(encoding="utf8").splitlines() if line[0] != "#"]
    assert all((tmp_path / line).samefile(tmp_path / line) and not Path(line).is_absolute() for line in lines)
    assert "00" in lines[0] and "05" in lines[-1]
    monkeypatch.setattr("maestlib.collection.scan.list_audio", lambda paths: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*command, str(music)]) == 130
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and "maestlib" in capsys.readouterr().out


def clustered(n, dim, seed):
    "Vectors with a common component and a falling spectrum, as embeddings have."
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, 33) ** -0.7
    vectors = rng.normal(size=(n, 32)) * spectrum @ rng.normal(size=(32, dim)) + 5 + 0.05 * rng.normal(size=(n, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def test_search_in_float16_is_exact():
    vectors = clustered(20_000, 96, 0)
    index = VectorIndex(vectors.copy())
    full = index.vectors.numpy().astype(np.float64)
    for row in range(0, 20_000, 2_000):
        expected = np.sort(full @ full[row])[::-1][:10]
        rows, cosines = index.top(index[row], 10)
        assert np.allclose(full[rows] @ full[row], expected, atol=1e-6) and np.allclose(cosines, expected, atol=1e-5)


def test_a_song_from_outside_and_its_copy(music, undisturbed, tmp_path, monkeypatch, model):
    monkeypatch.setattr("maestlib.collection.scan.load_library_model", lambda library: model)
    index = SongIndex(undisturbed)
    inside = index.find("album 0/03")
    wave, rate = soundfile.read(index.songs["path"][inside])
    soundfile.write(tmp_path / "copy.flac", wave, rate)
    assert index.find(tmp_path / "copy.flac") is None
    assert index.vector(tmp_path / "copy.flac") @ index.vectors[inside] > 0.99
    assert index.nearest([index.songs["path"][inside]], k=50).height < 12, "not itself"


def test_a_file_is_read_like_the_excerpts_of_a_library(model, tmp_path, monkeypatch):
    "From the beginning, where the library's excerpts are from there; the map did read its middle."
    wave = np.concatenate([recording(6), np.sin(np.arange(6 * 16_000) * 0.2) * 0.3, recording(6, 1)])
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.roll(wave, i * 48_000, 0), 16_000)
    settings = dict(excerpt_s=5, center=False)
    scan([tmp_path / "0.wav", tmp_path / "1.wav"], tmp_path / "library", model, progress=False, **settings)
    monkeypatch.setattr("maestlib.collection.scan.load_library_model", lambda library: model)
    spaces = SongSpaces(tmp_path / "library")
    ((title, vector),) = spaces.read(tmp_path / "0.wav")[0].items()
    assert vector @ spaces.vectors(title)[0] > 0.99


def test_a_library_of_a_few_windows(model, tmp_path):
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", recording(30, i), 16_000)
    options = dict(model=model, progress=False)
    report = scan(tmp_path, tmp_path / "library", preset="balanced", **options)
    settings = Library(tmp_path / "library").settings
    assert report.read == 2 and (settings.windows, settings.keep_every) == (3, SPEED_PRESETS["balanced"]["keep_every"])
    assert np.isclose(report.audio_s, 2 * 3 * 5, atol=0.1), "three windows of five seconds"
    assert scan(tmp_path, tmp_path / "library", preset="balanced", **options).unchanged == 2
    for other in (dict(preset="full"), dict(windows=2), dict(preset="balanced", keep_every=7)):
        with pytest.raises(ValueError, match="windows|keep_every"):
            scan(tmp_path, tmp_path / "library", **other, **options)
    excerpts = scan(tmp_path, tmp_path / "excerpts", preset="fast", excerpt_s=10, **options)
    assert np.isclose(excerpts.audio_s, 20, atol=0.1), "the excerpt replaces the windows of the preset"
    with pytest.raises(ValueError, match="give one of them"):
        scan(tmp_path, tmp_path / "both", windows=3, excerpt_s=10, **options)


def test_tags_of_a_calibrated_library(undisturbed):
    index = SongIndex(undisturbed)
    activations = dict(zip(index.songs["path"], undisturbed.activations()[1], strict=True))
    table = index.nearest(tags="jazz & !surf", k=50)
    expected = {path for path, a in activations.items() if max(a[0], a[1]) >= 0.5 > a[2]}
    assert set(table["path"]) <= expected and (table["degree"] >= 0.5).all()


@pytest.mark.parametrize("version", [3, 4])
def test_tags_of_both_versions_are_written_and_undone(version, music, model, tmp_path, monkeypatch):
    mutagen = pytest.importorskip("mutagen")
    from mutagen.id3 import ID3, TDRC, TIT2, TPE1, TYER

    path = tmp_path / "music/song.mp3"
    path.parent.mkdir()
    shutil.copy(next(music.rglob("*.mp3")), path)
    tags = ID3()
    tags.add(TIT2(3, "Süd"))
    tags.add(TPE1(3, ["A", "B"]))
    tags.add(TYER(3, "1999") if version == 3 else TDRC(3, "1999"))
    tags.save(path, v2_version=version, v23_sep=None)
    before, content = ID3(path, translate=False), read_identity(path).content
    scan(path.parent, tmp_path / "library", model, progress=False)
    options = dict(threshold=0.0, dry_run=False)

    written, errors = write_tags.write_tags(tmp_path / "library", **options)
    assert not errors and set(written["field"]) == {"genre", "mood"}
    after = ID3(path, translate=False)
    assert after.version == (2, version, 0) and read_identity(path).content == content
    moods = {"TMOO", "TXXX:MOOD"} if version == 4 else {"TXXX:MOOD"}
    assert set(after) == {*before, "TCON"} | moods and after["TPE1"] == before["TPE1"]
    assert write_tags.write_tags(tmp_path / "library", **options)[0].is_empty()
    assert write_tags.write_tags(tmp_path / "library", replace=True, **options)[0].is_empty()
    assert scan(path.parent, tmp_path / "library", progress=False).unchanged == 1
    assert write_tags.undo_tags(tmp_path / "library") == (1, {})
    assert dict(ID3(path, translate=False)) == dict(before) and mutagen.File(path).info.length > 0
    with pytest.raises(ValueError, match="nothing to undo"):
        write_tags.undo_tags(tmp_path / "library")


def test_tags_that_would_change_the_sound_are_not_written(music, model, tmp_path, monkeypatch):
    pytest.importorskip("mutagen")
    shutil.copytree(music / "album 1", tmp_path / "music")
    scan(tmp_path / "music", tmp_path / "library", model, progress=False)
    files = {path: path.read_bytes() for path in (tmp_path / "music").iterdir()}
    set_fields = write_tags.set_fields

    def damage(file, fields):
        set_fields(file, fields)
        data = bytearray(Path(file.filename).read_bytes())
        data[-200] ^= 255
        Path(file.filename).write_bytes(data)

    monkeypatch.setattr(write_tags, "set_fields", damage)
    assert main(["write-tags", "--library", str(tmp_path / "library"), "--threshold", "0", "--write"]) == 1
    assert {path: path.read_bytes() for path in (tmp_path / "music").iterdir()} == files


@POSIX
def test_links_to_folders_are_followed_once(music, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(music)
    (tmp_path / "c").symlink_to(music)
    files = list_audio([tmp_path]).files
    assert len(files) == 12 and files["path"].str.contains("/b/").all()


def test_names_that_start_with_a_dot_are_hidden_if_a_letter_follows(music, tmp_path):
    shown = [
        "...And Justice for All/01.wav",
        "...Baby One More Time.wav",
        ".38 Special/x.wav",
        ".5 The Gray Chapter.wav",
    ]
    for name in (*shown, "._01.wav", ".Trash/x.wav", "@eaDir/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    files = list_audio([tmp_path]).files["path"]
    assert [str(Path(path).relative_to(tmp_path)) for path in files if "/music/" not in path] == sorted(shown)


@POSIX
def test_names_are_found_in_either_form_and_whatever_their_bytes(music, model, tmp_path):
    "Unicode composes é, or a Mac decomposes it; a title may be longer than a file name; names may be no UTF-8."
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(music, folder)
    song = next(folder.rglob("*.wav"), None) or next(p for p in folder.rglob("*") if p.is_file())
    (folder / unicodedata.normalize("NFD", f"Café{song.suffix}")).write_bytes(song.read_bytes()[:-2])
    (folder / f"~love{song.suffix}").write_bytes(song.read_bytes()[:-4])
    scan(folder, tmp_path / "library", model, progress=False)
    index = SongIndex(tmp_path / "library")
    assert index.find("café") == index.find(unicodedata.normalize("NFD", "Café")) is not None
    assert index.find("~love") is not None
    with pytest.raises(ValueError, match="no such song"):
        index.find("x" * 300)
    colors = SongColors(SongSpaces(Library(tmp_path / "library"))).values("folder")[0]
    assert "caf" not in colors and any("xe9" in color for color in colors), "its folder, as it is printed"
    (folder / f"~love{song.suffix}").unlink()
    report = scan(folder, tmp_path / "library", prune=True, force=True, progress=False)
    assert report.pruned == 1


def test_the_module_runs_as_a_program(tmp_path):
    program = ["maestlib.collection.cli", "search", "x", "--library", tmp_path / "none"]
    child = start_python(program, PROJECT, os.environ | {"PYTHONPATH": str(PROJECT)})
    printed, errors = child.communicate()
    assert child.returncode == 2 and "no library" in errors and not printed


def test_another_rate_or_number_of_channels_is_another_sound(tmp_path):
    "The samples alone do not tell how they sound."
    wave = 0.1 * np.random.default_rng(0).normal(size=32_000)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    before = read_identity(tmp_path / "a.wav").content
    for rate, samples in ((8_000, wave), (16_000, wave.reshape(-1, 2))):
        soundfile.write(tmp_path / "a.wav", samples, rate)
        assert read_identity(tmp_path / "a.wav").content != before


def test_a_refused_scan_leaves_no_settings(music, model, tmp_path):
    for wrong, name in (
        ({"hop_s": 0.001}, "hop_s"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": 0}, "num_workers"),
        ({"device": "toaster"}, "device"),
    ):
        with pytest.raises(ValueError, match=f"{name}="):
            scan(music, tmp_path / "library", model, progress=False, **wrong)
    assert not (tmp_path / "library/library.json").exists()
