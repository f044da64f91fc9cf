"""Inputs of the wrong kind: what is unambiguous gives the same result, all else is refused in a line that names it."""

import json
from fractions import Fraction

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from helpers import one_thread, recording, tiny_model  # noqa: F401
from safetensors import safe_open
from safetensors.torch import save_file

import maestlib as ml
from maestlib.collection.library import LibrarySettings
from maestlib.core.checks import check_number
from maestlib.inference.windows import stream_mel
from maestlib.models.columns import build_model
from maestlib.models.maest import MAESTConfig
from maestlib.speed.benchmark import InferenceSetting
from maestlib.stats.significance import paired_bootstrap

NAN, INF = float("nan"), float("inf")
WAVE = recording(7)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def refused(action, *words):
    "The action raises one line, which contains all words."
    with pytest.raises((ValueError, TypeError)) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# ---- waveforms ----


def read_only(wave):
    wave = wave.copy()
    wave.flags.writeable = False
    return wave


SAME = {
    "reversed view": lambda wave: wave[::-1].copy()[::-1],
    "column": lambda wave: np.stack([wave, wave], 1)[:, 0],
    "big-endian": lambda wave: wave.astype(">f4"),
    "double": lambda wave: wave.astype(np.float64),
    "read-only": read_only,
    "tensor": torch.from_numpy,
    "with a gradient": lambda wave: torch.from_numpy(wave).requires_grad_(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SAME)
def test_the_same_samples_in_another_layout_give_the_same(model, name):
    expected = ml.embed(WAVE, model, dtype="float32")["embedding"].to_numpy()
    assert np.array_equal(ml.embed(SAME[name](WAVE), model, dtype="float32")["embedding"].to_numpy(), expected)
    assert torch.equal(ml.logmel(SAME[name](WAVE)).detach(), ml.logmel(WAVE))


def test_half_precision_is_close(model):
    exact, half = (ml.tag(w, model, dtype="float32").sort("label")["activation"] for w in (WAVE, WAVE.astype("f2")))
    assert (exact - half).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("wave", "word"),
    [
        (np.zeros((96, 625), np.float32), "(96, 625)"),
        (torch.zeros(2, 16000), "(2, 16000)"),
        (np.zeros((1, 16000)), "(1, 16000)"),
        ((WAVE * 32767).astype(np.int16), "int16"),
        (WAVE.astype(object), "object"),
        (WAVE * 1j, "complex"),
        (WAVE > 0, "bool"),
        (np.array("a.wav"), "U"),
        (np.ones(()), "()"),
        (WAVE[:0], "0 samples"),
        (np.where(np.arange(len(WAVE)) == 99, np.nan, WAVE), "NaN"),
        (np.where(np.arange(len(WAVE)) == 99, np.inf, WAVE), "infinity"),
        ([WAVE, WAVE], "paths"),
        ([0.1, 0.2], "paths"),
        (None, "paths"),
        (3, "paths"),
    ],
    ids=str,
)
def test_what_is_no_waveform_is_refused(model, wave, word):
    for function in (ml.embed, ml.tag):
        refused(lambda function=function: function(wave, model), word)


def test_samples_on_the_scale_of_integers_are_reported_once(model, caplog):
    ml.tag(WAVE * 32767, model)
    assert [("32768" in record.message) for record in caplog.records if record.levelname == "WARNING"] == [True]
    caplog.clear()
    ml.tag(WAVE * 5, model)
    assert not caplog.records, "mp3 and gain exceed full scale now and then"


@pytest.mark.parametrize("rate", [44100, 8000, 22050, 48000.0])
def test_a_waveform_at_another_rate_is_its_file(model, rate, tmp_path):
    wave = recording(7, rate=int(rate))
    soundfile.write(tmp_path / "a.wav", wave, int(rate), subtype="FLOAT")
    of_file = ml.embed(tmp_path / "a.wav", model, dtype="float32")
    of_wave = ml.embed(wave, model, dtype="float32", sample_rate=rate)
    assert of_wave.select("start_s", "end_s").equals(of_file.select("start_s", "end_s"))
    np.testing.assert_allclose(of_wave["embedding"].to_numpy(), of_file["embedding"].to_numpy(), atol=1e-3)
    tags = [
        ml.tag(s, model, dtype="float32", **o) for s, o in ((tmp_path / "a.wav", {}), (wave, {"sample_rate": rate}))
    ]
    assert (tags[0]["activation"] - tags[1]["activation"]).abs().max() < 1e-4
    (mel,) = stream_mel(torch.from_numpy(wave), model.config.mel, sample_rate=rate)
    assert torch.allclose(mel, torch.cat([*stream_mel(tmp_path / "a.wav", model.config.mel)], 1), atol=1e-3)
    for action in (ml.embed, ml.tag):
        refused(lambda action=action: action(tmp_path / "a.wav", model, sample_rate=rate), "sample_rate")
    refused(lambda: [*stream_mel(tmp_path / "a.wav", model.config.mel, sample_rate=rate)], "sample_rate", "a.wav")


def test_a_wrong_rate_matters(model):
    "What the parameter is for: the same samples, taken for 16 kHz, have other embeddings."
    wave = recording(7, rate=44100)
    right, wrong = (ml.embed(wave, model, average=True, sample_rate=rate)["embedding"][0] for rate in (44100, None))
    assert np.abs(right.to_numpy() - wrong.to_numpy()).max() > 0.01


@pytest.mark.parametrize("mel", [np.zeros((1, 96, 312), np.float32), [[[0.0]]], None])
def test_an_array_given_to_a_model_is_no_tensor(model, mel):
    for function in (model, model.embed, ml.normalize):
        refused(lambda function=function: function(mel), "mel", "tensor")


# ---- numbers ----

NUMBERS = {
    "block": ["middle", 2.5, True, NAN, [0, 0], [], [[1]], {"a": 1}],
    "tokens": [3, "", "x"],
    "hop_s": [NAN, INF, "2", 0, -1, True],
    "windows": [NAN, INF, "2", 0, -1, 1.5, True],
    "preset": ["slow", "", 3, True, []],
    "batch_size": ["8", 0, 2.5, NAN, True],
    "num_workers": [-1, "2", 1.5],
    "sample_rate": [0, -16000, 10**9, INF, NAN, 16000.5, "16000", True],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_embed(model, name):
    for value in NUMBERS[name]:
        refused(lambda value=value: ml.embed(WAVE, model, **{name: value}), name)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "top": [0, 2.5, "3", NAN, True],
        "threshold": [7, NAN, "high", -0.1, True],
        "hop_s": [NAN],
        "windows": [0],
        "preset": ["slow"],
        "batch_size": ["8"],
    }.items(),
)
def test_numbers_of_tag(model, name, values):
    for value in values:
        refused(lambda value=value: ml.tag(WAVE, model, **{name: value}), name)


def test_whole_numbers_of_any_type_are_accepted(model):
    expected = ml.embed(WAVE, model, block=2, hop_s=2)
    for block in (2.0, np.int64(2), torch.tensor(2), [2], np.array([2.0])):
        assert ml.embed(WAVE, model, block=block, hop_s=np.float32(2), batch_size=3.0).equals(expected)
    assert ml.tag(WAVE, model, top=1.0).height == 1 == ml.tag(WAVE, model, top=np.int32(1)).height
    assert ml.Patchout(keep_every=2.0, drop_rows=np.array([0, 8])) == ml.Patchout(2, (0, 8))


def others() -> dict:  # name of the parameter: calls that give it a wrong value
    table = pl.DataFrame({"path": ["a", "b"], "embedding": np.eye(2, 8, dtype=np.float32)})
    speed = pl.DataFrame({"realtime_factor": [9.0], "val_map": [0.5], "embed_kwargs": ["{}"], "setting": ["a"]})
    targets, scores = np.array([[0], [1]]), np.array([[0.1], [0.9]])

    def recommend(hours, **options):
        return ml.recommend(hours, table=speed, **options)

    return {
        "keep_every": [lambda v=v: ml.Patchout(keep_every=v) for v in (0, 1.5, INF, "2")],
        "drop_rows": [lambda v=v: ml.Patchout(drop_rows=v) for v in ("12", [NAN], [-1])],
        "random_rows": [lambda: ml.Patchout.random(rows=-1), lambda: ml.Patchout.random(rows=INF)],
        "patchout": [
            lambda: ml.tag(WAVE, tiny_model(), patchout="x"),
            lambda: ml.embed(WAVE, tiny_model(), patchout=3),
        ],
        "seconds": [lambda v=v: ml.load_model("random", size="tiny", seconds=v) for v in (NAN, "5", 0, 601)],
        "num_heads": [lambda v=v: ml.load_model("random", size="tiny", num_heads=v) for v in (2.5, "3", 0)],
        "labels": [lambda v=v: ml.load_model("random", size="tiny", labels=v) for v in ("jig", [1, 2], 3)],
        "seed": [lambda v=v: ml.load_model("random", size="tiny", seed=v) for v in ("0", NAN)],
        "n_fft": [lambda v=v: ml.MelConfig(n_fft=v) for v in (NAN, "512", 512.5)],
        "mean": [lambda v=v: ml.MelConfig(mean=v) for v in (NAN, INF, None)],
        "k=": [lambda v=v: ml.nearest(np.ones(8), table, k=v) for v in (0, 2.5, "3", NAN)],
        "chunk_size": [lambda v=v: ml.nearest(np.ones(8), table, chunk_size=v) for v in (0, -1, "9")],
        "hours_of_audio": [lambda v=v: recommend(v, deadline=1) for v in (NAN, INF, "5", 0)],
        "deadline": [lambda v=v: recommend(1, deadline=v) for v in (NAN, "1", -1)],
        "min_map": [lambda v=v: recommend(1, min_map=v) for v in (NAN, "0.5", 3)],
        "n_bootstrap": [lambda v=v: ml.evaluate(targets, scores, ["a"], n_bootstrap=v) for v in (-1, 1.5, "9")],
        "clusters": [
            lambda v=v: ml.evaluate(targets, scores, ["a"], clusters=v)
            for v in (np.arange(3), np.array(["Nina", None], object), ["Nina", None])
        ],
        "1 + resamples": [lambda: paired_bootstrap(targets, scores, scores, ["a"], n_bootstrap=0)],
        "targets": [
            lambda: ml.evaluate(targets * np.nan, scores, ["a"]),
            lambda: ml.evaluate(targets.astype(str), scores, ["a"]),
        ],
        "threads": [lambda v=v: InferenceSetting(threads=v) for v in (-1, "2", NAN)],
        "overlap": [lambda v=v: InferenceSetting(overlap=v) for v in (1, "0.5", NAN)],
        "learning_rate": [lambda v=v: ml.TrainConfig(learning_rate=v) for v in (INF, NAN, 0)],
        "batch_size": [lambda v=v: ml.TrainConfig(batch_size=v) for v in (1.5, "many", -1)],
        "excerpt_s": [lambda v=v: LibrarySettings(excerpt_s=v) for v in (NAN, INF, "30", 0)],
        "windows": [lambda v=v: LibrarySettings(windows=v) for v in (NAN, 1.5, "3", 0)],
        "block": [lambda v=v: LibrarySettings(block=v) for v in (2.7, "a", NAN)],
    }


@pytest.mark.parametrize("name", others())
def test_numbers_elsewhere(name):
    for action in others()[name]:
        refused(action, name)


def test_numbers_of_a_training_run_may_be_numpys():
    assert ml.TrainConfig(batch_size=np.int64(8), learning_rate=np.float32(0.5), swa=np.True_) == ml.TrainConfig(
        batch_size=8, learning_rate=0.5, swa=True
    )


@pytest.mark.parametrize(
    "value", [True, "1", NAN, INF, -INF, 1j, None, [1], Fraction(3, 2), np.array([1.0]), b"1", 10**400]
)
def test_what_is_no_number(value):
    refused(lambda: check_number("n", value, 0, 1e9, integer=True), "n=")


# ---- checkpoints ----


def loads_the_same(path, model):
    loaded, mel = (
        ml.load_model(path, labels=model.config.labels, num_heads=model.config.num_heads),
        torch.randn(1, 96, 300),
    )
    with torch.no_grad():
        assert torch.equal(loaded(mel), model(mel)) and type(loaded) is type(model)
    return loaded


def wrapped(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPPINGS = {
    "DDP": lambda s: wrapped("module.", s),
    "compiled": lambda s: wrapped("_orig_mod.", s),
    "a chain": lambda s: {"epoch": 3, "state_dict": wrapped("model.module._orig_mod.net.", s)},
    "Lightning": lambda s: {"state_dict": wrapped("model.", s), "hyper_parameters": {"lr": 0.1}, "loops": {"a": {}}},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **wrapped("module.", s)},
    "optimizer": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}},
    "nested": lambda s: {"checkpoint": {"weights": wrapped("encoder.", s)}},
    "teacher alone": lambda s: wrapped("teacher.", s),
    "EMA beside it": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
    "EMA under a prefix": lambda s: {"online." + k: v + 1 for k, v in s.items()} | wrapped("ema_model.", s),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPINGS)
def test_any_wrapping_is_taken_off(model, name, tmp_path):
    torch.save(WRAPPINGS[name](model.state_dict()), tmp_path / "w.pt")
    loads_the_same(tmp_path / "w.pt", model)


def test_two_models_in_a_file_are_a_question(model, tmp_path):
    torch.save(wrapped("teacher.", model.state_dict()) | wrapped("student.", model.state_dict()), tmp_path / "two.pt")
    refused(lambda: ml.load_model(tmp_path / "two.pt"), "two.pt", "teacher.", "student.")
    torch.save(wrapped("net.", model.state_dict()) | {"loss.weight": torch.ones(2)}, tmp_path / "more.pt")
    refused(lambda: ml.load_model(tmp_path / "more.pt"), "more.pt", "loss.weight")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_column_head_needs_no_header(prefix, tmp_path):
    config = MAESTConfig(5, ["a", "b"], embed_dim=48, num_heads=3, depth=4, column_labels=["x", "y", "z"])
    model = build_model(config).init_weights(1).eval()
    torch.save(wrapped(prefix, model.state_dict()), tmp_path / "columns.pt")
    loaded, mel = loads_the_same(tmp_path / "columns.pt", model), torch.randn(1, 96, 300)
    with torch.no_grad():
        assert torch.equal(loaded.forward_columns(mel)[1], model.forward_columns(mel)[1])


def with_header(model, path, /, **changes):  # a field whose value is None is left out
    ml.save_checkpoint(model, path)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {k: v for k, v in (header | changes).items() if v is not None})
    return json.loads(header["config"])


HEADERS = [
    (dict(config="{'seconds': 5"), "config"),
    (dict(config="[]"), "config"),
    (dict(config="null"), "config"),
    (dict(config=None), "config"),
    (dict(format="other"), "version"),
    (dict(model="EffNet"), "config"),
    *[(dict(thresholds=t), "threshold") for t in ("[NaN, 0.5]", '["a", 0.5]', "[0.5, 7]", '{"a": 1}', "null")],
    *[(dict(thresholds=t), "threshold") for t in ("[0.5]", "0.5", "[true, 0.5]", "[0.5")],
]  # fmt: skip


@pytest.mark.parametrize(("changes", "word"), HEADERS, ids=str)
def test_a_damaged_header_is_named(model, changes, word, tmp_path):
    pytest.importorskip("timm")  # of the baseline
    with_header(model, tmp_path / "model.safetensors", **changes)
    refused(lambda: ml.load_model(tmp_path / "model.safetensors"), "model.safetensors", word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(seconds="5"), "seconds"),
        (dict(seconds=NAN), "seconds"),
        (dict(num_heads=None), "num_heads"),
        (dict(num_heads="3"), "num_heads"),
        (dict(labels="ab"), "labels"),
        (dict(labels=[1, 2]), "labels"),
        (dict(labels=["a"]), "labels"),
        (dict(separate_heads="no"), "separate_heads"),
        (dict(mel=[]), "mel"),
        (dict(mel={}), "mel"),
        (dict(color=3), "color"),
    ],
    ids=str,
)
def test_a_wrong_field_of_the_config_is_named(model, changes, word, tmp_path):
    path = tmp_path / "model.safetensors"
    config = with_header(model, path)
    with_header(model, path, config=json.dumps(config | changes))
    refused(lambda: ml.load_model(path), "model.safetensors", word)
    for name in config.keys() - {"column_labels"}:
        with_header(model, path, config=json.dumps({k: v for k, v in config.items() if k != name}))
        refused(lambda: ml.load_model(path), "model.safetensors", name)


def test_config_json_of_hugging_face_is_checked(model, tmp_path):
    "Beside weights in its layout; what is wrong with it is named with the file of the weights."
    from test_weights import as_ast

    save_file(as_ast(model.state_dict(), 31), tmp_path / "model.safetensors")
    for text in ("{", "[]", '{"num_attention_heads": "3"}', '{"num_mel_bins": null}', '{"id2label": {"a": "jig"}}'):
        (tmp_path / "config.json").write_text(text)
        refused(lambda: ml.load_model(tmp_path), "model.safetensors")


@pytest.mark.parametrize("labels", ["ab", ["a", "a"], [1, 2], 3], ids=str)
def test_labels_are_names_each_of_them_once(model, labels, tmp_path):
    ml.save_checkpoint(model, tmp_path / "model.safetensors")
    refused(lambda: ml.load_model("random", size="tiny", labels=labels, seconds=5), "labels")
    refused(lambda: ml.load_model(tmp_path / "model.safetensors", labels=labels), "labels")
