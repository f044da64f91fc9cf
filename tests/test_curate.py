"""Discogs dumps against the standard library, broken and hostile files, and the guarantees of splits and sampling."""

import gzip
import os
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from maestlib.core.files import asset_path
from maestlib.datasets import curate as c
from maestlib.datasets import discogs, splits
from maestlib.datasets.discogs import InvalidDump

FULL = Path(os.environ.get("MAESTLIB_DATA", "/nonexistent"), "discogs")
FILES = [(asset_path("discogs_masters.xml.gz"), asset_path("discogs_releases.xml.gz"))]
if FULL.is_dir():
    FILES.append(tuple(next(FULL.glob(f"*{kind}.xml.gz")) for kind in ("masters", "releases")))


@pytest.fixture(scope="module", params=FILES, ids=lambda files: files[0].name)
def dumps(request):
    masters, releases = request.param
    trees = [ET.fromstring(gzip.decompress(path.read_bytes())) for path in request.param]
    return discogs.read_masters(masters), discogs.read_releases(releases), *trees


def shared_artists(tracks):  # how many are in two splits
    named = tracks.with_columns(splits.drop_placeholder_artists("artists")).explode("artists").drop_nulls("artists")
    return named.group_by("artists").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1).height


def texts(record, path):
    return [e.text for e in record.findall(path)]


def seconds(text):
    return sum(int(p) * 60**i for i, p in enumerate(reversed(text.split(":")))) if text else None


def leaf_tracks(record):  # tracks and movements, without headings and index tracks
    tracks = [t for t in record.iter("track") if t.find("sub_tracks") is None]
    return [t for t in tracks if t.findtext("position") or t.findtext("duration")]


def test_tables_equal_what_the_standard_library_reads(dumps):
    masters, releases, master_tree, release_tree = dumps
    for table, tree, key, year in (
        (masters, master_tree, "master_id", "year"),
        (releases, release_tree, "release_id", "released"),
    ):
        for row, record in zip(table.iter_rows(named=True), tree, strict=True):
            assert row[key] == int(record.get("id")) and row["title"] == record.findtext("title")
            assert row["year"] == (int((record.findtext(year) or "0")[:4]) or None)
            assert row["artist_ids"] == [int(i) for i in texts(record, "artists/artist/id")]
            assert row["artists"] == texts(record, "artists/artist/name")
            assert row["genres"] == texts(record, "genres/genre") and row["styles"] == texts(record, "styles/style")
    assert masters["main_release"].to_list() == [int(r.findtext("main_release")) for r in master_tree]
    assert releases["master_id"].to_list() == [int(r.findtext("master_id") or 0) or None for r in release_tree]
    assert releases["seconds"].to_list() == [
        [seconds(t.findtext("duration")) for t in leaf_tracks(r)] for r in release_tree
    ]
    assert releases["track_artists"].to_list() == [
        [texts(t, "artists/artist/name") for t in leaf_tracks(r)] for r in release_tree
    ]


def test_labels_and_drops_agree_with_plain_python(dumps):
    masters, releases, master_tree, release_tree = dumps
    work = {r: int(r.findtext("master_id") or -int(r.get("id"))) for r in release_tree}
    work |= {m: int(m.get("id")) for m in master_tree}
    styles, genres, pool = defaultdict(set), defaultdict(set), Counter()
    for record, w in work.items():
        styles[w] |= {*texts(record, "styles/style")}
        genres[w] |= {*texts(record, "genres/genre")}
    tracks = [(work[r], seconds(t.findtext("duration"))) for r in release_tree for t in leaf_tracks(r)]
    pool.update(w for w, s in tracks if s and s > 20)
    listed = defaultdict(list)
    for line in asset_path("discogs_519.txt").read_text(encoding="utf8").splitlines():
        listed[line.split("---")[1]].append(line.split("---")[0])
    votes = defaultdict(Counter)
    for record in work:
        for style in {*texts(record, "styles/style")} - {*listed}:
            votes[style].update({g: 1 / len(texts(record, "genres/genre")) for g in texts(record, "genres/genre")})
    listed.update((s, [min(v, key=lambda g: (-round(v[g], 6), g))]) for s, v in votes.items())
    labels = {w: {f"{g}---{s}" for s in styles[w] for g in (genres[w] & {*listed[s]} or listed[s][:1])} for w in styles}
    counts = Counter()
    for w, n in pool.items():
        counts.update({label: n for label in labels[w]})
    k = 60
    frequent = {label for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:k]}

    def reason(w, s):
        return next(
            i
            for i, holds in enumerate(
                (
                    w not in styles,
                    s is None,
                    (s or 0) <= 20,
                    not styles[w],
                    len(styles[w]) > 5,
                    not labels[w] & frequent,
                    True,
                )
            )
            if holds
        )

    dropped = Counter(reason(w, s) for w, s in tracks)
    table, drops = c.curate(masters, releases, discogs.catalogue_from_tracklists(releases), num_labels=k)
    assert drops["dropped_tracks"].to_list() == [0, *(dropped[i] for i in range(6))]
    assert table.height == dropped[6] and drops["step"].to_list() == ["pool", *c.DROP_REASONS]
    assert all(row["labels"] == sorted(labels[row["work"]] & frequent) for row in table.iter_rows(named=True))
    assert Counter(table["labels"].explode()) == Counter(
        label for w, s in tracks if reason(w, s) == 6 for label in labels[w] & frequent
    )
    assert shared_artists(table) == 0


# Broken and hostile files

RELEASES = asset_path("discogs_releases.xml.gz")


@pytest.mark.parametrize("out", [None, "out.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "truncated xml", "tag", "empty"])
def test_a_broken_dump_names_the_last_record_and_saves_those_before(damage, out, tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "cache"))
    packed, plain = RELEASES.read_bytes(), gzip.decompress(RELEASES.read_bytes())
    half = len(packed) // 2
    path = tmp_path / f"broken.xml{'.gz' if damage in ('truncated', 'corrupt') else ''}"
    path.write_bytes(
        {
            "truncated": packed[:half],
            "corrupt": packed[:half] + b"\xff" * 64 + packed[half + 64 :],
            "truncated xml": plain[: len(plain) // 2],
            "tag": plain.replace(b"</release>", b"</relase>", 101).replace(b"</relase>", b"</release>", 100),
            "empty": b"",
        }[damage]
    )
    with pytest.raises(
        ValueError, match=r"broken\.xml.*truncated or corrupt after record \d+ \(release \w+\)"
    ) as error:
        discogs.read_releases(path, out=tmp_path / out if out else None)
    assert "\n" not in str(error.value)
    count = int(str(error.value).split("after record ")[1].split()[0])
    [saved] = tmp_path.rglob("*.partial.parquet")
    assert str(saved) in str(error.value) and not (tmp_path / "out.parquet").exists()
    complete = discogs.read_releases(RELEASES)
    assert pl.read_parquet(saved).equals(complete.head(count))
    assert count == {"tag": 100, "empty": 0}.get(damage, count) and (count >= 90 or damage == "empty")
    if count:
        assert f"(release {complete['release_id'][count - 1]})" in str(error.value)


def test_plain_or_gzipped_lazy_or_eager_the_table_is_the_same(tmp_path):
    plain = tmp_path / "releases.xml"
    plain.write_bytes(gzip.decompress(RELEASES.read_bytes()))
    lazy = discogs.read_releases(plain, out=tmp_path / "releases.parquet")
    assert isinstance(lazy, pl.LazyFrame) and lazy.collect().equals(discogs.read_releases(RELEASES))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["releases.parquet", "releases.xml"]


RECORD = """<?xml version="1.0"?><!-- a dump --><?page 1?><releases><count>1</count><!-- 1 --><release id="7">{noise}
<artists>{noise}<artist>{noise}<name>A &amp; {noise}B</name><join>,</join><id>3</id></artist>{noise}</artists>{noise}
<title>T{noise}itle</title><styles>{noise}<style><![CDATA[R&B]]></style></styles><genres><genre>Rock</genre></genres>
<related><release id="9"/></related><tracklist>{noise}<track>{noise}<duration>1:00</duration><position>1</position>
<artists><artist><anv/><name>C</name></artist></artists></track></tracklist></release>{noise}
<release id="8"/></releases>"""


@pytest.mark.parametrize("noise", ["", "<!-- kept -->", "<?page break?>"])
def test_children_are_found_by_name(noise, tmp_path):
    path = tmp_path / "releases.xml"
    path.write_text(RECORD.format(noise=noise))
    row, empty = discogs.read_releases(path).rows()
    assert row == (7, None, "Title", None, [3], ["A & B"], ["Rock"], ["R&B"], [60], [["C"]])
    assert empty == (8, None, None, None, [], [], [], [], [], [])


def test_a_record_that_never_ends_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "cache"))
    path, styles = tmp_path / "releases.xml.gz", b"<style>x</style>" * 10_000
    with gzip.open(path, "wb", 1) as file:
        file.write(b'<releases><release id="1"/><release id="7"><styles>')
        file.writelines(styles for _ in range(240))  # 2.4 million children, 37 MiB
    with pytest.raises(ValueError, match=r"after record 1 \(release 1\): the next release is longer than 32 MiB"):
        discogs.read_releases(path)


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE masters [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY x "&b;&b;&b;&b;">]>',
        '<!DOCTYPE masters [<!ENTITY x SYSTEM "file://{secret}">]>',
        '<!DOCTYPE masters SYSTEM "file://{secret}">',
    ],
)
def test_a_document_type_is_refused(doctype, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    path, entity = tmp_path / "masters.xml", "&x;" if "ENTITY" in doctype else ""
    head = doctype.format(secret=secret)
    path.write_text(f'{head}<masters><master id="1"><title>{entity}</title></master></masters>')
    with pytest.raises(InvalidDump, match="DOCTYPE") as error:
        discogs.read_masters(path, out=tmp_path / "out.parquet")
    assert "the secret" not in str(error.value) and {p.name for p in tmp_path.iterdir()} == {"secret", "masters.xml"}


def test_another_dump_and_a_missing_file_are_refused():
    with pytest.raises(InvalidDump, match="<releases>"):
        discogs.read_masters(RELEASES)
    with pytest.raises(FileNotFoundError, match="nowhere.xml"):
        discogs.read_masters("/nowhere.xml")


# Catalogues


@pytest.mark.parametrize(
    "lines, message",
    [
        (["track_id,path,duration_s", "a,a.wav,30"], "master_id or release_id"),
        (["track_id,master_id,duration_s", "a,1,30"], "no column path"),
        (["track_id,path,release_id,duration_s", "a,a.wav,1,30", "a,b.wav,2,30"], "'a' occurs more than once"),
        (["track_id,path,release_id,duration_s", "a,a.wav,r7,30"], "release_id is 'r7' for track a"),
        (["track_id,path,release_id,duration_s", "a,a.wav,1,30", "b,./a.wav,2,30"], "file 'a.wav' is in two rows"),
        (["track_id,path,release_id,duration_s", "a,a.wav,1,30,9"], "line 2 has 5 fields"),
    ],
)
def test_a_malformed_catalogue_is_refused_with_its_path(lines, message, tmp_path):
    path = tmp_path / "catalogue.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as error:
        c.read_catalogue(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_catalogue_tracks_match_by_master_or_release(tmp_path):
    masters, releases = discogs.read_masters(asset_path("discogs_masters.xml.gz")), discogs.read_releases(RELEASES)
    tracks = pl.DataFrame(
        {
            "track_id": ["a", "b", "c", "d", "e"],
            "path": ["a.wav", "b.wav", "c.wav", "d.wav", "e.wav"],
            "master_id": [113, None, None, 10**9, None],
            "release_id": [None, 1, 10**9, None, None],
            "artist": [None, "A guest", None, None, None],
            "duration_s": [30.0, 21, 99, 99, 99],
        }
    )
    tracks.write_parquet(tmp_path / "catalogue.parquet")
    table, drops = c.curate(masters, releases, c.read_catalogue(tmp_path / "catalogue.parquet"), validation=0, test=0)
    assert dict(drops.select("step", "dropped_tracks").rows())["not in the dumps"] == 3
    assert table["work"].to_list() == [113, 1660109] and table["split"].to_list() == ["train", "train"]
    assert table["artists"].to_list() == [["Vince Watson"], ["A guest", "The Persuader"]]
    labels = [["Tech House", "Techno"], ["Deep House"]]
    assert table["labels"].to_list() == [[f"Electronic---{style}" for style in styles] for styles in labels]
    assert c.curate(masters, releases, tracks, vocabulary=["Electronic---Techno"], test=0, validation=0)[0].height == 1


# Splits


def made_catalogue(n=20_000, seed=1):
    random = np.random.default_rng(seed)
    artists = [[f"artist {int(a)}" for a in n / 4 * random.power(0.6, 2 if i % 12 == 0 else 1)] for i in range(n)]
    artists = [["Various"] if i % 20 == 0 else a for i, a in enumerate(artists)]
    labels = [[f"G---{int(s)}" for s in {*(40 * random.power(0.5, 2)).astype(int)}] for _ in range(n)]
    return pl.DataFrame(
        {"track_id": [f"t{i}" for i in range(n)], "artists": artists, "labels": labels, "work": np.arange(n) // 8}
    )


def test_splits_are_disjoint_stratified_and_seeded():
    tracks = splits.artist_split(made_catalogue(), validation=2000, test=0.1)
    splits_of = defaultdict(set)
    for names, split in tracks.select("artists", "split").rows():
        for name in names:
            splits_of[name].add(split)
    assert splits_of.pop("Various") == {"train", "validation", "test"}  # it ties nothing together
    assert all(len(found) == 1 for found in splits_of.values())
    assert (
        tracks.filter(pl.col("artists").list.contains("Various"))
        .group_by("work")
        .agg(pl.col("split").n_unique())["split"]
        .max()
        == 1
    )
    size = dict(tracks["split"].value_counts().rows())
    assert all(abs(size[name] - 2000) < 100 for name in ("validation", "test"))
    each = tracks.explode("labels").group_by("labels").agg(pl.len().alias("n"), (pl.col("split") == "test").mean())
    assert (each.filter(pl.col("n") > 300)["split"] - 0.1).abs().max() < 0.02
    again = splits.artist_split(made_catalogue().sample(fraction=1, shuffle=True, seed=5), validation=2000, test=0.1)
    assert (
        splits.split_fingerprint(again)
        == splits.split_fingerprint(tracks)
        != splits.split_fingerprint(splits.artist_split(made_catalogue(), 2000, 0.1, seed=1))
    )


def test_a_giant_component_goes_to_training_and_is_reported(capsys):
    with_hub = pl.concat_list("artists", pl.lit("The hub"))
    artists = pl.when(pl.int_range(pl.len()) < 6000).then(with_hub).otherwise("artists")
    tracks = made_catalogue().with_columns(artists.alias("artists"))
    tracks = splits.artist_split(tracks)
    assert "in training: 1 of" in capsys.readouterr().out
    assert {*tracks.filter(pl.col("artists").list.contains("The hub"))["split"]} == {"train"}
    assert np.bincount(splits.artist_components(tracks)).max() >= 6000 and shared_artists(tracks) == 0


def test_held_out_splits_of_more_than_half_are_refused():
    with pytest.raises(ValueError, match="validation=5000"):
        splits.artist_split(made_catalogue(2000), validation=5000)


# Balanced sampling


def test_weights_follow_the_paper():
    tracks = made_catalogue()
    counts = Counter(tracks["labels"].explode())
    expected = [sum(1000 / (counts[label] + 100) for label in labels) for labels in tracks["labels"]]
    names = sorted(counts)
    hot = np.array([[name in labels for name in names] for labels in tracks["labels"].to_list()], float)
    assert np.allclose(splits.balanced_weights(hot), expected)


def test_draws_are_seeded_without_replacement_and_by_weight():
    weights = np.array([1.0, 2, 3, 4, 0] * 200)
    draw = splits.sample_balanced(weights, n=100, epoch=1)
    assert len({*draw}) == 100 and (draw == splits.sample_balanced(weights, n=100, epoch=1)).all()
    assert {*splits.sample_balanced(weights, n=10_000)} == {*np.flatnonzero(weights)}
    assert (np.sort(draw) != np.sort(splits.sample_balanced(weights, n=100, epoch=2))).any()
    assert (np.sort(draw) != np.sort(splits.sample_balanced(weights, n=100, epoch=1, seed=1))).any()
    drawn = np.concatenate([splits.sample_balanced(weights, n=10, epoch=e) for e in range(3000)])
    counts = np.bincount(drawn, minlength=1000)
    fraction = counts.reshape(-1, 5).sum(0) / counts.sum()
    assert np.abs(fraction - np.array([0.1, 0.2, 0.3, 0.4, 0])).max() < 0.01  # 10 of 800: nearly with replacement
