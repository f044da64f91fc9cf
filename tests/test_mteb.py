"""Encoders inside mteb: a task of its own on synthetic sounds, without a network, down to the files of results."""

import json
import os

import numpy as np
import pytest

for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(offline, "1")
mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install -e '.[mteb]'")

from datasets import Dataset, DatasetDict  # noqa: E402
from helpers import one_thread, tiny_model  # noqa: E402, F401
from mteb.abstasks import AbsTaskClassification  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from maestlib.probing.encoders import AudioEncoder, maest_encoder, mel_encoder  # noqa: E402
from maestlib.probing.mteb import mteb_encoder, run_mteb  # noqa: E402

TASK = dict(name="ThreeTones", description="Which of three tones.", dataset={"path": "local/tones", "revision": "1"})
TASK |= dict(type="AudioClassification", category="a2c", modalities=["audio"], main_score="accuracy")


class ThreeTones(AbsTaskClassification):
    metadata = TaskMetadata(**TASK, eval_splits=["test"], eval_langs=["zxx-Zxxx"])
    input_column_name, samples_per_label, n_experiments = "audio", 4, 2

    def load_data(self, **options):
        rng = np.random.default_rng(0)

        def rows(count: int) -> Dataset:  # of different lengths, one too short for any window, at two rates
            audio = []
            for i in range(count):
                rate = (16000, 22050)[i % 2]
                t = np.arange(400 if i == 4 else int(rate * (0.5 + 0.1 * (i % 4)))) / rate
                wave = np.sin(2 * np.pi * 300 * (1 + 3 * (i % 3)) * t) + 0.01 * rng.normal(size=len(t))
                audio.append({"array": (0.3 * wave).astype("float32"), "sampling_rate": rate})
            return Dataset.from_dict({"audio": audio, "label": [i % 3 for i in range(count)]})

        if not self.data_loaded:
            self.dataset, self.data_loaded = DatasetDict(train=rows(18), test=rows(9)), True


def refuse(text: str):
    raise AssertionError(f"{text} is no JSON")


def test_tones_are_told_apart_and_results_are_filed(tmp_path):
    encoder = mel_encoder()
    model = mteb_encoder(encoder, training_datasets=set())
    table = run_mteb(model, [ThreeTones()], tmp_path, show_progress_bar=False)
    assert table.rows() == [("ThreeTones", "test", "default", pytest.approx(1, abs=0.12))]
    folder = tmp_path / "results" / "maestlib__mel-statistics" / encoder.revision
    assert {file.name for file in folder.iterdir()} == {"ThreeTones.json", "model_meta.json", "run_settings.jsonl"}
    result, meta = (json.loads((folder / f"{n}.json").read_text(), parse_constant=refuse) for n in TASK_FILES)
    assert result["scores"]["test"][0]["ap"] is None and result["task_name"] == "ThreeTones"
    assert (meta["embed_dim"], meta["modalities"], meta["license"]) == (192, ["audio"], None)
    assert mteb.ResultCache(tmp_path).load_task_result("ThreeTones", model.mteb_model_meta).get_score() > 0.8
    model.encode = None  # would fail if it were asked again
    assert run_mteb(model, [ThreeTones()], tmp_path, show_progress_bar=False).equals(table)
    assert json.loads((folder / "ThreeTones.json").read_text())["date"] == result["date"]


TASK_FILES = ("ThreeTones", "model_meta")


def test_another_layer_is_an_experiment(tmp_path):
    encoder = maest_encoder(tiny_model(), "tiny", "CC BY-NC-SA 4.0")
    for layer in (None, 0, "mean"):
        model = mteb_encoder(encoder, layer, "someone/tiny")
        assert len(run_mteb(model, [ThreeTones()], tmp_path, show_progress_bar=False)) == 1
        assert model.mteb_model_meta.embed_dim == 3 * 48 and model.mteb_model_meta.license == "cc-by-nc-sa-4.0"
    files = tmp_path.glob("results/someone__tiny/*/**/ThreeTones.json")
    places = {str(file.parent.relative_to(tmp_path / "results/someone__tiny" / encoder.revision)) for file in files}
    assert places == {".", "experiments/layer_0", "experiments/layer_mean"}


def test_each_recording_is_embedded_by_itself_at_the_rate_of_the_encoder():
    asked = []

    def embed_track(wave):
        asked.append((str(wave.dtype), len(wave)))
        return wave[:1].numpy()[None] + np.arange(3)[:, None]  # the first sample, in three layers

    model = mteb_encoder(AudioEncoder("probe", embed_track, 24000, 2.0, "Apache-2.0", "1"), layer=2)
    assert asked.pop() == ("torch.float32", 48000)
    rows = [{"audio": {"array": np.full(n, n / 1e5), "sampling_rate": 24000}} for n in (30000, 100, 5000)]
    rows.append({"audio": {"array": np.full((1, 9600), 0.5, np.float32), "sampling_rate": 48000}})
    from torch.utils.data import DataLoader

    values = model.encode(DataLoader(rows, 2), task_metadata=ThreeTones.metadata, hf_split="test", hf_subset="default")
    assert [n for _, n in asked] == [30000, 2400, 5000, 4800] and values.dtype == np.float32
    assert np.allclose(values[:3, 0], [2.3, 2.001, 2.05]) and values.shape == (4, 1)


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="layer=1: give an integer from 0 to 0"):
        mteb_encoder(mel_encoder(), layer=1)
    with pytest.raises(ValueError, match="licence|license"):
        mteb_encoder(mel_encoder(), license="my own words")
