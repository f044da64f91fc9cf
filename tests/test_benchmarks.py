"""Published split files: rows of the originals against a second reader, broken files, and the whole originals."""

import gzip
import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from maestlib.core.files import asset_path
from maestlib.datasets import benchmarks, protocol, registry
from maestlib.datasets.table import SPLITS, label_vocabulary, multi_hot

FULL = Path(os.environ.get("MAESTLIB_DATA", "/nonexistent"), "splits")
EXCERPTS = asset_path("benchmarks")
OPTIONS = {"mtt tagged": {"clips": "tagged"}, "msd": {"incomplete": True}, "msd-cals": {"incomplete": True}}
FOLDERS = {"mtg": "mtg_jamendo", "mtt": "mtt", "msd": "msd"}
NAMES = [*protocol.PAPER_COUNTS, "mtt tagged"]


def load(name, top=EXCERPTS, **options):
    name, options = name.split()[0], OPTIONS.get(name, {}) | options
    return registry.load_dataset(name, splits=top / FOLDERS[name[:3]], **options)


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(EXCERPTS, tmp_path / "copy"))


# Rows of the original files, read a second time by plain Python

TOPS = [pytest.param(EXCERPTS, id="excerpts")]
TOPS.append(pytest.param(FULL, id="full", marks=pytest.mark.skipif(not FULL.is_dir(), reason="no MAESTLIB_DATA")))


def read(path):
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return text.decode().splitlines()


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("task, file_task", benchmarks.MTG_TASKS.items())
def test_mtg_equals_the_files(task, file_task, top):
    table = load(f"mtg-{task}", top)
    rows = [(line.split("\t"), split) for split in SPLITS
            for line in read(top / f"mtg_jamendo/autotagging_{file_task}-{split}.tsv")[1:]]  # fmt: skip
    assert table["track_id"].to_list() == [f[0] for f, _ in rows]
    assert table["artist"].to_list() == [f[1] for f, _ in rows] and table["path"].to_list() == [f[3] for f, _ in rows]
    assert table["labels"].to_list() == [f[5:] for f, _ in rows] and table["split"].to_list() == [s for _, s in rows]
    assert table["duration_s"].to_list() == [float(f[4]) for f, _ in rows]


@pytest.mark.parametrize("top", TOPS)
def test_mtt_equals_the_file(top):
    rows = [line.split("\t") for line in read(top / "mtt/groundtruth_12-1-3.tsv")[1:]]
    table = load("mtt", top)
    assert table.select("split", "path").rows() == [tuple(r[:2]) for r in rows]
    assert table["labels"].to_list() == [r[2].split(",") if r[2] else [] for r in rows]
    assert load("mtt tagged", top)["path"].to_list() == [r[1] for r in rows if r[2]]


@pytest.mark.parametrize("top", TOPS)
def test_msd_equals_the_files(top):
    table, tags = load("msd", top), read(top / "msd/tags.txt")
    for split, short in (("train", "train"), ("validation", "valid"), ("test", "test")):
        part, ids = table.filter(pl.col("split") == split), read(top / f"msd/usual_{short}.txt")
        assert part["track_id"].to_list() == ids
        if split == "train":
            assert part["labels"].null_count() == len(ids)
        else:
            y = np.load(top / f"msd/usual_{short}_y.npy")
            assert (multi_hot(part, tags) == y).all()
    assert table["path"][0] == "A/A/A/TRAAAAK128F9318786.mp3"
    cals = load("msd-cals", top)
    ids = [i for s in ("valid", "test") for i in np.load(top / f"msd/cals_{s}_ids.npy").tolist()]
    assert cals["track_id"].to_list() == ids and set(cals["split"]) == {"validation", "test"}


# Original files


@pytest.mark.skipif(not FULL.is_dir(), reason="MAESTLIB_DATA names no folder of the original split files")
@pytest.mark.parametrize("name, row", zip(NAMES, range(len(NAMES)), strict=True))
def test_original_files_have_the_published_counts(name, row, capsys):
    counts = {
        "mtg-genre": (32572, 11043, 11479, 87),
        "mtg-instrument": (14395, 5466, 5115, 40),
        "mtg-mood": (9949, 3802, 4231, 56),
        "mtg-top50": (32136, 10888, 11356, 50),
        "mtt": (18706, 1825, 5329, 50),
        "mtt tagged": (15247, 1529, 4332, 50),
        "msd": (201680, 12634, 28540, 50),
        "msd-cals": (0, 34730, 34913, 0),
    }[name]
    table = load(name, FULL)
    message = capsys.readouterr().out
    [line] = protocol.report_protocol(table, name.split()[0]).to_dicts()
    assert (*(line[s] for s in SPLITS), line["labels"]) == counts
    shipped = protocol.published_protocols().filter(pl.col("fingerprint") == line["fingerprint"])
    assert shipped.to_dicts() == [line]
    assert line["variant"] in message and f"paper: {protocol.PAPER_COUNTS[name.split()[0]][0]:,}" in message


# Protocols


def test_an_excerpt_is_not_a_published_list(capsys):
    table = load("mtg-genre")
    assert "no published list" in capsys.readouterr().out
    complete, shorter = (protocol.report_protocol(t, "mtg-genre") for t in (table, table[1:]))
    assert complete["fingerprint"].item() != shorter["fingerprint"].item()
    assert protocol.report_protocol(table.reverse(), "mtg-genre").equals(complete)


def test_artists_in_two_splits_are_counted():
    table = load("mtg-genre")
    leak = table.with_columns(artist=pl.when(pl.int_range(pl.len()).is_in([0, 11])).then(
        pl.lit("both")).otherwise("artist"))  # fmt: skip
    counts = [protocol.report_protocol(t, "x")["artists_in_two_splits"].item() for t in (table, leak, load("msd"))]
    assert counts == [0, 1, None]


def test_benchmarks_and_the_demo_corpus_are_registered():
    assert set(registry.DATASETS) == {*registry.RENDERED, *protocol.PAPER_COUNTS}
    assert {"tunes", "tunes-confirmation", "scores", "heldout"} == set(registry.RENDERED)
    with pytest.raises(ValueError, match="msd-cals"):
        registry.load_dataset("mtg-gender")


# MagnaTagATune from the original annotations: the excerpt in their layout, 188 quoted columns, tab-separated


def write_annotations(folder, extra=()):
    rows = [line.split("\t") for line in read(EXCERPTS / "mtt/groundtruth_12-1-3.tsv")[1:]]
    used_tags = sorted({t for r in rows for t in r[2].split(",") if t})
    tags = [*(f"rare {i}" for i in range(182)), *used_tags]
    lines = [["clip_id", *tags, "mp3_path"]]
    lines += [[str(i), *("01"[t in r[2].split(",")] for t in tags), r[1]] for i, r in enumerate(rows)]
    lines += [[str(i), *"0" * len(tags), path] for i, path in extra]
    text = "\n".join("\t".join(f'"{v}"' for v in line) for line in lines)
    (folder / "mtt/annotations_final.csv").write_text(text + "\n")


def test_annotations_and_ground_truth_are_the_same_table(copy, capsys):
    write_annotations(copy, [(35644, "6/norine_braun-now_and_zen-08-gently-117-146.mp3")])
    table = load("mtt", copy)
    assert "1 clips, damaged as published, are left out: 6/norine_braun" in capsys.readouterr().out
    expected = load("mtt")
    columns = ["track_id", "artist", "path", "split"]
    assert table.select(columns).equals(expected.select(columns))
    assert [set(x) for x in table["labels"].to_list()] == [set(x) for x in expected["labels"].to_list()]


def test_other_clips_are_refused():
    with pytest.raises(ValueError, match="clips=top50: give all or tagged"):
        load("mtt", clips="top50")


# Last.fm


def write_lastfm(folder, table):
    tags = (folder / "msd/tags.txt").read_text().split("\n")[:-1]
    with sqlite3.connect(folder / "msd/lastfm_tags.db") as db:
        db.executescript("CREATE TABLE tids (tid TEXT); CREATE TABLE tags (tag TEXT); "
                         "CREATE TABLE tid_tag (tid INT, tag INT, val REAL)")  # fmt: skip
        db.executemany("INSERT INTO tids VALUES (?)", [(i,) for i in table["track_id"]])
        db.executemany("INSERT INTO tags VALUES (?)", [(t,) for t in ["seen live", *tags]])
        for i, labels in enumerate(table["labels"], 1):
            known = ["rock", "happy"] if labels is None else labels
            db.executemany("INSERT INTO tid_tag VALUES (?, ?, ?)", [(i, tags.index(t) + 2, 51) for t in known])
            db.execute("INSERT INTO tid_tag VALUES (?, 1, 100), (?, 3, 50)", (i, i))  # seen live, pop: not counted
    db.close()


def test_lastfm_fills_unknown_labels(copy, capsys):
    table = load("msd")
    write_lastfm(copy, table)
    filled = load("msd", copy, incomplete=False, drop_empty=True)
    assert filled.filter(pl.col("split") == "train")["labels"].to_list() == [["rock", "happy"]] * 12
    assert "20 of 20 tracks have the same labels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lastfm_tags.db: unknown track TR"):
        load("msd-cals", copy)


def test_cals_with_its_own_labels_needs_their_names(copy):
    for short in ("valid", "test"):
        np.save(copy / f"msd/{short}_binaries.npy", np.eye(4, 2, dtype=bool) | np.eye(4, 2, -2, dtype=bool))
    with pytest.raises(FileNotFoundError, match="no cals_tags.txt, the names of the labels"):
        load("msd-cals", copy)
    (copy / "msd/cals_tags.txt").write_text("loud\nquiet\n")
    assert load("msd-cals", copy)["labels"].to_list() == [["loud"], ["quiet"]] * 4
    with pytest.raises(FileNotFoundError, match="train_ids.npy not found; .*incomplete=True"):
        load("msd-cals", copy, incomplete=False)


# Audio


def test_missing_audio_is_counted_named_and_left_out(tmp_path, capsys):
    table = load("mtg-top50")
    for path in table["path"][2:]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).with_suffix(".low.mp3").write_bytes(b"")
    found = load("mtg-top50", audio=tmp_path)
    assert found["track_id"].to_list() == table["track_id"][2:].to_list()
    assert all(Path(p).is_file() for p in found["path"])
    message = capsys.readouterr().out
    assert "2 of 12 tracks have no audio (2 train, 0 validation, 0 test) and are left out: " in message
    assert ", ".join(table["path"][:2]) in message
    assert load("mtg-top50")["path"].to_list() == table["path"].to_list()


def test_a_folder_without_audio_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of the 12 tracks .* looked for as \d\d/\d+.mp3"):
        load("mtg-genre", audio=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load("mtg-genre", audio=tmp_path / "x")


# Broken files


def edit(path, old, new):
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, 1))


MTG, MTT, MSD = "mtg_jamendo/autotagging_genre-test.tsv", "mtt/groundtruth_12-1-3.tsv", "msd/usual_valid.txt"


@pytest.mark.parametrize(
    "name, file, old, new, message",
    [
        ("mtg-genre", MTG, b"TRACK_ID", b"TRACK", "columns are not TRACK_ID"),
        ("mtg-genre", MTG, b"track_0002011", b"song_2011", "unknown track 'song_2011'"),
        ("mtg-genre", MTG, b"track_0002011", b"track_0004246", "track_id track_0004246"),
        ("mtg-genre", MTG, b"195.0\tgenre---electronic", b"195.0", "line 2 has no tag"),
        ("mtg-genre", MTG, b"genre---pop", b"genre---pap", "label 'genre---pap' has no positive in train"),
        ("mtg-genre", MTG, b"genre---pop", b"genre---\xff", "cannot be read .*download"),
        ("mtt", MTT, b"split\tpath", b"path\tsplit", "columns are not split, path, tags"),
        ("mtt", MTT, b"train\t0/ammonite", b"train\tx/ammonite", "unknown track 'x/ammonite"),
        ("msd", MSD, b"TR", b"SO", "unknown track 'SO"),
        ("msd", MSD, b"\n", b"\nTRAAAAK128F9318780\n", r"usual_valid_y.npy: \(11, 50\), but usual_valid.txt has 12"),
        ("msd", "msd/usual_test_y.npy", b"'|b1'", b"'|O' ", "usual_test_y.npy: not a plain array"),
        ("msd", "msd/tags.txt", b"rock\npop\n", b"rock\n", "there are 49 tags"),
    ],
)
def test_a_broken_file_is_refused_with_its_path(name, file, old, new, message, copy):
    edit(copy / file, old, new)
    with pytest.raises(ValueError, match=message) as error:
        load(name, copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_archive_is_refused_with_its_path(copy):
    path = copy / MSD
    (copy / f"{MSD}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()
    with pytest.raises(ValueError, match="usual_valid.txt.gz: cannot be read"):
        load("msd", copy)


def test_errors_for_missing_files_name_the_source(copy, monkeypatch):
    (copy / MTG).unlink()
    with pytest.raises(FileNotFoundError, match="autotagging_genre-test.tsv: not found; https"):
        load("mtg-genre", copy)
    with pytest.raises(FileNotFoundError, match="labels of train .train_y.npy or lastfm_tags.db. not found"):
        load("msd", copy, incomplete=False)
    monkeypatch.delenv("MAESTLIB_DATA", raising=False)
    with pytest.raises(ValueError, match="MAESTLIB_DATA; the files are published at https"):
        registry.load_dataset("mtt")
    monkeypatch.setenv("MAESTLIB_DATA", str(copy))
    with pytest.raises(FileNotFoundError, match="splits/mtt: no such folder"):
        registry.load_dataset("mtt")


def test_a_label_missing_in_one_split_is_dropped_from_all_on_request(copy, capsys):
    edit(copy / MTG, b"genre---pop", b"genre---pap")
    table = load("mtg-genre", copy, drop_empty=True)
    assert label_vocabulary(table) == ["genre---electronic", "genre---soundtrack"] and table.height == 12
    assert "2 labels without a positive in some split are left out: genre---pap, genre---pop" in capsys.readouterr().out
