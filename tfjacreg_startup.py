"""What a command does before and while TensorFlow is imported, which takes seconds.

Not in the package `tfjacreg`: whoever imports that has imported TensorFlow.
"""

import os
import signal
import sys
import unicodedata

# What a command was called with, for the process that begins anew without it.
_ARGUMENTS = "TFJACREG_ARGUMENTS"
_STOPPING = (signal.SIGINT, signal.SIGTERM)
# What TensorFlow writes as it is imported, whatever TF_CPP_MIN_LOG_LEVEL is, and is no news: that
# it is fast, that a machine has no GPU, and (2.18) that it has two copies of a plugin.
_NO_NEWS = (
    b"All log messages before absl::InitializeLog() is called are written to STDERR",
    b"oneDNN custom operations are on.",
    b"Could not find cuda drivers on your machine, GPU will not be used.",
    b"failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)",
    b" factory: Attempting to register factory for plugin cu",
)
# Controls, direction marks and other invisible ones, surrogates, and separators of lines.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def prepare() -> None:
    """Readies streams and signals, hides passwords, and has TensorFlow be fast and say little."""
    # Until `cli.run` replaces them: while TensorFlow is imported there is nothing to save.
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    _open_streams()
    _hide_secrets()
    backend = configured_backend()
    if backend not in (None, "tensorflow"):
        # Keras would be imported with it, or fail to be, in its own words.
        name = os.path.basename(sys.argv[0])
        sys.stderr.write(
            f"{name}: error: Keras' backend must be 'tensorflow'. Received: {backend!r}. Set "
            "KERAS_BACKEND=tensorflow, or change ~/.keras/keras.json.\n"
        )
        sys.exit(2)
    # TensorFlow leaves oneDNN off on some processors, at a third of the speed.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def import_tensorflow() -> None:
    """Imports TensorFlow and lists its GPUs, without the lines on stderr that are no news.

    The other lines are written as they come, by a process that outlives a crash of this one.
    """
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    receiver, sender = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    reader = os.fork()
    if reader == 0:
        for number in _STOPPING:  # They are for the command; this process ends with its pipe.
            signal.signal(number, signal.SIG_IGN)
        os.close(sender)
        _copy_news(receiver)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    os.close(receiver)
    stderr = os.dup(2)
    os.dup2(sender, 2)
    os.close(sender)
    try:
        import tensorflow as tf

        tf.config.list_physical_devices("GPU")
    except ImportError:
        pass  # Whoever needs it says so.
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.waitpid(reader, 0)


def _copy_news(receiver: int) -> None:
    """Copies the lines of a pipe to stderr, except those that are no news."""
    with open(receiver, "rb") as lines:
        for line in lines:
            if not any(text in line for text in _NO_NEWS):
                try:
                    os.write(2, line)
                except OSError:
                    return


def is_module_command() -> bool:
    """Whether this process is `python -m tfjacreg`, which is being imported."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "tfjacreg"


def _stop(*_: object) -> None:
    try:
        os.write(1, b"\nStopped: nothing was under way.\n")
    finally:
        os._exit(130)


def _open_streams() -> None:
    """Opens streams that are closed: else the next file would get their number, and their text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # The lowest free number.
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def configured_backend() -> object:
    """The backend that Keras will take: of KERAS_BACKEND, or of its file; None for its default."""
    import json

    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    try:
        with open(os.path.join(home, "keras.json"), encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError):  # As Keras does.
        return None
    return settings.get("backend") if isinstance(settings, dict) else None


def _hide_secrets() -> None:
    """Begins anew with a command line that has no passwords: `ps` shows it to everybody.

    What was given comes along in the environment, which only its owner can read.
    """
    import json

    told = os.environ.pop(_ARGUMENTS, None)
    if told is not None:
        sys.argv[1:] = json.loads(told)
        return
    given = sys.argv[1:]
    shown = without_secrets(given)
    if shown != given:
        os.environ[_ARGUMENTS] = json.dumps(given)
        start = sys.orig_argv[: len(sys.orig_argv) - len(given)]
        os.execv(sys.executable, [*start, *shown])


def without_secrets(arguments: list[str]) -> list[str]:
    """A command line without what may be a password, in a URL or as `--storage`.

    Args:
        arguments: Its arguments.
    """
    shown, follows = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and _is_storage(option):
            argument = f"{option}={redacted(value)}"
        elif follows or _is_url(argument):  # A file may have a colon in its name.
            argument = redacted(argument)
        shown.append(argument)
        follows = not equals and _is_storage(argument)
    return shown


def _is_storage(option: str) -> bool:
    """Whether argparse takes it for `--storage`: the beginnings of options count."""
    return len(option) > 3 and "--storage".startswith(option)


def _is_url(argument: str) -> bool:
    import re

    names = re.findall(r"([\w%+.-]+)\s*=", argument)
    return "://" in argument or any(map(is_secret, names))


def redacted(text: str) -> str:
    """A URL, or what was meant as one, with `***` for what may be a password.

    Args:
        text: The URL, or libpq's own `host=... password=...`.
    """
    import re

    # First as a parameter of its own, then as a part of whatever else: all that follows may belong
    # to it, an @ too.
    for pattern in (r"(?<![^?&;\s])([\w%+.-]+)\s*[=:]\s*", r"([\w%+.-]+)\s*[=:]\s*"):
        for name in re.finditer(pattern, text):
            if is_secret(name[1]):
                return f"{_without_owner(text[: name.start()])}{name[0]}***"
        text = _without_owner(text)
    return text


def _without_owner(text: str) -> str:
    """A URL with `***` for the password that stands before its host, or where its port would."""
    import re

    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    # A password may hold any character: it ends at the last @.
    owner, at, place = rest.rpartition("@")
    user, *rest_of_owner = re.split("(:|%3a)", owner, maxsplit=1, flags=re.IGNORECASE)
    if rest_of_owner:
        owner = f"{user}{rest_of_owner[0]}***"
    place, mark, query = place.partition("?")
    host, colon, port = place.partition("/")[0].rpartition(":")
    if colon and not (port.isdecimal() or port.endswith("]") or not port):
        place = f"{host}:***"
    return f"{scheme}{separator}{owner}{at}{place}{mark}{query}"


def is_secret(name: str) -> bool:
    """Whether a parameter of a URL, perhaps with %, is one whose value nobody else is to see."""
    import re
    import urllib.parse

    plain = urllib.parse.unquote_plus(name)
    return re.search(r"pass|pwd|secret|token|(api_?|ssl|_)key\b", plain, re.IGNORECASE) is not None


def printable(text: str, *, limit: int | None = None) -> str:
    """Writes out what is not seen, such as ESC; line breaks and tabs stay.

    Args:
        text: The text.
        limit: How many characters are shown, at most.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}..."
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in _HIDDEN and c not in "\n\t" else c for c in text
    )


def hide_arguments(text: str) -> str:
    """A message with `***` for what this command was given and may be a password."""
    given = sys.argv[1:]
    for argument, shown in zip(given, without_secrets(given), strict=True):
        pairs = [(argument, shown)]
        if argument.startswith("--"):  # Of `--storage=URL` a message may quote the URL alone.
            pairs.append((argument.partition("=")[2], shown.partition("=")[2]))
        for value, instead in pairs:
            if value != instead:
                text = text.replace(value, instead).replace(repr(value)[1:-1], instead)
    return text
