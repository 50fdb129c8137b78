"""What a command does before and during the import of TensorFlow, which takes seconds.

This module is not in the package `tfjacreg`, whose import imports TensorFlow.
"""

import os
import signal
import sys
import unicodedata

# The arguments of a command, for the process that begins again without them.
_ARGUMENTS = "TFJACREG_ARGUMENTS"
_STOPPING = (signal.SIGINT, signal.SIGTERM)
# What TensorFlow writes during its import, whatever TF_CPP_MIN_LOG_LEVEL is, and is no news: that
# it is fast, that a machine has no GPU, and (2.18) that it has two copies of a plugin.
_NO_NEWS = (
    b"All log messages before absl::InitializeLog() is called are written to STDERR",
    b"oneDNN custom operations are on.",
    b"Could not find cuda drivers on your machine, GPU will not be used.",
    b"failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)",
    b" factory: Attempting to register factory for plugin cu",
)
# Unicode categories: control, format and private characters, surrogates, line separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def prepare() -> None:
    """Prepares streams and signals, hides passwords, and makes TensorFlow fast and quiet."""
    # Until `cli.run` replaces them: while TensorFlow is imported there is nothing to save.
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    _open_streams()
    _hide_secrets()
    backend = configured_backend()
    if backend not in (None, "tensorflow"):
        # Otherwise Keras would import the backend, or fail with a message of its own.
        name = os.path.basename(sys.argv[0])
        sys.stderr.write(
            f"{name}: error: Keras' backend must be 'tensorflow'. Received: {backend!r}. Set "
            "KERAS_BACKEND=tensorflow, or change ~/.keras/keras.json.\n"
        )
        sys.exit(2)
    # On some processors TensorFlow leaves oneDNN off, at a third of the speed.
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
        for number in _STOPPING:  # Signals are for the command; this process ends with its pipe.
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
        pass  # Where TensorFlow is needed, its absence is reported.
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
    """Whether this process runs `python -m tfjacreg` and is importing it."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "tfjacreg"


def _stop(*_: object) -> None:
    try:
        os.write(1, b"\nStopped: nothing was under way.\n")
    finally:
        os._exit(130)


def _open_streams() -> None:
    """Opens closed standard streams: otherwise the next file would get their number and text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # Gets the lowest free number.
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def configured_backend() -> object:
    """The backend that Keras will use, from KERAS_BACKEND or its file; None for the default."""
    import json

    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    try:
        with open(os.path.join(home, "keras.json"), encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError):  # Keras ignores them too.
        return None
    return settings.get("backend") if isinstance(settings, dict) else None


def _hide_secrets() -> None:
    """Begins again with a command line without passwords, since `ps` shows it to everybody.

    The original arguments are passed on in the environment, which only its owner can read.
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
    """Whether argparse takes it for `--storage`: it accepts the beginning of an option."""
    return len(option) > 3 and "--storage".startswith(option)


def _is_url(argument: str) -> bool:
    import re

    names = re.findall(r"([\w%+.-]+)\s*=", argument)
    return "://" in argument or any(map(is_secret, names))


def redacted(text: str) -> str:
    """A URL, or a text meant as one, with `***` in place of what may be a password.

    Args:
        text: The URL, or libpq's own form `host=... password=...`.
    """
    import re

    # First as a parameter of its own, then inside other text. Everything that follows the name may
    # belong to the password, including an @.
    for pattern in (r"(?<![^?&;\s])([\w%+.-]+)\s*[=:]\s*", r"([\w%+.-]+)\s*[=:]\s*"):
        for name in re.finditer(pattern, text):
            if is_secret(name[1]):
                return f"{_without_owner(text[: name.start()])}{name[0]}***"
        text = _without_owner(text)
    return text


def _without_owner(text: str) -> str:
    """A URL with `***` in place of a password before its host, or where its port would be."""
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
    """Whether a URL parameter, perhaps percent-encoded, has a value that must stay secret."""
    import re
    import urllib.parse

    plain = urllib.parse.unquote_plus(name)
    return re.search(r"pass|pwd|secret|token|(api_?|ssl|_)key\b", plain, re.IGNORECASE) is not None


def printable(text: str, *, limit: int | None = None) -> str:
    """Writes invisible characters, such as ESC, as escapes; line breaks and tabs stay.

    Args:
        text: The text.
        limit: The most characters to show.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}..."
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in _HIDDEN and c not in "\n\t" else c for c in text
    )


def hide_arguments(text: str) -> str:
    """A message with `***` in place of arguments of this command that may be passwords."""
    given = sys.argv[1:]
    for argument, shown in zip(given, without_secrets(given), strict=True):
        pairs = [(argument, shown)]
        if argument.startswith("--"):  # For `--storage=URL` a message may quote the URL alone.
            pairs.append((argument.partition("=")[2], shown.partition("=")[2]))
        for value, instead in pairs:
            if value != instead:
                text = text.replace(value, instead).replace(repr(value)[1:-1], instead)
    return text
