"""Training in several processes: the losses of one, shares of a batch, a process that fails."""

import contextlib
import io
import json
import os

import polars as pl
import pytest
import torch
from helpers import one_thread, run_ranks  # noqa: F401
from training_runs import FULL_RECIPE, assert_close_runs, folder, options, small  # noqa: F401

from maestlib.datasets.batches import BatchDataset, load_corpus
from maestlib.models.checkpoint import load_model
from maestlib.train import train_from_command_line
from maestlib.training import trainer as trainer_module
from maestlib.training.evaluation import compare_runs


def test_two_processes_give_the_losses_of_one(folder, tmp_path):
    settings = FULL_RECIPE | {"dataset": folder, "max_steps": 8, "num_validations": 2}
    one, two = (settings | {"out_dir": tmp_path / name} for name in ("one", "two"))
    assert train_from_command_line(options(one)) == 0
    variables = {"MAESTLIB_CACHE": os.environ["MAESTLIB_CACHE"]}
    (code, out, err), (other_code, other_out, other_err) = run_ranks(train_and_print, options(two), **variables)
    assert (code, other_code) == (0, 0) and "strides" not in err + other_err and "Warning" not in err + other_err, err
    assert "test tracks" in out and "test tracks" not in other_out, "one process logs"
    assert json.loads((tmp_path / "two/config.json").read_text())["gpus"] == 2
    assert_close_runs(tmp_path / "two", tmp_path / "one")
    table = compare_runs(tmp_path / "one", tmp_path / "two", n_bootstrap=20)
    assert table["map_difference"].abs().max() < 0.05
    for run in ("one", "two"):
        assert (tmp_path / run / "test.parquet").exists() and len(load_model(tmp_path / run).thresholds) == 4


def train_until_a_disk_fails(arguments):
    "In each process: the second one of three cannot read its batch of step 5."
    loader = BatchDataset.loader

    def failing(batches, start, stop, *rest, **options):
        for step, batch in enumerate(loader(batches, start, stop, *rest, **options), start):
            if os.environ["RANK"] == "1" and step == 5:
                raise OSError("mels.000.f16: input/output error")
            yield batch

    BatchDataset.loader = failing
    return train_and_print(arguments)


def train_and_print(arguments):  # → exit code, stdout, stderr
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        return train_from_command_line(arguments), out.getvalue(), err.getvalue()


def test_processes_that_cannot_be_started_are_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    settings = FULL_RECIPE | {"dataset": folder, "out_dir": tmp_path / "run"}
    for name, value in (("gpus", 1 + max(1, torch.cuda.device_count())), ("nodes", 2)):
        assert train_from_command_line(options(settings | {name: value})) == 1
        assert f"maestlib.train: {name}={value}: " in capsys.readouterr().err
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.slow
def test_a_process_that_cannot_read_ends_the_run_on_all(folder, tmp_path):
    "A quarter of the batch is three clips, one of them without a partner. Two processes complete it."
    settings = FULL_RECIPE | {"batch_size": 12, "patchout_columns": 26, "balanced_sampling": False, "mixup": 0}
    one, run = (settings | {"dataset": folder, "out_dir": tmp_path / name} for name in ("one", "run"))
    variables = {"MAESTLIB_CACHE": os.environ["MAESTLIB_CACHE"]}
    assert train_from_command_line(options(one)) == 0
    (code, out, _), (other_code, _, err), _ = run_ranks(
        train_until_a_disk_fails, options(run), processes=3, **variables
    )
    assert (
        code == 0
        and other_code == 1
        and "maestlib.train: mels.000.f16: input/output error; saved at step 5: fix the file" in err
    ), err
    assert "another process could not read its batch; saved at step 5" in out and "Connection closed" not in err, err
    assert pl.read_parquet(tmp_path / "run/steps.parquet")["step"].to_list() == list(range(5))
    (code, out, err), _ = run_ranks(train_and_print, ["--resume", str(tmp_path / "run")], **variables)
    assert code == 0 and "resumes at step 5" in out, err
    assert_close_runs(tmp_path / "run", tmp_path / "one", ["steps"])


def test_processes_share_each_batch(folder, monkeypatch):
    corpus = load_corpus(str(folder))
    whole = BatchDataset(corpus, 5, 12)[3]
    for processes in (2, 3, 4):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        parts = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(BatchDataset(corpus, 5, 12)[3])
        for expected, *shares in zip(whole, *parts, strict=True):
            assert torch.equal(torch.cat(shares), expected)
    with pytest.raises(ValueError, match="batch_size=5: give a multiple of the 4 processes"):
        BatchDataset(corpus, 5, 5)


def test_out_of_memory_in_several_processes_asks_for_a_smaller_micro_batch(small, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no")

    trainer = trainer_module.Trainer(*small(out_dir=str(tmp_path / "x")))
    trainer.world_size = 2
    monkeypatch.setattr(trainer_module, "compute_loss", no_memory)
    with pytest.raises(MemoryError, match="micro_batch_size=4: out of memory; resume with 2 or fewer"):
        trainer.train_step(*trainer.batches[0])


def test_gradients_can_be_sent_in_bf16(small, tmp_path, monkeypatch):
    sent = {}

    def keep_gradients(trainer, lr):
        is_bf16 = [
            torch.equal(p.grad, p.grad.bfloat16().float()) for p in trainer.model.parameters() if p.requires_grad
        ]
        sent[trainer.config.gradient_compression] = all(is_bf16)
        return torch.zeros(())

    monkeypatch.setattr(trainer_module, "optimizer_step", keep_gradients)
    runs = [small(out_dir=str(tmp_path / str(flag)), gradient_compression=flag) for flag in (False, True)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for run in runs:
            trainer = trainer_module.Trainer(*run)
            trainer.train_step(*trainer.batches[0])
    finally:
        torch.distributed.destroy_process_group()
    assert sent == {False: False, True: True}
