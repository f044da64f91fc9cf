"""Tags in files: a player, that is FFmpeg, reads what was written, and what it read before once it is undone."""

import struct
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import polars as pl
import pytest
import soundfile

from maestlib.collection.my_tags import MyTags
from maestlib.collection.write_tags import default_mapping, load_mapping, read_fields, write_fields
from maestlib.models.checkpoint import load_model
from maestlib.models.hub import label_names

mutagen = pytest.importorskip("mutagen")
from mutagen import id3  # noqa: E402
from mutagen.mp4 import MP4FreeForm  # noqa: E402

WAVE = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    for suffix in ("mp3", "flac", "ogg", "wav", "aiff"):
        soundfile.write(folder / f"a.{suffix}", WAVE, 16_000)
    for suffix, container in (("m4a", None), ("aac", "adts")):
        with av.open(str(folder / "a.wav")) as source, av.open(str(folder / f"a.{suffix}"), "w", container) as out:
            stream = out.add_stream("aac", rate=16_000)
            for frame in [*source.decode(audio=0), None]:
                out.mux(stream.encode(frame))
    return {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}


def shown(path: Path) -> dict[str, str]:
    with av.open(str(path), metadata_errors="replace") as container:
        return {**container.metadata, **container.streams.audio[0].metadata}


def there_and_back(path: Path, **fields: list[str]) -> None:
    "Write fields, look at the file as a player does, write back what was there before."
    before, view = read_fields(path), shown(path)
    write_fields(path, fields)
    assert {field: read_fields(path)[field] for field in fields} == fields
    after = {key.lower(): value for key, value in shown(path).items()}
    for field, values in fields.items():
        assert after[field] in [by.join(values) for by in ("/", "; ", ";")]
    kept = {key.lower(): value for key, value in view.items() if key.lower() not in (*fields, "tmoo")}
    assert kept.items() <= after.items(), "other tags have changed"
    write_fields(path, {field: before[field] for field in fields})
    assert shown(path) == view and read_fields(path) == before


def id3v1(genre: int, text: bytes = b"Title") -> bytes:
    return (
        b"TAG"
        + text.ljust(30, b"\0")
        + b"A".ljust(30)
        + b"B".ljust(30, b"\0")
        + b"1999"
        + b"c".ljust(30)
        + bytes([genre])
    )


def ape(version: int = 2000) -> bytes:
    items = b"".join(struct.pack("<II", len(v), 0) + k + b"\0" + v for k, v in ((b"Title", b"T"), (b"Genre", b"Ska")))
    header, footer = (
        b"APETAGEX" + struct.pack("<IIII", version, len(items) + 32, 2, flags) + b"\0" * 8
        for flags in (0xA << 28, 8 << 28)
    )
    return (header if version == 2000 else b"") + items + footer


LYRICS3 = b"LYRICSBEGININD0000310" + b"LYR00005hello" + b"000038LYRICS200"


@pytest.mark.parametrize("suffix", ["mp3", "flac", "ogg", "wav", "aiff", "m4a"])
def test_every_format_there_and_back(suffix, sounds, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(sounds[suffix])
    there_and_back(path, genre=["Jazz"], mood=["übermütig"])
    there_and_back(path, genre=["Jazz", "Rhythm & Blues"], mood=["calm", "sad"])


@pytest.mark.parametrize("back", [b"", id3v1(17), id3v1(255), ape(), ape(1000), ape() + id3v1(17), LYRICS3 + id3v1(17)])
@pytest.mark.parametrize("version", [None, 2, 3, 4])
def test_tags_at_the_end_of_an_mp3(version, back, sounds, tmp_path):
    path = tmp_path / "a.mp3"
    frames = {
        2: b"TT2\0\0\6\0Title" + b"TCO\0\0\5\0(17)",
        3: b"TIT2\0\0\0\6\0\0\0Title",
        4: b"TYER\0\0\0\5\0\0\x001999",
    }
    head = b"" if version is None else b"ID3" + bytes([version, 0, 0, 0, 0, 0, 100]) + frames[version].ljust(100, b"\0")
    path.write_bytes(head + sounds["mp3"] + back)
    there_and_back(path, genre=["Jazz"])
    there_and_back(path, mood=["calm"])
    assert path.read_bytes().endswith(back), "the tags at the end are not as they were"


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("(17)(6)Extra", ["Rock", "Grunge", "Extra"]), ("(RX)", ["Remix"]), ("(CR)Live", ["Cover", "Live"]),
        ("17", ["Rock"]), ("(17)", ["Rock"]), ("(4)Eurodisco", ["Disco", "Eurodisco"]), ("Rock", ["Rock"]),
        ("80s", ["80s"]), (["Rock", "Pop"], ["Rock", "Pop"]), (["17", "6"], ["Rock", "Grunge"]), ("", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", [id3.Encoding.LATIN1, id3.Encoding.UTF16])
def test_genres_of_id3(encoding, text, expected, version, sounds, tmp_path):
    path, tags = tmp_path / "a.mp3", id3.ID3()
    path.write_bytes(sounds["mp3"])
    tags.add(id3.TIT2(3, text="Title"))
    tags.add(id3.TCON(encoding, text=text))
    tags.save(path, v2_version=version, v23_sep=None)
    assert read_fields(path)["genre"] == expected
    data, view = path.read_bytes(), shown(path)
    try:
        write_fields(path, {"genre": ["Jazz"]})
    except ValueError as error:  # other values would be shown after undoing it
        assert len(expected) > 1 or text in ("(RX)", "80s")
        assert path.name in str(error) and "restored" in str(error) and path.read_bytes() == data
    else:
        assert shown(path)["genre"] == "Jazz"
        write_fields(path, {"genre": expected})
        assert shown(path) == view or not text


@pytest.mark.parametrize("version", [3, 4])
def test_a_slash_separates_in_version_3_only(version, sounds, tmp_path):
    path, tags = tmp_path / "a.mp3", id3.ID3()
    path.write_bytes(sounds["mp3"])
    tags.add(id3.TCON(0, text="Rock/Pop"))
    tags.save(path, v2_version=version)
    assert read_fields(path)["genre"] == (["Rock", "Pop"] if version == 3 else ["Rock/Pop"])
    there_and_back(path, genre=["Jazz"])


@pytest.mark.parametrize("suffix", ["mp3", "wav", "aiff", "flac", "ogg", "m4a"])
@pytest.mark.parametrize("key", ["MOOD", "Mood", "mood"])
def test_a_mood_of_any_case(key, suffix, sounds, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(sounds[suffix])
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    if suffix == "m4a":
        file.tags[f"----:com.apple.iTunes:{key}"] = [MP4FreeForm(b"sad")]
    elif suffix in ("flac", "ogg"):
        file.tags[key] = ["sad"]
    else:
        file.tags.add(id3.TXXX(3, desc=key, text=["sad"]))
    file.save()
    assert read_fields(path)["mood"] == ["sad"]
    there_and_back(path, mood=["calm"])


def test_the_mood_frame_of_version_4(sounds, tmp_path):
    path, tags = tmp_path / "a.mp3", id3.ID3()
    path.write_bytes(sounds["mp3"])
    tags.add(id3.TMOO(3, text=["sad", "calm"]))
    tags.save(path)
    view = shown(path)
    write_fields(path, {"mood": ["happy"]})
    assert read_fields(path)["mood"] == ["happy"] and shown(path)["TMOO"] == "happy"
    write_fields(path, {"mood": ["sad", "calm"]})
    assert shown(path) == view and id3.ID3(path)["TMOO"].text == ["sad", "calm"]


@pytest.mark.parametrize(
    "data_size, riff_size", [(0xFFFFFFFF, 0xFFFFFFFF), (20_000, None), (0, 0), (0xFFFFFFFF, None), (None, 100)]
)
def test_a_wav_whose_sizes_are_wrong(data_size, riff_size, sounds, tmp_path):
    path, data = tmp_path / "a.wav", bytearray(sounds["wav"])
    at = data.index(b"data") + 4
    if data_size is not None:
        data[at : at + 4] = struct.pack("<I", data_size)
    if riff_size is not None:
        data[4:8] = struct.pack("<I", riff_size)
    path.write_bytes(data)
    try:
        there_and_back(path, genre=["Jazz"])
    except ValueError as error:
        assert str(path) in str(error) and path.read_bytes() == data


def test_a_wav_with_a_list_of_info(tmp_path):
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        file.title, file.genre = "Title", "Rock"
        file.write(WAVE)
    assert read_fields(path)["genre"] == ["Rock"]
    there_and_back(path, genre=["Jazz"])


@pytest.mark.parametrize("suffix, genre, message", [("aac", "Jazz", "not written"), ("mp3", "80s", "'Folk', not as")])
def test_what_no_player_would_find_is_refused(suffix, genre, message, sounds, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(sounds[suffix])
    with pytest.raises(ValueError, match=message) as error:
        write_fields(path, {"genre": [genre]})
    assert str(path) in str(error.value) and path.read_bytes() == sounds[suffix]


def test_an_id3v1_tag_that_is_not_ascii_is_not_replaced(sounds, tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(sounds["mp3"] + id3v1(17, b"caf\xe9"))
    with pytest.raises(ValueError, match="another title"):
        write_fields(path, {"genre": ["Jazz"]})
    assert path.read_bytes() == sounds["mp3"] + id3v1(17, b"caf\xe9")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\r", "\r\n"])
def test_a_mapping_from_a_spreadsheet(line_end, encoding, tmp_path):
    library, path = SimpleNamespace(labels=["a", "b"], folder=tmp_path), tmp_path / "mapping.csv"
    path.write_bytes("value,label,field,\nÜ,a,mood,\n,,,\n,b,,\n".replace("\n", line_end).encode(encoding))
    assert load_mapping(library).rows() == [("a", "mood", "Ü")]
    for text, message in (
        ("label;field;value\na;mood;Ü\n", "separated by ',' here, not by ';'"), ("", "is empty"),
        ("label,field,value\na,mood,Ü,Ö\n", "line 2 has 4"), ("label,field,value\nc,mood,Ü\n", "unknown label"),
        ('label,field,value\na,"mood,Ü\n', "quotes in line 2"),
    ):  # fmt: skip
        path.write_bytes(text.replace("\n", line_end).encode(encoding))
        with pytest.raises(ValueError, match=f"mapping.csv: .*{message}"):
            load_mapping(library)


def test_only_genres_and_moods_are_mapped_by_default():
    "Labels of any other category, which look like those of Discogs, need a table."
    labels = ["Genre---Rock", "Mood---Happy", "Instrument---Guitar", "Voice---Female", "Dance---Jig", "House"]
    assert default_mapping(labels)["field"].to_list() == ["genre", "mood", "", "", "", ""]
    for count in (400, 519):
        assert set(default_mapping(label_names(count))["field"]) == {"genre"}
    for model in ("maest-10s-scores", "maest-30s-tunes"):
        assert set(default_mapping(load_model(model).config.labels)["field"]) == {""}


def test_a_model_without_genres_asks_for_a_mapping(tmp_path):
    "So does a table that maps nothing; the one that was made can be filled in."
    library = SimpleNamespace(labels=["Dance---Jig", "Mode---Major"], folder=tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)mapping.csv: maps none .*Dance---Jig.*`field`.*--mapping") as error:
            load_mapping(library)
    assert str(tmp_path) in str(error.value)
    file = tmp_path / "mapping.csv"
    assert pl.read_csv(file).fill_null("").rows() == [("Dance---Jig", "", "Jig"), ("Mode---Major", "", "Major")]
    file.write_text(file.read_text().replace('"",Jig', "genre,Irish"))
    assert load_mapping(library).rows() == [("Dance---Jig", "genre", "Irish")]


def test_my_tags_from_a_spreadsheet(tmp_path):
    tags, songs = MyTags(SimpleNamespace(folder=tmp_path)), pl.DataFrame({"path": ["/m/\xe9.mp3"], "content": ["c"]})
    for name in ("/m/e\u0301.mp3", "/m/./\xe9.mp3", "/x/../m/\xe9.mp3"):
        tags.file.write_text(f"path,tag,is_positive,content,\n{name},mine,TRUE,,\n", "utf-16")
        assert tags.labels("mine", songs).tolist() == [1]
    tags.label("mine", songs, None)
    assert tags.names == []
    for text, message in (
        ("tag;is_positive;path;content\n", "not by ';'"), ("tag,is_positive,path,content\nx,yes,p,c\n", "is 'yes'"),
        ("tag,is_positive,path,content,why\n", "remove the others"), ("tag,is_positive,path,content\nx\n", "line 2"),
    ):  # fmt: skip
        tags.file.write_text(text)
        with pytest.raises(ValueError, match=f"my_tags.csv: .*{message}"):
            tags.names  # noqa: B018
