"""Encoders of others behind one interface, with stand-ins for their packages: windows, revisions, rates and remedies.

The stand-ins return what can be computed by hand, in the shapes of the real ones.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import one_thread, recording, tiny_model  # noqa: F401
from torch import nn

from maestlib.audio.mel import logmel
from maestlib.models.checkpoint import save_checkpoint
from maestlib.models.hub import RELEASED_MODELS
from maestlib.probing import rivals

WIDTH, LAYERS = 4, 3


class Block(nn.Module):  # the tokens of a layer are those before it, plus one
    def __init__(self, as_tuple: bool = True):
        super().__init__()
        self.as_tuple, self.bias = as_tuple, nn.Parameter(torch.ones(WIDTH))

    def forward(self, tokens):
        return (tokens + self.bias, None) if self.as_tuple else tokens + self.bias


class Blocks(nn.Module):
    "Tokens are the largest samples of 100 at a time, WIDTH times over."

    def __init__(self, as_tuple: bool = True):
        super().__init__()
        self.layers, self.seen = nn.ModuleList([Block(as_tuple) for _ in range(LAYERS)]), []

    def run(self, waves) -> list[torch.Tensor]:  # LAYERS + 1 of (batch, time, WIDTH)
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(waves)
        hidden = [waves.unfold(1, 100, 100).amax(2, keepdim=True).expand(-1, -1, WIDTH)]
        for layer in self.layers:
            output = layer(hidden[-1])
            hidden.append(output[0] if isinstance(output, tuple) else output)
        return hidden


class Pretrained(nn.Module):  # keeps what it was loaded with
    @classmethod
    def from_pretrained(cls, source, **options):
        cls.loaded = (source, options)
        cls.last = cls()
        return cls.last


class Mert(Pretrained):
    as_tuple = True

    def __init__(self):
        super().__init__()
        self.encoder = Blocks(self.as_tuple)

    def forward(self, waves):
        self.encoder.run(waves)
        return SimpleNamespace(hidden_states=())  # as in transformers 5


class MuQ(Mert):
    def forward(self, waves, output_hidden_states):
        return SimpleNamespace(hidden_states=self.encoder.run(waves))


class ClapModel(Pretrained):
    boxed = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def get_audio_features(self, input_features):
        output = input_features.mean(1, keepdim=True).expand(-1, 8) * self.weight
        return SimpleNamespace(pooler_output=output) if self.boxed else output


class ClapFeatureExtractor(Pretrained):
    asked = []

    def __call__(self, waves, sampling_rate, return_tensors):
        self.asked.append((len(waves), {len(wave) for wave in waves}, sampling_rate, return_tensors))
        return {"input_features": torch.from_numpy(np.stack(waves))}


@pytest.fixture
def install(monkeypatch):
    monkeypatch.setenv("MAESTLIB_DEVICE", "cpu")

    def install(name: str, **contents):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return install


def check_windows(seen: list[torch.Tensor], size: int, count: int):
    assert {wave.shape[1] for wave in seen} == {size} and sum(map(len, seen)) == count
    assert max(map(len, seen)) <= 4


@pytest.mark.parametrize("as_tuple", [True, False])
def test_mert(install, monkeypatch, as_tuple):
    monkeypatch.setattr(Mert, "as_tuple", as_tuple)
    install("transformers", AutoModel=Mert)
    encoder = rivals.mert_encoder()
    source, options = Mert.loaded
    assert source == "m-a-p/MERT-v1-95M" and options["trust_remote_code"] and len(options["revision"]) == 40
    assert encoder.revision == options["revision"][:8] and encoder.license == "CC BY-NC 4.0"
    wave = 0.01 * torch.from_numpy(recording(27, rate=24000)) + 0.3
    values = encoder.embed_track(wave)
    assert values.shape == (LAYERS + 1, WIDTH) and np.allclose(np.diff(values, axis=0), 1, atol=1e-5)
    seen = Mert.last.encoder.seen
    check_windows(seen, 5 * 24000, 6)
    scaled = torch.cat(seen).double()
    first = wave[: 5 * 24000].double()
    expected = (first - first.mean()) / (first.var(correction=0) + 1e-7).sqrt()  # as Wav2Vec2FeatureExtractor scales
    assert scaled.mean(1).abs().max() < 1e-4 and torch.allclose(scaled[0], expected, atol=1e-3)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in Mert.last.encoder.layers)
    assert np.array_equal(encoder.embed_track(wave), values)
    assert np.isfinite(encoder.embed_track(torch.zeros(24000))).all(), "silence, shorter than a window"


def test_muq(install):
    install("transformers", __version__="4.57.6")
    install("muq", MuQ=MuQ)
    encoder = rivals.muq_encoder(revision="0123456789abcdef")
    assert MuQ.loaded == ("OpenMuQ/MuQ-large-msd-iter", {"revision": "0123456789abcdef"})
    assert encoder.revision == "01234567" and encoder.sample_rate == 24000
    assert encoder.embed_track(torch.from_numpy(recording(35, rate=24000))).shape == (LAYERS + 1, WIDTH)
    check_windows(MuQ.last.encoder.seen, 10 * 24000, 4)
    install("transformers", __version__="5.24.0")
    with pytest.raises(ImportError, match=r"transformers 5\.24\.0: .*maestlib\[rivals\].*environment of its own"):
        rivals.muq_encoder()


def test_omar(install):
    class Omar(nn.Module):
        sr = 16000

        def __init__(self, shift: float):
            super().__init__()
            self.net = Blocks()
            nn.init.constant_(self.net.layers[0].bias, shift)

        def extract_embeddings(self, waves, layers):  # (layers, batch, time, width)
            return torch.stack(self.net.run(waves)[1:])[layers]

    install("omar_rq", get_model=lambda model_id: models[model_id])
    models = {"mtg-upf/omar-rq-multicodebook": Omar(1), "another": Omar(2)}
    encoder, another = rivals.omar_encoder(), rivals.omar_encoder("another")
    wave = torch.from_numpy(recording(70))
    assert encoder.embed_track(wave).shape == (LAYERS, WIDTH) and encoder.sample_rate == 16000
    check_windows(models["mtg-upf/omar-rq-multicodebook"].net.seen, 30 * 16000, 3)
    assert np.allclose(another.embed_track(wave) - encoder.embed_track(wave), 1, atol=1e-5)
    assert encoder.revision != another.revision, "vectors of one would be found for the other"


@pytest.mark.parametrize("boxed", [False, True])  # as transformers 4 and 5 return it
def test_clap(install, monkeypatch, boxed):
    monkeypatch.setattr(ClapModel, "boxed", boxed)
    monkeypatch.setattr(ClapFeatureExtractor, "asked", [])
    install("transformers", ClapModel=ClapModel, ClapFeatureExtractor=ClapFeatureExtractor)
    encoder = rivals.clap_encoder()
    assert ClapModel.loaded == ClapFeatureExtractor.loaded and len(ClapModel.loaded[1]["revision"]) == 40
    wave = torch.from_numpy(recording(25, rate=48000))
    values = encoder.embed_track(wave)
    assert values.shape == (1, 8) and encoder.sample_rate == 48000
    assert ClapFeatureExtractor.asked == [(3, {480000}, 48000, "pt")], "no window is cropped or repeated"
    means = [wave[i * 48000 : (i + 10) * 48000].mean() for i in (0, 10, 15)]
    assert np.allclose(values, np.mean(means), atol=1e-5)


def test_a_folder_is_named_by_its_weights(install, tmp_path):
    install("transformers", AutoModel=Mert)
    encoder = rivals.mert_encoder(tmp_path)
    assert encoder.revision != rivals.mert_encoder().revision and Mert.loaded[0] == "m-a-p/MERT-v1-95M"
    assert encoder.revision == rivals.mert_encoder(tmp_path).revision and Mert.loaded[0] == tmp_path


class Session:  # of onnxruntime, whose outputs are the first 1280 and 400 values of a patch
    asked = []

    def __init__(self, path, providers):
        assert path.is_file() and providers == ["CPUExecutionProvider"]

    def get_inputs(self):
        return [SimpleNamespace(name="melspectrogram", shape=["batch", 128, 96])]

    def get_outputs(self):
        shapes = {"activations": 400, "embeddings": 1280}
        return [SimpleNamespace(name=name, shape=["batch", size]) for name, size in shapes.items()]

    def run(self, names, inputs):
        [patches] = inputs.values()
        self.asked.append((names, list(inputs), patches))
        return [patches.reshape(len(patches), -1)[:, :1280] for _ in names]


def test_discogs_effnet(install, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "asked", [])
    install("onnxruntime", InferenceSession=Session)
    (tmp_path / "a.onnx").write_bytes(b"one")
    encoder, wave = rivals.effnet_discogs_encoder(tmp_path / "a.onnx"), torch.from_numpy(recording(5))
    values, mel = encoder.embed_track(wave), logmel(wave).mT.numpy()
    [(names, sources, patches)] = Session.asked
    assert (names, sources, patches.dtype) == (["embeddings"], ["melspectrogram"], np.float32)
    assert patches.shape == ((313 - 128) // 62 + 1, 128, 96) and np.array_equal(patches[1], mel[62:190])
    assert values.shape == (1, 1280) and np.allclose(values[0, :96], mel[[0, 62, 124]].mean(0), atol=1e-6)
    short = encoder.embed_track(wave[:16000])
    assert short.shape == (1, 1280) and Session.asked[-1][2].shape == (1, 128, 96)
    (tmp_path / "a.onnx").write_bytes(b"two")
    assert rivals.effnet_discogs_encoder(tmp_path / "a.onnx").revision != encoder.revision


def test_discogs_effnet_by_onnxruntime(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).normal(size=(96, 1280)).astype(np.float32)
    constants = [onnx.numpy_helper.from_array(a, n) for n, a in {"w": weights, "axis": np.array([1])}.items()]
    nodes = [make.make_node("ReduceMean", ["melspectrogram", "axis"], ["mean"], keepdims=0)]
    nodes += [make.make_node("MatMul", ["mean", "w"], ["embeddings"]), make.make_node("Relu", ["mean"], ["other"])]
    inputs = [make.make_tensor_value_info("melspectrogram", kind, ["batch", 128, 96])]
    outputs = [make.make_tensor_value_info(n, kind, ["batch", s]) for n, s in {"other": 96, "embeddings": 1280}.items()]
    graph = make.make_graph(nodes, "stub", inputs, outputs, constants)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9), tmp_path / "a.onnx")
    wave = torch.from_numpy(recording(4))
    mel = logmel(wave).mT.numpy()
    expected = np.mean([mel[s : s + 128].mean(0) @ weights for s in range(0, len(mel) - 127, 62)], 0)
    values = rivals.effnet_discogs_encoder(tmp_path / "a.onnx").embed_track(wave)
    assert np.allclose(values, expected[None], atol=1e-3)


MISSING = {"mert-v1-95m": "transformers", "clap": "transformers", "muq": "muq", "omar-rq": "omar_rq"}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_package_names_its_remedy(name, install, monkeypatch):
    install("transformers", __version__="4.57.6")
    monkeypatch.setitem(sys.modules, MISSING[name], None)  # Python then raises as if it were not there
    with pytest.raises(ModuleNotFoundError, match=r'pip install "maestlib\[rivals\]"'):
        rivals.load_encoder(name)


def test_a_missing_onnxruntime_names_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "maestlib\[onnx\]"'):
        rivals.effnet_discogs_encoder(tmp_path / "a.onnx")


def test_the_licence_is_that_of_the_weights(monkeypatch, tmp_path):
    save_checkpoint(tiny_model(), tmp_path / "mine.safetensors")
    mine = rivals.load_encoder(tmp_path / "mine.safetensors")
    assert mine.license == "unknown" and rivals.load_encoder("maest-30s-tunes").license == "Apache-2.0"
    monkeypatch.setattr(rivals, "load_model", lambda name: tiny_model())
    for name in ("genres", "discogs-maest-30s-pw-129e-519l"):
        assert rivals.load_encoder(name).license == RELEASED_MODELS["discogs-maest-30s-pw-129e-519l"].license
