"""Speed where the notebooks do not go: bad input, recommendations at their limits, reduced models in use."""

import contextlib
import json
import subprocess
import sys

import polars as pl
import pytest
import torch

import maestlib as ml
from maestlib.models.checkpoint import BUNDLED_MODELS
from maestlib.models.maest import MAEST, MAESTConfig
from maestlib.models.patchout import Patchout
from maestlib.models.reduction import ReducedMAEST, pool_weighted, quantize_int8, top_attended
from maestlib.speed.benchmark import (
    InferenceSetting,
    benchmark,
    build_forward,
    busy_processes,
    published_package,
)
from maestlib.speed.tradeoff import embed_options, pareto_front, plot_pareto, recommend


def small(**fields):
    return (
        MAEST(MAESTConfig(embed_dim=32, num_heads=2, depth=3, seconds=2, labels=("a", "b"), **fields))
        .init_weights(0)
        .eval()
    )


def results(rows):
    "A results table: (setting, realtime factor, mAP on validation, can be recommended)."
    kwargs = embed_options(InferenceSetting(keep_every=2, merge=0.2), 30)
    shared = dict(memory_mb=1.0, family="patchout", ratio=1.0, model="maest", device="x", threads=2)
    return pl.DataFrame(
        [
            shared
            | dict(setting=setting, realtime_factor=float(factor), val_map=score, map=0.45, gflop=100 / factor)
            | dict(clips_per_s=factor / 30, embed_kwargs=kwargs if supported else None)
            for setting, factor, score, supported in rows
        ]
    )


TABLE = results([("slow", 100, 0.5, True), ("fast", 400, 0.4, True), ("bad", 90, 0.3, True), ("int8", 900, 0.5, False)])


def test_pareto_front():
    assert pareto_front(TABLE.head(3))["setting"].to_list() == ["slow", "fast"]
    assert pareto_front(TABLE)["setting"].to_list() == ["int8"]


def test_recommend():
    assert recommend(100, deadline=1, table=TABLE)["setting"] == "slow"
    assert recommend(100, deadline=0.5, table=TABLE)["setting"] == "fast"
    assert recommend(100, min_map=0.45, table=TABLE)["setting"] == "slow"
    assert recommend(100, min_map=0.1, table=TABLE)["options"]["patchout"] == Patchout(2)


def test_recommended_options_go_into_embed():
    recommended = recommend(1, min_map=0.1, table=TABLE)
    assert recommended["reduction"] == {"merge": 0.2, "keep_rate": 1.0}
    reduced, options = (
        ReducedMAEST(small(), **recommended["reduction"]),
        recommended["options"] | {"block": 1, "hop_s": 2},
    )
    assert len(ml.embed(torch.randn(16000 * 4), reduced, **options)) >= 2


def test_only_what_embed_supports_is_recommended():
    unsupported = [
        InferenceSetting("effnet"),
        InferenceSetting(seconds=10),
        InferenceSetting(overlap=0.5),
        InferenceSetting(compiled=True),
        InferenceSetting(threads=1),
    ]
    assert [embed_options(s, 30) for s in unsupported] == [None] * 5
    assert json.loads(embed_options(InferenceSetting(dtype="int8"), 30))["options"]["dtype"] == "int8"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(deadline=0.01), "fast is the fastest"),
        (dict(min_map=0.9), "slow is the best"),
        (dict(), "give one of them"),
        (dict(deadline=1, min_map=0.1), "give one of them"),
    ],
)
def test_nothing_to_recommend(asked, message):
    with pytest.raises(ValueError, match=message):
        recommend(100, **asked, table=TABLE)


def test_choices_are_made_on_validation():
    swapped = TABLE.with_columns(map=pl.Series([0.1, 0.9, 0.2, 0.1]))
    assert pareto_front(swapped).equals(swapped.filter(setting="int8"))
    chosen = recommend(100, deadline=1, table=swapped)
    assert chosen["setting"] == "slow" and chosen["val_map"] == 0.5 and chosen["map"] == 0.1


def test_a_table_of_another_version_is_refused(tmp_path):
    TABLE.drop("val_map").write_parquet(tmp_path / "old.parquet")
    with pytest.raises(ValueError, match="old.parquet: no column val_map"):
        recommend(1, deadline=1, table=tmp_path / "old.parquet")


def test_nothing_measured_yet(tmp_path):
    with pytest.raises(FileNotFoundError, match="run nbs/speed/tradeoff.ipynb"):
        recommend(1, deadline=1, table=tmp_path / "none.parquet")


def test_the_shipped_measurements_recommend_what_embed_takes(monkeypatch, tmp_path):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    night = recommend(1000, min_map=0)
    assert night["model"] in BUNDLED_MODELS and night["reduction"] == {}
    wave = torch.randn(16000 * 40, generator=torch.Generator().manual_seed(0)) * 0.1
    table = ml.embed(wave, night["model"], **night["options"])
    assert len(table) == night["options"]["windows"], "as many windows as the setting says"


def test_an_empty_selection_is_a_figure():
    assert "nothing" in plot_pareto(TABLE[:0]).layout.title.text


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(merge=0.7), "merge=0.7"),
        (dict(keep_rate=0.0), "keep_rate=0.0"),
        (dict(drop_after_block=9), "drop_after_block=9"),
        (dict(merge=0.1, keep_rate=0.5), "not both"),
    ],
)
def test_shares_out_of_range(how, words):
    with pytest.raises(ValueError, match=words):
        ReducedMAEST(small(), **how)


@pytest.mark.parametrize("fields", [dict(overlap=1.0), dict(batch_size=-1)])
def test_settings_that_make_no_sense(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        InferenceSetting(**fields)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="model=other"):
        benchmark([InferenceSetting("other")], {"maest": small()})


@pytest.mark.parametrize("how", [dict(merge=0.2), dict(keep_rate=0.3), dict(merge=0.2, separate_heads=True)])
def test_a_reduced_model_goes_where_a_maest_goes(how):
    model = small(separate_heads=how.pop("separate_heads", False))
    reduced = ReducedMAEST(model, **how, **({"drop_after_block": 1} if "keep_rate" in how else {}))
    wave = torch.randn(16000 * 3, generator=torch.Generator().manual_seed(0))
    full, less = (ml.embed(wave, m, block=2, dtype="float32") for m in (model, reduced))
    assert less.shape == full.shape
    a, b = (torch.tensor(t["embedding"].to_numpy()) for t in (full, less))
    assert (torch.cosine_similarity(a, b) > 0.9).all() and not torch.allclose(a, b, atol=1e-4)
    assert ml.tag(wave, reduced, top=2)["activation"].is_between(0, 1).all()
    full, less = (ml.embed(wave, m, block=2, tokens="rs", dtype="float32") for m in (model, reduced))
    a, b = (torch.tensor(t["embedding"].to_numpy()) for t in (full, less))
    assert a.shape == b.shape == (len(a), 2 * 9 * 32) and (torch.cosine_similarity(a, b) > 0.8).all()


def test_rows_of_merged_tokens_are_those_of_their_patches():
    model, mel = small(), torch.randn(2, 96, 125, generator=torch.Generator().manual_seed(0))
    same = ReducedMAEST(model).embed(mel, (0, 2), Patchout(drop_rows=(0,)), rows=True)
    assert torch.allclose(same, model.embed(mel, (0, 2), Patchout(drop_rows=(0,)), rows=True), atol=1e-5)
    x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))  # cls, dist, and two tokens
    counts = torch.tensor([[[1, 0], [1, 0], [2, 1], [1, 2]]])  # that stand for two rows of three patches
    patches = x[:, [2, 2, 3, 2, 3, 3]]
    rows = patches.unflatten(1, (2, 3))
    pooled = pool_weighted(x, counts, rows=True)
    expected = [x[:, :2], patches.mean(1, keepdim=True), rows.mean(2), rows.std(2, correction=0)]
    assert torch.allclose(pooled, torch.cat(expected, 1), atol=1e-6)


def test_another_reduction_is_another_model():
    from maestlib.inference.jobs import model_fingerprint

    model = small()
    found = {
        model_fingerprint(m) for m in (model, ReducedMAEST(model, 0.1), ReducedMAEST(model, 0.2), quantize_int8(model))
    }
    assert len(found) == 4


def test_what_is_attended_to_stays():
    k = torch.zeros(1, 1, 12, 4)
    k[0, 0, 5] = k[0, 0, 9] = 1
    assert top_attended(torch.ones(1, 1, 12, 4), k, 0.2).tolist() == [[0, 1, 5, 9]]


def test_tags_of_a_setting_are_those_of_the_model():
    model, mel = small(), torch.randn(2, 96, 125, generator=torch.Generator().manual_seed(0))
    forward, frames = build_forward(InferenceSetting(keep_every=2, block=1, dtype="float32"), model, tags=True)
    values = torch.from_numpy(forward(mel))
    assert frames == 125 and values.shape == (2, 3 * 3 * 32 + 2)
    assert torch.allclose(values[:, -2:], model(mel, Patchout(2)).sigmoid(), atol=1e-5)
    assert torch.allclose(values[:, 96:192].view(2, 3, 32), model.embed(mel, (1,), Patchout(2))[:, 0], atol=1e-5)


def test_int8_is_near():
    model, mel = small(), torch.randn(2, 96, 125, generator=torch.Generator().manual_seed(0))
    a, b = (m.embed(mel, (2,)).flatten(1) for m in (model, quantize_int8(model)))
    cosine = torch.cosine_similarity(a, b)
    assert (cosine > 0.99).all() and (cosine < 0.9999999).all()
    assert torch.allclose(model(mel), quantize_int8(model)(mel), atol=0.2)


def test_every_round_visits_every_state_and_times_every_setting_in_it(monkeypatch):
    rounds, calls, children = [], [], []

    @contextlib.contextmanager
    def watched(count):
        rounds.append(count)
        with busy_processes(count) as started:
            children.extend(started)
            yield started

    def other(waves):
        calls.append(sum(child.poll() is None for child in children))

    monkeypatch.setattr("maestlib.speed.benchmark.busy_processes", watched)
    settings = [InferenceSetting(keep_every=2), InferenceSetting()]
    table = benchmark(settings, {"maest": small()}, clips=1, repeats=2, others={"other": other}, busy=(0, 2))
    assert rounds == [0, 0, 2, 0, 2], "a first round without load, then all states in each"
    assert calls == [0, 0, 0, 2, 0, 2], "the first counts operations, too; all busy processes run where they should"
    assert table["busy"].to_list() == [0, 0, 0, 2, 2, 2]
    assert table["setting"].to_list() == ["maest, keep_every=2", "maest", "other"] * 2
    assert table.filter(setting="maest, keep_every=2")["ratio"].to_list() == [1, 1], "of the same state"
    assert table.filter(setting="other")["ratio_other"].to_list() == [1, 1] and (table["ratio_other"] > 0).all()
    assert len(children) == 4 and all(child.poll() is not None for child in children)


def test_without_states_there_is_one_and_others_are_timed_from_the_waveform_only():
    table = benchmark([InferenceSetting()], {"maest": small()}, "model", 1, 1, others={"other": None})
    assert table["busy"].to_list() == [0] and "ratio_other" not in table.columns


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_busy_processes_end_with_the_measurement(error):
    with pytest.raises(error), busy_processes(2) as children:
        assert [child.poll() for child in children] == [None] * 2
        raise error
    assert all(child.wait(60) for child in children)


def test_busy_processes_end_with_the_program():
    "They hold its stderr, so that `run` returns when the last of them is gone."
    code = "import os; from maestlib.speed.benchmark import busy_processes\nwith busy_processes(2): os._exit(3)"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=120).returncode == 3


def test_a_busy_process_that_ended_too_early_is_an_error():
    with pytest.raises(RuntimeError, match="ended before"), busy_processes(2) as children:
        children[0].kill()
        children[0].wait(60)


def test_a_state_that_makes_no_sense():
    with pytest.raises(ValueError, match="busy=-1"):
        benchmark([InferenceSetting()], {"maest": small()}, busy=(0, -1))


def test_the_published_package_is_one_of_the_others():
    pytest.importorskip("maest_infer")
    ((name, run),) = published_package().items()
    with torch.no_grad():
        values = run(torch.randn(1, 480_000, generator=torch.Generator().manual_seed(0)) * 0.1)
    assert name == "maest-infer" and values[-1].shape[-1] == 3 * 768


def test_the_published_package_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "maest_infer", None)
    assert published_package() == {}
