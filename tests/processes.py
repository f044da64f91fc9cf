"""Programs and notebook kernels that need not import PyTorch: multiprocessing's fork server has it already.

`python -m` computes for four seconds before the first line of maestlib runs, and the tests start a hundred processes.
Only the packages of others are imported before a process is forked. Where there is no fork server, they are started.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile

from jupyter_client.provisioning import LocalProvisioner

CAN_FORK = sys.platform == "linux"
PACKAGES = """
    torch torch._dynamo torch.distributed torch.optim.swa_utils torch.utils.flop_counter torchaudio.functional
    ipykernel.kernelapp ipykernel.ipkernel IPython.display ipywidgets plotly.graph_objects plotly.io sklearn.metrics
    sklearn.manifold scipy.stats scipy.sparse.csgraph timm music21 soundfile av safetensors.torch lxml.etree anywidget
    nbformat kaleido pytest
""".split()


CONTEXT = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
if CAN_FORK:
    CONTEXT.set_forkserver_preload(PACKAGES)  # when the first process starts; missing packages are left out


def _run(arguments: list[str], cwd: str, env: dict[str, str], printed: list[str]):
    "In the forked process: become another Python program."
    os.setsid()
    for descriptor, path in enumerate([os.devnull, *printed]):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    added = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*added, *(path for path in sys.path if path not in added)]
    sys.argv = arguments
    if "OMP_NUM_THREADS" in env:  # is read when torch is imported
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    if arguments[0].endswith(".py"):
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


class Fork:
    "A forked program, used as a `subprocess.Popen`."

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], cwd: str | os.PathLike, env: dict[str, str]):
        self.printed = [tempfile.NamedTemporaryFile() for _ in ("stdout", "stderr")]
        names = [file.name for file in self.printed]
        self.process = CONTEXT.Process(target=_run, args=(arguments, os.fspath(cwd), dict(env), names))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        "Wait for the end and return the exit code. Raises `subprocess.TimeoutExpired`."
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
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


def use_forked_kernels():
    "Make `ForkedKernel` the default of jupyter_client in this process."
    if not CAN_FORK:
        return
    from importlib.metadata import EntryPoint

    from jupyter_client.provisioning import KernelProvisionerFactory

    factory = KernelProvisionerFactory.instance()
    factory.provisioners["forked"] = EntryPoint("forked", "processes:ForkedKernel", factory.GROUP_NAME)
    factory.default_provisioner_name = "forked"


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
