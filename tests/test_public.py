"""Public datasets in the layout their authors publish, filled with tones: whole tracks, fine-tuning by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import tiny_model, write_tone

from maestlib.audio.windows import window_starts
from maestlib.core.files import asset_path
from maestlib.datasets import protocol, registry
from maestlib.datasets.batches import load_corpus
from maestlib.probing.embeddings import check_whole_tracks, extract_embeddings
from maestlib.training.config import TrainConfig

PROJECT = Path(__file__).parents[1]
FOLDERS = {"mtg": "mtg_jamendo", "mtt": "mtt", "msd": "msd"}
TRACK_S = {"mtg-genre": 40, "mtt": 6}
SPLITS = ("train", "train", "train", "validation", "test")


def write_mtg_genre(folder: Path):
    rows = {split: [] for split in SPLITS}
    for i in range(20):
        path, tags = f"{i:02}/{i}.mp3", ["genre---high"] if i % 2 else ["genre---low", "genre---pop"]
        write_tone((folder / "audio" / path).with_suffix(".wav"), TRACK_S["mtg-genre"], i % 2, i)
        fields = [f"track_{i:07}", f"artist_{i:06}", f"album_{i:06}", path, f"{TRACK_S['mtg-genre']:.1f}", *tags]
        rows[SPLITS[i // 2 % 5]].append("\t".join(fields))
    for split, lines in rows.items():
        file = folder / f"splits/mtg_jamendo/autotagging_genre-{split}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        header = "\t".join(["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"])
        file.write_text("\n".join([header, *lines]) + "\n")


def write_mtt(folder: Path):
    lines, letters = ["split\tpath\ttags"], dict(train="0", validation="c", test="d")
    for i in range(30):
        split = SPLITS[i // 2 % 5]
        path = f"{letters[split]}/artist_{i}-album-01-song-0-{TRACK_S['mtt']}.mp3"
        write_tone((folder / "audio" / path).with_suffix(".wav"), TRACK_S["mtt"], i % 2, i)
        lines.append(f"{split}\t{path}\t{'flute' if i % 2 else 'cello,slow'}")
    (folder / "splits/mtt").mkdir(parents=True)
    (folder / "splits/mtt/groundtruth_12-1-3.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def public(tmp_path_factory):  # name of a dataset -> folder with splits/ and audio/
    folders = {}
    for name, write in {"mtg-genre": write_mtg_genre, "mtt": write_mtt}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write(folders[name])
    return folders


@pytest.fixture
def named(public, monkeypatch):  # name -> its audio, with its lists where the loaders look
    def named(name):
        monkeypatch.setenv("MAESTLIB_DATA", str(public[name]))
        monkeypatch.setenv("MAESTLIB_CACHE", str(public[name] / "cache"))
        return str(public[name] / "audio")

    return named


@pytest.mark.parametrize("name", protocol.PAPER_COUNTS)
def test_audio_of_every_dataset_of_the_paper_is_found(name, tmp_path):
    options = {"splits": asset_path("benchmarks") / FOLDERS[name[:3]]}
    if name.startswith("msd"):
        options["incomplete"] = True
    table = registry.load_dataset(name, **options)
    for path in table["path"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = registry.load_dataset(name, audio=tmp_path, **options)
    assert found["track_id"].equals(table["track_id"]) and found["labels"].equals(table["labels"])
    assert [str(Path(path).relative_to(tmp_path).as_posix()) for path in found["path"]] == table["path"].to_list()


@pytest.mark.slow
def test_whole_tracks_have_a_store_of_their_own(named):
    audio = named("mtg-genre")
    excerpts, whole = (load_corpus("mtg-genre", audio=audio, **o) for o in ({}, {"stored_s": None}))
    assert set(excerpts.store.index["frames"]) == {1875} and set(whole.store.index["frames"]) == {2500}
    assert whole.store.path.name == f"{excerpts.store.path.name}-whole"
    check_whole_tracks(whole)
    with pytest.raises(ValueError, match=r"mtg-genre-\w+: holds the middle 30 s of track_.*stored_s=None"):
        check_whole_tracks(excerpts)


def test_excerpts_are_refused_unless_asked_for(named, tmp_path):
    corpus = load_corpus("mtg-genre", audio=named("mtg-genre"), stored_s=10)
    model = tiny_model()
    with pytest.raises(ValueError, match="holds the middle 10 s"):
        extract_embeddings(corpus, model, tmp_path)
    assert len(extract_embeddings(corpus, model, tmp_path, whole_tracks=False).values) == 20


@pytest.mark.slow
def test_without_a_length_in_the_table_the_files_decide(named):
    corpus = load_corpus("mtt", audio=named("mtt"), stored_s=5)
    with pytest.raises(ValueError, match="holds the middle 5 s"):
        check_whole_tracks(corpus)
    check_whole_tracks(load_corpus("mtt", audio=named("mtt"), stored_s=6))
    check_whole_tracks(load_corpus("mtt", audio=named("mtt")))
    corpus.table = corpus.table.with_columns(path=pl.lit("gone.wav"))
    with pytest.raises(ValueError, match="holds the middle 5 s"):
        check_whole_tracks(corpus)


def test_every_second_of_a_whole_track_counts(named, tmp_path):
    corpus = load_corpus("mtg-genre", audio=named("mtg-genre"), stored_s=None)
    values = extract_embeddings(corpus, "mel", tmp_path).values[0, 0, 0, :96]
    mel = (corpus.store.read(corpus.store_rows[0]).astype(np.float32) - 2.06755686) / (2 * 1.26829282)
    starts = window_starts(2500, 1875)
    assert starts == [0, 625] and np.allclose(
        values, np.mean([mel[s : s + 1875].mean(0) for s in starts], 0), atol=2e-3
    )


def run_train(arguments: list, processes: int = 0):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    command = [sys.executable, *launcher, "-m", "maestlib.train", *arguments]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, env=environment, cwd=PROJECT, timeout=280
    )
    assert result.returncode == 0, result.stderr[:3000]
    return result.stdout


@pytest.mark.slow
def test_fine_tuning_by_name(named, tmp_path):
    audio, out = named("mtt"), tmp_path / "run"
    notebook = [sys.executable, "-m", "papermill", PROJECT / "nbs/train.ipynb", tmp_path / "train.ipynb"]
    settings = {"dataset": "mtt", "audio": audio, "init": "maest-30s-tunes", "seconds": 5, "max_steps": 3}
    settings |= {"batch_size": 4, "patchout_columns": 10, "out_dir": out}
    parameters = [str(x) for name, value in settings.items() for x in ("-p", name, value)]
    result = subprocess.run([*map(str, notebook), *parameters], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    config = json.loads((out / "config.json").read_text())
    assert (config["dataset"], config["audio"]) == ("mtt", audio)
    assert "cello" in pl.read_parquet(out / "test.parquet").write_csv()
    assert TrainConfig.from_params({"resume": str(out)}).audio == audio


@pytest.mark.slow
def test_processes_train_on_a_named_dataset_and_resume(named, tmp_path):
    audio, out = named("mtt"), tmp_path / "run"
    arguments = ["--dataset", "mtt", "--audio", audio, "--seconds", 5, "--batch-size", 4, "--patchout-columns", 10]
    arguments += ["--size", "tiny", "--depth", 2, "--max-steps", 2, "--out-dir", out]
    run_train(arguments, processes=2)
    assert json.loads((out / "config.json").read_text())["audio"] == audio
    assert "validation mAP" in run_train(["--resume", out]), "the audio is found again without being named"
    assert pl.read_parquet(out / "metrics.parquet")["step"][-1] == 2
