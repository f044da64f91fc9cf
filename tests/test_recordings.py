"""A corpus of recordings: what may be used, by tags and credits, each track once, resumed and extended."""

import os

import numpy as np
import polars as pl
import pytest
import soundfile

import maestlib as ml
from maestlib.audio import extract
from maestlib.audio.store import MelStore, verify_store
from maestlib.core.files import asset_path
from maestlib.datasets.recordings import (
    CreditsTable,
    build_recordings,
    check_license,
    license_kind,
    list_recording_sources,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX")
HEADER = "path,title,author,license,source\n"


def write(path, seed=0, seconds=11.0, **tags):
    "A quiet chord of its own, struck twice a second, in the format that the name says."
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.arange(int(seconds * 16_000))
    tones = [np.sin(2 * np.pi * hz / 16_000 * samples) for hz in np.random.default_rng(seed).uniform(100, 4000, 6)]
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        for key, text in tags.items():
            setattr(file, key, text)
        file.write(0.04 * sum(tones) * np.exp(-(samples % 8000) / 3000))


def build(folder, **options):
    card, left_out = build_recordings(folder, folder.parent / "store", num_workers=0, **options)
    assert card.equals(pl.read_parquet(folder.parent / "store/card.parquet"))
    assert left_out.equals(pl.read_parquet(folder.parent / "store/left_out.parquet"))
    return {row["path"]: row for row in card.to_dicts()}, dict(left_out.iter_rows())


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "music"
    write(folder / "tagged.flac", 1, title="A Title", artist="Ann", license="CC BY-SA 4.0")
    write(folder / "pack/plain.wav", 2)
    (folder / "credits.csv").write_text(HEADER + "pack/*,,Ben,GPL-2+,a package\n")
    return folder


def test_tags_come_before_credits_and_a_path_before_patterns(folder):
    write(folder / "pack/own.ogg", 3, artist="Own", copyright="2001 Own")
    text = HEADER + "*,,,CC BY-NC 4.0,all\npack/own.ogg,Named,Else,MIT,\ntagged.flac,,,CC0,\npack/*,,Ben,GPL-2+,late\n"
    (folder / "credits.csv").write_text(text)
    card, left_out = build(folder)
    assert card["tagged.flac"] | {"seconds": 0, "split": ""} == {
        "path": "tagged.flac", "title": "A Title", "author": "Ann", "license": "CC BY-SA 4.0", "source": "all",
        "seconds": 0, "split": "",
    }  # fmt: skip
    own = card["pack/own.ogg"]
    assert [own[key] for key in ("title", "author", "license", "source")] == ["Named", "Own", "MIT", "all"]
    assert own["seconds"] == pytest.approx(11, abs=0.1)
    assert left_out.keys() == {"pack/plain.wav"} and "'CC BY-NC 4.0', is none of" in left_out["pack/plain.wav"]


def test_what_may_not_be_used_is_reported(folder):
    write(folder / "nobody.wav", 3)
    write(folder / "nc.ogg", 4, license="http://creativecommons.org/licenses/by-nc-nd/3.0/")
    write(folder / "pack/contradiction.flac", 5, license="All rights reserved")
    write(folder / "pack/short.wav", 6, seconds=3)
    (folder / "pack/damaged.ogg").write_bytes(b"OggS" + bytes(1000))
    card, left_out = build(folder)
    assert [*card] == ["pack/plain.wav", "tagged.flac"]
    reasons = {"nobody.wav": "no licence", "nc.ogg": "by-nc-nd", "pack/contradiction.flac": "All rights reserved"}
    reasons |= {"pack/short.wav": "3.0 s long", "pack/damaged.ogg": "damaged.ogg"}
    assert left_out.keys() == reasons.keys()
    assert all(reason in left_out[path] for path, reason in reasons.items())
    card, left_out = build(folder, licenses=("GPL",))
    assert [*card] == ["pack/plain.wav"] and "is none of GPL" in left_out["tagged.flac"]
    with pytest.raises(ValueError, match=f"{folder}: none of its 7 audio files may be used; the first is nc.ogg"):
        build(folder, licenses=("ISC",))


@POSIX
def test_a_name_that_is_not_utf8_is_reported(folder):
    os.rename(folder / "tagged.flac", os.fsencode(folder) + b"/caf\xe9.flac")
    card, left_out = build(folder)
    assert [*card] == ["pack/plain.wav"] and "UTF-8" in left_out["caf\\xe9.flac"]


def test_only_new_files_are_extracted(folder, monkeypatch):
    "Whatever their names; what is no longer accepted leaves the card, not the store."
    first, _ = build(folder)
    read, load = [], extract.logmel
    monkeypatch.setattr(extract, "logmel", lambda wave, config: read.append(len(wave)) or load(wave, config))
    assert build(folder)[0] == first and not read
    write(folder / "a first.wav", 7)
    (folder / "credits.csv").write_text(HEADER + "a*,,Cem,BSD,\npack/*,,,no idea,\n")
    card, left_out = build(folder)
    assert len(read) == 1 and [*card] == ["a first.wav", "tagged.flac"] and [*left_out] == ["pack/plain.wav"]
    assert card["tagged.flac"] == first["tagged.flac"]
    store = MelStore(folder.parent / "store")
    assert store.lookup([*card]).tolist() == [2, 1] and len(store) == 3 and not len(verify_store(store.path))


def test_a_killed_extraction_is_resumed(folder, monkeypatch):
    for i in range(2, 6):
        write(folder / f"pack/{i}.wav", i + 10)
    load, read = extract.logmel, []

    def stop(wave, config):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(wave)
        return load(wave, config)

    monkeypatch.setattr(extract, "logmel", stop)
    with pytest.raises(KeyboardInterrupt):
        build(folder)
    assert not (folder.parent / "store/card.parquet").exists()
    monkeypatch.undo()
    assert len(build(folder)[0]) == 6


def test_a_track_that_is_there_twice(folder):
    "By title and author, or by its sound: in another format, under another title."
    write(folder / "z/again.ogg", 1, title="Other")
    write(folder / "z/and again.mp3", 1)
    write(folder / "z/remix.wav", 8, title="a title", artist="ANN", license="CC0")
    write(folder / "z/else.wav", 9)
    write(folder / "z/longer.flac", 1, seconds=12)
    (folder / "credits.csv").write_text(HEADER + "*,,,CC0,\n")
    card, left_out = build(folder)
    assert left_out == dict.fromkeys(("z/again.ogg", "z/and again.mp3", "z/remix.wav"), "the same track as tagged.flac")
    assert [*card] == ["pack/plain.wav", "tagged.flac", "z/else.wav", "z/longer.flac"]


def test_the_split_depends_on_title_and_author_alone(folder):
    for i in range(12):
        write(folder / f"more/{i}.flac", 20 + i, seconds=1, title=f"Song {i}", artist="Dee", license="CC0")
    options = dict(min_s=0.5, validation=0.5)
    splits = {row["title"]: row["split"] for row in build(folder, **options)[0].values()}
    assert set(splits.values()) == {"train", "validation"} and len(splits) == 14
    os.rename(folder / "more", folder / "elsewhere")
    os.rename(folder.parent / "store", folder.parent / "old")
    (folder / "tagged.flac").unlink()
    again = {row["title"]: row["split"] for row in build(folder, **options)[0].values()}
    assert again == {title: split for title, split in splits.items() if title != "A Title"}


def test_licenses_are_read_as_they_are_written():
    for text, kind in (
        ("CC-BY-SA-3.0+", "CC BY-SA"), ("cc0", "CC0"), ("CC0-1.0", "CC0"), ("GPLv2/3", "GPL"), ("Expat", "MIT"),
        ("BSD-2-Clause", "BSD"), ("Creative Commons: By Attribution 4.0 License", "CC BY"), ("OGA-BY 3.0", None),
        ("http://creativecommons.org/licenses/publicdomain/", "public domain"), ("CC BY-SA-NC", "CC BY-NC-SA"),
        ("GFDL-1.3", None),
        ("CC BY-ND 3.0", "CC BY-ND"), ("Attribution-NonCommercial 3.0", None), ("", None), ("permitted by Ann", None),
    ):  # fmt: skip
        assert license_kind(text) == kind, text
    assert not check_license("CC BY-NC 3.0 or GPL-2+") and not check_license("ISC") and check_license(None)
    assert all(check_license(text) for text in ("CC BY-NC-SA 4.0", "CC BY-ND 3.0", "unknown", "GFDL-1.3"))


def test_brackets_of_credits_are_no_pattern(tmp_path):
    (tmp_path / "c.csv").write_text(HEADER + "Live [2020]/*,,Ben,CC BY,\nLive [2020]/a.mp3,A,,,\n")
    found = CreditsTable(tmp_path / "c.csv")
    assert found.find("Live [2020]/a.mp3") == {"title": "A", "author": "Ben", "license": "CC BY"}
    assert found.find("Live 2/a.mp3") == {}


def test_credits_without_a_column_name_the_file(tmp_path):
    (tmp_path / "c.csv").write_text("path,license\na,CC0\n")
    with pytest.raises(ValueError, match=r"c.csv: no column title, author, source"):
        CreditsTable(tmp_path / "c.csv")


def test_the_sources_that_are_listed():
    sources = list_recording_sources()
    assert set(sources["kind"]) == {"Debian", "GitHub"} and sources["name"].n_unique() == len(sources) > 80
    assert not any(map(check_license, sources["licenses"].str.split("; ").explode()))
    assert sources.filter((pl.col("kind") == "Debian") == pl.col("suite").is_null()).is_empty()


def test_the_bundled_model_and_its_tables_belong_together():
    model = ml.load_model()
    merged = pl.read_csv(asset_path("recordings-labels.csv"))
    assert merged["label"].to_list() == list(model.config.labels) and len(model.thresholds) == len(merged)
    assert {label.split("---")[0] for label in merged["label"]} >= {"Genre", "Mood", "Instrument", "Voice"}
    tracks = pl.read_parquet(asset_path("recordings-tracks.parquet"))
    assert {check_license(text) for text in tracks["license"].unique()} == {""}
    assert tracks.null_count().sum_horizontal().item() == 0 and not tracks["author"].str.contains("@").any()


def test_the_bundled_model_hears_a_recording_and_a_rendered_tune_differently():
    tags = [dict(ml.tag(asset_path(f"hear/clips/{name}.mp3"), top=None).iter_rows()) for name in ("lofi", "jig")]
    assert tags[0]["Tempo---Slow"] > 2 * tags[1]["Tempo---Slow"]
    assert max(tags[0], key=tags[0].get) in {"Genre---Ambient", "Tempo---Slow", "Instrument---Flute"}
