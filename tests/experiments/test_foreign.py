"""What others made is data: text is no Markdown, a file is no code, a password is nobody's."""

import itertools
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import pytest
from keras import layers
from markdown_it import MarkdownIt

from tfjacreg.experiments import checkpoint, html, tables, workers
from tfjacreg.experiments.locks import hidden, server_url
from tfjacreg.experiments.sweep import Sweep
from tfjacreg.printable import printable

TEXTS = [
    *("![x](/etc/passwd)", "[click](http://evil.example)", "<script>alert(1)</script>"),
    *("a\n\n# Heading", "a | b | c", "`code`", "**bold** __bold__ *i* _i_", "~~gone~~ &amp; &lt;"),
    *("<http://evil.example>", "http://evil.example www.evil.example", "\\", "\\*a\\*", "# a"),
    *(
        "![x][1]\n\n[1]: a.png",
        "a\x00b",
        "a\u2028b",
        "\x1b]0;t\x07\x1b[2J",
        "\u202egnp.exe",
        "</td></table>",
        "```\nfence\n```",
        "||",
    ),
    *("5 * 3 * 2", "fashion_mnist_net", "", "   ", "- item", "1. item", "> quote", "a\\|b"),
]


def as_rendered(text):
    """The text that a table's cell shows, and the kinds of tokens in it."""
    # A column with nothing in it would be left out.
    markdown = f"# title\n\n{tables.table(['head'], [[tables.plain(text)], ['x']])}\n"
    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(markdown)
    cells = [token for before, token in itertools.pairwise(tokens) if before.type == "td_open"]
    assert len(cells) == 2
    children = cells[0].children or []
    return "".join(child.content for child in children), {child.type for child in children}


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_others_is_shown_as_it_is(text):
    shown, kinds = as_rendered(text)
    assert kinds <= {"text", "text_special"}
    assert shown == printable(" ".join(text.split()))
    page = html.render(f"# {tables.plain(text) or 'x'}\n\n- {tables.plain(text)}\n", Path("none"))
    assert "<script" not in page and 'href="http' not in page and "<img" not in page


@pytest.mark.parametrize("text", ["a ``` b", "```", "a\n````\nb"])
def test_a_block_of_text_has_one_end(text):
    (token,) = MarkdownIt("commonmark").parse(tables.fence(text))
    assert token.type == "fence" and token.content == text + "\n"


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "folder/a.png", "link.png"])
def test_a_picture_from_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(b"secret")
    report = tmp_path / "report"
    (report / "folder").mkdir(parents=True)
    (report / "folder" / "a.png").write_bytes(b"secret")
    (report / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="A picture must lie in"):
        html.render(f"# title\n\n![x]({name})\n", report)


def test_a_lambda_layer_is_not_run(tmp_path):
    """Nor where somebody has told Keras to run them all."""
    model = keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: x * 2), layers.Dense(2)])
    model.save(tmp_path / "mine.keras")
    message = r"mine.keras cannot be loaded.*Lambda layer, and the Python code of a file is not run"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "mine.keras")


def test_no_module_is_imported_for_a_file(tmp_path, monkeypatch):
    """Old versions of Keras import whatever the file names."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.save(tmp_path / "good.keras")
    with (
        zipfile.ZipFile(tmp_path / "good.keras") as good,
        zipfile.ZipFile(tmp_path / "mine.keras", "w") as mine,
    ):
        for name in good.namelist():
            content = good.read(name)
            if name == "config.json":
                config = json.loads(content)
                config["config"]["layers"][1] |= {"module": "evil", "registered_name": None}
                content = json.dumps(config).encode()
            mine.writestr(name, content)
    checkpoint.load(tmp_path / "good.keras")
    with pytest.raises(ValueError, match=r"names \['evil.Dense'\]"):
        checkpoint.load(tmp_path / "mine.keras")
    assert "evil" not in sys.modules


def test_the_process_of_a_run_imports_what_train_py_would(tmp_path, monkeypatch):
    """Nothing from the folder that the sweep is started in."""
    started = {}

    class Popen(subprocess.Popen):
        def __init__(self, command, **options):
            started.update(command=command, env=options["env"])
            show = "import sys, json; print(json.dumps(sys.path))"
            super().__init__([*command[:2], "-c", show], **options)

    (tmp_path / "some.toml").write_text(
        'dataset = "digits"\nepochs = 1\nrepeats = 1\n[methods.none]\n'
    )
    monkeypatch.setattr(workers.subprocess, "Popen", Popen)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keras.py").write_text("raise SystemExit('imported')")
    (failure,) = workers.run_sweep(Sweep.load("some.toml"), Path("out")).failures.values()
    assert "metrics.json" in failure
    assert started["command"][1] == "-P"
    path = subprocess.run(
        [*started["command"][:2], "-c", "import sys, json; print(json.dumps(sys.path))"],
        env=started["env"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    places = [Path(place).resolve() for place in json.loads(path)]
    assert tmp_path not in places and Path() not in json.loads(path)
    assert Path(workers.__file__).parents[2] in places


SECRET = "hunter2SECRET"


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://me:{SECRET}@127.0.0.1/db",
        f"postgressql://me:{SECRET}@127.0.0.1/db",
        f"me:{SECRET}@127.0.0.1/db",
        f"postgresql:/me:{SECRET}@127.0.0.1/db",
        f"postgresql:me:{SECRET}",
        f"mysql://host/db?password={SECRET}",
        f"mysql://me:p@{SECRET}@host/db",
        f"sqlite://me:{SECRET}",
        f"postgresql://me:{SECRET}",
        f"host=h password={SECRET}",
        f"host=h passwd='{SECRET}'",
    ],
)
def test_a_password_is_in_no_message(url):
    try:
        server_url(url)
    except ValueError as error:
        text = f"{error}{error.__cause__}{error.__context__}"
        assert SECRET not in text and "postgresql://user@host/name" in text
    else:
        assert url == f"postgresql://me:{SECRET}"  # A port, in SQLAlchemy's eyes, or a host.


def test_postgres_is_postgresql():
    url = server_url(f"postgres://me:{SECRET}@host/db")
    assert url.drivername == "postgresql+psycopg" and url.host == "host"
    assert hidden(f"it was {SECRET}", f"postgres://me:{SECRET}@host/db") == "it was ***"
    assert hidden("nothing to hide", "postgres://host/db") == "nothing to hide"
    query = f"postgresql+psycopg://h/db?a=1&password={SECRET}"
    assert hidden(f"it was {SECRET}", query) == "it was ***"
    encoded = "postgresql://me:a%20%2Fb@h/db"
    assert hidden("a /b or a%20%2Fb or a%20/b", encoded) == "*** or *** or ***"
    assert hidden("nothing to hide", None) == "nothing to hide"


@pytest.mark.slow
def test_a_password_is_in_no_list_of_processes(tmp_path):
    """`ps` shows the command line to everybody: it is told to no process from there on."""
    root = Path(__file__).parents[2]
    (tmp_path / "some.toml").write_text('dataset = "digits"\nrepeats = 1\n[methods.none]\n')
    storage = f"postgresql://me:{SECRET}@127.0.0.1:9/db"
    process = subprocess.Popen(
        [
            sys.executable,
            "train.py",
            "--sweep",
            tmp_path / "some.toml",
            "--storage",
            storage,
            "--out",
            tmp_path / "out",
        ],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = Path(f"/proc/{process.pid}/cmdline")
    seen = []
    while process.poll() is None:
        try:
            seen.append(line.read_bytes())
        except OSError:
            break
        time.sleep(0.005)
    output, _ = process.communicate(timeout=120)
    assert SECRET not in output and "127.0.0.1" in output
    # But for the moment before Python reads its first line.
    late = [text for text in seen[len(seen) // 2 :] if text]
    assert late and not any(SECRET.encode() in text for text in late)
