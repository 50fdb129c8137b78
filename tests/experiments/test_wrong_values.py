"""Every field of every file with wrong values of every kind: one sentence with a way out."""

import functools
import json
import tomllib
from importlib import metadata

import pytest
from test_report import write_evaluation, write_run
from wrong import WRONG, changed, fields, in_json, in_lines, in_toml, without

from tfjacreg.experiments import distributions, evaluation, figures, html, measures, report
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.environment import environment
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.run import _refuse_another_machine
from tfjacreg.experiments.sweep import Sweep
from tfjacreg.printable import printable

TOML = 'dataset = "digits"\nepochs = 4\nrepeats = 1\n[methods.spectral]\n'
CONFIG = RunConfig.of(epochs=4)
WAYS_OUT = ("--overwrite", "Judge", "Move", "Train that run again", "no config.json")


def test_there_are_at_least_eight_for_each_kind_of_field():
    """Whatever a field is, at least so many values are of another type or out of its range."""
    for right in ("digits", 1.5, 3, True, [0.5], {"a": 1}, None):
        assert sum(type(value) is not type(right) for value in WRONG.values()) >= 8


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of one run, finished and judged."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.toml").write_text(TOML)
    path = folder / Sweep.folder(CONFIG)
    write_run(path, CONFIG, 0.5, 0.4, 0)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"environment": environment()}))
    write_evaluation(path)
    content = json.loads((path / "evaluation.json").read_text())
    content["settings"] |= {"dataset": "digits", **measures.PLAN}
    content["environment"] = environment()
    for name in ("pgd", "pgd_margin", "tpgd"):
        content[name]["faded"] = [0.0, 0.0, 0.5]
    (path / "evaluation.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Tables are made; pictures, which take long, are not; a package's version is read once."""
    for module in (figures, distributions):
        for name in vars(module):
            if name.endswith("_figure"):
                monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(html, "render", lambda text, _: text)
    monkeypatch.setattr(metadata, "version", functools.cache(metadata.version))


def by_train(path):
    reader = FolderReader(path)
    reader.check_claim(CONFIG)
    _refuse_another_machine(reader)
    reader.check_products(alone=True)
    reader.read_history()


def by_evaluate(path):
    reader = FolderReader(path)
    reader.require_classifier()
    (target,) = evaluation.find_targets([path])
    before = reader.read_evaluation() or {}
    now = {"dataset": target.dataset, "images": 6, "seed": 5, **measures.PLAN}
    evaluation._refuse_other_settings(
        reader.evaluation_file, before, {"settings": now, "environment": environment()}
    )


def by_report(path):
    out = path.parents[1] / "report"
    report.write([path.parent], out, benchmarks=path.parent)
    text = (out / "report.md").read_text()
    assert printable(text) == text and len(text) < 20_000


def refusal(use, path, told):
    """Why a use was refused, or None; any other end fails the test."""
    try:
        use(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1500, f"{told}: {message[:3000]!r}"
        return message
    except BaseException as error:
        pytest.fail(f"{told}: {type(error).__name__}: {error}")
    return None


USERS = {
    "config.json": (by_train, by_evaluate, by_report),
    "metrics.json": (by_train, by_report),
    "history.csv": (by_train, by_report),
    "evaluation.json": (by_evaluate, by_report),
}


@pytest.mark.parametrize("name", USERS)
def test_a_file_of_a_run(sweep, name):
    path = sweep / Sweep.folder(CONFIG)
    whole = (path / name).read_bytes()
    for use in USERS[name]:
        assert refusal(use, path, "whole") is None
    count = {"refused": 0, "harmless": 0}
    try:
        text = whole.decode()
        cases = in_lines(text) if name == "history.csv" else in_json(json.loads(text))
        for told, content in cases:
            content = content if isinstance(content, bytes) else content.encode()
            (path / name).write_bytes(content)
            for use in USERS[name]:
                message = refusal(use, path, f"{use.__name__}, {name}: {told}")
                count["harmless" if message is None else "refused"] += 1
                if message is not None:
                    assert str(path / name) in message, f"{told}: {message}"
                    assert any(way in message for way in WAYS_OUT), f"{told}: {message}"
            assert (path / name).read_bytes() == content
    finally:
        (path / name).write_bytes(whole)
    print(name, count)
    assert count["refused"] > count["harmless"]


def test_a_number_out_of_range_reaches_no_table(sweep):
    """What a share, a loss, a distance cannot be is refused, as what is no number is."""
    path = sweep / Sweep.folder(CONFIG)
    for name, keys, values in (
        ("metrics.json", ("test_accuracy",), (-0.1, 1.1, 1e300, 10**400)),
        ("metrics.json", ("lowest_test_loss", "test_accuracy"), (-1, 2)),
        ("metrics.json", ("step_seconds",), (-1, 1e300)),
        ("evaluation.json", ("pgd", "accuracy"), ([0.5, 0.4, 1.1], [0.5, -1, 0], [1, 1])),
        ("evaluation.json", ("pgd", "iterations"), ([4, 1, 9], [1, 1, 2], [-1, 0, 1])),
        ("evaluation.json", ("pgd", "faded"), ([0.5], [0, 0, 2])),
        ("evaluation.json", ("boundary", "misclassified"), ([6], [-1], [0.5], [True])),
        ("evaluation.json", ("boundary_distance",), ([-1.0], [1e300])),
        ("evaluation.json", ("sigma",), ([-1.0] * 6, [1.0] * 5)),
    ):
        whole = (path / name).read_text()
        for value in values:
            (path / name).write_text(json.dumps(changed(json.loads(whole), keys, value)))
            message = refusal(by_report, path, f"{name} {keys} {value}")
            (path / name).write_text(whole)
            assert message is not None and ".".join(keys[:1]) in message, (keys, value)


def test_a_sweep_file(tmp_path):
    content = {
        "dataset": "digits",
        "network": "lenet",
        "width": 1.0,
        "initialization": "keras",
        "epochs": 1,
        "schedule": "constant",
        "augment": False,
        "whole_training_set": False,
        "repeats": 1,
        "grid": {"learning_rate": [0.1], "batch_size": [32], "factor": [0.1]},
        "methods": {"none": {}, "spectral": {"factor": [0.01], "learning_rate": [0.2]}},
    }
    path = tmp_path / "some.toml"

    def text(content):
        return "\n".join(f"{key} = {in_toml(value)}" for key, value in content.items())

    path.write_text(text(content))
    assert len(Sweep.load(path).cells) == 2
    count = 0
    for keys in fields(content):
        cases = {kind: changed(content, keys, v) for kind, v in WRONG.items() if in_toml(v)}
        cases |= {"a day": changed(content, keys, "DAY"), "none": without(content, keys)}
        for kind, wrong in cases.items():
            told = f"{'.'.join(map(str, keys))} is {kind}"
            path.write_text(text(wrong).replace('"DAY"', "2026-11-25T00:00:00Z"))
            message = refusal(Sweep.load, path, told)
            if message is None:  # It is one: a flag that is true, a factor of another size.
                assert Sweep.load(path).cells, told
                tomllib.loads(path.read_text())
            else:
                assert "some.toml" in message, f"{told}: {message}"
                count += 1
    assert count > 300
