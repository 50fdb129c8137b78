"""What the commands do before TensorFlow is imported."""

import itertools

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
