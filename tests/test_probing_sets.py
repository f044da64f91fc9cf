"""Tables of data sets that probing suites use: each is built in its published layout, with invented rows.

Expected values are written beside the files that they come from, and no loader may open a connection.
"""

import hashlib
import json
import socket
from pathlib import Path

import polars as pl
import pytest

from maestlib.datasets.probing_sets import MGPHOT_GENES, load_emomusic, load_fma, load_mgphot, load_nsynth
from maestlib.datasets.table import COLUMNS
from maestlib.probing.tasks import make_folds, make_task


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write(folder: Path, files: dict[str, str]) -> Path:  # path: text
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf8")
    return folder


def write_emomusic(folder: Path, within: str = "annotations/") -> Path:
    info = (
        "song_id,file_name,Artist,Song title,start of the segment (min.sec),end of the segment (min.sec),Genre,"
        "Mediaeval 2013 set\n"
        "2,2.mp3,The New Mystery Girl,Down\t,3.44,4.29,Blues\t,development\n"
        '5,5.mp3,"Étienne, Jr.  99",Up,0.4,0.49,Blues,evaluation\n'
        "7,7.mp3,Unique X,Left,1,1.45,Jazz,development\n"
        "1000,1000.mp3,unique  x!,Right,2.1,2.55,Jazz,development\n"
    )
    ratings = (
        "song_id,mean_arousal,std_arousal,mean_valence,std_valence\n"
        "2,3.1,0.99,3.0,0.67\n5,4.4,2.1,5.3,1.9\n7,5.8,1.5,6.4,1.7\n1000,1.0,0.1,9.0,0.2\n"
    )
    audio = {f"clips_45seconds/{song}.mp3": "" for song in (2, 5, 7, 1000)}
    return write(folder, {f"{within}songs_info.csv": info, f"{within}static_annotations.csv": ratings} | audio)


@pytest.mark.parametrize("within", ["annotations/", ""])
def test_emomusic(tmp_path, within):
    table = load_emomusic(write_emomusic(tmp_path, within))
    assert table.columns == [*COLUMNS, "arousal", "valence"] and table["labels"].null_count() == 4
    rows = table.select("track_id", "artist", "arousal", "valence").rows()
    assert rows == [
        ("2", "The New Mystery Girl", 3.1, 3.0),
        ("5", "Étienne, Jr.  99", 4.4, 5.3),
        ("7", "Unique X", 5.8, 6.4),
        ("1000", "unique  x!", 1.0, 9.0),
    ]
    splits = dict(table.select("track_id", "split").rows())
    assert splits["5"] == "test" and splits["7"] == splits["1000"]
    for song, letters in {"2": b"the new mystery girl", "7": b"unique x"}.items():
        number = int(hashlib.sha1(letters).hexdigest(), 16) % 10
        assert splits[song] == (["train"] * 8 + ["validation"] * 2)[number]
    for track, path in table.select("track_id", "path").rows():
        assert Path(path).is_file() and Path(path).name == f"{track}.mp3"
    task = make_task("emotion", "regression", table, ["arousal", "valence"])
    assert task.outputs == ("arousal", "valence") and task.targets[3].tolist() == [1, 9]


def test_emomusic_songs_without_audio_or_set_are_left_out_and_logged(tmp_path, capsys):
    write_emomusic(tmp_path)
    (tmp_path / "clips_45seconds/5.mp3").unlink()
    info = tmp_path / "annotations/songs_info.csv"
    info.write_text(info.read_text().replace("Jazz,development\n1000", "Jazz,\n1000"))
    assert load_emomusic(tmp_path)["track_id"].to_list() == ["2", "1000"]
    out = capsys.readouterr().out
    assert "emomusic: 1 of 4 tracks are in no split and left out" in out
    assert "emomusic: 1 of 3 tracks have no audio (0 train, 0 validation, 1 test) and are left out: 5.mp3" in out


NOTES = {  # split: notes of examples.json
    "train": {
        "bass_synthetic_033-022-050": ("bass_synthetic_033", 22, "bass", ["dark"]),
        "bass_synthetic_033-023-050": ("bass_synthetic_033", 23, "bass", []),
        "synth_lead_synthetic_000-070-127": ("synth_lead_synthetic_000", 70, "synth_lead", ["bright", "tempo-synced"]),
    },
    "valid": {"organ_electronic_001-060-127": ("organ_electronic_001", 60, "organ", ["dark"])},
    "test": {"organ_electronic_001-061-127": ("organ_electronic_001", 61, "organ", ["bright"])},
}


def write_nsynth(folder: Path) -> Path:
    for part, notes in NOTES.items():
        fields = ("instrument_str", "pitch", "instrument_family_str", "qualities_str")
        examples = {
            name: dict(zip(fields, values, strict=True)) | {"note_str": name, "velocity": 127, "sample_rate": 16000}
            for name, values in notes.items()
        }
        audio = {f"nsynth-{part}/audio/{name}.wav": "" for name in notes}
        write(folder, {f"nsynth-{part}/examples.json": json.dumps(examples)} | audio)
    return folder


def test_nsynth(tmp_path, capsys):
    table = load_nsynth(write_nsynth(tmp_path))
    assert table.columns == [*COLUMNS, "pitch", "instrument", "qualities"]
    assert (
        "nsynth: 5 tracks, 3 labels; 3 train, 1 validation, 1 test; 1 artists in two splits" in capsys.readouterr().out
    )
    for track, artist, labels, split, *values in table.drop("path").rows():
        part = {"train": "train", "validation": "valid", "test": "test"}[split]
        assert (artist, *values) == NOTES[part][track] and labels == [f"Instrument---{values[1]}"]
    assert all(Path(path).is_file() for path in table["path"])
    task = make_task("qualities", "multilabel", table, "qualities")
    assert task.outputs == ("bright", "dark", "tempo-synced")
    assert task.targets.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert make_task("pitch", "multiclass", table, "pitch").outputs == ("22", "23", "60", "61", "70")


def test_nsynth_notes_without_a_field_are_named(tmp_path):
    path = write_nsynth(tmp_path) / "nsynth-test/examples.json"
    path.write_text(path.read_text().replace('"pitch"', '"Pitch"'))
    with pytest.raises(ValueError, match="nsynth-test/examples.json: organ_electronic_001-061-127 has no pitch"):
        load_nsynth(tmp_path)


FMA_TRACKS = (  # groups, names, and the name of the index; the text of an album may have several lines
    ",album,artist,set,set,track,track,track\n"
    ",information,id,split,subset,genre_top,genres,genres_all\n"
    "track_id,,,,,,,\n"
    '2,"<p>One, ""two""\nthree</p>",1,training,small,Hip-Hop,[83],"[83, 21]"\n'
    "140,,54,validation,small,Rock,[12],[12]\n"
    "1004,,77,test,medium,Rock,[12],[12]\n"
    "110000,,78,test,small,Hip-Hop,[21],[21]\n"
    '155,,1,training,large,,"[83, 12]","[83, 12, 21]"\n'
    "156,,1,training,large,,[],[]\n"
)
FMA_GENRES = "genre_id,#tracks,parent,title,top_level\n12,3,0,Rock,12\n21,2,0,Hip-Hop,21\n83,1,21,Trip-Hop,21\n"
FMA_PATHS = ("000/000002", "000/000140", "001/001004", "110/110000", "000/000155", "000/000156")


def write_fma(folder: Path) -> Path:
    audio = {f"fma_{size}/{path}.mp3": "" for size in ("small", "medium", "large") for path in FMA_PATHS}
    return write(folder, {"fma_metadata/tracks.csv": FMA_TRACKS, "fma_metadata/genres.csv": FMA_GENRES} | audio)


def test_fma(tmp_path):
    write_fma(tmp_path)
    small, medium, large = (load_fma(tmp_path, size) for size in ("small", "medium", "large"))
    assert small.columns == [*COLUMNS, "genre", "genres"]
    assert small.drop("path", "labels").rows() == [
        ("2", "1", "train", "Hip-Hop", ["Trip-Hop", "Hip-Hop"]),
        ("140", "54", "validation", "Rock", ["Rock"]),
        ("110000", "78", "test", "Hip-Hop", ["Hip-Hop"]),
    ]
    assert small["labels"].to_list() == [["Genre---Hip-Hop"], ["Genre---Rock"], ["Genre---Hip-Hop"]]
    assert medium["track_id"].to_list() == ["2", "140", "1004", "110000"]
    assert medium["path"][2].endswith("fma_medium/001/001004.mp3") and Path(medium["path"][3]).parent.name == "110"
    assert large["genre"].to_list()[4:] == [None, None] and large["labels"].to_list()[4:] == [None, None]
    assert large["genres"].to_list()[4:] == [["Trip-Hop", "Rock", "Hip-Hop"], []]
    task = make_task("genre", "multiclass", large, "genre")
    assert len(task.tracks) == 4 and [len(part) for part in make_folds(task)[0]] == [1, 1, 2]


def test_fma_refuses_other_sizes_and_other_headers(tmp_path):
    write_fma(tmp_path)
    with pytest.raises(ValueError, match="size=full: give small, medium, large"):
        load_fma(tmp_path, "full")
    for wrong in (
        FMA_TRACKS.replace("track_id,", "id,"),
        FMA_TRACKS.replace("genre_top", "top"),
        "track_id,title\n1,A\n",
    ):
        write(tmp_path, {"fma_metadata/tracks.csv": wrong})
        with pytest.raises(ValueError, match="tracks.csv: its three header rows do not give track_id, artist.id"):
            load_fma(tmp_path)


def write_mgphot(folder: Path, genes: int = 58) -> Path:
    songs = {
        str(number): {
            "artist": artist,
            "title": "A title",
            "youtube_url": f"https://www.youtube.com/watch?v={youtube_id}",
            "youtube_id": youtube_id,
            "is_official": True,
            "gene_values": [number / 100, *[0.5] * (genes - 2), 1],
            "year": 1999,
            "period": "1990s",
            "main_artist": artist.split(" feat. ")[0],
            "split": split,
        }
        for number, artist, youtube_id, split in (
            (10, "Ann", "-bcdefghijk", "train"),
            (11, "Ann feat. Cy", "AbCdefghij_", "train"),
            (12, "Bob", "abcdefghijk", "val"),
            (13, "Dee", "xyzdefghijk", "test"),
            (14, "Eve", "ignored0000", "ignore"),
        )
    }
    write(folder, {f"audio/{song['youtube_id'][:3]}/{song['youtube_id']}.mp3": "" for song in songs.values()})
    return write(folder, {"genome_index_split.json": json.dumps(songs, indent=2)})


def test_mgphot(tmp_path, capsys):
    table = load_mgphot(write_mgphot(tmp_path), tmp_path / "audio")
    assert table.columns == [*COLUMNS, *MGPHOT_GENES] and set(table.dtypes[5:]) == {pl.Float64}
    first, last = MGPHOT_GENES[0], MGPHOT_GENES[-1]
    assert table.select("track_id", "artist", "split", first, "Tempo", last).rows() == [
        ("10", "Ann", "train", 0.1, 0.5, 1.0),
        ("11", "Ann", "train", 0.11, 0.5, 1.0),
        ("12", "Bob", "validation", 0.12, 0.5, 1.0),
        ("13", "Dee", "test", 0.13, 0.5, 1.0),
    ]
    assert [Path(path).parent.name for path in table["path"]] == ["-bc", "AbC", "abc", "xyz"]
    out = capsys.readouterr().out
    assert "mgphot: 1 of 5 tracks are in no split and left out" in out and "0 artists in two splits" in out
    task = make_task("genes", "regression", table, [first])
    assert [len(part) for part in make_folds(task)[0]] == [2, 1, 1]


def test_mgphot_needs_58_ratings_of_each_song(tmp_path):
    with pytest.raises(ValueError, match="song 10 has 57 gene_values, not 58; reconstruct_index.py"):
        load_mgphot(write_mgphot(tmp_path, 57), tmp_path / "audio")


LOADERS = {
    "emomusic": (write_emomusic, load_emomusic, "annotations/songs_info.csv", "cvml.unige.ch"),
    "nsynth": (write_nsynth, load_nsynth, "nsynth-valid/examples.json", "magenta.tensorflow.org"),
    "fma": (write_fma, load_fma, "fma_metadata/genres.csv", "mdeff/fma"),
    "mgphot": (
        write_mgphot,
        lambda home: load_mgphot(home, home / "audio"),
        "genome_index_split.json",
        "MTG/MGPHot-audio",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_missing_is_named_with_where_it_is_published(tmp_path, name):
    build, load, file, site = LOADERS[name]
    build(tmp_path)
    for audio in [*tmp_path.rglob("*.mp3"), *tmp_path.rglob("*.wav")]:
        audio.unlink()
    with pytest.raises(FileNotFoundError, match=rf"none of the \d tracks of {name} is in it.*published at .*{site}"):
        load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: no such file; {name} is published at .*{site}"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="published at"):
        load(tmp_path / "nowhere")
