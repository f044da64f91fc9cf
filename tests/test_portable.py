"""What differs between Linux, macOS and Windows: modules, start of processes, open files, paths, devices.

Most of it is tested on any system, by taking away what the others lack.
"""

import ast
import errno
import hashlib
import io
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from maestlib.collection.cli import main
from maestlib.core import device as device_module
from maestlib.core.device import default_device, default_dtype, device_name, peak_memory, processor_name
from maestlib.core.files import atomic_write, cache_path, file_lock, resolve_path, write_json
from maestlib.models.checkpoint import load_model
from maestlib.models.hub import ReleasedModel, download

PROJECT = Path(__file__).parents[1]
SOURCES = [p for p in sorted(PROJECT.glob("maestlib/**/*.py")) if p.name != "_modidx.py"]
UNIX_MODULES = ("resource", "fcntl", "grp", "pwd", "termios", "tty", "pty", "syslog")
UNIX_NAMES = {
    "os": "sched_getaffinity fork forkpty getuid geteuid getgid getpgid killpg setsid nice statvfs uname chown mkfifo "
    "posix_fadvise posix_fallocate posix_spawn pread pwrite sendfile WNOHANG O_DIRECTORY O_NOFOLLOW".split(),
    "signal": "setitimer getitimer alarm pause sigwait SIGALRM SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGXFSZ SIGPROF "
    "ITIMER_PROF ITIMER_REAL".split(),
    "time": ["tzset"],
}

# Takes away what Windows lacks, and forbids what it forbids: to replace or delete a file that this process has open.
# The packages that maestlib uses choose by the system's name, so they are imported before this, and what Python's own
# library needs on this system stays.
LIKE_WINDOWS = f"""
import os, signal, sys, time
for name in {UNIX_MODULES!r}:
    sys.modules[name] = None
for owner, names in {UNIX_NAMES!r}.items():
    for name in names:
        if name not in ("statvfs", "uname", "WNOHANG", "SIGKILL") and hasattr(sys.modules[owner], name):
            delattr(sys.modules[owner], name)

def open_files():
    yield from (os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd") if fd.isdigit()
                if os.path.exists(f"/proc/self/fd/{{fd}}"))
    with open("/proc/self/maps", encoding="utf8") as maps:
        yield from (line.split(maxsplit=5)[5].rstrip() for line in maps if line.count("/"))

def refuse_open_files(function):
    def checked(*paths, **options):
        held = {{os.path.realpath(path) for path in paths}} & set(open_files())
        if held and not options:
            raise PermissionError(f"the file is open in this process: {{held}}")
        return function(*paths, **options)
    return checked

if os.path.exists("/proc/self/maps"):
    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, refuse_open_files(getattr(os, name)))
"""

# Every module, then a whole job: mels in two worker processes, two steps of training from a loader process, and
# embeddings. What is imported at the top, each worker imports, too.
JOB = """
import multiprocessing, pkgutil, sys
import torch, torchaudio, polars, filelock
if __name__ == "__main__":
    import torch.distributed, sklearn.metrics, ipywidgets, IPython.display
import like_windows

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import maestlib as ml
    names = [module.name for module in pkgutil.walk_packages(ml.__path__, "maestlib.")]
    for name in names:
        if name not in ("maestlib.assets", "maestlib._modidx"):
            __import__(name)
    dataset, run = sys.argv[1:]
    config = ml.TrainConfig(dataset=dataset, out_dir=run, seconds=2, size="tiny", max_steps=2, batch_size=4,
                            patchout_columns=2, num_workers=1, num_validations=1).resolve_auto()
    corpus = sys.modules["maestlib.datasets.batches"].load_corpus(dataset)
    model = sys.modules["maestlib.training.trainer"].create_model(config, corpus)
    metrics = ml.fit(config, corpus, model)
    for _ in range(2):  # the second time nothing is left to do
        table = ml.embed(dataset, run, block=0, out=f"{run}/embeddings.parquet").collect()
    print(len(names), len(corpus.table), metrics["step"][-1], table["path"].n_unique())
"""


@pytest.fixture
def odd_folder(tmp_path):
    "A folder with spaces, accents and other scripts in its name."
    folder = tmp_path / "été à 東京 (β)"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_every_module_and_a_whole_job_without_what_windows_lacks(odd_folder):
    "By spawn, and in a folder with an odd name."
    music, rng, rows = odd_folder / "ma musique ♪", np.random.default_rng(0), []
    music.mkdir()
    for i in range(20):
        wave = np.sin(np.arange(40_000) * (0.1 + 0.2 * (i % 2))) + rng.normal(0, 0.01, 40_000)
        soundfile.write(music / f"piste n° {i}.wav", 0.5 * wave, 16_000)
        split = ("train", "train", "train", "validation", "test")[i // 2 % 5]
        rows.append(
            {"path": f"piste n° {i}.wav", "labels": f"Hauteur---{'aiguë' if i % 2 else 'grave'}", "split": split}
        )
    pl.DataFrame(rows).write_csv(music / "tags.csv")
    run = odd_folder / "mon entraînement"
    (odd_folder / "like_windows.py").write_text(LIKE_WINDOWS, encoding="utf8")
    (odd_folder / "job.py").write_text(JOB, encoding="utf8")
    path = os.pathsep.join([str(PROJECT), str(odd_folder)])
    env = os.environ | {"PYTHONPATH": path, "MAESTLIB_CACHE": str(odd_folder / "le cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(odd_folder / "job.py"), str(music), str(run)]
    result = subprocess.run(command, capture_output=True, encoding="utf8", env=env, cwd=odd_folder, timeout=580)
    assert result.returncode == 0, result.stderr[-3000:]
    modules, *counts = map(int, result.stdout.split()[-4:])
    assert modules > 50 and counts == [20, 2, 20]
    assert not list(odd_folder.rglob("*.tmp")) and not list(odd_folder.rglob("*.parts"))


def test_a_path_of_any_letters_is_printed_to_any_pipe(odd_folder, monkeypatch):
    "Even where the pipe's encoding has few letters, as on Windows."
    pipes = {"stdout": io.TextIOWrapper(io.BytesIO(), "ascii"), "stderr": io.TextIOWrapper(io.BytesIO(), "ascii")}
    for name, pipe in pipes.items():
        monkeypatch.setattr(sys, name, pipe)
    assert main(["tag", str(odd_folder / "chanson.mp3"), "--model", "maest-30s-tunes"]) == 2
    assert main(["models"]) == 0
    for pipe in pipes.values():
        pipe.flush()
    assert "été à 東京" in pipes["stderr"].buffer.getvalue().decode("utf8")
    assert "│" in pipes["stdout"].buffer.getvalue().decode("utf8")


def test_no_module_depends_on_unix_or_on_the_locale():
    "No Unix-only import of a module, no Unix-only name without a question for it, no text in the locale's encoding."
    problems = []
    for path in SOURCES:
        text = path.read_text(encoding="utf8")
        tree = ast.parse(text)
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        problems += [f"{path.name}: import {name}" for name in names if name in UNIX_MODULES]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner, name = node.value.id, node.attr
                if name in UNIX_NAMES.get(owner, ()) and f'hasattr({owner}, "{name}")' not in text:
                    problems.append(f"{path.name}:{node.lineno}: {owner}.{name}")
            if isinstance(node, ast.Call) and not any(k.arg == "encoding" for k in node.keywords):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                is_text = any(k.arg == "text" and getattr(k.value, "value", None) is True for k in node.keywords)
                if is_text or name in ("read_text", "write_text"):
                    problems.append(f"{path.name}:{node.lineno}: {name} without encoding")
    assert len(SOURCES) > 50 and not problems, "\n".join(problems)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds open files in /proc")
def test_files_are_closed_before_they_are_replaced(tmp_path, monkeypatch):
    replace, replaced = os.replace, []

    def checked(source, target):
        held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        assert not held & {os.path.realpath(source), os.path.realpath(target)}, "Windows would refuse"
        replaced.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checked)
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "cache"))
    write_json(tmp_path / "a.json", [1])
    weights = tmp_path / "weights.ckpt"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    model = ReleasedModel("m", weights.as_uri(), 7, digest, seconds=5, num_labels=1, license="")
    assert download(model).read_bytes() == b"weights"
    damaged = ReleasedModel("m", weights.as_uri() + "#2", 7, "00", seconds=5, num_labels=1, license="")
    with pytest.raises(ValueError, match="sha256"):
        download(damaged)
    assert replaced == ["a.json", "weights.ckpt"]


def refuse(error):
    def refused(*_, **__):
        raise OSError(error, os.strerror(error))

    return refused


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_read_only_folder_is_named_with_the_variable_to_set(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MAESTLIB_RUNS", str(tmp_path / "runs"))
    cached = cache_path("embeddings", "a.npz")
    with monkeypatch.context() as patch:
        for name in ("mkdir", "touch"):
            patch.setattr(Path, name, refuse(error))
        patch.setattr(os, "open", refuse(error))
        with pytest.raises(OSError, match="mels: cannot be written .*set MAESTLIB_CACHE to another folder") as raised:
            cache_path("mels", "tunes-0")
        assert raised.value.errno == error
        with pytest.raises(OSError, match="embeddings: cannot be written .*set MAESTLIB_CACHE"), file_lock(cached):
            raise AssertionError("locked what cannot be written")
        with pytest.raises(OSError, match="maest-30s: cannot be written .*set MAESTLIB_RUNS to another folder"):
            write_json(tmp_path / "runs/maest-30s/config.json", {})
        with pytest.raises(OSError, match="elsewhere: cannot be written .*give another folder"):
            with atomic_write(tmp_path / "elsewhere/table.parquet"):
                raise AssertionError("wrote what cannot be written")
        assert main(["tag", "song.mp3", "--model", "discogs-maest-30s-pw-129e"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "set MAESTLIB_CACHE to another folder" in message


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write everywhere")
def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTLIB_CACHE", str(tmp_path))
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="set MAESTLIB_CACHE to another folder"):
        cache_path("mels", "tunes-0")


def test_a_full_disk_is_not_called_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    (tmp_path / "a.json").write_text("[1]", encoding="utf8")
    with pytest.raises(OSError, match="a.json: the disk is full") as raised:
        write_json(tmp_path / "a.json", [2])
    assert raised.value.errno == errno.ENOSPC and "written" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "[1]"


def test_any_name_of_a_file_is_written(tmp_path, monkeypatch):
    "A file system takes 255 bytes; `~love` is no home folder, but `~` is one."
    for name in ("л" * 122 + ".json", "~love.json"):
        write_json(tmp_path / name, [1])
        assert (tmp_path / name).read_text() and len([*tmp_path.iterdir()]) == 1
        (tmp_path / name).chmod(0o640)
        write_json(tmp_path / name, [2])
        assert os.name == "nt" or (tmp_path / name).stat().st_mode & 0o777 == 0o640, "it keeps its permissions"
        (tmp_path / name).unlink()
    monkeypatch.setattr("maestlib.core.files.project_root", lambda: tmp_path)
    assert resolve_path("~love") == tmp_path / "~love" and resolve_path("~/a") == Path.home() / "a"


def test_one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert device_module.cpu_count() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert device_module.cpu_count() == 1


def test_the_device_of_each_machine(monkeypatch):
    for name in ("MAESTLIB_DEVICE", "MAESTLIB_DTYPE", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device() == torch.device("mps") and default_dtype("mps") == torch.float32
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun's processes cannot exchange gradients between mps devices
    assert default_device() == torch.device("cpu")
    monkeypatch.setenv("MAESTLIB_DEVICE", "mps")
    with pytest.raises(ValueError, match=r"MAESTLIB_DEVICE=mps: give one that this process can use \(cpu\)"):
        default_device()
    monkeypatch.delenv("MAESTLIB_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert default_device() == torch.device("cuda", 1)


def test_the_processor_of_each_system(monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "AMD Ryzen 7 ")
    answers = {"win32": "AMD Ryzen 7", "darwin": "Apple M2"}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="Apple M2\n"))
    for system, name in answers.items():
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", system)
            assert processor_name.__wrapped__() == name
    assert device_name("cpu") == processor_name()


def test_peak_memory_without_resource(monkeypatch):
    psutil = pytest.importorskip("psutil")
    with_resource = peak_memory() if os.name != "nt" else None
    monkeypatch.setitem(sys.modules, "resource", None)
    now = psutil.Process().memory_info().rss
    assert abs(peak_memory() - now) < 0.5 * now or os.name == "nt"
    assert with_resource is None or peak_memory() < 1.1 * with_resource


@pytest.mark.skipif(
    not torch.backends.mps.is_available() or os.environ.get("MAESTLIB_DEVICE") == "cpu", reason="no Apple GPU to use"
)
def test_mps_agrees_with_the_cpu():
    torch.manual_seed(0)
    mel, vectors, logits = torch.randn(2, 96, 625), {}, {}
    for device in ("cpu", "mps"):
        model = load_model("maest-30s-tunes", device=device)
        with torch.inference_mode():
            vectors[device] = model.embed(mel.to(device)).flatten(1).cpu()
            logits[device] = model(mel.to(device)).cpu()
    for values in (vectors, logits):
        assert torch.cosine_similarity(values["cpu"], values["mps"]).min() > 0.9999
