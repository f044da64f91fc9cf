"""Parameters of training: defaults, presets, texts, and messages that name what is invalid."""

import dataclasses
import json

import pytest
import torch
from helpers import PROJECT
from training_runs import run_notebook

from maestlib.core.docs import parameter_comments
from maestlib.core.files import resolve_path
from maestlib.training.config import SLOW_MINUTES, TrainConfig


@pytest.mark.slow
def test_the_notebook_ends_with_the_message(tmp_path):
    code, out, err = run_notebook({"dataset": "nowhere", "out_dir": tmp_path / "x"})
    last = err.strip().splitlines()[-1]
    assert code != 0 and "nowhere" in last and "tunes" in last, err[-500:]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seconds": -3}, "seconds=-3"),
        ({"seconds": 400}, "seconds=400"),
        ({"seconds": "ten"}, "seconds='ten': give a number or auto"),
        ({"size": "huge"}, "size='huge'.*tiny"),
        ({"patchout_columns": 186}, "patchout_columns=186: nothing is kept of 186"),
        ({"seconds": 5, "patchout_columns": 30}, "patchout_columns=30: nothing is kept of 30"),
        ({"patchout_rows": 9}, "patchout_rows=9"),
        ({"patchout_rows": -1}, "patchout_rows=-1"),
        ({"max_minutes": 0}, "minutes=0"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"depth": 0}, "depth=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"preset": "maest-7s"}, "preset='maest-7s'.*maest-5s"),
        ({"model": "effnet-b0", "patchout_rows": 3}, "patchout_rows=3.*effnet-b0"),
        ({"gpus": 99}, "gpus=99"),
        ({"schedule": "steps"}, "schedule='steps'"),
        ({"teacher": "runs/nobody"}, "teacher=runs/nobody"),
        ({"init": "runs/nowhere"}, "runs/nowhere"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"dataset": "mtt"}, "audio=: give the folder with the audio of mtt"),
        ({"audio": "music"}, "audio=music: dataset=tunes has its own"),
        ({"slow_minutes": 0}, "slow_minutes=0"),
        ({"out_dir": "runs/maest-30s-tunes"}, "out_dir=runs/maest-30s-tunes: the name of a model"),
        ({"out_dir": "discogs-maest-30s-pw-129e/"}, "out_dir=.*: the name of a model"),
    ],
)
def test_errors_name_the_invalid_parameter(wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TrainConfig(**wrong).resolve_auto()


def parameters_cell():
    cells = json.loads((PROJECT / "nbs/train.ipynb").read_text(encoding="utf8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])))


def test_parameters_cell_sets_fields_to_their_defaults():
    defaults, values = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | {"resume": ""}, {}
    exec(parameters_cell(), values)
    del values["__builtins__"]
    assert values == {name: defaults[name] for name in values} and {"preset", "dataset", "resume"} <= set(values)


def test_every_field_is_described():
    comments = parameter_comments(TrainConfig)
    assert list(comments) == [f.name for f in dataclasses.fields(TrainConfig)] and "" not in comments.values()


def test_text_becomes_parameters():
    config = TrainConfig.from_params(
        {"seconds": "5", "swa": "true", "max_minutes": "none", "learning_rate": "1e-3", "audio": "", "batch_size": 8.0}
    )
    assert (config.seconds, config.swa, config.max_minutes) == (5, True, None)
    assert (config.learning_rate, config.batch_size) == (1e-3, 8)


def test_defaults_follow_the_paper_on_a_gpu(monkeypatch):
    monkeypatch.setattr("maestlib.training.config.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("maestlib.training.config.default_dtype", lambda device, training: torch.bfloat16)
    for seconds, columns in {5: 15, 10: 30, 20: 60, 30: 90}.items():
        config = TrainConfig(seconds=seconds).resolve_auto()
        assert (config.size, config.patchout_rows, config.patchout_columns) == ("base", 3, columns)
        assert config.max_minutes is None
        assert (config.mixup, config.time_masks, config.frequency_masks, config.balanced_sampling) == (0.3, 20, 5, True)
        assert config.swa and config.schedule == "recipe" and config.epochs == 130
        same = TrainConfig(preset=f"maest-{seconds}s").resolve_auto()
        assert (same.seconds, same.patchout_columns) == (seconds, columns)


def test_steps_are_the_presets_unless_something_else_is_chosen(monkeypatch):
    "No measurement beforehand shortens a run; a default one on a CPU may prove too slow."
    monkeypatch.delenv("MAESTLIB_MINUTES")
    monkeypatch.setattr("maestlib.training.config.default_device", lambda: torch.device("cpu"))
    for chosen, limits in (
        ({}, (2900, None, SLOW_MINUTES)),
        ({"slow_minutes": None}, (2900, None, None)),
        ({"max_steps": 7}, (7, None, None)),
        ({"max_steps": 0}, (0, None, None)),
        ({"epochs": 2}, (0, None, None)),
        ({"max_minutes": 3}, (0, 3, None)),
        ({"preset": "bundled"}, (6600, None, None)),
        ({"preset": "maest-30s"}, (0, None, None)),
    ):
        config = TrainConfig(**chosen).resolve_auto()
        assert (config.max_steps, config.max_minutes, config.slow_minutes) == limits, chosen
    monkeypatch.setenv("MAESTLIB_MINUTES", "0.5")
    config = TrainConfig().resolve_auto()
    assert (config.max_steps, config.max_minutes, config.slow_minutes) == (0, 0.5, None)


def test_run_folders_do_not_overwrite(tmp_path, monkeypatch):
    monkeypatch.setattr("maestlib.core.files.project_root", lambda: tmp_path)
    monkeypatch.delenv("MAESTLIB_RUNS")
    (tmp_path / "[live]").mkdir()
    (tmp_path / "[live]/a.wav").touch()
    (tmp_path / "[live]/tags.csv").write_text("path,labels\na.wav,x\n")
    for names, settings in (
        (("maest-30s-tunes-1", "maest-30s-tunes-2", "maest-30s-tunes-3"), {}),  # maest-30s-tunes is a model
        (("maest-10s-scores-1", "maest-10s-scores-2"), {"preset": "bundled"}),
        (("maest-5s-tunes", "maest-5s-tunes-2", "maest-5s-tunes-3"), {"seconds": 5}),
        (("maest-5s-[live]", "maest-5s-[live]-2"), {"seconds": 5, "dataset": str(tmp_path / "[live]")}),
    ):
        for name in names:
            assert TrainConfig(**settings).resolve_auto().out_dir == f"runs/{name}"
            (tmp_path / "runs" / name).mkdir(parents=True)
    assert resolve_path("runs").is_absolute()
