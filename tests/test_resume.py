"""Runs that are stopped: by a kill in any state, by a signal, in the notebook."""

import json
import os
import shutil
import signal
from dataclasses import replace

import polars as pl
import pytest
from helpers import every_kill, kill_when, one_thread  # noqa: F401
from training_runs import (  # noqa: F401
    FULL_RECIPE,
    SCORES,
    folder,
    once_more,
    options,
    read_without_times,
    run_notebook,
    small,
    start,
)

from maestlib.train import train_from_command_line
from maestlib.training.config import TrainConfig
from maestlib.training.evaluation import predict
from maestlib.training.loop import TrainingInterrupted, fit


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train_from_command_line(options(FULL_RECIPE | {"dataset": folder, "out_dir": run})) == 0
    return run


def test_every_state_that_a_kill_can_leave(small, tmp_path):
    "A run that is stopped before any of its renames and deletions gives the same scores when it is resumed."
    settings, states = {"max_steps": 2, "num_validations": 1, "depth": 1, "swa": True, "schedule": "recipe"}, 0
    expected = fit(*small(out_dir=str(tmp_path / "whole"), **settings)).select(SCORES)
    for run in every_kill(lambda run: fit(*small(out_dir=str(run), **settings)), tmp_path):
        has_begun = (run / "config.json").exists()
        history = fit(*(once_more(run) if has_begun else small(out_dir=str(run), **settings)))
        assert history.select(SCORES).equals(expected), run.name
        assert (run / "last.safetensors").exists()
        states += 1
    assert states > 8


def test_killed_and_resumed_run_gives_the_same_losses(folder, undisturbed, tmp_path):
    run = tmp_path / "killed"
    process = start("maestlib.train", *options(FULL_RECIPE | {"dataset": folder, "out_dir": run}))
    kill_when(process, (run / "metrics.parquet").exists)
    assert train_from_command_line(["--resume", str(run)]) == 0
    for name in ("steps", "metrics"):
        assert read_without_times(run, name).equals(read_without_times(undisturbed, name)), name
    for name in ("best", "last", "swa"):
        assert (run / f"{name}.safetensors").stat().st_size == (undisturbed / f"{name}.safetensors").stat().st_size
    assert not (run / "state.pt").exists()


@pytest.mark.slow
def test_the_notebook_resumes_a_run(folder, undisturbed, tmp_path):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    code, out, err = run_notebook({"resume": run})
    assert code == 0 and "finished already" in err and "ROC-AUC" in err, err[-3000:]


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_sigterm_saves_and_the_run_resumes(folder, undisturbed, tmp_path, monkeypatch, capsys):
    run = tmp_path / "stopped"

    def predict_and_stop(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return predict(*arguments, **options)

    with monkeypatch.context() as once:
        once.setattr("maestlib.training.loop.predict", predict_and_stop)
        assert train_from_command_line(options(FULL_RECIPE | {"dataset": folder, "out_dir": run})) == 0
    out = capsys.readouterr().out
    assert f"resume with -p resume {run}" in out and (run / "state.pt").exists(), out
    assert train_from_command_line(["--resume", str(run)]) == 0
    assert "resumes at step" in capsys.readouterr().out
    assert read_without_times(run, "steps").equals(read_without_times(undisturbed, "steps"))
    assert train_from_command_line(["--resume", str(run), "--size", "base"]) == 1
    assert "size=base: the run to resume has tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_during_validation_loses_nothing(small, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "num_validations": 2, "swa": True, "schedule": "recipe", "model": "effnet-b0"}
    whole = fit(*small(out_dir=str(tmp_path / "whole"), **settings))
    calls = []

    def predict_then_stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # in the second validation
            signal.raise_signal(signal.SIGTERM)
        return predict(*arguments, **options)

    with monkeypatch.context() as once, pytest.raises(TrainingInterrupted, match="saved at step 4; resume with"):
        once.setattr("maestlib.training.loop.predict", predict_then_stop)
        fit(*small(out_dir=str(tmp_path / "stopped"), **settings))
    assert len(pl.read_parquet(tmp_path / "stopped/metrics.parquet")) == 1
    resumed = fit(*once_more(tmp_path / "stopped"))
    assert resumed.select(SCORES).equals(whole.select(SCORES))


def test_other_data_are_refused(small, tmp_path, monkeypatch):
    "The columns of the head belong to the labels with which the run began."

    def stop(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return predict(*arguments, **options)

    with monkeypatch.context() as once, pytest.raises(TrainingInterrupted):
        once.setattr("maestlib.training.loop.predict", stop)
        fit(*small(out_dir=str(tmp_path), num_validations=2))
    config, corpus, model = once_more(tmp_path)
    renamed = replace(corpus, labels=[*corpus.labels[1:], "Z"])
    with pytest.raises(ValueError, match="restore it, or start anew"):
        fit(config, renamed, model)
    assert len(fit(config, corpus, model)) == 2


def test_a_run_with_an_unknown_parameter_is_refused(small, tmp_path):
    config, corpus, model = small(out_dir=str(tmp_path / "run"), max_steps=2, num_validations=1)
    fit(config, corpus, model)
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert TrainConfig.from_params({"resume": str(tmp_path / "run")}) == config
    (tmp_path / "run/config.json").write_text(json.dumps(saved | {"number_of_wheels": 3}))
    with pytest.raises(ValueError, match="number_of_wheels: there is no such parameter"):
        TrainConfig.from_params({"resume": str(tmp_path / "run")})
