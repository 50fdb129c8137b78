"""Runs Python programs in fresh processes: forks of one that has imported TensorFlow and Keras.

This import takes longer than most programs here. The process computes nothing, so that every fork
sets up TensorFlow by itself. As a program this file takes orders as lines of JSON and answers each
with the exit status.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1


class FreshPython:
    """The process that forks. Its children end with it."""

    def __init__(self):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, program, *argv, cwd=ROOT, check=True):
        """Runs a program as `python -c TEXT ...` or `python FILE ...` would.

        Args:
            program: The text, or the path of a file.
            argv: The arguments that follow on the command line.
            cwd: The current folder; by default the folder of the project.
            check: Whether a status other than 0 is an error.

        Returns:
            A `subprocess.CompletedProcess` with what it has printed, as text.
        """
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("stdout", "stderr")]
            order = {"file": str(program) if isinstance(program, Path) else None}
            order |= {"code": program.read_text() if order["file"] else program, "cwd": str(cwd)}
            order |= {"argv": [str(a) for a in argv], "outputs": [str(path) for path in outputs]}
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the process that forks has died"
            done = subprocess.CompletedProcess(
                [program, *argv], json.loads(answer), *(path.read_text() for path in outputs)
            )
        assert done.returncode == 0 or not check, f"{done.returncode}: {done.stderr}"
        return done

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


def _execute(order):
    """Runs a program to its end in the fork; returns the exit status that Python would have."""
    for descriptor, path in enumerate(order["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    file = order["file"]
    sys.path[0] = os.path.dirname(file) if file else ""
    sys.argv = [file or "-c", *order["argv"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = file
    try:
        exec(compile(order["code"], file or "<string>", "exec"), vars(main))
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve():
    import keras  # noqa: F401
    import tensorflow as tf  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            status = _execute(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
