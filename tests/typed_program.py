"""A program as a user writes it, for `mypy --strict` (test_types.py); it is not run."""

from pathlib import Path
from typing import assert_type

import numpy as np
import polars as pl
import torch

import maestlib as ml
from maestlib.datasets.batches import load_corpus


def main(song: Path) -> None:
    model = ml.load_model()
    assert_type(model, ml.MAEST)
    assert_type(model.config, ml.MAESTConfig)
    wave = ml.load_audio(song)
    assert_type(wave, torch.Tensor)
    mel = ml.normalize(ml.logmel(wave, ml.MelConfig()))
    logits: torch.Tensor = model(mel[None], patchout=ml.Patchout(keep_every=3))
    print(logits.shape, model.config.labels[0].upper(), ml.__version__.split("."))

    assert_type(ml.tag(song, model, top=3, threshold="calibrated"), pl.DataFrame)
    assert_type(ml.tag(np.zeros(16000, np.float32), sample_rate=16000), pl.DataFrame)
    table = ml.embed([song], model, block=(1, 2), patchout=ml.Patchout(drop_rows=(0,)), out="emb.parquet")
    assert_type(table, pl.DataFrame | pl.LazyFrame)
    assert_type(ml.nearest(table.lazy().collect(), "emb.parquet", k=2), pl.DataFrame)
    head = ml.train_head("music/tags.csv", model, out="mine.safetensors")
    print(head.config.labels, head.config.thresholds)

    dataset = ml.load_dataset("music", validation=0.2)
    assert_type(dataset, pl.DataFrame)
    assert_type(ml.extract_mels(dataset, "store"), pl.DataFrame)
    assert_type(ml.verify_store("store"), pl.DataFrame)
    print(ml.MelStore("store").path / "index.parquet")
    config = ml.TrainConfig.from_params({"dataset": "store", "max_steps": 10})
    assert_type(config, ml.TrainConfig)
    assert_type(ml.fit(config, load_corpus("store"), model), pl.DataFrame)
    assert_type(ml.evaluate(np.eye(2), np.eye(2), ["a", "b"]), pl.DataFrame)
    print(ml.recommend(1000, deadline=2)["setting"])
    assert_type(ml.list_models(), pl.DataFrame)
    ml.save_checkpoint(model, "model.safetensors")
    assert_type(ml.save_pretrained(model, "folder", license="Apache-2.0"), Path)
    assert_type(ml.push_to_hub(model, "me/mine", license="Apache-2.0"), str)

    report = ml.scan([song], "library", excerpt_s=30.0)
    library = ml.Library("library")
    print(report.failed, library.labels)
    assert_type(ml.playlist(library, [str(song)]), pl.DataFrame)
    changes, errors = ml.write_tags("library", dry_run=True)
    assert_type(changes, pl.DataFrame)
    count, errors = ml.undo_tags("library")
    assert_type(count, int)
