"""Complete runs of `embed`: broken files, kills, many workers, the command line. What a notebook cannot show."""

import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from helpers import audio_folder, every_kill, kill_when, one_thread, recording, tiny_model, write_broken_files  # noqa: F401
from polars.testing import assert_frame_equal
from processes import start_python

from maestlib.audio.extract import extract_mels
from maestlib.audio.mel import MelConfig, load_audio, logmel, normalize
from maestlib.audio.store import MelStore
from maestlib.collection.cli import main
from maestlib.collection.search import nearest
from maestlib.core.chunks import ChunkClaims
from maestlib.datasets.batches import Corpus
from maestlib.inference import embedding
from maestlib.inference.embedding import embed, tag
from maestlib.inference.windows import stream_mel
from maestlib.models.checkpoint import BUNDLED_MODEL, load_model, save_checkpoint
from maestlib.models.patchout import Patchout
from maestlib.probing.embeddings import extract_embeddings

PROJECT = Path(__file__).parents[1]
GOOD = 54


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, model):
    "A folder of short files, one in ten broken in its own way, and a checkpoint beside it."
    root = tmp_path_factory.mktemp("corpus")
    audio_folder(root / "audio", GOOD)
    write_broken_files(root / "audio")
    save_checkpoint(model, root / "m.safetensors")
    return root


def command_line(corpus, out):
    options = ["--out", f"{out}/emb.parquet", "--model", f"{corpus}/m.safetensors", "--batch-size", "2"]
    return ["embed", f"{corpus}/audio", *options]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    "An undisturbed run."
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(command_line(corpus, out)) == 1, "some files failed"
    return out


def test_broken_files_are_reported(undisturbed, tmp_path):
    table = pl.read_parquet(undisturbed / "emb.parquet")
    report = pl.read_parquet(undisturbed / "emb.report.parquet")
    assert table["path"].n_unique() == GOOD and table["path"].is_sorted()
    assert {Path(path).name for path in report["path"]} == write_broken_files(tmp_path)
    assert report["error"].str.len_chars().min() > 10
    assert not list(undisturbed.glob(".*")) and not (undisturbed / "emb.parquet.parts").exists()


def test_a_decoder_that_crashes(corpus, model, tmp_path, crash_on):
    "A process that dies of a signal costs the file that it reads."
    crash_on("07.flac")
    files = sorted(str(path) for path in (corpus / "audio/album 1").glob("0*"))
    embed(files, model, out=tmp_path / "out.parquet", num_workers=2)
    report = pl.read_parquet(tmp_path / "out.report.parquet")
    assert [Path(path).stem for path in report["path"]] == ["07"] and "crashed" in report["error"][0]
    assert pl.read_parquet(tmp_path / "out.parquet")["path"].n_unique() == len(files) - 1


def test_a_worker_that_comes_late_returns_what_there_is(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr(ChunkClaims, "acquire", lambda claims, name: False)
    table = embed(corpus, model, out=tmp_path / "folder").collect()
    assert table.is_empty() and table.columns == ["path", "start_s", "end_s", "embedding"]


def test_the_command_line_goes_on_with_what_earlier_versions_wrote(undisturbed):
    "They gave the patchout that keeps all, and results are resumed only with the settings that made them."
    assert "Patchout(keep_every=1, drop_rows=()" in pl.read_parquet_metadata(undisturbed / "emb.parquet")["maestlib"]


def test_goes_on_after_sigkill(corpus, undisturbed, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    process = start_python(["maestlib.collection.cli", *command_line(corpus, tmp_path)], PROJECT, env)
    kill_when(process, lambda: list(tmp_path.glob("emb.parquet.parts/*.parquet")))
    assert main(command_line(corpus, tmp_path)) == 1
    assert_same(tmp_path, undisturbed)


def test_every_state_that_a_kill_can_leave(corpus, model, tmp_path):
    "What is in a chunk is not computed again, and nothing is lost."
    files, states = sorted((corpus / "audio/album 1").glob("0*.flac")), 0
    (tmp_path / "whole").mkdir()

    def run(folder):
        embed(files, model, out=folder / "emb.parquet", num_workers=1)

    run(tmp_path / "whole")
    for folder in every_kill(run, tmp_path):
        chunks = {file: file.stat().st_ino for file in folder.glob("emb.parquet.parts/*.parquet")}
        with pytest.MonkeyPatch.context() as patch:
            written, replace = [], os.replace
            patch.setattr(os, "replace", lambda old, new, r=replace, w=written: (w.append(Path(new)), r(old, new)))
            run(folder)
        assert not chunks.keys() & set(written), "no chunk is written twice"
        for hidden in folder.glob(".*.tmp"):  # half a result of the process that was killed
            shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
        assert_same(folder, tmp_path / "whole")
        states += 1
    assert states > len(files)


def test_two_workers_share_the_files(corpus, undisturbed, tmp_path, monkeypatch):
    "A second one starts when the first has claimed its third chunk, and computes all others; the first completes them."
    claimed, acquire = {}, ChunkClaims.acquire

    def acquire_and_start_another(claims, name):
        has_it = acquire(claims, name)
        if has_it:
            claimed.setdefault(id(claims), []).append(name)
        if has_it and [*map(len, claimed.values())] == [3]:
            assert main(command_line(corpus, tmp_path)) in (0, 1)
            assert not (tmp_path / "emb.parquet").exists()
        return has_it

    monkeypatch.setattr(ChunkClaims, "acquire", acquire_and_start_another)
    assert main(command_line(corpus, tmp_path)) == 1
    first, second = claimed.values()
    assert len(first) < 10 < len(second) and not set(first) & set(second), "each chunk was computed by one of them"
    assert_same(tmp_path, undisturbed)


def assert_same(folder, undisturbed):
    "The bytes of a single undisturbed worker, and nothing else."
    for name in ("emb.parquet", "emb.report.parquet"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert sorted(path.name for path in folder.iterdir()) == ["emb.parquet", "emb.report.parquet"]


def test_a_file_disappears(corpus, model, tmp_path):
    "Between being listed and being read."
    paths = [tmp_path / f"{i}.wav" for i in range(40)]
    for path in paths:
        soundfile.write(path, recording(1), 16000)
    listed = [*paths]
    paths[-1].unlink()
    embed(listed, model, out=tmp_path / "emb.parquet")
    report = pl.read_parquet(tmp_path / "emb.report.parquet")
    assert report["path"].to_list() == [str(paths[-1])] and "no such file" in report["error"][0]


def test_other_settings_are_refused(corpus, undisturbed, capsys):
    assert main([*command_line(corpus, undisturbed), "--block", "3"]) == 2
    assert "other settings" in capsys.readouterr().err
    other = tiny_model(seed=1)
    with pytest.raises(ValueError, match="other settings"):
        embed(corpus / "audio", other, out=undisturbed / "emb.parquet")


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 44100), ("mp3", 44100), ("ogg", 22050), ("flac", 48000)])
def test_long_file_in_parts_is_the_whole(suffix, rate, tmp_path):
    path = tmp_path / f"long.{suffix}"
    soundfile.write(path, np.stack([recording(23, 1, rate), recording(23, 2, rate)], 1), rate)
    wave = load_audio(path)
    whole = logmel(wave)[:, : len(wave) // 256]
    for seconds in (8, 4.99):
        assert torch.allclose(torch.cat(list(stream_mel(path, MelConfig(), part_s=seconds)), 1), whole, atol=1e-3)


def test_last_second_and_average(model, tmp_path):
    "The last second of a file is read, in a window of full length; the average is the plain mean over the windows."
    wave = recording(31.3)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    wave[-16000:] = recording(31.3, seed=9)[-16000:]
    soundfile.write(tmp_path / "b.wav", wave, 16000, subtype="FLOAT")
    a, b = (embed(tmp_path / f"{n}.wav", model, dtype="float32") for n in "ab")
    changes = np.abs(a["embedding"].to_numpy() - b["embedding"].to_numpy()).max(1)
    assert changes[-1] > 1e-3 and changes[a["end_s"].to_numpy() < 30].max() < 1e-4
    mean = embed(tmp_path / "a.wav", model, dtype="float32", average=True)
    assert abs(mean["end_s"][0] - 31.3) < 0.016 and len(set((a["end_s"] - a["start_s"]).round(6))) == 1
    np.testing.assert_allclose(mean["embedding"][0].to_numpy(), a["embedding"].to_numpy().mean(0), atol=1e-5)
    tags = [tag(tmp_path / f"{n}.wav", model, dtype="float32").sort("label")["activation"].to_numpy() for n in "ab"]
    assert np.abs(tags[0] - tags[1]).max() > 1e-6


def test_embed_and_the_probing_extraction_give_one_vector_per_track(model, tmp_path):
    "Of tracks that are shorter than a window, a window long, and longer with an end that is not on the grid of hops."
    rows = []
    for i, seconds in enumerate((2.345, 5, 5.1, 13.37)):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, recording(seconds, i), 16000)
        rows.append((f"{i}", str(path)))
    table = pl.DataFrame(rows, ["track_id", "path"], orient="row")
    extract_mels(table, tmp_path / "store", seconds=None, num_workers=0)
    store = MelStore(tmp_path / "store")
    corpus = Corpus(table, store, np.arange(4), ["a"], np.zeros((4, 1), np.uint8), store.config)
    expected = extract_embeddings(corpus, model, tmp_path / "embeddings", dtype="float32").values.astype(np.float32)
    embedded = embed(table["path"], model, tuple(range(model.config.depth)), average=True, dtype="float32")
    for block in range(model.config.depth):
        ours, theirs = embedded.filter(block=block)["embedding"].to_numpy(), expected[:, block].reshape(4, -1)
        assert (np.linalg.norm(ours - theirs, axis=1) < 1e-3 * np.linalg.norm(theirs, axis=1)).all()


def test_stereo_mp3_has_the_tags_of_its_wav(tmp_path):
    "44.1 kHz, two channels: the tags agree to a hundredth, much less than they differ between recordings."
    model = tiny_model([f"Genre---{i}" for i in range(20)], seconds=10)
    stereo = np.stack([recording(14, 3, 44100), recording(14, 4, 44100)], 1)
    for suffix in ("wav", "mp3"):
        soundfile.write(tmp_path / f"a.{suffix}", stereo, 44100)
    wav, mp3 = (
        tag(tmp_path / f"a.{suffix}", model, top=None, dtype="float32").sort("label") for suffix in ("wav", "mp3")
    )
    other = tag(recording(14, 5), model, top=None, dtype="float32").sort("label")
    differences = [np.abs((wav["activation"] - t["activation"]).to_numpy()).max() for t in (mp3, other)]
    assert differences[0] < 0.01 and differences[0] < differences[1] / 3, differences


def test_nearest_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 24)).astype(np.float32)
    table = pl.DataFrame({"path": [f"{i}" for i in range(500)], "embedding": vectors})
    table.write_parquet(tmp_path / "emb.parquet")
    neighbors = nearest(table.head(3), tmp_path / "emb.parquet", k=5, chunk_size=77)
    x = table["embedding"].to_numpy().astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.argsort(-(x[:3] @ x.T), 1)[:, :5]
    assert neighbors["path"].cast(pl.Int64).to_numpy().reshape(3, 5).tolist() == expected.tolist()
    assert (neighbors.filter(rank=0)["cosine"] - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="24"):
        nearest(np.ones(7), table)


INVALID = [dict(block=12), dict(block=-1), dict(tokens="tc"), dict(hop_s=0), dict(windows=0), dict(batch_size=0)]
INVALID += [dict(preset="slow"), dict(windows=2, hop_s=1), dict(windows=2, tokens="f")]


@pytest.mark.parametrize("arguments", INVALID)
def test_wrong_parameters_are_named(model, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        embed(torch.zeros(16000), model, **arguments)


def test_windows_are_those_of_the_whole_recording(model, tmp_path):
    soundfile.write(tmp_path / "song.flac", recording(60), 16000)
    mels = logmel(load_audio(tmp_path / "song.flac"))
    for count, starts in ((1, [27.5]), (3, [9.5, 27.5, 45.5])):
        table = embed(tmp_path / "song.flac", model, windows=count, dtype="float32")
        assert np.allclose(table["start_s"], starts, atol=0.02)
        assert np.allclose(table["end_s"] - table["start_s"], 312 * 0.016)
        for start, vector in table.select("start_s", "embedding").iter_rows():
            mel = normalize(mels[:, round(start / 0.016) :][:, :312], model.config.mel)
            with torch.inference_mode():
                expected = model.embed(mel[None], (model.config.middle_block,)).flatten().numpy()
            assert np.allclose(expected, vector, atol=1e-3)
    assert embed(tmp_path / "song.flac", model, windows=99).height == 23, "all there are"
    few = embed(tmp_path / "song.flac", model, windows=3, average=True)
    assert few.equals(embed(tmp_path / "song.flac", model, preset="balanced", patchout=Patchout(), average=True))
    assert embed(recording(3), model, windows=3).height == 1, "shorter than a window"


def test_a_file_that_ends_before_its_header_says_is_sampled_where_it_is(model, tmp_path):
    soundfile.write(tmp_path / "whole.mp3", recording(60), 16000)
    content = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "half.mp3").write_bytes(content[: len(content) // 2])
    ends = embed(tmp_path / "half.mp3", model)["end_s"].max()
    assert 20 < ends < 40
    table = embed(tmp_path / "half.mp3", model, windows=3)
    assert table.height == 3 and table["end_s"].max() <= ends
    (tmp_path / "text.mp3").write_text("not music")
    with pytest.raises(ValueError, match="text.mp3"):
        embed(tmp_path / "text.mp3", model, windows=3)


def test_the_file_of_another_number_of_windows_is_refused(model, tmp_path):
    soundfile.write(tmp_path / "song.wav", recording(20), 16000)
    embed(tmp_path, model, windows=1, out=tmp_path / "e.parquet")
    assert embed(tmp_path, model, windows=1, out=tmp_path / "e.parquet").collect().height == 1
    for windows in (2, None):
        with pytest.raises(ValueError, match="other settings"):
            embed(tmp_path, model, windows=windows, out=tmp_path / "e.parquet")


def test_presets_on_the_command_line(model, tmp_path, capsys):
    soundfile.write(tmp_path / "song.wav", recording(40), 16000)
    save_checkpoint(model, tmp_path / "m.safetensors")
    command = ["embed", str(tmp_path / "song.wav"), "--model", str(tmp_path / "m.safetensors"), "--out"]
    counts = {}
    for preset in ("full", "balanced", "fast"):
        assert main([*command, f"{tmp_path}/{preset}.parquet", "--preset", preset]) == 0
        counts[preset] = len(pl.read_parquet(tmp_path / f"{preset}.parquet"))
    assert counts == {"full": 15, "balanced": 3, "fast": 1}
    assert main([*command, f"{tmp_path}/two.parquet", "--windows", "2", "--hop-s", "3"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["tag", str(tmp_path / "song.wav"), "--preset", "balanced"]) == 0


def test_no_audio_in_a_folder(model, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no audio"):
        embed(tmp_path, model)
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert main(["embed", str(tmp_path), "--out", f"{tmp_path}/e.parquet", "--model", f"{tmp_path}/m.safetensors"]) == 2
    assert "no audio" in capsys.readouterr().err
    assert embedding.embed(torch.zeros(16000), model).height == 1, "silence is fine"


def test_a_terminal_means_its_own_folder(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", 0.1 * rng.normal(size=32_000), 16_000)
    (tmp_path / "b.wav").write_bytes(b"no audio")
    monkeypatch.chdir(tmp_path)
    command = ["embed", "a.wav", "b.wav", "--out", "emb.parquet", "--model", "maest-30s-tunes", "--keep-every", "10"]
    assert main(command) == 1 and (tmp_path / "emb.parquet").exists()
    assert main([c for c in command if c != "b.wav"]) == 0, "what failed earlier is not asked for now"
    (tmp_path / "text.parquet").write_text("words")
    command[4] = "text.parquet"
    assert main(command) == 2 and "not a parquet file" in capsys.readouterr().err


@pytest.mark.parametrize("function", [embed, tag])
def test_without_a_model_the_bundled_one_reads(function, tmp_path):
    "A name, a file and a folder are accepted in place of a model."
    wave, bundled = recording(4), load_model()
    save_checkpoint(bundled, tmp_path / "model.safetensors")
    expected = function(wave, bundled, dtype="float32")
    for model in (None, BUNDLED_MODEL, tmp_path / "model.safetensors", str(tmp_path)):
        assert_frame_equal(function(wave, model, dtype="float32"), expected)
    assert_frame_equal(function(wave, dtype="float32"), expected)
    with pytest.raises(ValueError, match="model: Linear is no MAEST"):
        function(wave, torch.nn.Linear(1, 1))


def test_a_folder_that_cannot_be_read_is_reported(model, tmp_path, monkeypatch, capsys):
    "Also beside others, whose audio is embedded."
    for name in ("open", "closed"):
        (tmp_path / "music" / name).mkdir(parents=True)
        soundfile.write(tmp_path / f"music/{name}/a.wav", recording(4), 16_000)
    closed, scandir = str(tmp_path / "music/closed"), os.scandir

    def refuse(path):
        if os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    save_checkpoint(model, tmp_path / "m.safetensors")
    command = ["embed", str(tmp_path / "music"), "--model", f"{tmp_path}/m.safetensors", "--out", f"{tmp_path}/e.v1"]
    assert main(command) == 1 and "may not be read" in capsys.readouterr().err
    report = pl.read_parquet(tmp_path / "e.v1.report.parquet")
    assert report["path"].to_list() == [closed]
    assert nearest(pl.read_parquet(tmp_path / "e.v1/*.parquet").head(1), tmp_path / "e.v1")["cosine"][0] > 0.999
    (tmp_path / "e.v1/.other.claim").write_text("of a worker that was killed")
    assert nearest(pl.read_parquet(tmp_path / "e.v1/*.parquet").head(1), tmp_path / "e.v1")["cosine"][0] > 0.999
    command[1] = closed
    assert main(command) == 2, "nothing was done"


def test_what_is_asked_for_on_the_command_line_is_done(model, tmp_path, capsys):
    soundfile.write(tmp_path / "song.wav", recording(40), 16_000)
    save_checkpoint(model, tmp_path / "m.safetensors")
    end = ["--model", f"{tmp_path}/m.safetensors", "--out", f"{tmp_path}/e.parquet"]
    assert main(["embed", f"{tmp_path}/song.wav", "--keep-every", "0", *end]) == 2
    assert "keep_every" in capsys.readouterr().err
    assert main(["embed", f"{tmp_path}/song.wav", "--preset", "fast", "--drop-rows", "0", *end]) == 0
    expected = embed(tmp_path / "song.wav", model, preset="fast", patchout=Patchout(2, (0,)))
    assert_frame_equal(pl.read_parquet(tmp_path / "e.parquet"), expected, check_exact=False, abs_tol=1e-5)


@pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX")
def test_a_name_that_is_not_utf8_is_one_of_the_failed(model, tmp_path, capsys):
    (tmp_path / "music").mkdir()
    soundfile.write(tmp_path / "music/a.wav", recording(4), 16_000)
    for name in (b"/caf\xe9.wav", b"/th\xe9.wav"):
        shutil.copy(tmp_path / "music/a.wav", os.fsencode(tmp_path / "music") + name)
    Path(os.fsdecode(os.fsencode(tmp_path / "music") + b"/th\xe9.wav")).write_bytes(b"no audio")
    save_checkpoint(model, tmp_path / "m.safetensors")
    options = ["--model", f"{tmp_path}/m.safetensors"]
    assert main(["embed", str(tmp_path / "music"), *options, "--out", f"{tmp_path}/e.parquet"]) == 1
    assert "skipped: " in (error := capsys.readouterr().err) and "th\\xe9.wav" in error
    assert main(["tag", str(tmp_path / "music"), *options, "--top", "1"]) == 1
    assert "caf\\xe9.wav" in capsys.readouterr().out


def test_a_file_is_embedded_once_however_it_is_named(model, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", recording(4), 16_000)
    monkeypatch.chdir(tmp_path)
    assert (
        embed(["a.wav", tmp_path, "./a.wav", f"{tmp_path}/../{tmp_path.name}/a.wav"], model, average=True).height == 1
    )
    for source in ("", ["a.wav", ""]):
        with pytest.raises(ValueError, match="a path is empty"):
            embed(source, model)


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device={device}: cannot be used here"):
        load_model("random", size="tiny", device=device)
