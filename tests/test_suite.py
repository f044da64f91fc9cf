"""The probe suite on stand-ins: every kind of task, each score against scikit-learn or mir_eval."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile

metrics = pytest.importorskip("sklearn.metrics")
mir_eval = pytest.importorskip("mir_eval")

from maestlib.core.text import KEYS  # noqa: E402
from maestlib.paper.experiments import run_experiment  # noqa: E402
from maestlib.paper.scales import PaperConfig  # noqa: E402
from maestlib.probing.encoders import AudioEncoder, embed_recordings, mel_encoder  # noqa: E402
from maestlib.probing.suite import answer_suite, few_shot_curve, score_suite  # noqa: E402
from maestlib.probing.tasks import Task, make_folds, make_task  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"genre": "multiclass", "level": "regression", "key": "key", "high+loud": "multilabel"}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    "60 tones by 20 artists: their pitch is a genre and a key, their level a value; of one label, some is unknown."
    folder, rng, rows = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0), []
    times = np.arange(8000) / 16000
    for i in range(60):
        kind, level = i % 3, rng.uniform(0.02, 0.5)
        tone = level * np.sin(2 * np.pi * (300, 700, 1500)[kind] * times) + 0.01 * rng.normal(size=8000)
        soundfile.write(folder / f"{i}.wav", tone, 16000)
        loud = None if i % 5 == 0 else int(level > 0.2)
        key = ("C", "G major", "Am")[kind]
        rows.append((f"{i}.wav", f"artist {i // 3}", "abc"[kind], np.log(level), key, int(kind == 2), loud))
    columns = ["path", "artist", "genre", "level", "key", "high", "loud"]
    pl.DataFrame(rows, columns, orient="row").write_csv(folder / "sounds.csv")
    return folder


def tasks(sounds: Path) -> list:
    table = str(sounds / "sounds.csv")
    return [make_task(columns, kind, table, columns.split("+")) for columns, kind in KINDS.items()]


def independent(task, rows, predicted) -> dict[str, float]:
    targets = task.targets[rows]
    if task.kind == "regression":
        return {
            "r2": metrics.r2_score(targets, predicted),
            "pearson": np.corrcoef(targets[:, 0], predicted[:, 0])[0, 1],
        }
    if task.kind == "multilabel":
        known = [np.isfinite(column) for column in targets.T]
        pairs = [(t[k], p[k]) for t, p, k in zip(targets.T, predicted.T, known, strict=True)]
        scores = {"roc_auc": metrics.roc_auc_score, "map": metrics.average_precision_score}
        return {name: np.mean([score(*pair) for pair in pairs]) for name, score in scores.items()}
    truth, answer = targets.argmax(1), predicted.argmax(1)
    accuracy = metrics.accuracy_score(truth, answer)
    if task.kind == "multiclass":
        return {"accuracy": accuracy, "macro_f1": metrics.f1_score(truth, answer, average="macro")}
    weighted = [mir_eval.key.weighted_score(KEYS[a], KEYS[b]) for a, b in zip(truth, answer, strict=True)]
    return {"key_score": np.mean(weighted), "accuracy": accuracy}


def check_scores(answers: pl.DataFrame, scores: pl.DataFrame, tasks: list):
    for task in tasks:
        for row in answers.filter(task=task.name).iter_rows(named=True):
            expected = independent(task, row["rows"], np.array(row["predicted"]))
            for metric, value in expected.items():
                found = scores.filter(task=task.name, model=row["model"], probe=row["probe"], metric=metric)
                assert found["value"].item() == pytest.approx(value, abs=2e-3), (task.name, metric)
                assert found["low"].item() <= found["value"].item() <= found["high"].item() + 1e-9


def test_every_kind_of_task(sounds, tmp_path):
    chosen, out = tasks(sounds), tmp_path / "answers.parquet"
    probes = (("ridge", "layer"), ("nearest", "stack"), ("mix", "layer"))
    answers = answer_suite(chosen, ["mel"], probes, out, tmp_path)
    answers = pl.concat([answers, answer_suite(chosen[:1], ["mel"], (("mlp", "mean"),), out, tmp_path)])
    scores, differences = score_suite(answers, chosen, n_bootstrap=200)
    check_scores(answers, scores, chosen)
    assert differences.is_empty(), "one model"
    ridge = dict(scores.filter(probe="ridge").select(pl.format("{} {}", "task", "metric"), "value").iter_rows())
    assert ridge["genre accuracy"] > 0.9 and ridge["key key_score"] > 0.9 and ridge["high+loud roc_auc"] > 0.9
    assert ridge["level r2"] > 0.6
    again = answer_suite(chosen, ["mel"], probes, out, tmp_path / "other")
    assert again.equals(answers[: len(again)]) and not (tmp_path / "other").exists(), "nothing is embedded again"


def test_a_broken_recording_is_left_out_for_that_model_and_the_scores_stay_paired(sounds, tmp_path):
    mel = mel_encoder()
    table = pl.read_csv(sounds / "sounds.csv").with_columns(path=str(sounds) + "/" + pl.col("path"))
    (tmp_path / "text.wav").write_text("no music")
    is_seventh = pl.col("path").str.ends_with("/7.wav")
    broken = table.with_columns(path=pl.when(is_seventh).then(pl.lit(f"{tmp_path}/text.wav")).otherwise("path"))
    task = make_task("genre", "multiclass", broken, "genre")
    other = AudioEncoder("other", lambda wave: mel.embed_track(wave) ** 2, 16000, 1, "none", "1")
    answers = answer_suite([task], [mel, other], (("ridge", "layer"),), folder=tmp_path)
    assert all(len(rows) == 59 and 7 not in rows for rows in answers["rows"].to_list())
    _, differences = score_suite(answers, [task], n_bootstrap=100)
    assert differences["contrast"].to_list() == ["mel statistics - other"] * 2
    with pytest.raises(ValueError, match="none of 1 recordings"):
        embed_recordings([f"{tmp_path}/text.wav"], mel, tmp_path)
    for size in (200, 0):
        for file in tmp_path.rglob("*.npy"):
            file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match="npy: damaged; delete it"):
            embed_recordings([f"{sounds}/1.wav"], mel, tmp_path)


def test_folds_and_layers_that_are_none_are_named(sounds):
    task = make_task("genre", "multiclass", str(sounds / "sounds.csv"), "genre")
    with pytest.raises(ValueError, match="folds=1"):
        make_folds(task, 1)
    with pytest.raises(ValueError, match="layer=2"):
        few_shot_curve(task, np.ones((60, 2, 4)), 2)


def test_a_published_split_is_the_only_fold(sounds):
    table = pl.read_csv(sounds / "sounds.csv")
    split = pl.Series("split", ["train"] * 30 + ["validation"] * 15 + ["test"] * 15)
    [fold] = make_folds(make_task("genre", "multiclass", table.with_columns(split), "genre"))
    assert [len(part) for part in fold] == [30, 15, 15]
    with pytest.raises(ValueError, match="no track in test"):
        make_folds(make_task("genre", "multiclass", table[:45].with_columns(split[:45]), "genre"))


def suite_parameters(sounds: Path, out: Path) -> dict:
    names = ",".join(f"{sounds}/sounds.csv:{kind}:{columns}" for columns, kind in KINDS.items())
    return {"experiment": "suite", "tasks": names, "models": "mel,clap", "n_bootstrap": 100, "out_dir": str(out)}


def test_experiment_reports_and_skips_what_is_not_there(sounds, tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = PaperConfig.from_params(suite_parameters(sounds, tmp_path))
    report = run_experiment("suite", config)
    assert report.findings[-1].startswith("clap is skipped")
    named = [replace(task, name=f"sounds-{task.name}") for task in tasks(sounds)]
    parts = pl.col("setting").str.split(", ")
    scores = report.results.with_columns(task="dataset", model=parts.list.first(), probe=parts.list.last())
    check_scores(pl.read_parquet(tmp_path / "suite-answers.parquet"), scores, named)
    assert len(scores.filter(pl.col("probe").is_in(["ridge", "mix"]))) == 4 * 2 * 2
    curve = scores.filter(pl.col("metric").str.starts_with("accuracy, "), probe="few-shot")
    assert len(curve) == 5 and curve["value"][-1] > 0.8 and scores.filter(probe="cost")["value"].item() > 0
    assert json.loads(scores["manifest"][0])["settings"]["models"] == "mel,clap"


@pytest.mark.slow
def test_papermill(sounds, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        ROOT / "nbs/paper.ipynb",
        tmp_path / "paper.ipynb",
        "--no-progress-bar",
    ]
    chosen = suite_parameters(sounds, tmp_path) | {"models": "maest-10s-scores,mel"}
    chosen["tasks"] += ",scores-onsets"
    for name, value in chosen.items():
        command += ["-p", name, value]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = pl.read_parquet(tmp_path / "results.parquet").filter(pl.col("reference").is_null())
    onsets = dict(results.filter(dataset="scores-onsets").select("metric", "value").iter_rows())
    assert 0.5 < onsets["f1"] < 1 and set(results["experiment"]) == {"suite"}


def test_answers_follow_the_files_and_the_kind(sounds, tmp_path):
    "What was stored for other files, or for another kind of question, is not reused; a repaired file is read."
    table = pl.read_csv(sounds / "sounds.csv").with_columns(path=str(tmp_path) + "/" + pl.col("path"))
    for name in table["path"]:
        (tmp_path / Path(name).name).write_bytes((sounds / Path(name).name).read_bytes())
    broken = tmp_path / "7.wav"
    whole = broken.read_bytes()
    broken.write_text("no music")
    out = tmp_path / "answers.parquet"

    def answer(kind: str) -> list:
        task = make_task("high", kind, table, ["high"])
        return answer_suite([task], ["mel"], (("ridge", "layer"),), out, tmp_path / "vectors")["rows"].to_list()[0]

    assert 7 not in answer("multilabel")
    broken.write_bytes(whole)
    assert 7 in answer("multilabel") and 7 in answer("regression")
    assert pl.read_parquet(out)["data"].n_unique() == 3


def test_two_of_one_name_are_refused(sounds, tmp_path):
    mel, [task, *_] = mel_encoder(), tasks(sounds)
    with pytest.raises(ValueError, match="encoders: two are named mel statistics"):
        answer_suite([task], [mel, replace(mel, revision="2")], folder=tmp_path)
    with pytest.raises(ValueError, match="tasks: two are named"):
        answer_suite([task, replace(task, kind="multilabel")], [mel], folder=tmp_path)


def test_several_columns_of_labels_from_a_file(tmp_path):
    table = pl.DataFrame({"path": list("abcd"), "happy": [1, 0, 1, 0], "sad": [1, 1, 0, None]})
    table.write_csv(tmp_path / "t.csv")
    task = make_task("mood", "multilabel", str(tmp_path / "t.csv"), ["happy", "sad"])
    assert task.outputs == ("happy", "sad")
    np.testing.assert_array_equal(task.targets, [[1, 1], [0, 1], [1, 0], [0, np.nan]])


@pytest.mark.parametrize("kind", ["multiclass", "key"])
def test_a_class_that_is_not_known_is_refused(kind):
    targets = np.eye(24, dtype=np.float32)[np.arange(48) % 24]
    targets[0] = np.nan
    with pytest.raises(ValueError, match=f"the {kind} of a track is not known"):
        Task("t", kind, pl.DataFrame({"path": [*map(str, range(48))]}), KEYS, targets)
