"""Every experiment of the paper under its full protocol, on stand-ins for the public datasets in their own layouts.

Rendered tunes stand for recordings, a few tracks for thousands, small random weights for the released ones: the numbers
are of no account. What is tested is what a user of the real data meets: file names, split lists, whole tracks, columns,
pairing with the paper's values, refusals, an interrupted study.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
from helpers import tiny_model
from training_runs import folder, small  # noqa: F401

from maestlib.audio.mel import load_audio
from maestlib.datasets.batches import load_corpus
from maestlib.datasets.registry import load_dataset
from maestlib.models.checkpoint import save_checkpoint
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.paper.experiments import RUNNERS, PaperReport, results_path, run_experiment
from maestlib.paper.probes import embed_all, model_title
from maestlib.paper.published import EXPERIMENTS
from maestlib.paper.results import KEY, Report, make_manifest, make_results, plot_results, to_latex
from maestlib.paper.scales import PUBLIC_DATASETS, PaperConfig, audio_folders
from maestlib.probing.study import append_rows

pytest.importorskip("papermill")
ROOT = Path(__file__).resolve().parents[1]
TRACKS = {"train": 6, "validation": 3, "test": 4}
TRACK_S = 42  # two segments and a half of 30 s windows: more than the centre of a track
TAGS = ("jazz", "rock", "slow")
TINY = "MAEST-30s (tiny, ours)"


def tracks():  # yields number, split, tags
    i = 0
    for split, count in TRACKS.items():
        for _ in range(count):
            yield i, split, [TAGS[i % 3]] + [TAGS[(i + 1) % 3]] * (i % 2)
            i += 1


def write(path: Path, lines: list[str]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_mtg(splits: Path) -> list[str]:  # path of the audio of each track
    for task, group in {
        "genre": "genre",
        "instrument": "instrument",
        "moodtheme": "mood/theme",
        "top50tags": "top",
    }.items():
        for part in TRACKS:
            rows = [
                "\t".join([f"track_{i:07}", f"artist_{i // 2:06}", "album_000001", f"00/{i}.mp3", f"{TRACK_S}.0"])
                + "".join(f"\t{group}---{tag}" for tag in tags)
                for i, split, tags in tracks()
                if split == part
            ]
            header = "\t".join(["TRACK_ID", "ARTIST_ID", "ALBUM_ID", "PATH", "DURATION", "TAGS"])
            write(splits / f"mtg_jamendo/autotagging_{task}-{part}.tsv", [header, *rows])
    return [f"00/{i}" for i, *_ in tracks()]


def write_mtt(splits: Path) -> list[str]:
    folder = {"train": "0", "validation": "c", "test": "d"}
    paths = [f"{folder[split]}/artist_{i // 2}-album-{i:02}-song-0-29" for i, split, _ in tracks()]
    rows = [f"{s}\t{path}.mp3\t{','.join(tags)}" for path, (_, s, tags) in zip(paths, tracks(), strict=True)]
    write(splits / "mtt/groundtruth_12-1-3.tsv", ["split\tpath\ttags", *rows])
    return paths


def write_msd(splits: Path) -> list[str]:
    ids = [f"TRAAA{chr(65 + i)}A{i:011X}" for i, *_ in tracks()]
    targets = np.array([[tag in tags for tag in TAGS] for *_, tags in tracks()])
    write(splits / "msd/tags.txt", TAGS)
    write(splits / "msd/cals_tags.txt", TAGS)
    parts = np.array([split for _, split, _ in tracks()])
    for split, short in {"train": "train", "validation": "valid", "test": "test"}.items():
        own = parts == split
        write(splits / f"msd/usual_{short}.txt", np.array(ids)[own].tolist())
        np.save(splits / f"msd/usual_{short}_y.npy", targets[own])
        np.save(splits / f"msd/cals_{short}_ids.npy", np.array(ids)[own])
        np.save(splits / f"msd/cals_{short}_binaries.npy", targets[own])
    return [f"{name[2]}/{name[3]}/{name[4]}/{name}" for name in ids]


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    "A folder with splits/, audio/ of each dataset, and weights of two sizes of input."
    folder = tmp_path_factory.mktemp("public")
    clips = load_dataset("tunes")["path"][:20]
    waves = [load_audio(path) for path in clips]
    for name, write_lists in {"mtg": write_mtg, "mtt": write_mtt, "msd": write_msd}.items():
        for i, path in enumerate(write_lists(folder / "splits")):
            file = (folder / "audio" / name / path).with_name(f"{Path(path).name}.flac")
            file.parent.mkdir(parents=True, exist_ok=True)
            both = np.concatenate([waves[i], waves[i + 1]])[: TRACK_S * 16000]
            soundfile.write(file, both, 16000)
    for seconds in (10, 30):
        config = MAESTConfig.from_size("tiny", depth=2, seconds=seconds, labels=("a", "b"))
        save_checkpoint(MAEST(config).init_weights(seconds), folder / f"maest-{seconds}s.safetensors")
    return folder


def environment(public: Path) -> dict:
    return os.environ | {"MAESTLIB_DATA": str(public), "MAESTLIB_CACHE": str(public / "cache")}


def parameters(public: Path) -> dict:
    audio = {"mtg": [n for n in PUBLIC_DATASETS if n.startswith("mtg")], "mtt": ["mtt"], "msd": ["msd", "msd-cals"]}
    return {
        "experiment": "all",
        "scale": "full",
        "datasets": "mtt",
        "grid": False,  # 144 probes; see below
        "audio": ",".join(f"{name}={public / 'audio' / folder}" for folder, names in audio.items() for name in names),
        "model": f"{public}/maest-30s.safetensors,{public}/maest-10s.safetensors",
        "rivals": "mel,random",
        "pretraining": "mtg-genre",
        "init": f"random,passt,{public}/maest-10s.safetensors",
        "teacher": "own",
        "size": "tiny",
        "depth": 1,
        "max_steps": 2,
        "n_bootstrap": 200,
        "out_dir": str(public / "results"),
    }


@pytest.fixture(scope="module")
def executed(public) -> dict:
    "The notebook, executed by papermill with all experiments at full scale, on one of the datasets."
    command = [sys.executable, "-m", "papermill", ROOT / "nbs/paper.ipynb", public / "paper.ipynb", "--no-progress-bar"]
    for name, value in parameters(public).items():
        command += ["-p", name, value]
    run = subprocess.run([*map(str, command)], env=environment(public), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((public / "paper.ipynb").read_text())


@pytest.fixture(scope="module")
def results(executed, public) -> pl.DataFrame:
    return pl.read_parquet(public / "results/results.parquet")


@pytest.mark.slow
def test_every_experiment_leaves_results(results):
    assert set(results["experiment"]) == set(EXPERIMENTS) - {"suite"} and set(results["scale"]) == {"full"}
    scores = results.filter(pl.col("metric").is_in(["map", "roc_auc"]) & pl.col("reference").is_null())
    assert scores["value"].is_between(0, 1).all() and (scores["low"] <= scores["high"]).all()
    assert set(scores["unit"]) == {"artist"}


def in_process(public, monkeypatch, **changed) -> PaperReport:
    for name, value in environment(public).items():
        monkeypatch.setenv(name, value)
    return PaperReport(PaperConfig.from_params(parameters(public) | changed))


@pytest.mark.slow
def test_seven_datasets_beside_the_paper(results, public, monkeypatch):
    paper = in_process(public, monkeypatch, datasets="auto", experiment="downstream")
    paper.show("downstream")
    paper.check()
    results = pl.read_parquet(public / "results/results.parquet").filter(experiment="downstream")
    table = results.filter(metric="map", setting=TINY).filter(pl.col("reference").is_null())
    published = dict(table.select("dataset", "published").iter_rows())
    assert published == {
        "mtg-genre": 0.216, "mtg-instrument": 0.229, "mtg-mood": 0.154, "mtg-top50": 0.315, "mtt": 0.419, "msd": 0.407,
        "msd-cals": 0.354,
    }  # fmt: skip
    assert {TINY, TINY.replace("30", "10"), "mel statistics", f"{TINY}, block chosen"} <= set(results["setting"])
    manifests = [json.loads(text) for text in results["manifest"].unique()]
    assert len({m["data"]["labels"] for m in manifests}) == 6, "msd and msd-cals have the same tracks and labels"
    for manifest in manifests:
        assert set(manifest["weights"]) == {TINY, TINY.replace("30", "10")} and manifest["versions"]["torch"]
        assert manifest["settings"]["keep_every"] == 1 and manifest["settings"]["probe_learning_rate"] == 1e-4


@pytest.mark.slow
def test_grid_is_searched_on_validation(results, public, monkeypatch):
    grid = {"batch_size": (64,), "epochs": (2, 3), "dropout": (0.5,), "learning_rate": (1e-4, 1e-3)}
    monkeypatch.setattr("maestlib.probing.layers.PAPER_GRID", grid)
    paper = in_process(public, monkeypatch, grid=True, experiment="downstream", rivals="", out_dir=f"{public}/grid")
    paper.show("downstream")
    paper.check()
    probes = pl.read_parquet(public / "grid/probes-mtt.parquet").filter(model=TINY, tokens="cdt", blocks="1")
    points = probes.select("epochs", "learning_rate").unique()
    assert len(points) == 4 + 1, "the grid, and the default for the block chosen"


@pytest.mark.slow
def test_figure_2_has_every_block_and_stack(results):
    rows = results.filter(experiment="fig2", dataset="mtt", metric="map").filter(pl.col("reference").is_null())
    own = rows.filter(pl.col("setting").str.starts_with(f"{TINY}, block"))
    assert len(own) == 2 * 7, "two blocks, seven stacks"
    differences = results.filter(experiment="fig2", dataset="mtt", metric="map", reference="mel statistics")
    assert len(differences) == 1


@pytest.mark.slow
def test_trained_settings_and_their_weights(results):
    init = results.filter(experiment="init", metric="map").filter(pl.col("reference").is_null())
    assert set(init["setting"]) == {"random", "maest-10s"}, "PaSST's weights cannot be had here"
    assert set(init.select("counterpart", "weights").rows()) == {
        ("discogs20", "last"), ("discogs20", "SWA"), ("mtt", "last"), ("mtt", "SWA"),
    }  # fmt: skip
    paper = init.filter(setting="random", counterpart="mtt", weights="SWA")
    assert paper["published"].to_list() == [0.39]
    lengths = results.filter(experiment="length", metric="map").filter(pl.col("reference").is_null())
    assert set(lengths["setting"]) == {"5 s", "10 s", "20 s", "30 s"}


@pytest.mark.slow
def test_training_follows_the_recipe(results, public):
    configs = [json.loads(path.read_text()) for path in (public / "results/runs").glob("*/config.json")]
    by_seconds = {c["seconds"]: c for c in configs if c["preset"] != "laptop"}
    assert {s: c["patchout_columns"] for s, c in by_seconds.items()} == {5: 15, 10: 30, 20: 60, 30: 90}
    assert all(c["swa"] and c["mixup"] == 0.3 and c["schedule"] == "recipe" for c in configs)


@pytest.mark.slow
def test_report_shows_figures_and_limits(executed):
    outputs = [o for cell in executed["cells"] for o in cell.get("outputs", [])]
    data = [o["data"] for o in outputs if "data" in o]
    assert sum("application/vnd.plotly.v1+json" in d for d in data) >= 6
    prose = "".join("".join(d.get("text/markdown", "")) for d in data)
    assert "PaSST is skipped" in prose and "the paper prints Figure 2 without values" in prose
    assert "\\begin{tabular}" in "".join("".join(o.get("text", "")) for o in outputs)


@pytest.mark.slow
def test_same_question_again_trains_nothing(results, public, monkeypatch):
    monkeypatch.setattr("maestlib.paper.runs.fit", lambda *_: pytest.fail("trained again"))
    paper = in_process(public, monkeypatch)
    paper.show("length")
    paper.check()
    again = pl.read_parquet(public / "results/results.parquet").filter(experiment="length")
    assert len(again) == len(results.filter(experiment="length"))
    of_length = again.sort("setting", "weights", "metric", "dataset", "value")
    assert of_length["value"].to_list() == results.filter(experiment="length").sort(
        "setting", "weights", "metric", "dataset", "value")["value"].to_list()  # fmt: skip


@pytest.mark.slow
def test_a_store_of_cut_tracks_is_refused(results, public, monkeypatch):
    in_process(public, monkeypatch)
    cut = load_corpus("mtt", audio=str(public / "audio/mtt"), quiet=True)  # the centre 30 s, as training takes them
    config = PaperConfig.from_params(parameters(public) | {"experiment": "fig2", "datasets": str(cut.store.path)})
    paper = PaperReport(config)
    paper.show("fig2")
    assert "fig2" in paper.failed and str(cut.store.path) in str(paper.failed["fig2"])
    with pytest.raises(RuntimeError, match="1 of 1 experiments failed: fig2"):
        paper.check()


@pytest.mark.slow
def test_teacher_of_other_labels_is_refused(results, public, monkeypatch):
    paper = in_process(public, monkeypatch, teacher=f"{public}/maest-30s.safetensors")
    paper.show("teacher")
    assert "it knows 2 labels, not the 3 of mtg-genre" in str(paper.failed["teacher"])


def test_dataset_without_audio_is_refused():
    with pytest.raises(ValueError, match="mtt needs audio="):
        PaperConfig.from_params({"scale": "full", "experiment": "fig2", "datasets": "mtt"})


def score(setting: str, counterpart: str, metric: str, value: float, weights: str | None = "last") -> dict:
    row = {"experiment": "length" if weights else "downstream", "scale": "desk", "dataset": "tunes"}
    row |= {"setting": setting, "counterpart": counterpart, "weights": weights, "metric": metric, "runs": 1}
    return row | {"value": value, "low": value - 0.05, "high": value + 0.05}


def test_a_dataset_with_two_counterparts_has_a_row_for_each():
    rows = [
        score(setting, counterpart, metric, value + i / 100)
        for i, setting in enumerate(("5 s", "10 s"))
        for counterpart, metric, value in (
            ("discogs20", "roc_auc", 0.6), ("discogs20", "map", 0.2), ("mtt", "roc_auc", 0.8), ("mtt", "map", 0.4))
    ]  # fmt: skip
    results = make_results(rows, make_manifest())
    table = Report(results).table()
    assert len(table) == 4 and not table.select("setting", "counterpart").is_duplicated().any()
    pairs = table.select("counterpart", pl.col("ROC-AUC", "mAP").str.head(4)).rows()
    assert pairs == [
        ("discogs20", "60.0", "20.0"),
        ("mtt", "80.0", "40.0"),
        ("discogs20", "61.0", "21.0"),
        ("mtt", "81.0", "41.0"),
    ]
    assert table["mAP, paper"].to_list() == ["21.1", "40.8", "22.8", "41.1"]
    titles = [annotation.text for annotation in plot_results(results).layout.annotations]
    assert titles == ["tunes", "the paper's Discogs20", "tunes", "the paper's MTT"], "no axis is shared"


def test_both_counterparts_of_one_dataset_are_kept(tmp_path):
    results = make_results([score("5 s", name, "map", 0.4) for name in ("discogs20", "mtt")], make_manifest())
    append_rows(tmp_path / "results.parquet", results, KEY)
    assert len(append_rows(tmp_path / "results.parquet", results[1:], KEY)) == 2


def test_latex_names_the_dataset_of_the_papers_values():
    rows = [score(TINY, "mtt", "map", 0.3, None), score("mel statistics", "mtt", "map", 0.2, None)]
    latex = to_latex(make_results(rows, make_manifest()))
    assert "tunes (paper: MTT) mAP" in latex
    assert f"{TINY} & \\textbf{{30.0}}" in latex and "MAEST-30s (paper) & 41.9" in latex
    same = [row | {"dataset": "mtt"} for row in rows]
    assert "(paper: MTT)" not in to_latex(make_results(same, make_manifest()))
    alone = make_results(rows[1:], make_manifest())
    assert "(paper" not in to_latex(alone), "no published value, nothing to name"


def test_counts_have_no_decimals():
    rows = [score("a", "discogs20", "map", 0.4, None), score("a", "discogs20", "count", 93.0, None)]
    rows[1] |= {"low": None, "high": None}
    table = Report(make_results(rows, make_manifest())).table()
    assert table.select("mAP", "count").row(0) == ("40.0 (35.0 to 45.0)", "93")


def test_nothing_is_downloaded_that_was_not_asked_for(small, tmp_path, monkeypatch):
    "A rival that is not in the cache is skipped, in the report too, with what to give."
    _, corpus, _ = small()
    calls = []
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    monkeypatch.setattr("maestlib.models.musicnn.subprocess.run", lambda command, **_: calls.append(command))
    config = PaperConfig.from_params({"rivals": "musicnn,mel"})
    embeddings, skipped = embed_all(config, corpus, {TINY: tiny_model(embed_dim=12, depth=1)})
    assert list(embeddings) == [TINY, "mel statistics"] and not calls
    assert len(skipped) == 1 and "musicnn is skipped" in skipped[0] and "give download=true" in skipped[0]
    with pytest.raises(AttributeError):  # the stand-in of pip returns nothing
        embed_all(replace(config, download=True, rivals="musicnn"), corpus, {TINY: tiny_model(embed_dim=12, depth=1)})
    assert "musicnn==0.1.0" in calls[0] and replace(config, download=True).settings == config.settings


def test_every_experiment_writes_a_report_of_its_own(tmp_path, monkeypatch):
    reports = {
        name: Report(make_results([score(name, "mtt", "map", 0.4)], make_manifest()), [], [f"{name} | found"], ["few"])
        for name in ("fig2", "curation")
    }
    for name, report in reports.items():
        monkeypatch.setitem(RUNNERS, name, lambda config, report=report: report)
        run_experiment(name, PaperConfig.from_params({"experiment": name, "out_dir": str(tmp_path)}))
    for name in reports:
        text = (tmp_path / f"{name}.md").read_text(encoding="utf8")
        assert text.startswith(f"# {EXPERIMENTS[name]}\n") and f"- {name} | found" in text and "| 40.0 (35.0" in text
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "curation.md", "fig2.md", "results.parquet",
    ]  # fmt: skip


def test_papermill_can_read_every_parameter():
    "It takes a second equals sign in a line, as in a comment, for something else."
    lines = []
    for path in ROOT.glob("nbs/**/*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                lines += [(path.name, line) for line in "".join(cell["source"]).splitlines()]
    assert len(lines) > 50 and [line for line in lines if line[1].count("=") > 1] == []


def test_only_released_models_have_the_papers_names():
    tiny = MAEST(MAESTConfig.from_size("tiny", depth=1, seconds=30, labels=("a",)))
    assert model_title("maest-30s-tunes", tiny) == model_title("runs/x/best.safetensors", tiny) == TINY
    assert model_title("discogs-maest-30s-pw-129e", tiny) == "MAEST-30s"


def test_answers_of_earlier_parameters_are_not_counted(tmp_path):
    paper = PaperReport(PaperConfig.from_params({"experiment": "curation", "out_dir": str(tmp_path)}))
    rows = [score("5 s", "mtt", "map", 0.4)]
    now, before = (make_results(rows, make_manifest(settings={"seed": seed})) for seed in (0, 1))
    for results in (before, now):
        append_rows(results_path(paper.config), results, KEY)
    paper.reports["length"] = Report(now)
    assert paper.results().equals(now)


def test_a_folder_of_audio_may_have_a_comma():
    config = PaperConfig.from_params({"experiment": "suite", "audio": "emotify=/m/Crosby, Stills & Nash, irmas=/x=y,"})
    assert audio_folders(config) == {"emotify": "/m/Crosby, Stills & Nash", "irmas": "/x=y"}
    assert audio_folders(PaperConfig.from_params({"experiment": "suite", "audio": "/m/Crosby, Stills"})) == {}
