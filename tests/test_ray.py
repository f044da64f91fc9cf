"""Embedding on a Ray cluster of two nodes, one of which is lost. Skipped without the extra `ray`."""

import threading
import time

import numpy as np
import polars as pl
import pytest
import soundfile
from helpers import tiny_model

from maestlib.inference.embedding import embed
from maestlib.inference.ray import embed_with_ray

ray = pytest.importorskip("ray", reason='pip install "maestlib[ray]"')
pytestmark = pytest.mark.slow
FILES = 60


def _start_node(cluster, **options):
    "Start a node. Ray gives it 15 seconds to come up, which a busy machine may exceed; try again."
    for attempt in range(5):
        try:
            return cluster.add_node(num_cpus=2, object_store_memory=200_000_000, **options)
        except Exception:
            if attempt == 4:
                raise


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    cluster = Cluster()
    _start_node(cluster, include_dashboard=False)
    cluster.other = _start_node(cluster)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_is_lost(cluster, tmp_path, capfd):
    rng, paths = np.random.default_rng(0), []
    for i in range(FILES):
        paths.append(tmp_path / f"{i:02}.wav")
        soundfile.write(paths[-1], rng.normal(0, 0.1, 16000 * rng.integers(1, 9)), 16000)
    paths[7].write_text("not audio")
    model = tiny_model()
    options = dict(dtype="float32", batch_size=2)
    expected = embed(paths, model, out=tmp_path / "expected.parquet", **options).collect()
    done_at_loss = []

    def lose_a_node():
        while len(done := list(tmp_path.glob("emb.parquet.parts/*.parquet"))) < 5:
            time.sleep(0.02)
        cluster.remove_node(cluster.other, allow_graceful=False)
        done_at_loss.append(len(done))

    thread = threading.Thread(target=lose_a_node, daemon=True)
    thread.start()
    table = embed_with_ray(paths, model, tmp_path / "emb.parquet", readers=2, **options).collect()
    thread.join()
    assert "ActorPoolMapOperator[Map(ChunkReader)]" in "".join(capfd.readouterr()), "decoding is a step of its own"
    assert 5 <= done_at_loss[0] < FILES and len(ray.nodes()) == 2 and sum(node["Alive"] for node in ray.nodes()) == 1
    assert table.drop("embedding").equals(expected.drop("embedding")), (
        "every file exactly once, in the order of the list"
    )
    np.testing.assert_allclose(table["embedding"].to_numpy(), expected["embedding"].to_numpy(), atol=1e-3)
    reports = [pl.read_parquet(tmp_path / f"{name}.report.parquet")["path"].to_list() for name in ("emb", "expected")]
    assert reports[0] == reports[1] == [str(paths[7])]
    assert not (tmp_path / "emb.parquet.parts").exists()
