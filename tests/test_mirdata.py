"""Tables of public datasets: each is built in its published layout, and read as mirdata reads it, without a network.

Expected values are written beside the files that they come from.
"""

import json
import socket
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile

from maestlib.datasets.mirdata import MIRDATA, from_mirdata
from maestlib.datasets.table import COLUMNS, validate_table

core = pytest.importorskip("mirdata.core", reason="mirdata is not installed: pip install -e '.[mirdata]'")

SONG = {"artists": [{"name": "Ann"}, {"name": "Bob"}], "genres": [{"name": "Breaks"}], "sub_genres": [], "bpm": 150}
UNKNOWN = SONG | {"artists": [{"name": "Bob"}], "bpm": None}


def dump_jams(genre: str, *tempi: tuple[float, float]) -> str:  # (BPM, confidence)
    data = [{"time": 0.0, "duration": 120.0, "value": value, "confidence": weight} for value, weight in tempi]
    tags = [{"time": 0.0, "duration": 120.0, "value": genre, "confidence": 1.0}]
    annotations = [{"namespace": "tempo", "data": data}, {"namespace": "tag_open", "data": tags}]
    return json.dumps({"annotations": annotations})


def jamendo_lists() -> dict[str, str]:  # path: text; in split i, track i % 3 is the one for testing
    head, folder = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS", "data/splits"
    rows = [f"track_000000{i}\tartist_{i}\talbum_{i}\t0{i}/{i}.mp3\t9.5\tmood/theme---m{i}" for i in range(3)]
    rows[0] += "\tmood/theme---calm"
    files = {"data/autotagging_moodtheme.tsv": "\n".join([head, *rows])}
    for number in range(5):
        for place, split in enumerate(("test", "train", "validation")):
            text = "\n".join([head, rows[(number + place) % 3]])
            files[f"{folder}/split-{number}/autotagging_moodtheme-{split}.tsv"] = text
    return files


DATASETS = {  # name: {track_id: {kind: path}}, {path: text}, expected rows: artist, labels, split, further columns
    "ballroom": (
        {
            track: {"audio": f"B_1.0/audio/{dance}/{track}.wav", "beats": f"b/{track}.beats", "tempo": f"{track}.bpm"}
            for dance, track in [("Waltz", "Albums-Latin_Jam2-01"), ("Rumba-American", "Media-105901")]
        },
        {"Albums-Latin_Jam2-01.bpm": "84\n"},
        {
            "Albums-Latin_Jam2-01": ("Albums-Latin_Jam2", ["Genre---waltz"], None, "waltz", 84.0),
            "Media-105901": ("Media-105901", ["Genre---rumba-american"], None, "rumba-american", None),
        },
    ),
    "beatport_key": (
        {str(i): {"audio": f"audio/{i} A - B.mp3", "meta": f"meta/{i}.json", "key": f"keys/{i}.txt"} for i in range(4)},
        {f"meta/{i}.json": json.dumps(SONG) for i in (0, 1)}
        | {"meta/2.json": json.dumps(UNKNOWN)}
        | {"keys/0.txt": "Eb minor", "keys/1.txt": "D minor | F major", "keys/2.txt": "X", "keys/3.txt": "c Major\n"},
        {
            "0": ("Ann", ["Key---D# minor"], None, "D# minor", 150.0, ["Breaks"]),
            "1": ("Ann", None, None, None, 150.0, ["Breaks"]),
            "2": ("Bob", None, None, None, None, ["Breaks"]),
            "3": ("3", ["Key---C major"], None, "C major", None, None),
        },
    ),
    "da_tacos": (
        {
            f"{subset}#W_{i}#P_{i}": dict.fromkeys("cens crema hpcp key madmom mfcc tags".split(), f"{subset}.h5")
            for i, subset in enumerate(("benchmark", "coveranalysis"))
        },
        {
            f"da-tacos_metadata/da-tacos_{subset}_subset_metadata.json": json.dumps(
                {f"W_{i}": {f"P_{i}": {"perf_artist": f"artist {i}"}}}
            )
            for i, subset in enumerate(("benchmark", "coveranalysis"))
        },
        {
            "benchmark#W_0#P_0": ("artist 0", None, "test", "W_0"),
            "coveranalysis#W_1#P_1": ("artist 1", None, "validation", "W_1"),
        },
    ),
    "fma_keys": (
        {"10": {"audio": "000/000010.mp3"}, "141": {"audio": "000/000141.mp3"}},
        {"fma_keys_metadata.csv": "track_id,spotify_uri,key_and_mode\n10,x,F# Major\n141,y,Bb minor\n"},
        {
            "10": ("10", ["Key---F# major"], None, "F# major"),
            "141": ("141", ["Key---A# minor"], None, "A# minor"),
        },
    ),
    "giantsteps_key": (
        {"3": {"audio": "audio/10 A.B - C (feat. D).mp3", "meta": "meta/10.json", "key": "keys_gs+/10.txt"}},
        {"meta/10.json": json.dumps(SONG), "keys_gs+/10.txt": "Gb minor\n"},
        {"3": ("Ann", ["Key---F# minor"], None, "F# minor", 150.0, ["Breaks"])},
    ),
    "giantsteps_tempo": (
        {
            i: {"audio": f"audio/{i}.LOFI.mp3", "annotation_v1": f"v1/{i}.jams", "annotation_v2": f"v2/{i}.jams"}
            for i in ("5", "6")
        },
        {"v1/5.jams": dump_jams("trance", (137.6, 1)), "v2/5.jams": dump_jams("", (77, 0.31), (139, 0.69))}
        | {"v1/6.jams": dump_jams("house", (125, 1)), "v2/6.jams": dump_jams("")},
        {
            "5": ("5", ["Genre---trance"], None, 139.0, "trance", 137.6),
            "6": ("6", ["Genre---house"], None, None, "house", 125.0),
        },
    ),
    "gtzan_genre": (
        {
            track: {"audio": f"genres/{track}.wav", "beats": f"{track}.beats", "tempo": f"{track}.bpm"}
            for track in ("blues.00029", "blues.00000", "hiphop.00069", "jazz.00033")
        },
        {"blues.00029.bpm": "8.553000000000000114e+01\n"},
        {  # jazz.00033 is in none of the lists without faults
            "blues.00029": ("blues.00029", ["Genre---blues"], "train", "blues", 85.53),
            "blues.00000": ("blues.00000", ["Genre---blues"], "validation", "blues", None),
            "hiphop.00069": ("hiphop.00069", ["Genre---hip-hop"], "test", "hip-hop", None),
        },
    ),
    "irmas": (
        {
            track: {"audio": f"{path}.wav", "annotation": f"{path}.txt"}
            for track, path in {
                "0189__2": "IRMAS-TrainingData/cla/[cla][cla]0189__2",
                "0021__1": "IRMAS-TrainingData/gel/[gel][dru][pop_roc]0021__1",
                "1": "IRMAS-TestingData-Part1/Part1/02 - And On-8",
            }.items()
        },
        {"IRMAS-TestingData-Part1/Part1/02 - And On-8.txt": "gel\t\nvoi\t\n"},
        {
            "0189__2": ("0189", ["Instrument---clarinet"], "train", ["clarinet"]),
            "0021__1": ("0021", ["Instrument---electric guitar"], "train", ["electric guitar"]),
            "1": (
                "02 - And On",
                ["Instrument---electric guitar", "Instrument---voice"],
                "test",
                ["electric guitar", "voice"],
            ),
        },
    ),
    "medley_solos_db": (
        {key: {"audio": f"audio/Medley-solos-DB_{key}.wav"} for key in ("a1", "b2", "c3")},
        {
            "annotation/Medley-solos-DB_metadata.csv": "subset,instrument,instrument_id,song_id,uuid4\n"
            "training,flute,3,210,a1\nvalidation,female singer,2,7,b2\ntest,piano,4,8,c3\n"
        },
        {
            "a1": ("song 210", ["Instrument---flute"], "train", "flute"),
            "b2": ("song 7", ["Instrument---female singer"], "validation", "female singer"),
            "c3": ("song 8", ["Instrument---piano"], "test", "piano"),
        },
    ),
    "mtg_jamendo_autotagging_moodtheme": (
        {f"track_000000{i}": {"audio": f"audios/0{i}/{i}.mp3"} for i in range(3)},
        jamendo_lists(),
        {
            "track_0000000": ("artist_0", ["Mood---m0", "Mood---calm"], "test", ["m0", "calm"]),
            "track_0000001": ("artist_1", ["Mood---m1"], "train", ["m1"]),
            "track_0000002": ("artist_2", ["Mood---m2"], "validation", ["m2"]),
        },
    ),
    "openmic2018": (
        {i: {"audio": f"audio/{i}.ogg", "vggish": f"vggish/{i}.json"} for i in ("0_1", "0_2", "0_3")},
        {
            "openmic-2018-metadata.csv": "artist_name,track_genres,sample_key,start_time\n"
            "Ann,\"[{'genre_title': 'Pop'}]\",0_1,0\nBob,,0_2,0\n,[],0_3,0\n",
            "openmic-2018-aggregated-labels.csv": "sample_key,instrument,relevance,num_responses\n"
            "0_1,flute,0.9,3\n0_1,piano,0.17,3\n0_2,piano,0.5,3\n0_3,voice,0.0,3\n",
            "partitions/split01_train.csv": "0_1\n0_2\n",
            "partitions/split01_test.csv": "0_3\n",
        },
        {
            "0_1": ("Ann", ["Instrument---flute"], "train", ["flute"], ["Instrument---piano"]),
            "0_2": ("Bob", ["Instrument---piano"], "train", ["piano"], []),
            "0_3": ("0_3", [], "test", [], ["Instrument---voice"]),
        },
    ),
    "tinysol": (
        {name: {"audio": f"audio/Winds/{name}.wav"} for name in ("Fl-C4", "Ob-A2", "Vn-G3")},
        {
            "annotation/TinySOL_metadata.csv": "Path,Fold,Family,I,Instrument,T,Technique,Pitch,ID,D,DI,In,S,R\n"
            "Winds/Fl-C4.wav,0,Winds,Fl,Flute,ord,ordinario,C4,60,mf,2,0,,TRUE\n"
            "Winds/Ob-A2.wav,1,Winds,Ob,Oboe,ord,ordinario,A2,45,mf,2,0,,FALSE\n"
            "Winds/Vn-G3.wav,4,Strings,Vn,Violin,ord,ordinario,G3,55,mf,2,0,1.0,FALSE\n"
        },
        {
            "Fl-C4": ("Fl-C4", ["Instrument---Flute"], "test", "Flute", 60),
            "Ob-A2": ("Ob-A2", ["Instrument---Oboe"], "validation", "Oboe", 45),
            "Vn-G3": ("Vn-G3", ["Instrument---Violin"], "train", "Violin", 55),
        },
    ),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(core.Dataset, "download", refuse)


def write_audio(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(1600), 16000)


def write_dataset(folder: Path, name: str) -> dict:  # arguments of `from_mirdata`
    tracks, files, _ = DATASETS[name]
    index = {track: {kind: [path, "checksum"] for kind, path in kinds.items()} for track, kinds in tracks.items()}
    files = files | {"index.json": json.dumps({"version": "1.0", "tracks": index})}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for track, kinds in tracks.items():
        audio = kinds.get("audio") or "audio/{1}/{2}.mp3".format(*track.split("#"))
        write_audio(folder / audio)
    return {"name": name, "data_home": folder, "index": folder / "index.json"}


def test_every_dataset_is_tested():
    assert DATASETS.keys() == MIRDATA.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_values_are_those_of_the_files(tmp_path, name):
    table = from_mirdata(**write_dataset(tmp_path, name), validation=0.0)
    assert validate_table(table, name).columns == [*COLUMNS, *MIRDATA[name].columns]
    further = list(MIRDATA[name].columns)
    rows = table.select("track_id", "artist", "labels", "split", *further).rows()
    expected = DATASETS[name][2]
    assert {track for track, *_ in rows} == expected.keys()
    for track, *values in rows:
        if expected[track][2] is None:  # no published split
            values[1:3] = [values[1], None]
        assert tuple(values) == expected[track]
    for track, path in table.select("track_id", "path").rows():
        audio = DATASETS[name][0][track].get("audio")
        assert Path(path).is_absolute() and Path(path).is_file() and (audio is None or path.endswith(audio))


@pytest.mark.parametrize("name, fold", [("tinysol", 4), ("mtg_jamendo_autotagging_moodtheme", 1)])
def test_folds(tmp_path, name, fold):
    arguments = write_dataset(tmp_path, name)
    splits = dict(from_mirdata(**arguments, fold=fold).select("track_id", "split").rows())
    assert splits == {
        "tinysol": {"Fl-C4": "validation", "Ob-A2": "train", "Vn-G3": "test"},
        "mtg_jamendo_autotagging_moodtheme": {
            "track_0000000": "validation",
            "track_0000001": "test",
            "track_0000002": "train",
        },
    }.get(name)
    with pytest.raises(ValueError, match=f"fold=5: {name} has 5"):
        from_mirdata(**arguments, fold=5)


def many_songs(folder: Path) -> dict:  # beatport_key with 40 tracks of 20 artists
    tracks = {str(i): {"audio": f"audio/{i}.mp3", "meta": f"{i}.json", "key": f"{i}.txt"} for i in range(40)}
    index = {track: {kind: [path, ""] for kind, path in kinds.items()} for track, kinds in tracks.items()}
    (folder / "index.json").write_text(json.dumps({"tracks": index}))
    for i in range(40):
        (folder / f"{i}.json").write_text(json.dumps(SONG | {"artists": [{"name": f"artist {i // 2}"}]}))
        (folder / f"{i}.txt").write_text("A minor")
        write_audio(folder / f"audio/{i}.mp3")
    return {"name": "beatport_key", "data_home": folder, "index": folder / "index.json"}


def test_without_a_published_split_artists_are_divided_whatever_audio_there_is(tmp_path, capsys):
    arguments = many_songs(tmp_path)
    table = from_mirdata(**arguments, validation=0.2, test=0.1)
    counts = dict(table.group_by("split").agg(pl.col("artist").n_unique()).rows())
    assert counts == {"train": 14, "validation": 4, "test": 2}
    assert table.group_by("artist").agg(pl.col("split").n_unique())["split"].max() == 1
    assert not table.equals(from_mirdata(**arguments, validation=0.2, test=0.1, seed=1))
    for i in range(0, 40, 3):
        (tmp_path / f"audio/{i}.mp3").unlink()
    capsys.readouterr()
    part = from_mirdata(**arguments, validation=0.2, test=0.1)
    assert part.equals(table.filter(pl.col("track_id").cast(int) % 3 != 0))
    out = capsys.readouterr().out
    assert "beatport_key: 14 of 40 tracks have no audio" in out and "audio/0.mp3" in out
    with pytest.raises(ValueError, match="leave something for training"):
        from_mirdata(**arguments, validation=0.5, test=0.5)


def test_training_artists_become_a_validation_split_where_none_is_published(tmp_path):
    arguments = write_dataset(tmp_path, "openmic2018")
    splits = dict(from_mirdata(**arguments, validation=0.5).select("track_id", "split").rows())
    assert splits["0_3"] == "test" and {splits["0_1"], splits["0_2"]} == {"train", "validation"}


def test_the_published_split_can_be_left_aside(tmp_path, capsys):
    arguments = write_dataset(tmp_path, "gtzan_genre")
    from_mirdata(**arguments)
    assert "gtzan_genre: 1 of 4 tracks are in no list and left out" in capsys.readouterr().out
    table = from_mirdata(**arguments, published=False, validation=0.25, test=0.25)
    assert "jazz.00033" in table["track_id"] and sorted(table["split"]) == ["test", "train", "train", "validation"]


def test_missing_annotations_are_null_and_logged(tmp_path, capsys):
    arguments = write_dataset(tmp_path, "beatport_key")
    (tmp_path / "keys/0.txt").unlink()
    assert from_mirdata(**arguments)["key"].to_list() == [None, None, None, "C major"]
    out = capsys.readouterr().out
    assert "beatport_key: 3 of 4 tracks have no key" in out and "beatport_key: 1 of 4 tracks have no genres" in out


def test_what_cannot_be_read_is_named(tmp_path):
    arguments = write_dataset(tmp_path, "beatport_key")
    (tmp_path / "meta/1.json").write_text('{"bpm": nan}')
    with pytest.raises(ValueError, match="^1: .*is the dataset as published"):
        from_mirdata(**arguments)


def test_unknown_names_are_answered_with_the_known_ones(tmp_path):
    for name in ("beatles", "GTZAN"):  # of mirdata, but not here; of nobody
        with pytest.raises(ValueError, match=f"name={name}: give ballroom, .*, tinysol"):
            from_mirdata(name, tmp_path)


def test_what_is_missing_is_named_with_the_command_to_obtain_it(tmp_path):
    command = r"to obtain it: python -c \"import mirdata; mirdata.initialize\('irmas', '.*'\).download\(\)\""
    arguments = write_dataset(tmp_path, "irmas")
    with pytest.raises(FileNotFoundError, match=f"data_home=.*nowhere: no such folder; {command}"):
        from_mirdata("irmas", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"none.json: no such file, .* fetches it alone; {command}"):
        from_mirdata("irmas", tmp_path, index=tmp_path / "none.json")
    for audio in tmp_path.rglob("*.wav"):
        audio.unlink()
    with pytest.raises(FileNotFoundError, match=f"none of the 3 tracks of irmas is in it; .*{command}"):
        from_mirdata(**arguments)


@pytest.mark.parametrize(
    "name, file",
    [
        ("tinysol", "annotation/TinySOL_metadata.csv"),
        ("openmic2018", "openmic-2018-metadata.csv"),
        ("openmic2018", "openmic-2018-aggregated-labels.csv"),
        ("mtg_jamendo_autotagging_moodtheme", "data/splits/split-3/autotagging_moodtheme-test.tsv"),
        ("da_tacos", "da-tacos_metadata/da-tacos_benchmark_subset_metadata.json"),
    ],
)
def test_missing_metadata_of_a_whole_dataset_are_an_error(tmp_path, name, file):
    arguments = write_dataset(tmp_path, name)
    (tmp_path / file).unlink()
    for published in (True, False):
        with pytest.raises(FileNotFoundError, match="to obtain it: python -c"):
            from_mirdata(**arguments, published=published)


def test_da_tacos_says_that_it_has_no_audio(tmp_path):
    arguments = write_dataset(tmp_path, "da_tacos")
    for audio in (tmp_path / "audio").rglob("*.mp3"):
        audio.unlink()
    with pytest.raises(FileNotFoundError, match="audio/W_0/P_0.mp3; .*it has no audio: put recordings of your own"):
        from_mirdata(**arguments)
