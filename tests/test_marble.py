"""The encoder for MARBLE inside a stand-in of MARBLE, written from its interface, and built from the printed YAML."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from helpers import one_thread, recording, tiny_model  # noqa: F401
from torch import nn

from maestlib.models.checkpoint import save_checkpoint
from maestlib.probing import marble

yaml = pytest.importorskip("yaml")


class BaseEncoder(nn.Module):
    def __init__(self, **options):
        super().__init__()


class LayerSelector(nn.Module):  # tensors (batch, time, width) → (batch, chosen, time, width)
    def __init__(self, layers: list[int]):
        super().__init__()
        self.layers = layers

    def forward(self, hidden):
        return torch.stack([hidden[layer] for layer in self.layers], 1)


class TimeAvgPool(nn.Module):
    def forward(self, hidden):
        return hidden.mean(2, keepdim=True)


class LayerWeightedSum(nn.Module):  # stacks a tuple, and nothing else
    def forward(self, hidden):
        return (torch.stack(hidden, 1) if isinstance(hidden, tuple) else hidden).mean(1, keepdim=True)


class MLPDecoder(nn.Sequential):
    def __init__(self, in_dim, out_dim, hidden_layers, activation_fn, dropout):
        assert activation_fn == {"class_path": "torch.nn.ReLU"}
        widths = [in_dim, *hidden_layers]
        layers = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        super().__init__(*layers, nn.ReLU(), nn.Dropout(dropout), nn.Linear(widths[-1], out_dim))


class Task(nn.Module):
    def __init__(self, sample_rate, encoder, emb_transforms, decoders):
        super().__init__()
        self.encoder = build(encoder)
        self.transforms, self.decoders = (nn.ModuleList(map(build, parts)) for parts in (emb_transforms, decoders))
        assert self.encoder.sample_rate == sample_rate

    def forward(self, wave):
        hidden = self.encoder(wave)
        for transform in self.transforms:
            hidden = transform(hidden)
        [logits] = [decoder(hidden) for decoder in self.decoders]
        return logits


def build(config: dict):
    module, name = config["class_path"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**config.get("init_args", {}))


@pytest.fixture
def installed(monkeypatch):  # a module of the encoder that found MARBLE
    contents = {
        "marble.core.base_encoder": {"BaseEncoder": BaseEncoder},
        "marble.modules.transforms": {"LayerSelector": LayerSelector, "TimeAvgPool": TimeAvgPool},
        "marble.modules.decoders": {"MLPDecoder": MLPDecoder},
    }
    for name in ("marble", "marble.core", "marble.modules", *contents):
        module = ModuleType(name)
        vars(module).update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.reload(marble)
    monkeypatch.undo()
    importlib.reload(marble)


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tiny_model(), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def test_a_task_is_built_from_the_yaml_and_learns(installed, checkpoint):
    encoder = installed.MAESTEncoder(checkpoint)
    assert isinstance(encoder, BaseEncoder)
    settings = yaml.safe_load(installed.marble_config(encoder, layer=1, num_classes=3))
    assert all(settings["data"]["init_args"][split]["init_args"]["sample_rate"] == 16000 for split in ("train", "test"))
    task = Task(**settings["model"]["init_args"]).train()
    assert not task.encoder.model.training and task.transforms[0].layers == [1]
    waves = torch.stack([torch.from_numpy(recording(7, seed)) for seed in (0, 1)])[:, None]
    logits = task(waves)
    assert logits.shape == (2, 1, 1, 3)
    logits.sum().backward()
    assert all(p.grad is not None for p in task.decoders.parameters())
    assert all(p.grad is None for p in task.encoder.parameters())


def test_layers_are_a_tuple_that_can_be_summed(installed, checkpoint):
    hidden = installed.MAESTEncoder(checkpoint)(torch.from_numpy(recording(7))[None, None])
    assert len(hidden) == 4 and hidden[0].shape == (1, 43, 48)
    assert LayerWeightedSum()(hidden).shape == (1, 1, 43, 48)


def test_a_long_input_is_read_in_windows(checkpoint):
    encoder, wave = marble.MAESTEncoder(checkpoint), torch.from_numpy(recording(12.5, 3))[None]
    columns = encoder.model.config.grid[1]
    layers, first = encoder(wave), encoder(wave[:, : 5 * 16000])
    assert columns == 30 and layers[0].shape[1] == (781 - 16) // 10 + 1 == 77
    for long, short in zip(layers, first, strict=True):
        torch.testing.assert_close(long[:, :columns], short, atol=1e-4, rtol=1e-4)
    last = encoder(wave[:, 47 * 10 * 256 :])[3]  # from column 47 to 77, but for what its first frame sees
    torch.testing.assert_close(layers[3][:, 60:].mean(), last[:, 13:].mean(), atol=0.02, rtol=0.02)
    batch = encoder(torch.cat([wave, wave.flip(-1)]))
    torch.testing.assert_close(batch[2][:1], layers[2], atol=1e-4, rtol=1e-4)


def test_full_training_and_half_precision(checkpoint):
    encoder = marble.MAESTEncoder(checkpoint, train_mode="full")
    assert encoder.training and not encoder.eval().training and encoder.train().training
    encoder = marble.MAESTEncoder(checkpoint).bfloat16()
    assert encoder(torch.from_numpy(recording(2))[None])[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert marble.MAESTEncoder(checkpoint)(torch.from_numpy(recording(2))[None])[0].isfinite().all()
