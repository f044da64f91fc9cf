"""Features of other models: what is refused, files, ONNX models; MusiCNN from random weights in TensorFlow's format."""

import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from maestlib.audio.mel import MEL, load_audio
from maestlib.datasets.batches import load_corpus
from maestlib.inference.embedding import embed
from maestlib.models import musicnn
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.musicnn_fast import FastMusiCNN
from maestlib.probing.embeddings import subset_corpus
from maestlib.probing.features import features_from_onnx, from_features, read_features
from maestlib.probing.musicnn import musicnn_features


@pytest.fixture(scope="module")
def corpus():
    return subset_corpus(load_corpus("tunes", quiet=True), 12)


@pytest.fixture(scope="module")
def table(corpus):
    "Ids and features of the corpus' tracks in another order, and of a track that it lacks."
    ids = [*reversed(corpus.table["track_id"].to_list()), "another"]
    return ids, np.random.default_rng(0).normal(size=(len(ids), 5)).astype(np.float32)


# A matrix


def test_rows_are_found_by_id(corpus, table):
    ids, matrix = table
    features = from_features(ids, matrix, "m", corpus)
    features.check_corpus(corpus)
    assert np.array_equal(features.values[:, 0, 0], matrix[-2::-1]) and features.tokens == "e"
    changed = matrix.copy()
    changed[0] += 1e-3
    assert from_features(ids, changed, "m", corpus).fingerprint() != features.fingerprint()
    changed = matrix.copy()
    changed[-1] += 1e-3  # not in the corpus
    assert from_features(ids, torch.from_numpy(changed), "m", corpus).fingerprint() == features.fingerprint()


def test_what_cannot_be_compared_is_refused(corpus, table):
    ids, matrix = table
    holes = matrix.copy()
    holes[2, 1] = np.nan
    for arguments, message in {
        "missing": ((ids[3:], matrix[3:]), rf"rival: 3 of {len(corpus.table)} tracks have no features \(.*{ids[0]}"),
        "twice": (([ids[0], *ids], matrix[[0, *range(len(ids))]]), f"rival: {ids[0]} more than once"),
        "NaN": ((ids, holes), rf"rival: NaN or infinity in 1 tracks \({ids[2]}\)"),
        "rows": ((ids, matrix[1:]), r"rival: features of shape \(\d+, 5\); give \(\d+ tracks, values\)"),
        "axes": ((ids, matrix[..., None]), "rival: features of shape"),
        "empty": ((ids, matrix[:, :0]), "rival: features of shape"),
    }.values():
        with pytest.raises(ValueError, match=message):
            from_features(*arguments, "rival", corpus)


# A file


def test_a_file_of_windows_is_averaged(corpus, table, tmp_path):
    ids, matrix = table
    expected = from_features(ids, matrix, "m", corpus).values
    for embedding in (pl.Series([*(matrix - 1), *(matrix + 1)]), pl.Series(np.concatenate([matrix - 1, matrix + 1]))):
        pl.DataFrame({"track_id": ids * 2, "embedding": embedding}).write_parquet(tmp_path / "rival.parquet")
        features = read_features(tmp_path / "rival.parquet", corpus)
        assert features.meta["model"] == "rival" and np.allclose(features.values, expected, atol=1e-6)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"id": ["a"], "embedding": [[1.0]]}, "columns id, embedding; needs embedding and track_id or path"),
        ({"track_id": ["a"]}, "needs embedding"),
        ({"track_id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}, "embeddings of 1 to 2 values"),
        ({"path": ["a"] * 2, "block": [1, 2], "embedding": [[1.0]] * 2}, "several blocks; keep one"),
        ({"path": ["elsewhere.flac"], "embedding": [[1.0]]}, "tracks have no features"),
        ({"track_id": ["a"], "embedding": ["[1.0]"]}, "an embedding is String; give lists of numbers"),
    ],
)
def test_other_files_are_refused(columns, message, corpus, tmp_path):
    pl.DataFrame(columns).write_parquet(tmp_path / "rival.parquet")
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / "rival.parquet", corpus)


def test_a_track_is_found_by_any_spelling_of_its_name(corpus, table, tmp_path):
    paths, matrix = [Path(path) for path in corpus.table["path"]], table[1][:-1]
    named = replace(corpus, table=corpus.table.with_columns(track_id=pl.format("{}\xe9", "track_id")))
    expected = from_features(named.table["track_id"].to_list(), matrix, "m", named).values
    names = {
        "path": [f"{path.parent}/../{path.parent.name}/./{path.name}" for path in paths],
        "track_id": [f"{track}e\u0301" for track in corpus.table["track_id"]],
    }
    for key, spelled in names.items():
        pl.DataFrame({key: spelled, "embedding": [*matrix]}).write_parquet(tmp_path / "rival.parquet")
        assert np.array_equal(read_features(tmp_path / "rival.parquet", named).values, expected)


def test_a_file_that_is_no_table_of_features(corpus, tmp_path):
    (tmp_path / "rival.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="rival.parquet: not a table"):
        read_features(tmp_path / "rival.parquet", corpus)


def test_what_embed_writes_is_read(corpus, tmp_path):
    model = MAEST(MAESTConfig(embed_dim=24, num_heads=2, depth=2, seconds=10)).init_weights(0).eval()
    paths = corpus.table["path"].to_list()
    embed(paths, model, block=1, tokens="ct", out=tmp_path / "windows.parquet")
    values = read_features(tmp_path / "windows.parquet", corpus).values
    windows = pl.read_parquet(tmp_path / "windows.parquet").filter(path=paths[3])
    assert len(windows) > 4 and values.shape == (len(paths), 1, 1, 48)
    seconds = (windows["end_s"] - windows["start_s"]).to_numpy()
    assert seconds.min() < seconds.max(), "the last window is shorter"
    assert np.allclose(values[3, 0, 0], np.average(windows["embedding"].to_numpy(), 0, seconds), atol=1e-5)


# ONNX


class Means(torch.nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return x.mean(self.axis).flatten(1)


def export(module, example, path, dynamic=None):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    options = {"input_names": ["x"], "output_names": ["y"], "dynamo": True, "verbose": False}
    torch.onnx.export(module.eval(), (example,), dynamic_shapes=dynamic, **options).save(path)
    return path


@pytest.mark.parametrize("shape, axis", [((1, 96, 128), 2), ((7, 1, 128, 96), 2), ((3, 128, 96), 1)])
def test_the_layout_is_read_from_the_model(shape, axis, corpus, tmp_path):
    path = export(Means(axis), torch.rand(shape), tmp_path / "means.onnx")
    values = features_from_onnx(path, corpus, folder=tmp_path / "plain").values[:, 0, 0]
    mel = corpus.store.read(corpus.store_rows[5]).astype(np.float32)
    starts = [*range(0, 1875 - 128, 64), 1875 - 128]
    assert np.allclose(values[5], np.mean([mel[s : s + 128].mean(0) for s in starts], 0), atol=2e-3)
    normalized = features_from_onnx(path, corpus, normalization=MEL, folder=tmp_path / "normal").values[:, 0, 0]
    assert np.allclose(normalized, (values - MEL.mean) / (2 * MEL.std), atol=2e-3)


def test_waveforms_come_from_the_files(corpus, tmp_path):
    class Level(torch.nn.Module):
        def forward(self, x):
            return x.square().mean(1, keepdim=True)

    path = export(Level(), torch.rand(2, 16000), tmp_path / "level.onnx", {"x": {0: "batch", 1: "samples"}})
    few = replace(corpus, table=corpus.table[:3], store_rows=corpus.store_rows[:3], targets=corpus.targets[:3])
    values = features_from_onnx(path, few, seconds=30, folder=tmp_path / "waves").values
    expected = [load_audio(p).square().mean() for p in few.table["path"]]
    assert np.allclose(values[:, 0, 0, 0], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="no fixed length; give seconds"):
        features_from_onnx(path, few)
    with pytest.raises(ValueError, match="output='z'; give one of y"):
        features_from_onnx(path, few, output="z", seconds=30)


def test_an_image_model_is_refused(corpus, tmp_path):
    path = export(Means(2), torch.rand(1, 3, 64, 64), tmp_path / "image.onnx")
    with pytest.raises(ValueError, match=r"image.onnx: input x of shape \[1, 3, 64, 64\]; needs waveforms or mels"):
        features_from_onnx(path, corpus, folder=tmp_path / "plain")


# MusiCNN, with random weights


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    head = varint(number << 3 | (0 if isinstance(value, int) else 2))
    return head + (varint(value) if isinstance(value, int) else varint(len(value)) + value)


def table_block(entries):  # keys leave out what they share with the one before
    body, previous = b"", b""
    for key, value in entries:
        shared = next((i for i, (a, b) in enumerate(zip(previous, key, strict=False)) if a != b), 0)
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    return body + struct.pack("<II", 0, 1) + bytes(5)  # one restart; no compression, no checksum


def write_checkpoint(folder, tensors, compression=0):
    data, entries = b"", [(b"", field(1, 1))]
    for name, values in sorted(tensors.items()):
        shape = b"".join(field(2, field(1, size)) for size in values.shape)
        numbers = field(4, len(data)) if data else b""  # zero is left out
        kind = 9 if values.dtype == np.int64 else 1
        entries.append((name.encode(), field(1, kind) + field(2, shape) + numbers + field(5, values.nbytes)))
        data += values.tobytes()
    table, handles = b"", []
    for part in (entries[:7], entries[7:]):
        block = table_block(part)
        handles.append((part[-1][0], varint(len(table)) + varint(len(block) - 5)))
        table += block[:-5] + bytes([compression]) + bytes(4)
    index = table_block(handles)
    footer = varint(0) * 2 + varint(len(table)) + varint(len(index) - 5)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".index").write_bytes(table + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))
    (folder / ".data-00000-of-00001").write_bytes(data)


def random_tensors():
    rng = np.random.default_rng(0)
    kernels = [(7, 38, 1, 204), (7, 67, 1, 204), (128, 1, 1, 51), (64, 1, 1, 51), (32, 1, 1, 51)]
    kernels += [(7, 561, 1, 64), (7, 64, 1, 64), (7, 64, 1, 64), (1506, 200), (200, 50)]
    names = ["conv2d", *(f"conv2d_{i}" for i in range(1, 8)), "dense", "dense_1"]
    tensors = {}
    for name, shape in zip(names, kernels, strict=True):
        tensors[f"{name}/kernel"] = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        tensors[f"{name}/bias"] = rng.normal(size=shape[-1]) * 0.1
    for i, width in enumerate([1, 204, 204, 51, 51, 51, 64, 64, 64, 1506, 200]):
        name = f"batch_normalization_{i}" if i else "batch_normalization"
        tensors |= {f"{name}/{part}": rng.normal(size=width) for part in ("gamma", "beta", "moving_mean")}
        tensors[f"{name}/moving_variance"] = rng.uniform(0.5, 2, size=width)
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def reference(tensors, patches):  # (batch, frames, bands), as the TensorFlow graph has them -> logits, penultimate
    t = {name: torch.from_numpy(values) for name, values in tensors.items()}

    def norm(x, i, axis):
        name = f"batch_normalization_{i}" if i else "batch_normalization"
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        gamma, beta, mean, var = (
            t[f"{name}/{p}"].view(shape) for p in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return gamma * (x - mean) / (var + 1e-3).sqrt() + beta

    def conv(x, i, before, after):  # NHWC, padded in time
        name = f"conv2d_{i}" if i else "conv2d"
        x = F.pad(x, (0, 0, 0, 0, before, after)).permute(0, 3, 1, 2)
        y = F.conv2d(x, t[f"{name}/kernel"].permute(3, 2, 0, 1), t[f"{name}/bias"]).relu()
        return norm(y.permute(0, 2, 3, 1), i + 1, 3)

    x = norm(patches[..., None], 0, 3)
    padding = [(3, 3), (3, 3), (63, 64), (31, 32), (15, 16)]
    stages = [torch.cat([conv(x, i, *p).amax(2) for i, p in enumerate(padding)], 2)]
    for i in (5, 6, 7):
        y = conv(stages[-1][..., None], i, 3, 3).squeeze(2)
        stages.append(y + stages[-1] if i > 5 else y)
    features = torch.cat(stages, 2)
    x = norm(torch.stack([features.amax(1), features.mean(1)], 2).flatten(1), 9, 1)
    x = norm((x @ t["dense/kernel"] + t["dense/bias"]).relu(), 10, 1)
    return x @ t["dense_1/kernel"] + t["dense_1/bias"], x


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer") / "musicnn"
    for name in ("MTT", "MSD"):
        write_checkpoint(folder / f"{name}_musicnn", random_tensors() | {"step": np.array(3)})
    labels = [[f"{kind} {i}" for i in range(50)] for kind in ("tag", "other")]
    (folder / "configuration.py").write_text(f"SR = 16000\nMTT_LABELS = {labels[0]}\nMSD_LABELS = {labels[1]}\n")
    return folder


def test_musicnn_computes_what_the_graph_does(weights):
    tensors = random_tensors()
    read = musicnn.read_tensorflow_checkpoint(weights / "MTT_musicnn")
    assert read.keys() == tensors.keys() and all(np.array_equal(read[name], tensors[name]) for name in tensors)
    patches = torch.rand(3, 187, 96, generator=torch.Generator().manual_seed(0))
    model = musicnn.load_musicnn(weights.parent)
    with torch.inference_mode():
        logits, penultimate = model(patches.mT)
    expected = reference(tensors, patches)
    assert torch.allclose(logits, expected[0], atol=1e-3) and torch.allclose(penultimate, expected[1], atol=1e-3)
    assert model.labels[7] == "tag 7" and musicnn.load_musicnn(weights, "MSD").labels[7] == "other 7"
    with pytest.raises(ValueError, match="name='FMA': give one of MTT, MSD"):
        musicnn.load_musicnn(weights, "FMA")


@pytest.mark.parametrize("frames", [187, 100, 561])
def test_products_compute_what_the_convolutions_do(weights, frames):
    model = musicnn.load_musicnn(weights)
    mels = 3 * torch.rand(2, 96, frames, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, penultimate = model(mels)
    exact, close = FastMusiCNN(model, torch.float32)(mels), FastMusiCNN(model, torch.bfloat16)(mels)
    assert torch.allclose(exact[0], logits, atol=1e-3) and torch.allclose(exact[1], penultimate, atol=1e-3)
    assert (close[1] - penultimate).square().mean() < 0.01 * penultimate.var()


def test_musicnn_features_are_means_and_deviations_over_patches(weights, corpus, tmp_path):
    model = musicnn.load_musicnn(weights)
    values = musicnn_features(corpus, model, tmp_path, seconds=10, batch_size=5).values[:, 0, 0]
    mel = torch.from_numpy(corpus.store.read(corpus.store_rows[7])).float()[:561].view(3, 187, 96)
    _, penultimate = reference(random_tensors(), mel)
    assert np.allclose(values[7, :200], penultimate.mean(0), atol=1e-3)
    assert np.allclose(values[7, 200:], penultimate.std(0, correction=0), atol=1e-3)


def test_the_weights_are_found_in_a_wheel_and_then_in_the_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"cannot be downloaded .*pip download .*give the .whl as folder="):
        musicnn.find_musicnn()
    wheel = tmp_path / "musicnn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("musicnn/__init__.py", "")
    with pytest.raises(ValueError, match="not the wheel of musicnn 0.1.0"):
        musicnn.find_musicnn(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        for path in weights.rglob("*"):
            archive.write(path, path.relative_to(weights.parent))
    found = musicnn.find_musicnn(wheel)
    assert found == musicnn.find_musicnn() == tmp_path / "cache/weights/musicnn-0.1.0-mtt-msd"
    assert sorted(p.name for p in found.parent.iterdir() if p.is_dir()) == ["musicnn-0.1.0-mtt-msd"]


def test_other_weights_are_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration.py"):
        musicnn.load_musicnn(tmp_path)
    (tmp_path / "configuration.py").write_bytes((weights / "configuration.py").read_bytes())
    tensors = random_tensors()
    write_checkpoint(tmp_path / "MSD_musicnn", tensors)
    write_checkpoint(tmp_path / "MTT_musicnn", tensors | {"dense/kernel": tensors["dense/kernel"][:, :100]})
    with pytest.raises(ValueError, match=r"not the weights of MTT_musicnn \(dense/kernel: \(100, 1506\)"):
        musicnn.load_musicnn(tmp_path)
    write_checkpoint(tmp_path / "MTT_musicnn", tensors, compression=1)
    with pytest.raises(ValueError, match=r".index: damaged, or of several shards \(a compressed index\)"):
        musicnn.load_musicnn(tmp_path)
    (tmp_path / "MTT_musicnn/.index").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not the index of a TensorFlow checkpoint"):
        musicnn.load_musicnn(tmp_path)
