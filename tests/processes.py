"""Programs in processes of their own, to be stopped and killed for real.

They are forked from one that has read torch and the emoji, which takes a new one seven seconds of a
core, and then run as Python runs them. CUDA does not outlive a fork: where there is a GPU to use,
each is begun anew.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["preloaded"])
_made = []


def start(*arguments, env=(), before=None):
    """Python with these arguments: `-m`, a module's name and its own, or a file and its own.

    Args:
        env: what its environment says beside this process's own.
        before: a function of a test module, called in it before anything else.
    """
    whole, arguments = {**os.environ, **dict(env)}, [str(a) for a in arguments]
    if torch.cuda.is_available():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *arguments], env=whole, preexec_fn=before, **pipes)
    return Forked(arguments, whole, before)


def end_all():
    """Kills those that were forked and still run, and removes what all have written."""
    while _made:
        process = _made.pop()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        shutil.rmtree(process.folder)


class Forked:
    """As much of `subprocess.Popen` as the tests use."""

    def __init__(self, arguments, env, before):
        self.arguments, self.folder = arguments, Path(tempfile.mkdtemp())
        self._said = [self.folder / name for name in ("stdout", "stderr")]
        given = (arguments, env, self._said, before)
        self._process = _FORKING.Process(target=_become, args=given)
        with pytest.MonkeyPatch.context() as patch:  # of the one to fork from
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            self._process.start()
        self.pid = self._process.pid
        _made.append(self)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Waits for its end; what it wrote to stdout and stderr."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return tuple(path.read_text() for path in self._said)


def _become(arguments, env, said, before):
    assert "preloaded" in sys.modules
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    if before:
        before()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
