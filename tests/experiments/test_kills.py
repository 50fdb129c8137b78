"""kill -9 at random moments: nothing twice, nothing lost beyond an epoch, nothing left behind."""

import json
import time

import pytest

from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.experiments.sweep import Sweep

pytestmark = pytest.mark.slow
EPOCHS = 4
FILES = {"config.json", "history.csv", "metrics.json", "classifier.keras", "saved_model"}
FIGURES = ("test_accuracy", "test_loss", "test_spectral_norm", "val_loss", "val_accuracy")


def command(out, seed):
    return ["train", "--epochs", EPOCHS, "--seed", seed, "--out", out]


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """The figures of two runs by seed, the seconds and the changes of files of one."""
    folder, figures = tmp_path_factory.mktemp("undisturbed"), {}
    started = time.monotonic()
    for seed in (0, 1):
        log = folder / "log"
        status, output = nursery.call(*command(folder / str(seed), seed), log=log, dies_at=-1)
        assert status == 0, output
        metrics = json.loads((folder / str(seed) / "metrics.json").read_text())
        figures[seed] = {name: metrics[name] for name in FIGURES}
    seconds = (time.monotonic() - started) / 2
    changes = int(output.rpartition("changes of files: ")[2].split()[0])
    print(f"a run takes {seconds:.1f} s and makes {changes} changes of files")
    assert changes > 20
    return figures, seconds, changes


def start_and_kill(nursery, moments, argv, log, seconds, changes):
    """Kills a command before some change of files, or at some other time; says when."""
    if moments.random() < 0.6:
        number = moments.randrange(changes)
        child = nursery.start(*argv, log=log, dies_at=number)
        print(f"before change {number}:", child.wait())
    else:
        delay = moments.uniform(0, seconds)
        child = nursery.start(*argv, log=log)
        time.sleep(delay)
        print(f"after {delay:.2f} s:", child.kill())
    assert child.poll() in (0, -9), child.output


def lines(path):
    try:
        return (path / "history.csv").read_text().splitlines()
    except FileNotFoundError:
        return []


def assert_figures(path, expected):
    folder = FolderReader(path)
    folder.check_products()
    metrics = folder.read_metrics()
    assert {name: metrics[name] for name in FIGURES} == pytest.approx(expected, rel=1e-5)


def test_train_py(nursery, undisturbed, moments, tmp_path):
    figures, seconds, changes = undisturbed
    out, seed = tmp_path / "run", 0
    for _number in range(10):
        overwrite = ["--overwrite"] if moments.random() < 0.3 else []
        # What is still there of a run that was being thrown away does not count.
        previous, before = seed, [] if FolderReader(out).is_clearing else lines(out)
        seed = 1 - seed if overwrite else seed
        argv = [*command(out, seed), *overwrite]
        start_and_kill(nursery, moments, argv, tmp_path / "log", seconds, changes)
        folder = FolderReader(out)
        if not folder.claimed:
            assert not before and set(p.name[:9] for p in out.glob("*")) <= {".partial-", ".lock"}
            continue
        config = RunConfig.of(epochs=EPOCHS, seed=folder.read_config()["seed"])
        if overwrite and config.seed == previous:
            # Killed before the first change: the old run is as it was.
            assert FolderReader(out).is_clearing or lines(out) == before
            seed = previous
        elif not overwrite:
            # The last line may be that of an epoch that was not yet in the checkpoint.
            assert config.seed == seed and lines(out)[: max(len(before) - 1, 0)] == before[:-1]
        if folder.finished:
            assert_figures(out, figures[config.seed])
    status, output = nursery.call(*command(out, seed), log=tmp_path / "log")
    assert status == 0, output
    assert_figures(out, figures[seed])
    assert {p.name for p in out.iterdir()} == FILES


def test_evaluate_py(nursery, undisturbed, moments, tmp_path):
    out = tmp_path / "run"
    assert nursery.call(*command(out, 0), log=tmp_path / "log")[0] == 0
    argv = ["evaluate", out, "--attacks", "noise", "pgd", "square", "--out", tmp_path / "figures"]
    argv += ["--adversarial-examples", 2]
    started = time.monotonic()
    status, output = nursery.call(*argv, log=tmp_path / "log", dies_at=-1)
    assert status == 0, output
    seconds = time.monotonic() - started
    changes = int(output.rpartition("changes of files: ")[2].split()[0])
    whole = (out / "evaluation.json").read_bytes()
    (out / "evaluation.json").unlink()
    known: set[str] = set()
    for _ in range(6):
        start_and_kill(nursery, moments, argv, tmp_path / "log", seconds, changes)
        found = FolderReader(out).read_evaluation() or {}
        assert known <= found.keys()
        known = set(found)
    status, output = nursery.call(*argv, log=tmp_path / "log")
    assert status == 0, output
    assert (out / "evaluation.json").read_bytes() == whole
    examples = {"evaluation.json", "adversarial_examples.png"}
    assert {p.name for p in out.iterdir()} == FILES | examples
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"robustness.png"}


def test_a_sweep_with_two_workers(nursery, undisturbed, moments, tmp_path):
    figures, seconds, _ = undisturbed
    path, out = tmp_path / "four.toml", tmp_path / "four"
    path.write_text(
        f'dataset = "digits"\nepochs = {EPOCHS}\nrepeats = 2\n[methods.spectral]\n[methods.none]\n'
    )
    argv = ["train", "--sweep", path, "--out", out]
    seen: dict[str, list[str]] = {}
    for _ in range(3):
        pair = [nursery.start(*argv, log=tmp_path / f"log{number}") for number in range(2)]
        for child in pair:
            delay = moments.uniform(0, 1.5 * seconds)
            time.sleep(delay)
            print(f"{delay:.2f} s later:", child.kill())
        before, seen = seen, {p.name: lines(p) for p in out.glob("*-seed*")}
        for name, rows in before.items():
            assert seen[name][: max(len(rows) - 1, 0)] == rows[:-1]
    pair = [nursery.start(*argv, log=tmp_path / f"log{number}") for number in range(2)]
    assert [child.wait() for child in pair] == [0, 0], [child.output for child in pair]
    configs = list(Sweep.load(path).configs().values())
    for config in configs:
        folder = out / Sweep.folder(config)
        assert {p.name for p in folder.iterdir()} == FILES
        FolderReader(folder).check_claim(config)
        FolderReader(folder).check_products()
        if config.regularizer == "spectral":
            assert_figures(folder, figures[config.seed])
        kept = seen.get(folder.name, [])
        assert (
            lines(folder)[: max(len(kept) - 1, 0)] == kept[:-1] and len(lines(folder)) == EPOCHS + 1
        )
    names = {Sweep.folder(config) for config in configs}
    assert {p.name for p in out.iterdir()} == names | {"sweep.toml", "sweep.sqlite3", ".sweep.lock"}
