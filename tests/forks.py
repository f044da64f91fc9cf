"""Python programs and notebook kernels that need not import torch: each is forked from a process that has.

`python -m` takes four seconds of computing before the first line of maestlib runs, and the tests start a hundred
processes. Only packages of others are imported before the fork; on systems other than Linux nothing is forked.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from jupyter_client.provisioning import LocalProvisioner

CAN_FORK = sys.platform == "linux"
PACKAGES = """
    torch torch._dynamo torch.distributed torch.optim.swa_utils torch.utils.flop_counter torchaudio.functional
    ipykernel.kernelapp ipykernel.ipkernel IPython.display ipywidgets plotly.graph_objects plotly.io sklearn.metrics
    sklearn.manifold scipy.stats scipy.sparse.csgraph timm music21 soundfile av safetensors.torch lxml.etree anywidget
    nbformat kaleido
""".split()


class Fork:
    "A forked program, used as a `subprocess.Popen`."

    stdin = stdout = stderr = None

    def __init__(
        self,
        arguments: list[str],  # a module or a .py file, and what follows
        cwd: str | os.PathLike,
        env: dict[str, str],
    ):
        self.printed = [tempfile.NamedTemporaryFile() for _ in ("stdout", "stderr")]
        out, err = (file.name for file in self.printed)
        self.pid = _ask({"arguments": arguments, "cwd": cwd, "env": env, "out": out, "err": err})
        self.returncode = None

    def poll(self) -> int | None:
        "Return the exit code, None while the program runs."
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        "Wait for the end and return the exit code. Raises `subprocess.TimeoutExpired`."
        end = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> list[str]:
        "Wait for the end and return what was printed to stdout and to stderr. Raises `subprocess.TimeoutExpired`."
        self.wait(timeout)
        return [file.read().decode() for file in self.printed]

    def send_signal(self, number: int):
        "Send a signal, unless the program has ended."
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        "Ask the program to end."
        self.send_signal(signal.SIGTERM)

    def kill(self):
        "End the program."
        self.send_signal(signal.SIGKILL)


class ForkedKernel(LocalProvisioner):
    "Starts the kernel of a notebook as a `Fork`. jupyter_client finds it by the name in `use_forked_kernels`."

    async def launch_kernel(self, cmd, **kwargs):
        self.process = Fork(cmd[cmd.index("-m") + 1 :], kwargs.get("cwd") or os.getcwd(), kwargs["env"])
        self.pid = self.pgid = self.process.pid
        return self.connection_info


def start_python(
    arguments: list,  # a module or a .py file, and what follows
    cwd: str | os.PathLike,
    env: dict[str, str],
) -> Fork | subprocess.Popen:
    "Start a Python program with its output in pipes, or in what serves as such."
    arguments = [str(argument) for argument in arguments]
    if CAN_FORK:
        return Fork(arguments, cwd, env)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    module = [] if arguments[0].endswith(".py") else ["-m"]
    return subprocess.Popen([sys.executable, *module, *arguments], env=env, cwd=cwd, **pipes)


def use_forked_kernels():
    "Make `ForkedKernel` the default of jupyter_client in this process."
    if not CAN_FORK:
        return
    from importlib.metadata import EntryPoint

    from jupyter_client.provisioning import KernelProvisionerFactory

    factory = KernelProvisionerFactory.instance()
    factory.provisioners["forked"] = EntryPoint("forked", "forks:ForkedKernel", factory.GROUP_NAME)
    factory.default_provisioner_name = "forked"


_lock = threading.Lock()


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "encoding": "utf8"}
    server = subprocess.Popen([sys.executable, __file__], start_new_session=True, **pipes)
    atexit.register(server.communicate)  # closes the pipe, which ends it
    return server


def _ask(request: dict) -> int | None:
    with _lock:
        server = _server()
        server.stdin.write(json.dumps(request, default=os.fspath) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


def _run(arguments: list[str], cwd: str, env: dict[str, str], out: str, err: str):
    "In the forked process: become another Python program."
    os.setsid()
    for target, (path, mode) in enumerate(((os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY))):
        file = os.open(path, mode | os.O_APPEND)
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0] = cwd
    sys.path[1:1] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.argv = arguments
    if "OMP_NUM_THREADS" in env:  # is read when torch is imported
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    try:
        if arguments[0].endswith(".py"):
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # what Python does at its end, but for the seconds that it takes to delete all modules
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve():
    "Import the packages, then answer each line of JSON: a program to fork by its number, a number by its exit code."
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # tests that need it are skipped
    gc.freeze()
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif answer := os.fork():
            pass
        else:
            replies.close()
            return request
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    if program := _serve():
        _run(**program)
