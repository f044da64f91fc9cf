"""Nothing in a training step or in a batch of `predict` waits for a GPU: run on fake CUDA tensors, on any machine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from maestlib.audio import mel as mel_module
from maestlib.datasets.batches import load_corpus
from maestlib.models.columns import build_model
from maestlib.models.effnet import EffNet, EffNetConfig
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.patchout import Patchout, select_patches
from maestlib.training import recipe
from maestlib.training import trainer as trainer_module
from maestlib.training.config import TrainConfig
from maestlib.training.evaluation import predict
from maestlib.training.loop import fit
from maestlib.training.trainer import Trainer, create_model

CUDA = torch.device("cuda:0")
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


class CountWaits(TorchDispatchMode):
    "Count where the CPU would wait for the device; reading a value of a fake tensor raises by itself."

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            devices = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            if devices[0] != devices[1]:
                self.waits.append(f"copy {devices[0]} → {devices[1]}")
        if func is torch.ops.aten.index.Tensor and args[0].is_cuda:
            if any(index is not None and not index.is_cuda for index in args[1]):
                self.waits.append("index on the CPU")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("tunes", quiet=True)


@pytest.fixture
def fake():
    "A mode in which CUDA tensors have shapes and no values."
    return FakeTensorMode()


def build_trainer(fake, corpus, monkeypatch, tmp_path, teacher=False, **settings):
    "A trainer on a fake GPU. The backward pass is pretended: autograd's engine needs a real one."
    settings = dict(seconds=5, batch_size=4, micro_batch_size=2, dtype="bfloat16", max_steps=4) | settings
    settings |= dict(preset="maest-5s", size="tiny", compile=False, num_workers=0, out_dir=str(tmp_path))
    config = TrainConfig(**settings, balanced_sampling=False).resolve_auto()
    if config.column_weight:  # as if `tunes` knew what is active in each column
        known = np.zeros((len(corpus.table), 30, 1), np.uint8)
        corpus = replace(corpus, column_labels=tuple("abcdefgh"), columns=known)
    shape = dict(seconds=5, labels=corpus.labels, mel=corpus.mel)
    columns = dict(column_labels=corpus.column_labels) if config.column_weight else {}
    monkeypatch.setattr(trainer_module, "default_device", lambda: CUDA)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)  # built there; fake weights cannot move
    with fake, CUDA:
        tiny = MAESTConfig.from_size("tiny", depth=2, separate_heads=teacher, **shape, **columns)
        model = EffNet(EffNetConfig(**shape)) if config.model == "effnet-b0" else build_model(tiny)
        trainer = Trainer(config, corpus, model, MAEST(tiny) if teacher else None)
    trainer.model.train()

    def backward(loss):
        assert loss.is_cuda and loss.requires_grad
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return trainer


def take_step(fake, trainer):  # → CountWaits
    batch = tree_map_only(torch.Tensor, fake.from_tensor, next(iter(trainer.load_batches())))
    with fake, CountWaits() as counter:
        trainer.train_step(*batch)
    return counter


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patchout_scope": "clip"},
        {"equalizer": 0.1},
        {"teacher": True},
        {"model": "effnet-b0"},
        {"dtype": "float16"},
        {"head_lr_scale": 10},
        {"column_weight": 0.1},
        {"patchout_scope": "clip", "column_weight": 0.1},
    ],
    ids=str,
)
def test_a_training_step_does_not_wait(settings, fake, corpus, monkeypatch, tmp_path):
    trainer = build_trainer(fake, corpus, monkeypatch, tmp_path, **settings)
    for _ in range(2):
        assert take_step(fake, trainer).waits == []
    loss, norm, lr = trainer.pending_metrics[-1]
    assert loss.is_cuda and norm.is_cuda and isinstance(lr, float)


def validating_normalize(mel, config, validate):
    return original_normalize(mel, config, validate=True)


original_normalize = mel_module.normalize
original_to = trainer_module.StepRandomness.to
original_optimizer_step = trainer_module.optimizer_step


def on_the_cpu(randomness, device):
    "The masks and λ stay where they are drawn."
    return randomness._replace(patches=randomness.patches.to(device))


def blocking(randomness, device):
    return type(randomness)(*(x.to(device) for x in randomness[:-1]), randomness.patches.to(device))


def drawn_inside(randomness, device):
    "Rows and columns are drawn in the step, as the model does it without a selection."
    moved = original_to(randomness, device)
    rows, columns = select_patches((9, 30), Patchout.random(3, 15))
    return moved._replace(patches=moved.patches._replace(rows=rows.to(device), columns=columns.to(device)))


def lr_tensor(trainer, lr):
    norm = original_optimizer_step(trainer, lr)
    return torch.stack([norm, torch.tensor(lr, device=CUDA)])[0]


@pytest.mark.parametrize(
    "target, name, mistake",
    [
        (trainer_module, "normalize", validating_normalize),  # isfinite().all()
        (trainer_module.StepRandomness, "to", on_the_cpu),  # λ, and the product of the masks, made on the CPU
        (trainer_module.StepRandomness, "to", blocking),  # λ and masks copied in a way that waits
        (trainer_module.StepRandomness, "to", drawn_inside),  # rows and columns
        (trainer_module, "optimizer_step", lr_tensor),  # the tensor of the learning rate
        (recipe, "specaugment", lambda mel, t, f: mel * (t.cpu()[:, None] * f.cpu()[:, :, None]).to(mel)),
    ],
    ids=["normalize", "masks on the cpu", "blocking copy", "rows and columns", "learning rate", "mask product"],
)
def test_each_known_wait_would_be_caught(target, name, mistake, fake, corpus, monkeypatch, tmp_path):
    trainer = build_trainer(fake, corpus, monkeypatch, tmp_path)
    monkeypatch.setattr(target, name, mistake)
    try:
        waits = take_step(fake, trainer).waits
    except (DataDependentOutputException, RuntimeError) as error:  # a value is read; tensors on two devices
        waits = [str(error)]
    assert waits


@pytest.mark.parametrize("model", [MAEST, EffNet])
def test_predict_waits_once_at_the_end(model, fake, corpus, monkeypatch):
    shape = dict(seconds=5, labels=corpus.labels, mel=corpus.mel)
    config = MAESTConfig.from_size("tiny", depth=2, **shape) if model is MAEST else EffNetConfig(**shape)
    with fake, CUDA:
        model = model(config)

    def read(windows, size, collate_fn, **options):  # a DataLoader reads a seed's value
        return (collate_fn([*windows[start : start + size]]) for start in range(0, len(windows), size))

    monkeypatch.setattr(torch.utils.data, "DataLoader", read)
    indices = corpus.indices("test")[:3]  # of 30 s: six windows each, in batches of four
    with fake, CountWaits() as counter, pytest.raises(RuntimeError, match="numpy"):  # a fake tensor has no values
        predict(model, corpus, indices, Patchout(keep_every=2), torch.bfloat16, batch_size=4)
    assert counter.waits == ["copy cuda → cpu"]


def test_blocks_are_compiled_four_times_in_a_run(corpus, tmp_path, monkeypatch):
    "All but the last block share a program, in training and in validation, however many steps there are."
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compile_(block, backend="eager", **how))
    monkeypatch.setattr("maestlib.training.evaluation.auto_batch_size", lambda *_: 12)  # 12 windows of each track
    settings = dict(preset="maest-5s", size="tiny", depth=4, seconds=5, batch_size=4, micro_batch_size=2, max_steps=6)
    settings |= dict(num_validations=3, validation_keep_every=10, compile=True, num_workers=0, swa=False)
    config = TrainConfig(**settings, balanced_sampling=False, out_dir=str(tmp_path / "run")).resolve_auto()
    few = [i for split, n in (("train", 40), ("validation", 4), ("test", 1)) for i in corpus.indices(split)[:n]]
    part = replace(corpus, table=corpus.table[few], store_rows=corpus.store_rows[few], targets=corpus.targets[few])
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    history = fit(config, part, create_model(config, part))
    assert len(history) == 3 and counters["stats"]["unique_graphs"] == 4, counters["stats"]
    assert not counters["recompile_limit"]
