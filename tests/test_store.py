"""What a notebook cannot show of the mel store: kills, full disks, crashes, many workers, damage of every kind."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from helpers import Killed, every_kill, kill_when, wait_until
from processes import CONTEXT

from maestlib.audio.extract import extract_mels
from maestlib.audio.isolated import imap_isolated
from maestlib.audio.mel import MelConfig
from maestlib.audio.store import INDEX_SCHEMA, TABLES, MelStore, shard_path, table_checksums, verify_store
from maestlib.core.chunks import ChunkClaims

quick = partial(extract_mels, seconds=1.5, min_seconds=0.2, num_workers=0, chunk_size=3)


def content(store):
    return {f.name: f.read_bytes() for f in Path(store).iterdir()}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Forty short recordings; one is not audio, one is too short."
    folder, rng, rows = tmp_path_factory.mktemp("audio"), np.random.default_rng(0), []
    for i in range(40):
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.normal(0, 0.1, (rng.integers(4000, 20000), 2)), 8000)
        rows.append((f"t{i}", str(path), ["Genre---Style"] * (i % 3)))
    (folder / "7.wav").write_text("not audio")
    soundfile.write(folder / "20.wav", np.zeros(800), 8000)
    return pl.DataFrame(rows, ["track_id", "path", "labels"], orient="row")


@pytest.fixture(scope="module")
def complete(table, tmp_path_factory):
    "An undisturbed store."
    store = tmp_path_factory.mktemp("complete") / "store"
    report = quick(table, store)
    assert report["track_id"].to_list() == ["t7", "t20"]
    assert "7.wav" in report["error"][0] and "min_seconds=0.2" in report["error"][1]
    return store


def extract_small(table, store):
    quick(table, store, chunk_size=6)


def test_every_state_that_a_kill_can_leave(table, tmp_path):
    small, states = table.head(12), 0
    extract_small(small, tmp_path / "complete")
    for store in every_kill(partial(extract_small, small), tmp_path):
        extract_small(small, store)
        assert content(store) == content(tmp_path / "complete"), store.name
        states += 1
    assert states > 10


def _session(process):
    "The session of a process in /proc; 0 when it has ended."
    try:
        state, _, _, session = process.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
        return int(session) * (state != "Z")
    except OSError:
        return 0


SCRIPT = """
import sys
import polars as pl
from maestlib.audio.extract import extract_mels
if __name__ == "__main__":
    extract_mels(pl.read_parquet(sys.argv[1]), sys.argv[2], 1.5, 0.2, num_workers=2, chunk_size=3)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_give_the_same_and_do_not_outlive_a_kill(table, complete, tmp_path):
    table.write_parquet(tmp_path / "table.parquet")
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "table.parquet", tmp_path / "store"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    group = []

    def has_begun():
        group[:] = [p for p in Path("/proc").glob("[0-9]*") if _session(p) == process.pid]
        return list(tmp_path.glob("store/parts/0*"))

    kill_when(process, has_begun)
    assert len(group) >= 3, "main and two workers"
    wait_until(lambda: not any(_session(p) == process.pid for p in group))
    quick(table, tmp_path / "store")
    assert content(tmp_path / "store") == content(complete)


def test_a_crash_or_a_stall_costs_one_file():
    calls = [f"{i} * 2" for i in range(12)]
    calls[3] = calls[9] = "__import__('os').abort()"
    calls[4] = "__import__('time').sleep(999)"
    calls[10] = "__import__('re').match('(a+)+$', 'a' * 99 + 'b')"  # holds Python's lock for years, as C code may
    results = list(imap_isolated(eval, calls, 2, on_crash=str, timeout_s=1))
    for i, (call, result) in enumerate(zip(calls, results, strict=True)):
        assert result == 2 * i if call.startswith(f"{i} ") else f"{call}: decoding it crashed" in result


def _with_small_files(table, store, limit):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        quick(table, store)
    except OSError as e:
        (store / "error.txt").write_text(str(e))


def test_full_disk(table, tmp_path, monkeypatch):
    pytest.importorskip("resource", reason="limits the size of files as only Unix can")
    table = table[6:]  # the first chunk has the broken file, and so the smallest shard
    quick(table, tmp_path / "complete")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="34 tracks need about 0.0 GB and 0.0 GB are free"):
            quick(table, tmp_path / "a")
    limit = (tmp_path / "complete/mels.000.f16").stat().st_size
    process = CONTEXT.Process(target=_with_small_files, args=(table, tmp_path / "a", limit))
    process.start()
    process.join()
    message = (tmp_path / "a/error.txt").read_text()
    assert re.search(r"cannot write \(.*\); the \d+ tracks before are kept; make room", message), message
    (tmp_path / "a/error.txt").unlink()
    assert 0 < len(list((tmp_path / "a/parts").glob("0*"))) < 12
    with pytest.raises(FileNotFoundError, match="no finished mel store"):
        MelStore(tmp_path / "a")
    quick(table, tmp_path / "a")
    assert content(tmp_path / "a") == content(tmp_path / "complete")


def test_no_space_reaches_the_caller(table, tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if Path(target).name.startswith("mels."):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device.*0 tracks before are kept") as caught:
        quick(table, tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    left = [path.name for path in (tmp_path / "a/parts").iterdir()]
    assert left == ["plan.json"], "neither a claim nor half a shard is left"


def begin(table, store):
    "Plan a store, and stop before the first shard."

    def stop(path, **options):
        raise Killed

    with pytest.raises(Killed):
        quick(table, store, load=stop)


def test_a_worker_leaves_what_another_has_claimed(table, complete, tmp_path):
    "It ends without waiting; whoever is last completes the store."
    store = tmp_path / "store"
    begin(table, store)
    with ChunkClaims(store / "parts") as other:
        assert other.acquire("00002.parquet") and other.acquire("00013.parquet")
        report = quick(table, store)
        assert report["track_id"].to_list() == ["t20"], "t7 is in the chunk of the other"
        assert other.missing(["00002.parquet", "00013.parquet", "00000.parquet"]) == ["00002.parquet", "00013.parquet"]
        assert not (store / "SHA256SUMS").exists() and not verify_store(store).is_empty()
    report = quick(table, store)
    assert report["track_id"].to_list() == ["t7", "t20"] and content(store) == content(complete)


def test_four_workers_make_the_store_of_one(table, complete, tmp_path):
    workers = [CONTEXT.Process(target=quick, args=(table, tmp_path / "store")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert content(tmp_path / "store") == content(complete)


def test_growing_and_new_labels(table, complete, tmp_path):
    for rows in (10, 25, 40):
        quick(table.head(rows), tmp_path / "grown")
        assert verify_store(tmp_path / "grown").is_empty()
    grown, whole = MelStore(tmp_path / "grown"), MelStore(complete)
    assert grown.tracks.equals(whole.tracks) and grown.report.equals(whole.report)
    assert all(np.array_equal(grown.read(i), whole.read(i)) for i in range(len(whole)))
    assert grown.index["shard"].max() == 4 + 5 + 5 - 1, "each time new shards, of three tracks"
    before = (tmp_path / "grown/mels.000.f16").stat().st_mtime_ns
    relabelled = table.with_columns(labels=pl.lit(["New---Label"]))
    quick(relabelled, tmp_path / "grown")
    assert MelStore(tmp_path / "grown").tracks["labels"].to_list() == [["New---Label"]] * 38
    assert verify_store(tmp_path / "grown").is_empty()
    assert (tmp_path / "grown/mels.000.f16").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda t: t.reverse(), {}, "holds 40 other tracks"),
        (lambda t: t.head(9), {}, "holds 40 other tracks"),
        (lambda t: t, dict(seconds=2.0), "seconds=1.5, now 2.0"),
        (lambda t: t, dict(config=MelConfig(frontend="torchaudio")), "frontend essentia against torchaudio"),
        (lambda t: t.drop("path"), {}, "needs track_id and path"),
        (lambda t: t.vstack(t.head(1)), {}, "track_id t0 more than once"),
        (lambda t: t.clear(), {}, "no rows"),
        (lambda t: t, dict(min_seconds=0.1), "min_seconds=0.2, now 0.1"),
        (lambda t: t, dict(seconds=0.01), "seconds=0.01"),
    ],
)
def test_refused(table, complete, change, options, message):
    before = content(complete)
    with pytest.raises(ValueError, match=re.escape(message)):
        quick(change(table), complete, **options)
    assert content(complete) == before


def test_refuses_another_table_while_unfinished(table, tmp_path):
    begin(table, tmp_path / "a")
    with pytest.raises(ValueError, match="begun with another table"):
        quick(table.head(30), tmp_path / "a")


def test_a_store_of_one_shard_is_opened_and_extended(table, complete, tmp_path):
    "As stores were until the extraction was divided into chunks."
    whole, old = MelStore(complete), tmp_path / "old"
    quick(table.head(10), old, chunk_size=10)
    assert {path.name for path in old.glob("mels.*")} == {"mels.000.f16"}
    quick(table, old)
    assert all(np.array_equal(MelStore(old).read(i), whole.read(i)) for i in range(len(whole)))
    assert verify_store(old).is_empty() and (old / "mels.010.f16").exists()


def test_verify_finds_any_flipped_byte(complete, tmp_path):
    store = Path(shutil.copytree(complete, tmp_path / "a"))
    assert verify_store(store).is_empty()
    rng = np.random.default_rng(0)
    for name, good in content(store).items():
        for position in rng.integers(len(good), size=8):
            bad = bytearray(good)
            bad[position] ^= 1 << rng.integers(8)
            (store / name).write_bytes(bad)
            assert not verify_store(store).is_empty(), f"{name}, byte {position}"
        for wrong in (good[:-1], good + b"\0", b""):
            (store / name).write_bytes(wrong)
            assert not verify_store(store).is_empty(), f"{name}, {len(wrong)} bytes"
        (store / name).unlink()
        assert not verify_store(store).is_empty(), f"without {name}"
        (store / name).write_bytes(good)
    assert verify_store(store).is_empty()


class _Crops(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, row):
        return self.store.read_crops([row], 50)[0]


def test_crops(complete):
    store = MelStore(complete)
    for start, row in ((0, 0), (3, 5)):
        assert np.array_equal(store.read(row, start, 10), store.read(row)[start : start + 10])
    long = store.read_crops(range(len(store)), 200)
    for crop, frames, row in zip(long, store.index["frames"], range(len(store)), strict=True):
        assert np.array_equal(crop[:, :frames].T, store.read(row)) and not crop[:, frames:].any()
    random = [store.read_crops([1, 2], 20, np.random.default_rng(4)) for _ in range(2)]
    assert torch.equal(*random) and not torch.equal(random[0], store.read_crops([1, 2], 20))
    batches = torch.utils.data.DataLoader(_Crops(store), 8, num_workers=2, multiprocessing_context=CONTEXT)
    assert torch.equal(torch.cat(list(batches)), store.read_crops(range(len(store)), 50))
    assert store.lookup(["t3", "t0", "t39"]).tolist() == [3, 0, 37]
    with pytest.raises(ValueError, match="1 tracks are not in it .t7"):
        store.lookup(["t1", "t7"])
    with pytest.raises(ValueError, match="row=99"):
        store.read(99)


def test_more_shards_than_open_files(complete, tmp_path):
    "A process may open 1,024 files, and the workers of a loader share them."
    mels = np.random.default_rng(0).random((600, 2, 96)).astype(np.float16)
    names = [f"t{i}" for i in range(len(mels))]
    index = {"track_id": names, "shard": range(len(mels)), "start": 0, "frames": 2, "checksum": 0}
    tables = {"tracks": pl.DataFrame({"track_id": names}), "index": pl.DataFrame(index).cast(INDEX_SCHEMA)}
    for name in TABLES:
        tables.get(name, pl.DataFrame()).write_parquet(tmp_path / f"{name}.parquet")
    shutil.copy(complete / "meta.json", tmp_path)
    for shard, mel in enumerate(mels):
        shard_path(tmp_path, shard).write_bytes(mel.tobytes())
    (tmp_path / "SHA256SUMS").write_text(table_checksums(tmp_path))
    store = MelStore(tmp_path)
    for _ in range(2):
        assert all(np.array_equal(store.read(row, 1, 1), mel[1:]) for row, mel in enumerate(mels))
    descriptors = Path("/proc/self/fd")
    assert (
        not descriptors.exists() or sum(".f16" in os.readlink(f) for f in descriptors.iterdir() if f.is_symlink()) < 500
    )
