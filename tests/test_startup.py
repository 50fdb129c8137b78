"""What the commands do before TensorFlow is imported."""

import itertools

import pytest
import sqlalchemy

import startup

DRIVERS = ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2", "PostgreSQL"]
PASSWORDS = ["hunter2", "a%20b%40c", "with:colon", "with/slash", "with?mark"]


@pytest.mark.parametrize("option", ["", "--storage=", "--stor="])
@pytest.mark.parametrize(("driver", "password"), list(itertools.product(DRIVERS, PASSWORDS)))
@pytest.mark.parametrize("user", ["me", ""])
def test_a_password_before_the_host_is_split_off(option, driver, password, user):
    argument = f"{option}{driver}://{user}:{password}@host:9/db?connect_timeout=3"
    without, found = startup.split_password(argument)
    assert without == f"{option}{driver}://{user}@host:9/db?connect_timeout=3"
    assert found == sqlalchemy.make_url(f"{driver}://{user}:{password}@host/db").password


@pytest.mark.parametrize("start", ["me@host/db", "host/db", "host:9/db", "/db", "me:first@host/db"])
@pytest.mark.parametrize("name", ["password", "pass%77ord"])
@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("a=1&", ""), ("", "&a=1"), ("a=1&", "&b=2")]
)
def test_a_password_in_the_query_is_split_off(start, name, before, after):
    url = f"postgresql+psycopg://{start}?{before}{name}=hunter2%21+x{after}"
    without, password = startup.split_password(url)
    assert password == "hunter2! x" == sqlalchemy.make_url(url).query["password"]
    assert "hunter2" not in without and "first" not in without
    rest = sqlalchemy.make_url(without)
    expected = {k: v for k, v in sqlalchemy.make_url(url).query.items() if k != "password"}
    assert dict(rest.query) == expected
    assert rest.host == sqlalchemy.make_url(url).host and rest.database == "db"


@pytest.mark.parametrize(
    "argument",
    ["postgresql://me@host/db", "postgresql://host:9/db?a=1", "--out", "train.py", "a:b@c", ""],
)
def test_what_has_no_password_stays(argument):
    assert startup.split_password(argument) == (argument, None)


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
