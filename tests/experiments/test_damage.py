"""Every file of a run folder damaged in every way: what is said, and that nothing whole is lost."""

import dataclasses
import json
import shutil

import pytest
from nursery import shrink

from tfjacreg.experiments import evaluation, pipeline, selection
from tfjacreg.experiments.config import RunConfig, RunError
from tfjacreg.experiments.folder import RunFolder
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.ledger import Ledger
from tfjacreg.experiments.run import run, train
from tfjacreg.experiments.sweep import SWEEP_FILE, Sweep

TOML = 'dataset = "digits"\nepochs = 2\nrepeats = 1\n[methods.spectral]\n'
CONFIG = RunConfig.of(epochs=2)
FIGURES = ("test_accuracy", "test_loss", "test_spectral_norm", "val_loss", "lowest_val_loss")
SHAPES = {
    "a list": b"[]",
    "an empty object": b"{}",
    "null": b"null",
    "a number": b"3",
    "a string": b'"config"',
    "a list of objects": b'[{"dataset": "digits"}]',
    "too deep": b"[" * 100_000,
    "other JSON": b'{"loss": 1}',
    "no text": b"\x00\x01\xfe\xff" * 64,
    "a table": b"a,b\r\n1,2\r\n",
    "one line": b"epoch,val_loss,step_seconds\r\n",
    "lines of text": b"epoch,val_loss,step_seconds\r\n1,x,y\r\n2,x,y\r\n",
    "too few columns": b"epoch,val_loss,step_seconds\r\n1\r\n2\r\n",
    "not finite": b"epoch,val_loss,step_seconds\r\n1,nan,nan\r\n2,inf,1\r\n",
}


def damages(content, moments, *, positions):
    """What may become of a file: by name, its content or None."""
    found = {"missing": None, "empty": b"", "twice": content * 2}
    found |= {name: other for name, other in SHAPES.items()}
    for position in sorted(moments.sample(range(1, len(content)), positions)):
        found[f"cut at {position}"] = content[:position]
    for position in sorted(moments.sample(range(len(content)), positions)):
        flipped = content[position] ^ (1 << moments.randrange(8))
        found[f"flipped at {position}"] = (
            content[:position] + bytes([flipped]) + content[position + 1 :]
        )
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return found
    found |= {"UTF-16": text.encode("utf-16"), "with a mark": text.encode("utf-8-sig")}
    found["an accent"] = text.replace("e", "é", 1).encode("latin-1")
    if text.startswith("{"):
        values = json.loads(text)
        for name in values:  # Each field with wrong values: test_wrong_values.py.
            found[f"without {name}"] = _json({k: v for k, v in values.items() if k != name})
    else:
        first, *rows = text.splitlines(keepends=True)
        found["a row less"] = "".join([first, *rows[:-1]]).encode()
        found["a row more"] = "".join([first, *rows, rows[-1]]).encode()
        found["rows exchanged"] = "".join([first, *rows[::-1]]).encode()
        found["a column less"] = "".join(line.partition(",")[2] for line in [first, *rows]).encode()
    return found


def _json(content):
    return json.dumps(content).encode()


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        loaded = {}

        def load(config, original=pipeline.load):
            if not loaded:
                loaded["data"] = original(config)
            return loaded["data"]

        patch.setattr(pipeline, "load", load)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of one run, finished and judged; its figures."""
    sweep = tmp_path_factory.mktemp("finished")
    (sweep / SWEEP_FILE).write_text(TOML)
    folder = sweep / Sweep.folder(CONFIG)
    metrics = run(CONFIG, folder, verbose=0)
    (target,) = evaluation.find_targets([folder])
    evaluation.judge([target], sweep / "figures", perturbations=["noise"])
    return sweep, metrics


class _Stop(Exception):
    pass


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The same run, stopped before the export; and one with another seed."""
    folders = [tmp_path_factory.mktemp("interrupted") / str(seed) for seed in (0, 1)]

    def stop(*_):
        raise _Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_result", stop)
        for seed, folder in enumerate(folders):
            with pytest.raises(_Stop):
                run(dataclasses.replace(CONFIG, seed=seed), folder, verbose=0)
    return folders


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def outcome(use, folder, told):
    """What comes of a use, or why it was refused; any other error fails the test."""
    try:
        return use(folder), None
    except ValueError as error:
        return None, str(error)
    except Exception as error:
        pytest.fail(f"{told}: {type(error).__name__}: {error}")


def by_train(folder):
    return run(CONFIG, folder, verbose=0)


def by_evaluate(folder):
    with evaluation.owned([folder], folder.parent / "figures"):
        (target,) = evaluation.find_targets([folder])
        evaluation.judge([target], folder.parent / "figures", perturbations=["noise"])


def by_report(folder):
    (results,) = selection.read([folder.parent])
    (result,) = results.runs
    if result.problem is not None:
        raise RunError(f"{folder} {result.problem}: --overwrite")
    evaluated = folder / "evaluation.json"
    if evaluated.exists():
        FolderReader(folder).read_evaluation()
    return result.metrics


def by_sweep(folder):
    sweep = Sweep.load(folder.parent / SWEEP_FILE)
    with Ledger.open(sweep, folder.parent, None, None) as ledger:
        claim = ledger.take()
        ledger.succeed(claim, {"test_accuracy": METRICS["test_accuracy"], "test_loss": 1.0})
        ledger.locks.release(claim.name, claim.descriptor)
        ledger.check_folders()
        if not FolderReader(folder).finished:
            raise RunError(f"{folder} is made again: metrics.json, config.json, --overwrite")
    (folder.parent / "sweep.sqlite3").unlink()
    return FolderReader(folder).read_metrics()


METRICS: dict[str, float] = {}
USERS = {"train": by_train, "evaluate": by_evaluate, "report": by_report, "sweep": by_sweep}
FILES = {
    "config.json": USERS,
    "metrics.json": USERS,
    "history.csv": {"train": by_train, "report": by_report, "sweep": by_sweep},
    "classifier.keras": {"train": by_train, "evaluate": by_evaluate},
    "evaluation.json": {"evaluate": by_evaluate, "report": by_report},
    "saved_model/saved_model.pb": {"train": by_train},
    "saved_model/variables/variables.index": {"train": by_train},
}


@pytest.mark.parametrize("name", FILES)
def test_a_finished_run(finished, moments, tmp_path, name):
    """Who uses the file refuses it by name, with a way out; or its figures are what they were."""
    sweep, metrics = finished
    METRICS.update(test_accuracy=metrics["test_accuracy"])
    count = {"refused": 0, "harmless": 0}
    content = (sweep / Sweep.folder(CONFIG) / name).read_bytes()
    for damage, other in damages(content, moments, positions=8).items():
        place = copy(sweep, tmp_path / "sweep")
        folder = place / Sweep.folder(CONFIG)
        if other is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(other)
        before = contents(folder)
        for user, use in FILES[name].items():
            if user == "sweep" and moments.random() < 0.75:
                continue  # A ledger takes its time.
            told = f"{user}, {name} {damage}"
            found, refusal = outcome(use, folder, told)
            count["refused" if refusal else "harmless"] += 1
            if refusal:
                assert name.partition("/")[0] in refusal, f"{told}: {refusal}"
                ways = ("--overwrite", "Judge", "no config.json", "no metrics.json", "Move")
                assert any(way in refusal for way in ways), f"{told}: {refusal}"
                assert contents(folder) == before, told
            elif found is not None:
                assert {k: found[k] for k in FIGURES} == {k: metrics[k] for k in FIGURES}, told
            else:  # evaluate.py, which may have written the file anew.
                before = contents(folder)
    print(name, count)
    assert count["refused"] > 20


@pytest.mark.parametrize("name", ["config.json", "history.csv", "checkpoint.keras"])
def test_an_interrupted_run(interrupted, finished, moments, tmp_path, name):
    """train.py refuses the file by name, with a way out; or it ends as if nothing had been."""
    metrics = finished[1]
    content = (interrupted[0] / name).read_bytes()
    found = damages(content, moments, positions=8)
    found["another run's"] = (interrupted[1] / name).read_bytes()
    if name == "checkpoint.keras":
        found["a classifier"] = next(finished[0].glob("*/classifier.keras")).read_bytes()
    count = {"refused": 0, "harmless": 0}
    for damage, other in found.items():
        folder = copy(interrupted[0], tmp_path / "run")
        if other is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(other)
        before, told = contents(folder), f"{name} {damage}"
        result, refusal = outcome(by_train, folder, told)
        count["refused" if refusal else "harmless"] += 1
        if refusal:
            assert name in refusal and "--overwrite" in refusal, f"{told}: {refusal}"
            assert contents(folder) == before, told
        else:
            for figure in FIGURES[:-1]:
                assert result[figure] == pytest.approx(metrics[figure], rel=1e-5), told
    print(name, count)
    assert count["refused"] > 20


def test_files_of_two_runs(finished, interrupted, tmp_path):
    """Each whole, and not of one run."""
    folder = copy(interrupted[1], tmp_path / "run")
    shutil.copy(interrupted[0] / "config.json", folder)
    with pytest.raises(RunError, match=r"checkpoint.keras .*other settings.*--overwrite"):
        run(CONFIG, folder, verbose=0)
    whole = finished[0] / Sweep.folder(CONFIG)
    other = tmp_path / "other"
    run(dataclasses.replace(CONFIG, seed=1), other, verbose=0)
    for name, message in {
        "metrics.json": r"metrics.json is not of the settings in config.json",
        "history.csv": r"history.csv is damaged, or not of the run of metrics.json",
        "classifier.keras": r"classifier.keras is damaged, or not of the run of metrics.json",
    }.items():
        folder = copy(whole, tmp_path / "mixed")
        shutil.copy(other / name, folder / name)
        with pytest.raises(RunError, match=message):
            run(CONFIG, folder, verbose=0)


def test_a_run_of_the_first_version_is_read_as_before(finished, tmp_path):
    """Its metrics.json has no digests, and its evaluation.json no seal."""
    folder = copy(finished[0], tmp_path / "sweep") / Sweep.folder(CONFIG)
    for name in ("metrics.json", "evaluation.json"):
        content = json.loads((folder / name).read_text())
        content = {k: v for k, v in content.items() if k not in ("files", "sha256")}
        (folder / name).write_text(json.dumps(content))
    metrics = by_train(folder)
    assert {k: metrics[k] for k in FIGURES} == {k: finished[1][k] for k in FIGURES}
    assert by_report(folder) == metrics
    by_evaluate(folder)


def test_results_kept_alone_are_a_sweeps(finished, tmp_path):
    """Without classifier and SavedModel; by hand they are missed."""
    folder = FolderReader(copy(finished[0], tmp_path / "sweep") / Sweep.folder(CONFIG))
    folder.classifier_file.unlink()
    with pytest.raises(RunError, match="classifier.keras is missing"):
        folder.check_products(alone=True)
    shutil.rmtree(folder.saved_model)
    folder.check_products(alone=True)
    with pytest.raises(RunError, match=r"classifier.keras is missing.*--overwrite"):
        run(CONFIG, folder.path)


def test_a_first_epoch_that_is_in_no_checkpoint_is_trained_again(finished, interrupted, tmp_path):
    """Killed between the two files, the folder has a line of history and nothing else."""
    folder = copy(interrupted[0], tmp_path / "run")
    (folder / "checkpoint.keras").unlink()
    text = (folder / "history.csv").read_text().splitlines(keepends=True)
    (folder / "history.csv").write_text("".join(text[:2]))
    metrics = train(CONFIG, RunFolder(folder), verbose=0)
    for name in FIGURES[:-1]:
        assert metrics[name] == pytest.approx(finished[1][name], rel=1e-5)
