"""A job never stops: files that are none, vanish or crash a decoder; interrupts; generators left unfinished."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from helpers import PROJECT, TIMEOUT_S, audio_folder, one_thread, recording, tiny_model, write_music  # noqa: F401
from processes import start_python

import maestlib as ml
from maestlib.audio.extract import extract_mels
from maestlib.audio.isolated import DecoderProcesses
from maestlib.collection import scan as scan_module
from maestlib.collection.cli import build_parser, main
from maestlib.collection.expressions import rank_by_tags
from maestlib.collection.files import hash_file, parse_path_list, read_identity
from maestlib.collection.library import Library
from maestlib.collection.playlist import write_playlist
from maestlib.collection.scan import scan
from maestlib.collection.search import SongIndex, nearest
from maestlib.inference.embedding import count_vectors
from maestlib.models.checkpoint import BUNDLED_MODEL, load_model, save_checkpoint

POSIX = pytest.mark.skipif(os.name != "posix", reason="such files, names and signals exist on POSIX")
TOKENS = "cdtrs"


@pytest.fixture(scope="module")
def model():
    model = tiny_model(["Jazz---Bop", "Mood---Calm", "Tempo---Fast"])
    model.thresholds = (0.5, 0.5, 0.5)
    return model


@pytest.fixture
def music(tmp_path):
    "Three good files."
    return audio_folder(tmp_path / "music", 3)


def failed_names(report):
    return sorted(Path(path).name for path, _ in report.failed)


@POSIX
def test_only_files_are_opened(music, model, tmp_path):
    "A pipe that nobody writes to would be read for ever, and so would a device."
    (music / "folder.wav").mkdir()
    write_music(music / "folder.wav/inside.wav", 1, 7)
    os.mkfifo(music / "pipe.mp3")
    os.mkfifo(music / "folder.wav/pipe.ogg")
    (music / "device.wav").symlink_to("/dev/zero")
    (music / "circle.flac").symlink_to(music / "circle.flac")
    (music / "broken.wav").symlink_to(music / "nowhere.wav")
    (music / "up.wav").symlink_to(music)
    bad = ["broken.wav", "circle.flac", "device.wav", "pipe.mp3", "pipe.ogg"]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # the path of a socket is short
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(music / "socket.wav"))
            bad.append("socket.wav")
        report = scan(music, tmp_path / "library", model, progress=False)
        again = scan([music, music / "pipe.mp3"], tmp_path / "library", progress=False)
        table = ml.embed(music, model, average=True)
    assert report.read == 4 and failed_names(report) == sorted(bad)
    assert (again.unchanged, again.planned) == (4, 0) and failed_names(again) == sorted(bad)
    assert table["path"].n_unique() == 4
    with pytest.raises(ValueError, match="pipe.mp3"):
        ml.tag(music / "pipe.mp3", model)


def test_folders_with_brackets_are_read(music, model, tmp_path):
    "Albums are often called so; to polars and to a shell, brackets are a pattern."
    live = music.rename(tmp_path / "Live [2020]")
    (live / ".e [1].parquet.parts.0.tmp").mkdir()  # of a worker that was killed
    for out in ("e [1].parquet", "e [1]"):
        for _ in range(2):  # anew, and resumed
            table = ml.embed(live, model, average=True, out=live / out).collect()
        assert len(table) == 3 and nearest(table.head(1), live / out)["cosine"][0] > 0.999
    assert not [*live.glob(".*")]
    assert scan(live, live / "library", model, progress=False).read == 3
    assert scan(live, live / "library", progress=False).unchanged == 3
    library = Library(live / "library")
    assert len(nearest(library.songs["path"][:1].to_list(), library, k=2)) == 2
    table = pl.DataFrame({"track_id": ["a"], "path": library.songs["path"][:1]})
    assert extract_mels(table, live / "mels", num_workers=0).is_empty()
    assert extract_mels(table, live / "mels", num_workers=0).is_empty()
    assert ml.verify_store(live / "mels").is_empty() and len(ml.MelStore(live / "mels").tracks) == 1
    table.with_columns(labels=pl.lit("x")).write_csv(live / "tags.csv")
    assert len(ml.load_dataset(live)) == 1


def test_files_vanish_during_a_scan(music, model, tmp_path, monkeypatch):
    "They are reported, not remembered, and read when they are back."
    list_audio, gone = scan_module.list_audio, music / "album 1/01.flac"

    def list_and_remove(paths):
        listing = list_audio(paths)
        gone.rename(tmp_path / "elsewhere")
        return listing

    monkeypatch.setattr(scan_module, "list_audio", list_and_remove)
    report = scan(music, tmp_path / "library", model, progress=False)
    monkeypatch.undo()
    assert report.read == 2 and failed_names(report) == ["01.flac"]
    (tmp_path / "elsewhere").rename(gone)
    assert scan(music, tmp_path / "library", model, progress=False).read == 1


@POSIX
def test_broken_files_with_names_that_are_not_utf8(music, model, tmp_path):
    for name in (b"/caf\xe9.wav", b"/caf\xe9.flac"):
        Path(os.fsdecode(os.fsencode(music) + name)).write_text("no music")
    shutil.copy(music / "album 0/00.wav", os.fsencode(music) + b"/good\xe9.wav")
    report = scan(music, tmp_path / "library", model, progress=False)
    assert failed_names(report) == [r"caf\xe9.flac", r"caf\xe9.wav"] and report.read + report.recognized == 4
    assert scan(music, tmp_path / "library", model, progress=False).failed_before == 2
    for out in (None, tmp_path / "out.parquet", tmp_path / "out.parquet"):
        table = ml.embed(music, model, average=True, out=out)
        assert rf"{music}/good\xe9.wav" in table.lazy().collect()["path"]
    assert pl.read_parquet(tmp_path / "out.report.parquet")["path"].to_list() == [
        rf"{music}/caf\xe9.flac",
        rf"{music}/caf\xe9.wav",
    ]


def test_no_file_is_opened_in_the_main_process(music, model, tmp_path, monkeypatch):
    "Not by the plan, the timing of a dry run, `embed` and `tag`, a search for a file outside, or an extraction."
    save_checkpoint(model, tmp_path / "m.safetensors")
    shutil.copy(music / "album 0/00.wav", tmp_path / "outside.wav")

    def crash(*_, **__):
        raise SystemError("a decoder in the main process")

    monkeypatch.setattr(soundfile, "SoundFile", crash)
    monkeypatch.setattr(av, "open", crash)
    for dry_run in (True, False):
        report = scan(music, tmp_path / "library", tmp_path / "m.safetensors", dry_run=dry_run, progress=False)
        assert report.planned == 3 and not report.failed
    assert ml.embed(music, model, average=True).height == 3
    assert ml.tag(tmp_path / "outside.wav", model).height == 3
    assert nearest(tmp_path / "outside.wav", tmp_path / "library", k=1).height == 1
    table = pl.DataFrame({"track_id": [1], "path": [str(tmp_path / "outside.wav")]})
    options = dict(seconds=None, num_workers=0, load=lambda path, **_: torch.zeros(9999))
    assert extract_mels(table, tmp_path / "store", **options).is_empty(), "its space was estimated"


def test_a_decoder_that_crashes_at_the_header(music, model, tmp_path, crash_on):
    "As the first of all, so that the plan reads it; alone, it is an error that names it."
    path = write_music(music / "album 0/0.ogg", 1)
    crash_on("0.ogg")
    assert failed_names(scan(music, tmp_path / "library", model, dry_run=True, progress=False)) == []
    report = scan(music, tmp_path / "library", model, progress=False)
    assert report.read == 3 and failed_names(report) == ["0.ogg"]
    assert ml.embed(music, model, average=True).height == 3
    for function in (ml.embed, ml.tag):
        with pytest.raises(ValueError, match="0.ogg: decoding it crashed"):
            function(path, model)
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert main(["tag", path, "--model", str(tmp_path / "m.safetensors")]) == 2


@pytest.mark.parametrize("data", [b"\xff\xfea\0\n", b"\xfe\xff\0a\0"], ids=repr)
def test_a_list_of_paths_that_was_cut_is_named(data):
    with pytest.raises(ValueError, match="list.txt: its UTF-16 is not valid"):
        parse_path_list(data, "list.txt")


@pytest.mark.parametrize("flush_s", [-1, float("nan"), "60", None])
def test_a_time_that_is_none_is_named(flush_s, music, model, tmp_path):
    with pytest.raises(ValueError, match="flush_s="):
        scan(music, tmp_path / "library", model, flush_s=flush_s)


@pytest.mark.parametrize("suffix", ["wav", "ogg", "flac"])
def test_two_joined_files_are_not_the_first_of_them(suffix, tmp_path):
    "Nor those joined with another: a scan would take one recording for the other."
    parts = [Path(write_music(tmp_path / f"{i}.{suffix}", 1, i)).read_bytes() for i in range(3)]
    contents = []
    for i, data in enumerate((parts[0], parts[0] + parts[1], parts[0] + parts[2])):
        (tmp_path / f"joined{i}.{suffix}").write_bytes(data)
        contents.append(read_identity(tmp_path / f"joined{i}.{suffix}").content)
    assert len(set(contents)) == 3


@POSIX
def test_a_huge_file_without_sound_is_hashed_at_once(tmp_path):
    with open(tmp_path / "disk.wav", "wb") as file:
        try:
            file.truncate(1 << 42)
        except OSError:
            pytest.skip("this file system has no sparse files of 4 TB")
    before = hash_file(tmp_path / "disk.wav")
    with open(tmp_path / "disk.wav", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert hash_file(tmp_path / "disk.wav") != before


@POSIX
def test_an_answer_that_was_not_awaited_is_not_that_of_the_next_call():
    "An interrupt in a notebook, and the next cell."
    decoders = DecoderProcesses()
    assert decoders.call(abs, -1) == 1

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            decoders.call(time.sleep, TIMEOUT_S)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert decoders.call(divmod, 7, 2) == (3, 1)
    decoders.close()


UNFINISHED = {
    "a map": """
        import time
        from maestlib.audio.isolated import imap_isolated
        left = imap_isolated(time.sleep, [0, 10_000, 10_000, 10_000], 2)
    """,
    "a mel": """
        from maestlib.audio.isolated import decoder_processes
        from maestlib.audio.mel import MelConfig
        from maestlib.inference.windows import stream_mel
        left = stream_mel(path, MelConfig(), part_s=2, opener=decoder_processes().open_audio)
    """,
    "windows": """
        import maestlib as ml
        from maestlib.inference.windows import iter_results
        model = ml.load_model("random", size="tiny", labels=["a"], seconds=5)
        left = iter_results([[path] * 50], model, lambda mels: mels.numpy(), None, 2, 4)
    """,
}


@pytest.mark.parametrize("what", UNFINISHED)
def test_a_program_ends_although_a_generator_is_unfinished(what, tmp_path):
    path = write_music(tmp_path / "a.wav", 30)
    lines = [line.strip() for line in f"path = {path!r}\n{UNFINISHED[what]}".splitlines()]
    (tmp_path / "program.py").write_text("\n".join([*lines, "next(left)", "print('its end')"]))
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(tmp_path / "program.py")]
    ended = subprocess.run(program, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (ended.returncode, ended.stdout) == (0, "its end\n") and "Error" not in ended.stderr, ended.stderr


SCAN = """
import sys
from maestlib.collection.scan import scan
scan(sys.argv[1], sys.argv[2], sys.argv[3], batch_size=1, num_workers=2, flush_s=0, progress=False)
"""


@POSIX
@pytest.mark.slow
def test_ctrl_c_wherever_it_strikes(model, tmp_path):
    "It ends the program, no song is recorded as damaged, and the next scan reads what is missing."
    save_checkpoint(model, tmp_path / "m.safetensors")
    for i in range(20):
        write_music(tmp_path / f"music/{i}.wav", 60, i)
    (tmp_path / "program.py").write_text(SCAN)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    codes = []
    for place in range(20):
        program = [tmp_path / "program.py", tmp_path / "music", tmp_path / f"{place}", tmp_path / "m.safetensors"]
        process = start_python(program, PROJECT, env)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.4 + 0.15 * place)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        codes.append(process.wait(TIMEOUT_S))
        if (tmp_path / f"{place}/library.json").exists():
            assert Library(tmp_path / f"{place}").songs["error"].is_null().all()
    assert all(codes), codes
    report = scan(tmp_path / "music", tmp_path / "19", model, progress=False)
    assert report.read + report.unchanged == 20 and not report.failed


@pytest.mark.parametrize("tokens", [*TOKENS, TOKENS, "ct", "rs", "", "tc", "x", None, 3, ["c"]])
def test_a_scan_of_any_tokens(tokens, music, model, tmp_path):
    "A library that can be searched, or an error that names them."
    is_valid = isinstance(tokens, str) and tokens and [t for t in TOKENS if t in tokens] == [*tokens]
    if not is_valid:
        with pytest.raises((ValueError, TypeError), match="tokens"):
            scan(music, tmp_path / "library", model, tokens=tokens, progress=False)
        return
    scan(music, tmp_path / "library", model, tokens=tokens, progress=False)
    library = Library(tmp_path / "library")
    songs, vectors = library.vectors()
    assert vectors.shape == (3, count_vectors(model, tokens) * model.config.embed_dim)
    assert np.allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-2)
    assert nearest(songs["path"][0], library, k=2).height == 2


def test_vectors_that_float16_cannot_hold(music, tmp_path):
    "Sums of many layers, and deviations of rows, may be large: they are kept at unit length."
    model = tiny_model(["a", "b"])
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.weight.mul_(1e7)
    scan(music, tmp_path / "library", model, tokens="cdtrs", block=model.config.depth - 1, progress=False)
    assert np.isfinite(Library(tmp_path / "library").vectors()[1]).all()


@pytest.fixture(scope="module")
def embedded(model, tmp_path_factory):
    "Files, their table, and their library."
    root = tmp_path_factory.mktemp("embedded")
    audio_folder(root / "music", 4)
    scan(root / "music", root / "library", model, progress=False)
    table = ml.embed(root / "music", model, average=True, out=root / "out.parquet").collect()
    return root, table


def test_nearest_rows_of_a_path(embedded, monkeypatch):
    root, table = embedded
    path = table["path"][1]
    for embeddings in (table, table.lazy(), root / "out.parquet", str(root / "out.parquet")):
        for query in (path, Path(path), table[1], table[1].lazy(), table["embedding"][1].to_list()):
            assert nearest(query, embeddings, k=1)["path"].to_list() == [path]
    monkeypatch.chdir(root)
    assert nearest(os.path.relpath(path), table, k=1)["path"].to_list() == [path]


def test_nearest_songs_of_a_library(embedded):
    root, table = embedded
    index = SongIndex(root / "library")
    expected = index.nearest([table["path"][1]], 2)
    for query in (table["path"][1], Path(table["path"][1]), [table["path"][1]], table["path"][1:2]):
        for library in (root / "library", str(root / "library"), Library(root / "library"), index):
            assert nearest(query, library, 2).equals(expected)


QUERIES = [5, print, None, np.ones(7), np.full(144, np.nan), "nowhere.wav", ["nowhere.wav"], [], [["a"]], {"a": 1}]


@pytest.mark.parametrize("query", QUERIES, ids=repr)
def test_a_query_that_is_none_is_named(query, embedded):
    root, table = embedded
    for embeddings in (table, root / "library"):
        with pytest.raises((ValueError, TypeError), match="query|songs|nowhere") as error:
            nearest(query, embeddings)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "embeddings", [5, "none.parquet", np.ones((3, 4)), pl.DataFrame({"path": ["a"]}), Path(__file__)]
)
def test_a_table_that_is_none_is_named(embeddings, embedded):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match="embeddings|none.parquet|table") as error:
        nearest(embedded[1][0], embeddings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", None, np.nan])
def test_a_number_of_neighbors_that_is_none_is_named(k, embedded):
    root, table = embedded
    for embeddings in (table, root / "library"):
        with pytest.raises(ValueError, match="k="):
            nearest(table["path"][0], embeddings, k=k)


@POSIX
def test_players_find_the_songs_of_a_playlist(tmp_path, caplog):
    "A player strips blanks and skips lines that begin with #."
    names = [
        "#1 hit.wav",
        "#EXTM3U.wav",
        "#",
        " blank.wav",
        "\tb.wav",
        "~a.wav",
        "http:a.wav",
        "two\nlines.wav",
        "c.wav",
    ]
    paths = [tmp_path / "#list" / name for name in names] + [tmp_path / name for name in names]
    for path in paths:
        write_music(path.with_suffix(".wav") if not path.suffix else path, 0.1)
    paths = [str(path.with_suffix(".wav") if not path.suffix else path) for path in paths]
    nothing = pl.Series([None] * len(paths), dtype=pl.String)
    songs = pl.DataFrame({"path": paths, "artist": nothing, "title": nothing, "duration_s": nothing.cast(pl.Float64)})
    write_playlist(songs, tmp_path / "a.m3u8")
    lines = [line.strip() for line in (tmp_path / "a.m3u8").read_text(encoding="utf8").split("\n")]
    played = [tmp_path / line for line in lines if line and not line.startswith("#")]
    assert [str(path) for path in played] == [str(Path(path)) for path in paths if "\n" not in path]
    assert not any(":" in line.split("/")[0] for line in lines if not line.startswith("#"))


def test_a_search_without_a_result(embedded, capsys):
    command = ["search", "--library", str(embedded[0] / "library"), "--tags"]
    assert main([*command, "calm & !calm"]) == 1
    printed = capsys.readouterr()
    assert not printed.out and "no song fits" in printed.err and "Jazz: Bop" in printed.err
    assert main([*command, "violin"]) == 2 and "Jazz, Mood, Tempo" in capsys.readouterr().err


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder in which the examples of the help and of the README run."
    home = tmp_path_factory.mktemp("home")
    audio_folder(home / "Music", 9)
    for i, name in enumerate(("song", "other", "a", "b", "c")):
        write_music(home / f"Music/{name}.mp3", 3, 20 + i)
        shutil.copy(home / f"Music/{name}.mp3", home)
    (home / "music").symlink_to(home / "Music", target_is_directory=True)
    return home


def examples():
    "The commands in the help and the README, and the tags that options name as examples, without comments."
    text = build_parser().format_help() + (PROJECT / "README.md").read_text(encoding="utf8")
    lines = [line.strip() for line in text.splitlines()]
    needs_runs = "maestlib compare"
    return [line for line in lines if line.startswith("maestlib ") and not line.startswith(needs_runs)]


@pytest.mark.slow
@POSIX
def test_the_examples_of_the_help_and_the_readme_run(home, monkeypatch, capsys):
    pytest.importorskip("mutagen")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    commands = [shlex.split(line.split("   ")[0]) for line in examples()]
    assert len(commands) > 12
    commands.sort(key=lambda command: command[1] != "scan")
    for command in commands:
        code = main([os.path.expanduser(argument) for argument in command[1:]])
        printed = capsys.readouterr()
        ended = any(message in printed.err for message in ("no song fits", "maps none of the labels"))
        assert code == 0 or ended, (command, printed.err)


def test_the_labels_of_examples_are_those_of_the_bundled_model(capsys):
    for command in ("search", "playlist"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    text = capsys.readouterr().out + "\n".join(examples()) + nearest.__doc__
    expressions = set(re.findall(r'"([^"]*[&|][^"]*)"', " ".join(text.split())))
    labels = load_model(BUNDLED_MODEL).config.labels
    assert len(expressions) >= 2
    for expression in expressions:
        assert rank_by_tags(expression, np.zeros((1, len(labels))), labels).shape == (1,)
