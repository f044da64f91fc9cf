"""Claims that many processes race for, abandoned claims, and a plan of very many files."""

import multiprocessing
import os
import time

import polars as pl
import pytest
from processes import CONTEXT

from maestlib.core.chunks import EMPTY_CLAIM_TIMEOUT_S, ChunkClaims
from maestlib.inference.jobs import ParquetJob, stream_to_parquet

NAMES = [f"{i:03}" for i in range(40)]


def _work(folder, barrier, won):
    "Take all chunks, and note which."
    with ChunkClaims(folder, timeout_s=60) as claims:
        barrier.wait()
        for name in claims.take(NAMES):
            if claims.is_needed(name):
                with open(folder / name, "x"):  # fails where a second worker writes the same chunk
                    won.put(name)
            claims.release(name)


def _race(folder, workers=4):
    "Every chunk was written once, by whomever."
    barrier, won = CONTEXT.Barrier(workers), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_work, args=(folder, barrier, won)) for _ in range(workers)]
    for process in processes:
        process.start()
    names = sorted(won.get(timeout=120) for _ in NAMES)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * workers
    assert names == NAMES == sorted(path.name for path in folder.iterdir())


def test_each_chunk_has_one_owner(tmp_path):
    _race(tmp_path)


@pytest.mark.parametrize("owner", ["another-machine 7 0", ""])
def test_a_race_for_abandoned_claims_has_one_winner(tmp_path, owner):
    for name in NAMES:
        claim = tmp_path / f".{name}.0.claim"
        claim.write_text(owner)
        os.utime(claim, (time.time() - 1000,) * 2)
    _race(tmp_path)


def test_a_claim_that_is_renewed_is_not_taken_over(tmp_path):
    with ChunkClaims(tmp_path, timeout_s=30) as worker, ChunkClaims(tmp_path, timeout_s=30) as other:
        assert worker.acquire("0")
        claim = tmp_path / ".0.0.claim"
        claim.write_text("another-machine 7 0")  # judged by its heartbeat alone
        os.utime(claim, (time.time() - 1000,) * 2)
        while time.time() - claim.stat().st_mtime > 100:
            time.sleep(0.01)
        assert not other.acquire("0") and claim.read_text().split()[1] == str(os.getpid())


def test_what_a_suspended_worker_writes_is_dropped(tmp_path):
    "It lost its chunk, which then failed elsewhere: it may finish. Once the chunk is done, it does not."
    with ChunkClaims(tmp_path) as suspended:
        assert suspended.acquire("0")
        (tmp_path / ".0.0.claim").write_text("another-machine 7 0")
        os.utime(tmp_path / ".0.0.claim", (time.time() - 1000,) * 2)
        with pytest.raises(ZeroDivisionError), ChunkClaims(tmp_path) as successor:
            assert successor.acquire("0") and suspended.is_needed("0")
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir()), "the chunk is free again"
        with ChunkClaims(tmp_path) as third:
            assert [*third.take(["0"])] == ["0"]


def test_a_claim_that_was_never_signed_is_taken_over_soon(tmp_path):
    claim = tmp_path / ".0.0.claim"
    claim.touch()
    with ChunkClaims(tmp_path) as claims:
        assert not claims.acquire("0"), "its owner may be about to sign it"
        os.utime(claim, (time.time() - EMPTY_CLAIM_TIMEOUT_S - 5,) * 2)
        assert claims.acquire("0")


def test_the_end_of_a_process_is_the_end_of_its_claims(tmp_path):
    "On this machine at once, without waiting for the timeout."
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(120)
    with ChunkClaims(tmp_path) as claims:
        assert not claims.acquire("0")
        process.kill()
        process.join()
        assert claims.acquire("0")


def _hold(folder, ready):
    with ChunkClaims(folder) as claims:
        assert claims.acquire("0")
        ready.set()
        multiprocessing.Event().wait(300)


def _job(out, paths):
    def to_table(path, windows):
        return pl.DataFrame({"path": path, "value": [value for *_, value in windows]})

    return ParquetJob(out, paths, to_table, {"path": pl.String, "value": pl.Int64}, "settings")


def _run(chunks):
    for i, path in enumerate(path for chunk in chunks for path in chunk):
        yield i, [(0.0, 1.0, len(path))]


def test_a_plan_is_a_function_of_the_list(tmp_path):
    paths = [f"music/{i:07}.mp3" for i in range(100_000)]
    job = _job(tmp_path / "a", paths)
    assert len(job.chunks) == 391 and all(len(paths) == 256 for paths in [*job.chunks.values()][:-1])
    assert [path for name in sorted(job.chunks) for path in job.chunks[name]] == paths
    assert _job(tmp_path / "b", [*paths]).chunks == job.chunks
    assert not _job(tmp_path / "b", paths[::-1]).chunks.keys() & job.chunks.keys()
    assert len(_job(tmp_path / "b", paths[:300]).chunks) == 100, "a hundredth of a small job"


@pytest.mark.parametrize("out", ["rows.parquet", "rows"])
def test_a_file_or_a_folder_in_the_order_of_the_list(tmp_path, out):
    paths = [f"{i}.mp3" for i in range(700, 0, -1)]
    table = stream_to_parquet(_job(tmp_path / out, paths), _run).collect()
    assert table["path"].to_list() == paths
    assert pl.read_parquet(tmp_path / "rows.report.parquet").is_empty()
    assert (tmp_path / out).is_file() == out.endswith(".parquet")
    grown = stream_to_parquet(_job(tmp_path / out, [*paths, "new.mp3"]), _run).collect()
    assert sorted(grown["path"]) == sorted([*paths, "new.mp3"])


def test_a_late_worker_does_not_begin_again(tmp_path):
    "It has planned before the others merged; it finds no folder and ends."
    paths = [f"{i}.mp3" for i in range(30)]
    late = _job(tmp_path / "rows.parquet", paths)
    stream_to_parquet(_job(tmp_path / "rows.parquet", paths), _run)
    computed = []

    def run(chunks):
        computed.extend(chunks)
        return iter([])

    assert len(stream_to_parquet(late, run).collect()) == 30 and not computed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.parquet", "rows.report.parquet"]


def test_chunks_of_other_settings_are_refused(tmp_path):
    (tmp_path / "rows.parquet.parts").mkdir()
    pl.DataFrame({"path": ["0.mp3"]}).write_parquet(tmp_path / "rows.parquet.parts/0.parquet", metadata={})
    with pytest.raises(ValueError, match="other settings"):
        _job(tmp_path / "rows.parquet", ["0.mp3"])
