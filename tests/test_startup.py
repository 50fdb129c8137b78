"""What the commands do before TensorFlow is imported."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tfjacreg_startup as startup

DRIVERS = ["postgresql", "postgres", "postgresql+psycopg", "PostgreSQL+psycopg2", "mysql", "x+y"]
PASSWORDS = [
    *("hunter2", "a%20b%40hunter2", "hunter2:colon", "hunter2/slash", "hunter2?mark", "hunter2#a"),
    *("p@hunter2", "%ZZhunter2", "hunter2&a=b", "hunter2\udcff", "hunter2 space", "://hunter2"),
]


@pytest.mark.parametrize("start", ["--storage=", "--stor=", "--storage", "--st", None])
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_before_the_host_is_hidden(start, password):
    """In a command line, and in a message that quotes it."""
    for driver, user in itertools.product(DRIVERS, ["me", ""]):
        url = f"{driver}://{user}:{password}@host:9/db?connect_timeout=3"
        given = [url] if start is None else [start + url] if "=" in start else [start, url]
        shown = startup.without_secrets(["--sweep", "f.toml", *given, "--out", "a"])
        assert shown[:2] == ["--sweep", "f.toml"] and shown[-2:] == ["--out", "a"]
        text = " ".join(shown)
        assert (
            "hunter2" not in text and f"{driver}://{user}:***@host:9/db?connect_timeout=3" in text
        )
        assert startup.without_secrets(shown) == shown


QUERY = [
    *("password", "pass%77ord", "p%61ssword", "sslpassword", "PASSWD", "SSLPassWord", "pwd"),
    *("oauth_client_secret", "sslkey", "scram_client_key", "access_token"),
]


@pytest.mark.parametrize("name", QUERY)
@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("a=1&", ""), ("", "&a=1"), ("a=1&", "&b=2")]
)
def test_a_password_in_the_query_is_hidden(name, before, after):
    for start in ("me@host/db", "host/db", "host:9/db", "/db", "me:hunter2@host/db", "[::1]:9/db"):
        url = f"postgresql+psycopg://{start}?{before}{name}=hunter2%21+x{after}"
        (shown,) = startup.without_secrets([url])
        assert "hunter2" not in shown and shown.startswith("postgresql+psycopg://")
        assert "9/db" in shown or ":9" not in start
        assert startup.without_secrets([shown]) == [shown]
        (shown,) = startup.without_secrets([url.replace("hunter2", "an@hunter2")])
        assert "hunter2" not in shown and startup.without_secrets([shown]) == [shown]


@pytest.mark.parametrize(
    "storage",
    [
        *("host=h password=hunter2", "host=h passwd='hunter2 x'", "password = hunter2 host=h"),
        *("me:hunter2@host/db", "postgresql:/me:hunter2@h/db", "postgresql:me:hunter2"),
        *("postgresql://me:hunter2", "postgresql://me:hunter2/db", "sslpassword=hunter2"),
        *("PGPASSWORD=hunter2", "postgresql://h/db;password=hunter2", "//me:hunter2@h"),
        *("postgresql:\\\\me:hunter2@h", "jdbc:postgresql://h/db?user=me&password=hunter2"),
        *("postgresql://a:b@postgresql://me:hunter2@host/db", "postgresql://me%3Ahunter2@host/db"),
        *("host=h p%61ssword=hunter2", "host=h oauth_client_secret = hunter2"),
    ],
)
def test_a_password_in_what_is_no_url_is_hidden(storage, monkeypatch):
    for given in (["--storage", storage], [f"--storage={storage}"]):
        shown = startup.without_secrets(given)
        assert "hunter2" not in " ".join(shown)
        monkeypatch.setattr(startup.sys, "argv", ["train.py", *given])
        for message in (f"unrecognized: {' '.join(given)}", f"Received: {storage}.", repr(storage)):
            assert "hunter2" not in startup.hide_arguments(message)


@pytest.mark.parametrize(
    "argument",
    [
        *("postgresql://me@host/db", "postgresql://host:9/db?a=1", "postgresql://[::1]:9/db"),
        *("--out", "train.py", "a:b@c", "", "gs://bucket/a", "--storage", "runs/a=1", "a/passing"),
    ],
)
def test_what_has_no_password_stays(argument):
    assert startup.without_secrets([argument]) == [argument]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["-m", "prepare", "-m"], True),
        (["-m"], True),
        (["x.py", "-m"], False),
        (["-c"], False),
        ([], False),
    ],
)
def test_python_m_tfjacreg_is_known_while_it_is_imported(monkeypatch, arguments, command):
    monkeypatch.setattr(startup.sys, "argv", arguments)
    for start in (["-P", "-m", "tfjacreg"], ["-mtfjacreg"]):
        monkeypatch.setattr(startup.sys, "orig_argv", ["python", *start, *arguments[1:]])
        assert startup.is_module_command() == command
    other = ["python", "-m", "tfjacreg.experiments.workers", *arguments[1:]]
    monkeypatch.setattr(startup.sys, "orig_argv", other)
    assert not startup.is_module_command()


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ('{"backend": "torch"}', "torch"),
        ('{"backend": "numpy"}', "numpy"),
        ('{"backend": 3}', 3),
        ('{"backend": "tensorflow"}', "tensorflow"),
        *((text, None) for text in ("{}", "[]", "", "{", "3")),
    ],
)
def test_a_backend_other_than_tensorflow_is_refused(tmp_path, monkeypatch, capsys, text, backend):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(startup.signal, "signal", lambda *_: None)
    assert startup.configured_backend() is None
    (tmp_path / "keras.json").write_text(text)
    assert startup.configured_backend() == backend
    if backend in (None, "tensorflow"):
        startup.prepare()
        return
    with pytest.raises(SystemExit) as caught:
        startup.prepare()
    assert caught.value.code == 2 and f"Received: {backend!r}." in capsys.readouterr().err
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert startup.configured_backend() == "tensorflow"


# Stands for TensorFlow, with lines of 2.21 and 2.18, and one that is news.
NOISY = """
import os
def log(*lines, end=chr(10)):
    os.write(2, (chr(10).join(lines) + end).encode())
log(
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1.6    1788 port.cc:153] oneDNN custom operations are on. You may see ...",
    "I0000 00:00:1.6    1788 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU "
    "will not be used.",
    "E external/cuda_fft.cc:477] Unable to register cuFFT factory: Attempting to register factory "
    "for plugin cuFFT when one has already been registered",
)
log("F0000 no AVX here", end="")
{then}
class config:
    @staticmethod
    def list_physical_devices(kind):
        log(
            "!",
            "E0000 00:00:1.4    1788 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA "
            "error: Failed call to cuInit: UNKNOWN ERROR (303)",
        )
"""
IMPORTING = """
import sys, tfjacreg_startup
tfjacreg_startup.import_tensorflow()
print(" after", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("then", "status", "shown"),
    [
        ("", 0, "F0000 no AVX here!\n after\n"),
        ("os.abort()", -6, "F0000 no AVX here"),
        # Whoever needs it says that it is not there.
        ("raise ImportError", 0, "F0000 no AVX here after\n"),
    ],
)
def test_tensorflow_says_what_is_news_even_as_it_crashes(tmp_path, then, status, shown):
    (tmp_path / "tensorflow.py").write_text(NOISY.format(then=then))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (status, shown)
