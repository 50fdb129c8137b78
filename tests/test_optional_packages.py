"""A base install, without any extra: what works, and what is said about the rest."""

import re
import tomllib
from pathlib import Path

import base_install
import pytest

from tfjacreg import optional_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SENTENCE = re.compile(
    r"[^.]+(\.py)? needs the package (\w+), which is not installed: "
    r'run pip install "tfjacreg\[(\w+)\]"\.'
)
# Runs a script or a module as Python's command line does, in a process where imports are blocked.
BLOCKED = """
import runpy, sys
sys.path[:0] = [{root!r}, {tests!r}]
{block}
sys.argv = {argv!r}
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
SERVER = "postgresql://nobody@localhost/none"
FINISHED = "results/digits/none-lr0.01-b32-seed0"
ALL = "import base_session; base_session.block_extras()"


@pytest.fixture
def run_blocked(fresh_python):
    def run(block, *argv):
        words = {"root": str(ROOT), "tests": str(ROOT / "tests"), "argv": list(argv)}
        return fresh_python.run(BLOCKED.format(block=block, **words), check=False)

    return run


@pytest.mark.slow
def test_the_base_measures_trains_saves_and_attacks(run_blocked, tmp_path):
    done = run_blocked("", "tests/base_session.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    versions, *messages = done.stdout.splitlines()
    assert versions.startswith("TensorFlow ")
    packages = {}
    for line in messages:
        what, message = line.split(": ", 1)
        packages[what] = SENTENCE.fullmatch(message).group(2, 3)
    assert packages == {
        "attacks.pgd": ("cleverhans", "experiments"),
        "attacks.tpgd": ("cleverhans", "experiments"),
        "datasets.load digits": ("sklearn", "experiments"),
        "datasets.load kmnist": ("tensorflow_datasets", "experiments"),
        "datasets.prepare": ("tensorflow_datasets", "experiments"),
    }
    assert (tmp_path / "saved_model" / "saved_model.pb").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "argv", "extra"),
    [
        (ALL, ["train.py", "--epochs", "1", "--out", "OUT"], "experiments"),
        (ALL, ["train.py", "--sweep", "sweeps/quick.toml", "--out", "OUT"], "experiments"),
        (
            "sys.modules['psycopg'] = None",
            ["train.py", "--sweep", "sweeps/quick.toml", "--out", "OUT", "--storage", SERVER],
            "postgresql",
        ),
        (ALL, ["evaluate.py", FINISHED, "--out", "OUT"], "experiments"),
        (ALL, ["tfjacreg", "prepare", "kmnist", "OUT"], "experiments"),
    ],
    ids=["train", "sweep", "storage", "evaluate", "prepare"],
)
def test_a_script_names_the_command_in_one_sentence(run_blocked, tmp_path, block, argv, extra):
    done = run_blocked(block, *(str(tmp_path / "out") if a == "OUT" else a for a in argv))
    assert done.returncode == 2, done.stderr
    error = re.fullmatch(r"(?:\w+(?:\.py)?: )?error: (.*)", done.stderr.splitlines()[-1]).group(1)
    assert SENTENCE.fullmatch(error).group(3) == extra
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_message(extra):
    with (
        pytest.raises(optional_packages.MissingExtraError) as caught,
        optional_packages.importing(extra, "Flying"),
    ):
        import no_such_package.wings  # noqa: F401
    assert str(caught.value) == (
        "Flying needs the package no_such_package, which is not installed: "
        f'run pip install "tfjacreg[{extra}]".'
    )


def test_a_missing_module_of_our_own_is_no_missing_extra():
    with (
        pytest.raises(ModuleNotFoundError, match=r"tfjacreg\.no_such_module"),
        optional_packages.importing("experiments", "Flying"),
    ):
        import tfjacreg.no_such_module  # noqa: F401


def test_every_extra_named_in_a_message_exists():
    sources = [ROOT / "train.py", ROOT / "evaluate.py", *(ROOT / "tfjacreg").rglob("*.py")]
    named = {
        name
        for source in sources
        for name in re.findall(r"importing\(\s*\"(\w+)\"", source.read_text())
    }
    assert named == {"experiments", "postgresql"} and named <= EXTRAS.keys()


def names(requirements):
    """The distributions' names, without versions and extras."""
    return [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements]


def test_the_docs_list_what_is_installed():
    page = (ROOT / "docs" / "installing.md").read_text()
    rows = dict(re.findall(r"^\| (?:`(\w+)`|\(none\)) \| (.*?) \|", page, re.M))
    assert rows.keys() == {"", *EXTRAS}
    assert rows[""].split(", ") == names(PROJECT["dependencies"])
    added = [name for name in names(EXTRAS["experiments"]) if name != "importlib_resources"]
    assert rows["experiments"].split(", ") == added


def test_the_readme_names_the_oldest_versions():
    oldest = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    readme = (ROOT / "README.md").read_text()
    for name, package in (("TensorFlow", "tensorflow"), ("Keras", "keras")):
        assert f"{name} {oldest[package]} or newer" in readme
    assert base_install.oldest() == [
        f"{package}=={oldest[package]}.*" for package in ("tensorflow", "keras")
    ]
