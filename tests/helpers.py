"""What several files of tests share: tiny models, short recordings, several processes, and work that is killed."""

import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from processes import CONTEXT

from maestlib.models.maest import MAEST, MAESTConfig

PROJECT = Path(__file__).parents[1]
NOBODY = 2**22 + 1  # no system gives a process this number
TIMEOUT_S = 300  # in which something happens at all


def tiny_model(labels=("Dance---Jig", "Dance---Reel"), seed: int = 0, **config) -> MAEST:
    "A MAEST of four blocks with random weights, in evaluation mode."
    config = dict(embed_dim=48, num_heads=3, depth=4, seconds=5, labels=tuple(labels)) | config
    return MAEST(MAESTConfig(**config)).init_weights(seed).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Import it, and a file's tests run with one thread: as fast for tiny models, on a busy machine too."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recording(seconds: float, seed: int = 0, rate: int = 16000) -> np.ndarray:  # (samples,)
    "Noise under a few tones that come and go: every second differs."
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 3000, 4))
    return (0.05 * tones * (1 + np.sin(t)) + rng.normal(0, 0.02, len(t))).astype(np.float32)


def write_music(path: Path, seconds: float, seed: int = 0, rate: int = 16000, channels: int = 1) -> str:  # the path
    "Write a `recording` into a file in the format of its suffix, its folder too."
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(recording(seconds, seed, rate)[:, None], channels, 1), rate)
    return str(path)


def write_tone(path: Path, seconds: float, high: bool, seed: int, pulsed: bool | None = None) -> None:
    "Write a low or a high tone, which may be pulsed three times a second: labels that a model learns in seconds."
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * 16000)) / 16000
    wave = 0.4 * np.sin(2 * np.pi * (2000 if high else 300) * rng.uniform(0.9, 1.1) * t)
    wave = wave * (np.sin(2 * np.pi * 3 * t) > 0) if pulsed else wave
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (wave + 0.01 * rng.normal(size=len(t))).astype(np.float32), 16000)


def audio_folder(folder: Path, count: int) -> Path:
    "Write wav, flac and mp3 files of one to four seconds into three subfolders."
    for i in range(count):
        write_music(folder / f"album {i % 3}/{i:02}.{('wav', 'flac', 'mp3')[i % 3]}", 1 + i % 4, i)
    return folder


def write_broken_files(folder: Path) -> set[str]:  # their names
    "Write files that cannot be read, each for a reason of its own."
    (folder / "text.mp3").write_text("not music at all\n" * 50)
    (folder / "empty.wav").touch()
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    cut = Path(write_music(folder / "cut.flac", 5))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    if os.name == "posix":
        (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    return {"text.mp3", "empty.wav", "nan.wav", "cut.flac"} | ({"dangling.wav"} if os.name == "posix" else set())


def wait_until(condition: Callable[[], object]) -> None:
    "Wait for a condition, which must come true at some time."
    for _ in range(TIMEOUT_S * 100):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError("the condition never came true")


def kill_when(process, condition: Callable[[], object]) -> None:  # a Popen, or what is used as one
    "Kill a process with SIGKILL once a condition holds, or once it has ended."
    wait_until(lambda: process.poll() is not None or condition())
    process.kill()
    process.communicate()


class Killed(BaseException):
    "Stands for SIGKILL in `every_kill`."


def every_kill(run: Callable[[Path], object], root: Path) -> Iterator[Path]:
    """Yield a folder in each state that a kill of `run(folder)` can leave.

    It is stopped before its first, second, … rename or deletion, until a run needs no more of them. Nothing is renamed
    or deleted after the stop, as the process would be gone; its claims are those of a process that has ended.
    """
    originals = [
        (o, n, getattr(o, n)) for o, n in ((os, "replace"), (os, "rename"), (Path, "unlink"), (shutil, "rmtree"))
    ]
    for stop_at in itertools.count(1):
        calls, folder = itertools.count(1), root / f"stopped-{stop_at}"

        def killable(original, stop_at=stop_at, calls=calls):
            def call(path, *arguments, **options):
                if not os.path.lexists(path):  # nothing to rename or to delete
                    return original(path, *arguments, **options)
                if next(calls) >= stop_at:
                    raise Killed
                return original(path, *arguments, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, name, original in originals:
                patch.setattr(owner, name, killable(original))
            try:
                run(folder)
                return
            except Killed:
                pass
        for claim in folder.rglob(".*.claim"):
            claim.write_text(claim.read_text().replace(f" {os.getpid()} ", f" {NOBODY} "))
        yield folder


def _run_rank(function, arguments, variables, results):
    os.environ.update(variables)
    torch.set_num_threads(1)
    results.put((int(variables["RANK"]), function(*arguments)))


def run_ranks(function: Callable, *arguments, processes: int = 2, **variables: str) -> list:
    "Call a function in several processes with torchrun's environment variables, and return its results by rank."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])} | variables
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    results, ranks = CONTEXT.SimpleQueue(), []
    for rank in range(processes):
        settings = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared
        ranks.append(CONTEXT.Process(target=_run_rank, args=(function, arguments, settings, results)))
        ranks[-1].start()
    for process in ranks:
        process.join(TIMEOUT_S)
    assert [process.exitcode for process in ranks] == [0] * processes
    return [result for _, result in sorted(results.get() for _ in ranks)]
