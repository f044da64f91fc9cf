"""What every test shares. Notebooks are run by nbval with their own parameters; only the clock is shortened here."""

import os
import shutil
from pathlib import Path

RUNS = Path(__file__).resolve().parent.parent / "runs/tests"  # what a test has trained is not for the reader's use
if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
os.environ["MAESTLIB_RUNS"] = str(RUNS)
os.environ.setdefault("MAESTLIB_MINUTES", "0.1")  # of training, where a notebook does not say
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers share the cores, and threads that wait for each other are slow
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
