"""What train.py and evaluate.py do before TensorFlow is imported, which takes seconds.

Not in `tfjacreg.cli`: whoever imports that has imported TensorFlow.
"""

import os
import re
import signal
import sys
import urllib.parse


def prepare() -> None:
    """Hides a password, has signals end the process, and makes TensorFlow fast and quiet."""
    _hide_password()
    # Until `cli.run` replaces them: while TensorFlow is imported there is nothing to save.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(130))
    # TensorFlow leaves oneDNN off on some processors, at a third of the speed.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _hide_password() -> None:
    """Begins anew with the password in libpq's own variable: `ps` shows command lines to all."""
    for number, argument in enumerate(sys.orig_argv):
        match = re.match(r"(?:--\w+=)?postgres(?:ql)?://[^:@/]*(:(.*))@", argument)
        if match:
            os.environ["PGPASSWORD"] = urllib.parse.unquote(match[2])
            without = argument[: match.start(1)] + argument[match.end(1) :]
            command = [*sys.orig_argv[:number], without, *sys.orig_argv[number + 1 :]]
            os.execv(sys.executable, command)
