"""What train.py and evaluate.py do before TensorFlow is imported, which takes seconds.

Not in `tfjacreg.cli`: whoever imports that has imported TensorFlow.
"""

import json
import os
import re
import signal
import sys
import urllib.parse


def prepare() -> None:
    """Hides a password, has signals end the process, and makes TensorFlow fast and quiet."""
    _hide_password()
    backend = configured_backend()
    if backend not in (None, "tensorflow"):
        # Keras would be imported with it, or fail to be, in its own words.
        name = os.path.basename(sys.argv[0])
        sys.stderr.write(
            f"{name}: error: Keras' backend must be 'tensorflow'. Received: {backend!r}. Set "
            "KERAS_BACKEND=tensorflow, or change ~/.keras/keras.json.\n"
        )
        sys.exit(2)
    # Until `cli.run` replaces them: while TensorFlow is imported there is nothing to save.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(130))
    # TensorFlow leaves oneDNN off on some processors, at a third of the speed.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def configured_backend() -> object:
    """The backend that Keras will take: of KERAS_BACKEND, or of its file; None for its default."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    try:
        with open(os.path.join(home, "keras.json"), encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError):  # As Keras does.
        return None
    return settings.get("backend") if isinstance(settings, dict) else None


def _hide_password() -> None:
    """Begins anew with the password in libpq's own variable: `ps` shows command lines to all."""
    for number, argument in enumerate(sys.orig_argv):
        without, password = split_password(argument)
        if password is not None:
            os.environ["PGPASSWORD"] = password
            command = [*sys.orig_argv[:number], without, *sys.orig_argv[number + 1 :]]
            os.execv(sys.executable, command)


def split_password(argument: str) -> tuple[str, str | None]:
    """An argument that is the URL of a PostgreSQL server, without its password; and that.

    Args:
        argument: Of the command line; the URL may follow `--storage=`.

    Returns:
        The rest, and None where there is no password. That of the query counts, as in SQLAlchemy.
    """
    start = re.match(r"(?:--[\w-]+=)?postgres(?:ql)?(?:\+\w*)?://", argument, re.IGNORECASE)
    if not start:
        return argument, None
    rest, password = argument[start.end() :], None
    owner = re.match(r"([^:@/?]*)(?::([^?]*|[^@]*))?@", rest)
    user = ""
    if owner:
        user, rest = f"{owner[1]}@", rest[owner.end() :]
        password = owner[2] and urllib.parse.unquote(owner[2])
    place, mark, query = rest.partition("?")
    kept = []
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if urllib.parse.unquote_plus(name) == "password":
            password = urllib.parse.unquote_plus(value)
        else:
            kept.append(pair)
    if password is None:
        return argument, None
    query = "&".join(kept)
    return f"{start[0]}{user}{place}{mark if query else ''}{query}", password
