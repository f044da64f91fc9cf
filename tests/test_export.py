"""Exported files agree with the model, at sizes other than the recorded one, and contain its labels."""

import copy
import json

import pytest
import torch

from maestlib.audio.mel import MelConfig, logmel, normalize
from maestlib.models.export import LogMel, export_onnx, export_torch
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.patchout import Patchout

LABELS = ("Rock---Krautrock", "Non-Music---Poesía", "Pop---Schlager")


@pytest.fixture(scope="module", params=[False, True], ids=["one head", "separate_heads"])
def model(request):
    model = (
        MAEST(MAESTConfig(5, LABELS, embed_dim=96, num_heads=3, depth=2, separate_heads=request.param))
        .init_weights(1)
        .eval()
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def example_mels(min_frames):
    "Mels of different batch sizes and lengths."
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(clips, 96, frames, generator=generator) for clips, frames in ((1, 312), (5, 101), (2, min_frames))
    ]


@pytest.mark.parametrize("frontend", ["essentia", "torchaudio"])
def test_frontend_as_layers(frontend):
    config = MelConfig(frontend=frontend)
    wave = 0.3 * torch.randn(2, 16_000 + 100, generator=torch.Generator().manual_seed(4))
    reference = normalize(logmel(wave, config), config)[..., : 16_100 // 256]
    torch.testing.assert_close(LogMel(config)(wave), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("patchout", [None, Patchout(keep_every=3, drop_rows=(0, 7, 8))])
def test_onnx_from_mel(model, patchout, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export_onnx(model, tmp_path / "mel.onnx", patchout=patchout) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["mel.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "mel.onnx", providers=["CPUExecutionProvider"])
    for mel in example_mels(16):
        (logits,) = session.run(["logits"], {"mel": mel.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(mel, patchout), atol=1e-4, rtol=0)
    metadata = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(metadata["labels"])) == LABELS
    assert MAESTConfig.from_dict(json.loads(metadata["config"])) == model.config
    with pytest.raises(Exception, match="."):  # longer than the model: an error, not a wrong answer
        session.run(None, {"mel": torch.zeros(1, 96, 400).numpy()})


def test_onnx_from_waveform(model, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export_onnx(model, tmp_path / "tags.onnx", include_frontend=True) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "tags.onnx", providers=["CPUExecutionProvider"])
    for samples in (80_000, 30_000):
        wave = 0.2 * torch.randn(2, samples, generator=torch.Generator().manual_seed(5))
        (activations,) = session.run(["activations"], {"wave": wave.numpy()})
        with torch.no_grad():
            expected = model(normalize(logmel(wave))[..., : samples // 256]).sigmoid()
        torch.testing.assert_close(torch.from_numpy(activations), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("include_frontend", [False, True])
def test_torch_export(model, include_frontend, tmp_path):
    assert export_torch(model, tmp_path / "model.pt2", include_frontend=include_frontend) < 1e-4
    extra = {"config.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert MAESTConfig.from_dict(json.loads(extra["config.json"])) == model.config
    for mel in example_mels(26):
        x = mel[:, 0].repeat(1, 256) if include_frontend else mel
        with torch.no_grad():
            expected = model(normalize(logmel(x))[..., : mel.shape[2]]).sigmoid() if include_frontend else model(mel)
            torch.testing.assert_close(program(x), (expected,), atol=1e-4, rtol=0)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.zeros(1, 400 * 256) if include_frontend else torch.zeros(1, 96, 400))


def cosine(a, b):  # of embeddings, the lowest
    return float(torch.nn.functional.cosine_similarity(torch.from_numpy(a), b, dim=-1).min())


def test_onnx_embeddings_from_waveform(model, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    patchout, blocks, file = Patchout(keep_every=2), (1, 0), tmp_path / "f.onnx"
    assert export_onnx(model, file, include_frontend=True, patchout=patchout, blocks=blocks) < 1e-4
    wave = 0.2 * torch.randn(2, 40_000, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = model.embed(normalize(logmel(wave))[..., : 40_000 // 256], blocks, patchout)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["activations", "embeddings"]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["blocks"]) == [1, 0] and tuple(json.loads(metadata["labels"])) == LABELS
    assert cosine(session.run(["embeddings"], {"wave": wave.numpy()})[0], expected) >= 0.999999


def test_torch_export_of_embeddings_alone(model, tmp_path):
    export_torch(model, tmp_path / "e.pt2", blocks=(0,), include_head=False)
    program, mel = torch.export.load(tmp_path / "e.pt2").module(), example_mels(26)[1]
    with torch.no_grad():
        torch.testing.assert_close(program(mel), (model.embed(mel, (0,)),), atol=1e-4, rtol=1e-5)
    assert not any("blocks.1." in name for name in program.state_dict())


def test_invalid_exports_are_refused(tmp_path):
    model = MAEST(MAESTConfig(5, LABELS, embed_dim=96, num_heads=3, depth=1)).init_weights(1).eval()
    with pytest.raises(ValueError, match="random"):
        export_torch(model, tmp_path / "x.pt2", patchout=Patchout.random(rows=3))
    with pytest.raises(ValueError, match="drop_rows"):
        export_torch(model, tmp_path / "x.pt2", patchout=Patchout(drop_rows=(9,)))
    with pytest.raises(ValueError, match="float32"):
        export_torch(copy.deepcopy(model).bfloat16(), tmp_path / "x.pt2")
    with pytest.raises(ValueError, match="blocks=1: give an integer from 0 to 0"):
        export_torch(model, tmp_path / "x.pt2", blocks=(1,))
    with pytest.raises(ValueError, match="no output"):
        export_torch(model, tmp_path / "x.pt2", include_head=False)
    assert list(tmp_path.iterdir()) == []
