"""Heads: trained from a table, stored in a file, read by everything that shows tags."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import one_thread, tiny_model, write_tone  # noqa: F401
from safetensors.torch import save_file

from maestlib.collection.cli import main
from maestlib.collection.library import Library
from maestlib.collection.scan import LibraryReader, scan
from maestlib.collection.search import SongIndex
from maestlib.inference.embedding import embed, make_embedder, tag
from maestlib.inference.heads import HEAD_FORMAT, Head, HeadConfig, load_head, resolve_heads, save_head
from maestlib.inference.jobs import model_fingerprint
from maestlib.models.checkpoint import save_checkpoint
from maestlib.models.export import export_onnx, export_torch
from maestlib.models.patchout import Patchout

pytest.importorskip("sklearn")
from maestlib.probing import heads  # noqa: E402
from maestlib.probing.heads import train_head  # noqa: E402

LABELS = ("Dance---Jig", "Dance---Reel")


@pytest.fixture(scope="module")
def model():
    model = tiny_model(LABELS)
    model.thresholds = (0.6, 0.4)
    return model


@pytest.fixture(scope="module")
def music(tmp_path_factory, model):
    "Tones, low or high, steady or pulsed, by eight artists; one of two windows; a test song; a broken file."
    folder, rows = tmp_path_factory.mktemp("music"), []
    for i in range(32):
        high, pulsed = i % 2 == 1, i // 2 % 2 == 1
        write_tone(folder / f"{i:02}.wav", 7 if i == 5 else 1.5, high, i, pulsed)
        labels = ["high" if high else "low"] + ["pulsed"] * pulsed + ["rare"] * (i < 3) + ["solo"] * (i < 4)
        rows.append((f"{i:02}.wav", f"artist {i // 4}", ";".join(labels), "train"))
    (folder / "broken.wav").write_text("no audio")
    write_tone(folder / "test.wav", 1, True, 99)
    rows += [("broken.wav", "artist 0", "high", "train"), ("test.wav", "artist 9", "low", "test")]
    table = pl.DataFrame(rows, ["path", "artist", "labels", "split"], orient="row")
    table.write_csv(folder / "tags.csv")
    save_checkpoint(model, folder / "m.safetensors")
    return folder


@pytest.fixture(scope="module")
def trained(music, model):
    options = dict(min_positives=4, embeddings=music / "e.parquet")
    return train_head(music / "tags.csv", model, out=music / "tones.safetensors", **options)


def random_head(model, seed: int, labels=("a", "b"), blocks=(1,), tokens="cdt", **config) -> Head:
    torch.manual_seed(seed)
    vectors = sum(9 if token in "rs" else 1 for token in tokens)
    size = len(blocks) * vectors * model.config.embed_dim
    config = dict(fingerprint=model_fingerprint(model), thresholds=[0.5] * len(labels), name=f"head{seed}") | config
    head = Head(HeadConfig(labels, blocks, tokens, size, **config))
    head.mean.normal_()
    head.scale.uniform_(0.5, 2)
    return head.requires_grad_(False).eval()


def activations_of(path, model, heads, **options) -> dict[str, float]:
    tags = tag(path, model, top=None, heads=heads, dtype="float32", **options)
    return dict(tags.select("label", "activation").iter_rows())


def test_a_trained_head_ranks_recordings_it_has_not_seen(trained, model, tmp_path, music):
    assert trained.config.labels == ("high", "low", "pulsed")
    ranked = {label: [] for label in ("high", "low", "pulsed")}
    for i in range(12):
        write_tone(tmp_path / f"{i}.wav", 2, i % 2 == 1, 1000 + i, i // 2 % 2 == 1)
        found = activations_of(tmp_path / f"{i}.wav", model, trained)
        for label, truth in (("high", i % 2), ("low", 1 - i % 2), ("pulsed", i // 2 % 2)):
            ranked[label].append((found[label], truth))
    for label, pairs in ranked.items():
        positives, negatives = ([value for value, truth in pairs if truth == kind] for kind in (1, 0))
        assert np.mean([p > n for p in positives for n in negatives]) > 0.9, label


def test_provenance_is_in_the_file(trained, music):
    config = load_head(music / "tones.safetensors").config
    assert config == trained.config and config.name == "tones"
    provenance = config.provenance
    assert (provenance["table"], provenance["recordings"], provenance["artists"]) == ("tags.csv", 32, 8), "no test song"
    scores = {row["name"]: row for row in provenance["scores"]}
    assert scores["high"]["positives"] == 16 and scores["pulsed"]["positives"] == 16
    assert all(scores[label]["roc_auc"] > 0.9 and scores[label]["map"] > 0.9 for label in config.labels)
    assert str(music) not in json.dumps(config.to_dict()), "no folder of a person"


def test_rare_labels_are_named(music, model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("maestlib.core.files.log.propagate", True)
    options = dict(min_positives=4, embeddings=music / "e.parquet")
    train_head(music / "tags.csv", model, out=tmp_path / "a.safetensors", **options)
    message = next(record.getMessage() for record in caplog.records if "left out" in record.getMessage())
    assert "rare (3)" in message and "solo (4)" in message and "pulsed" not in message, "of few songs; of one artist"
    with pytest.raises(ValueError, match="fewer than 17 recordings.*high.*low.*give a lower min_positives"):
        train_head(music / "tags.csv", model, out=tmp_path / "b.safetensors", **options | dict(min_positives=17))
    assert not (tmp_path / "b.safetensors").exists()


def test_the_same_seed_gives_the_same_head(trained, music, model, tmp_path):
    options = dict(min_positives=4, embeddings=music / "e.parquet")
    again = train_head(music / "tags.csv", model, out=tmp_path / "tones.safetensors", **options)
    assert again.config == trained.config
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in again.state_dict().items())


def test_an_mlp_of_two_blocks_from_a_table_in_memory(music, model, tmp_path):
    rows = [(str(music / f"{i:02}.wav"), ["both"] if i % 2 == i // 2 % 2 else ["one"]) for i in range(32)]
    table = pl.DataFrame(rows, ["path", "labels"], orient="row")
    options = dict(block=(1, 3), tokens="cdtrs", hidden=8.0, min_positives=4, folds=np.float64(5))
    head = train_head(table, model, out=tmp_path / "mlp.safetensors", **options)
    assert [tuple(p.shape) for p in head.parameters()] == [(8, 2 * 21 * 48), (8,), (2, 8), (2,)]
    assert head.config.provenance["artists"] == 32, "each recording is a group of its own"
    found = activations_of(music / "05.wav", model, tmp_path / "mlp.safetensors")
    values = embed(music / "05.wav", model, (1, 3), "cdtrs", dtype="float32")
    x = np.concatenate([values.filter(block=block)["embedding"].to_numpy() for block in (1, 3)], 1)
    expected = head(torch.from_numpy(x)).sigmoid().mean(0)
    assert len(x) == 2 and np.allclose([found["both"], found["one"]], expected, atol=1e-4), "the mean over the windows"


@pytest.mark.parametrize(
    "table, message",
    [
        (pl.DataFrame({"file": ["a.wav"]}), "has file; give path and labels"),
        (pl.DataFrame({"path": ["a.wav"], "labels": ["a;b"]}), "lists of texts"),
    ],
)
def test_a_table_without_labels_is_refused(table, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_head(table, model, out=tmp_path / "x.safetensors")


def test_loading_gives_the_same_activations(model, music, tmp_path):
    head = random_head(model, 1, hidden=5)
    save_head(head, tmp_path / "mine.safetensors")
    found = activations_of(music / "00.wav", model, tmp_path / "mine.safetensors")
    assert found == activations_of(music / "00.wav", model, head)
    assert load_head(tmp_path / "mine.safetensors").config.name == "mine", "it is named as its file"


@pytest.mark.parametrize("patchout", [None, Patchout(keep_every=2)])
def test_several_heads_in_one_pass_equal_each_alone(model, patchout):
    mels = torch.randn(3, 96, 312, generator=torch.Generator().manual_seed(0))
    parts = [((1,), "cdt", 0), ((3, 0), "t", 6), ((2,), "crs", 0), ((3,), "d", 0)]
    heads = [
        random_head(model, i, (f"a{i}", f"b{i}"), blocks, tokens, hidden=hidden)
        for i, (blocks, tokens, hidden) in enumerate(parts)
    ]
    attached = resolve_heads(heads, model)
    assert attached.thresholds == (0.6, 0.4) + (0.5,) * 8 and attached.blocks == (0, 1, 2, 3)
    passes = []
    model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    together = make_embedder(model, (2, 1), "dt", patchout, "float32", with_tags=True, heads=attached)(mels)
    model.blocks[0]._forward_hooks.clear()
    assert len(passes) == 1
    with torch.no_grad():
        assert np.allclose(together[:, :2], model(mels, patchout).sigmoid(), atol=1e-5)
        for i, (head, (blocks, tokens, _)) in enumerate(zip(heads, parts, strict=True)):
            x = make_embedder(model, blocks, tokens, patchout, "float32")(mels).reshape(3, -1)
            alone = head(torch.from_numpy(x)).sigmoid()
            assert np.allclose(together[:, 2 + 2 * i : 4 + 2 * i], alone, atol=1e-4), parts[i]
    vectors = make_embedder(model, (2, 1), "dt", patchout, "float32")(mels).reshape(3, -1)
    assert np.allclose(together[:, 10:], vectors, atol=1e-4)


def test_a_label_of_both_is_the_heads(model, music):
    head = random_head(model, 1, ("Dance---Jig", "calm"), thresholds=(0.1, 0.2))
    heads = resolve_heads(head, model)
    assert heads.labels == ("Dance---Reel", "Dance---Jig", "calm") and heads.thresholds == (0.4, 0.1, 0.2)
    tags = tag(music / "00.wav", model, heads=head)
    assert dict(tags.select("label", "head").iter_rows()) == {
        "Dance---Reel": None, "Dance---Jig": "head1", "calm": "head1",
    }  # fmt: skip
    levels = tag(music / "00.wav", model, heads=head, level="genre")
    best = tags.filter(pl.col("label") != "calm").row(0, named=True)
    assert levels.filter(label="Dance").select("activation", "head").row(0) == (best["activation"], best["head"])
    with pytest.raises(ValueError, match="heads: 'calm' is there twice"):
        tag(music / "00.wav", model, heads=[head, random_head(model, 2, ("calm",))])


def test_a_head_of_another_model_is_refused_by_name(trained, music):
    other = tiny_model(LABELS, seed=1)
    for head in (trained, music / "tones.safetensors"):
        with pytest.raises(ValueError, match="head tones: made for another model.*train the head again"):
            tag(music / "00.wav", other, heads=head)
    with pytest.raises(ValueError, match="head tones: made for another model"):
        scan(music / "00.wav", music / "other", other, heads=[music / "tones.safetensors"], progress=False)
    assert not (music / "other").exists()


def test_rows_that_patchout_drops_are_missed(model, music):
    with pytest.raises(ValueError, match="head head1: reads 864 values, not .*must be kept"):
        tag(music / "00.wav", model, heads=random_head(model, 1, tokens="rs"), patchout=Patchout(1, (0,)))


def test_damaged_files_are_refused_by_name(trained, music, tmp_path):
    path, good = tmp_path / "bad.safetensors", (music / "tones.safetensors").read_bytes()
    for message, content in {
        "an incomplete": good[:-4],
        "empty": b"",
        "a damaged one": b"\x00" * 100,
        "no head, or one of another version": good.replace(b"maestlib-head-1", b"maestlib-head-9"),
        "a damaged head .*NaN or infinity.*train it again": good[:-4] + np.float32(np.nan).tobytes(),
        "a damaged head .*unknown in_features, in_featurez": good.replace(b"in_features", b"in_featurez"),
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.safetensors: .*{message}"):
            load_head(path)
    for message, change in {
        "3 thresholds for 2 labels": {"labels": ["high", "low"]},
        "size mismatch": {"in_features": 145},
        "Missing key": {"hidden": 4},
        "blocks=-1": {"blocks": [-1]},
    }.items():
        config = json.dumps(trained.config.to_dict() | change)
        save_file(trained.state_dict(), path, metadata={"format": HEAD_FORMAT, "config": config})
        with pytest.raises(ValueError, match=f"bad.safetensors: a damaged head .*{message}"):
            load_head(path)
    with pytest.raises(ValueError, match="m.safetensors: no head"):
        load_head(music / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="none.safetensors: no such file; train a head"):
        load_head(tmp_path / "none.safetensors")


def test_a_head_is_written_completely_or_not_at_all(model, tmp_path, monkeypatch):
    path = tmp_path / "head.safetensors"
    save_head(random_head(model, 1), path)
    before = path.read_bytes()

    def fail(tensors, temporary, metadata):
        Path(temporary).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("maestlib.inference.heads.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_head(random_head(model, 2), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]


def test_tag_and_heads_on_the_command_line(trained, model, music, tmp_path, capsys):
    save_head(random_head(model, 3, ("calm",)), tmp_path / "mood.safetensors")
    command = ["tag", str(music / "03.wav"), "--model", str(music / "m.safetensors"), "--dtype", "float32"]
    command += ["--head", str(music / "tones.safetensors"), "--head", str(tmp_path / "mood.safetensors")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and sum(line.endswith("(tones)") for line in lines) == 3
    assert any(line.endswith("  calm  (mood)") for line in lines)
    of_tones = [line.split("  ")[1] for line in lines if line.endswith("(tones)")]
    assert of_tones[2] == "low", "a high, pulsed tone"
    assert main([*command, "--json", "--threshold", "calibrated"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert {"high", "pulsed"} <= found["tags"].keys() and "low" not in found["tags"]
    assert main([*command[:-1], str(music / "m.safetensors")]) == 2
    assert "m.safetensors: no head" in capsys.readouterr().err


def test_a_library_shows_the_labels_of_heads(trained, model, music, tmp_path, capsys):
    "The expressions of a search, the mapping of write-tags and files outside of the library read them."
    out, head = tmp_path / "library", str(music / "tones.safetensors")
    files = [str(music / f"{i:02}.wav") for i in range(8)]
    command = ["scan", *files, "--out", str(out), "--model", str(music / "m.safetensors"), "--quiet"]
    assert main([*command, "--head", head, "--dtype", "float32"]) == 0
    library = Library(out)
    assert library.labels == (*LABELS, "high", "low", "pulsed")
    assert library.thresholds == [0.6, 0.4, *trained.config.thresholds]
    songs, activations = library.activations()
    for path, row in zip(songs["path"], activations, strict=True):
        expected = activations_of(path, model, trained)
        assert np.allclose(row, [expected[label] for label in library.labels], atol=2e-3)
    found = SongIndex(library).nearest([], tags="high & !pulsed", k=8)["path"]
    assert sorted(Path(path).stem for path in found) == ["01", "05"]
    outside, _ = LibraryReader(library)(music / "09.wav")
    expected = activations_of(music / "09.wav", model, trained)
    assert np.allclose(outside, [expected[label] for label in library.labels], atol=1e-3)
    pytest.importorskip("mutagen")
    (tmp_path / "mapping.csv").write_text("label,field,value\nhigh,mood,bright\n")
    capsys.readouterr()
    assert main(["write-tags", "--library", str(out), "--mapping", str(tmp_path / "mapping.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split(":")[0]).stem for line in lines] == ["01", "03", "05", "07"] and "bright" in lines[0]


def test_other_heads_need_another_library(trained, model, music, tmp_path):
    out, head = tmp_path / "library", tmp_path / "head.safetensors"
    save_head(random_head(model, 1), head)
    scan(music / "00.wav", out, model, heads=[head], progress=False)
    assert scan(music / "00.wav", out, model, progress=False).unchanged == 1, "its own, where none are given"
    assert scan([music / "00.wav", music / "01.wav"], out, model, heads=head, progress=False).read == 1
    with pytest.raises(ValueError, match="made with heads=.*head.safetensors.*tones.safetensors.*give another out"):
        scan(music / "02.wav", out, model, heads=[music / "tones.safetensors"], progress=False)
    save_head(random_head(model, 2), head)
    with pytest.raises(ValueError, match="head.safetensors changed after the scan; give another out"):
        scan(music / "02.wav", out, model, progress=False)
    assert Library(out).songs.height == 2


def test_exported_models_end_in_the_labels_of_heads(model, tmp_path):
    heads = resolve_heads([random_head(model, 1, blocks=(3, 1)), random_head(model, 2, ("calm",), hidden=4)], model)
    mel = torch.randn(2, 96, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = heads(model(mel), model.embed(mel, heads.blocks))
    assert expected.shape == (2, 5)
    assert export_torch(model, tmp_path / "m.pt2", heads=heads) < 1e-4
    extra = {"config.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    torch.testing.assert_close(program(mel)[0], expected, atol=1e-4, rtol=0)
    assert json.loads(extra["config.json"])["labels"] == [*LABELS, "a", "b", "calm"]
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export_onnx(model, tmp_path / "m.onnx", heads=heads) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"mel": mel.numpy()})
    assert np.allclose(logits, expected, atol=1e-4)
    names = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    assert names == [*LABELS, "a", "b", "calm"]
    with pytest.raises(Exception, match="must be kept as in its training"):
        export_torch(model, tmp_path / "rows.pt2", heads=resolve_heads(random_head(model, 1, tokens="cr"), model))


def test_the_page_has_the_labels_of_heads(model, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from maestlib.collection.page import export_page_model, page_config

    heads = resolve_heads(random_head(model, 1, blocks=(1, 3)), model)
    assert export_page_model(model.requires_grad_(False), tmp_path / "page.onnx", heads) < 1e-4
    facts = page_config(model, "mine", heads)
    assert facts["labels"] == [*LABELS, "a", "b"] and len(facts["probe"]) == 4
    assert facts["thresholds"] == [0.6, 0.4, 0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "f"}, "tokens='f'"),
        ({"hidden": -1}, "hidden=-1"),
        ({"seed": "x"}, "seed="),
        ({"min_positives": -5}, "min_positives=-5"),
        ({"out": "mine.pt"}, "ends in .safetensors"),
    ],
)
def test_options_are_checked_before_anything_is_embedded(music, model, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(heads, "embed", None)
    with pytest.raises(ValueError, match=message):
        train_head(music / "tags.csv", model, **{"out": tmp_path / "h.safetensors"} | options)


def test_a_path_in_two_rows_is_refused(music, model, tmp_path):
    table = pl.DataFrame({"path": [str(music / "00.wav")] * 2, "labels": [["high"], ["low"]]})
    with pytest.raises(ValueError, match="00.wav is in two rows"):
        train_head(table, model, out=tmp_path / "h.safetensors")
