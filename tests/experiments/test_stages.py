"""A sweep in two stages: the choice, its training, its judging, the report; whoever dies when."""

import json
import os
import re
import shutil
import signal
import time

import pytest
from test_report import write_evaluation, write_run

import train
from tfjacreg.experiments import durations, report, stages, workers
from tfjacreg.experiments.config import RunError
from tfjacreg.experiments.ledger import Ledger
from tfjacreg.experiments.sweep import Sweep

DEADLINE = 900
TWO = """
dataset = "digits"
epochs = 4
repeats = 2
[methods.none]
[methods.weight_decay]
factor = [0.001, 0.01]
[methods.spectral]
factor = [0.01, 0.1, 1]
[final]
choose_by = "{choose_by}"
repeats = 3
judge = ["noise", "pgd_margin"]
limit = 6
"""
# The means over the repeats, by cell; what diverges has the lowest where it does not.
LOSSES = {
    "none-lr0.01-b32": 0.5,
    "weight_decay-0.001-lr0.01-b32": 0.4,
    "weight_decay-0.01-lr0.01-b32": 0.45,
    "spectral-0.01-lr0.01-b32": 0.3,
    "spectral-0.1-lr0.01-b32": 0.35,
    "spectral-1-lr0.01-b32": 0.1,
}
DIVERGES = {"spectral-1-lr0.01-b32-seed1"}


def stand_in(patch):
    """The process of a run is a function that writes a result; the runs that it was called for."""
    calls = []

    def process(ledger, claim, _bar):
        config, folder = ledger.configs[claim.name], ledger.out / claim.name
        calls.append(f"{ledger.out.name}/{claim.name}")
        if claim.name in made.diverging:
            return "RunError: Training diverged in epoch 1"
        if not (folder / "metrics.json").exists():
            cell, _, _ = claim.name.rpartition("-seed")
            write_run(folder, config, LOSSES[cell], 0.2, config.seed, exist_ok=True)
        if ledger.sweep.judgement.names:
            write_evaluation(folder)
        return None

    def made():
        return calls

    made.diverging = set(DIVERGES)
    patch.setattr(workers, "_process", process)
    patch.setattr(report.figures, "save", lambda figure, path: None)
    for name in ("accuracy_figure", "robustness_figure", "training_figure"):
        draw = lambda *arguments: report.figures.save(None, arguments[-1])  # noqa: E731
        patch.setattr(report.figures, name, draw)
    patch.setattr(report.html, "render", lambda text, out: "")
    return made


@pytest.fixture
def made(monkeypatch):
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished sweep that nobody disturbed, in a folder named `out`; what came of it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        return folder / "out", stages.run(sweep(folder), folder / "out")


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of that sweep, to go on with."""
    return shutil.copytree(whole[0], tmp_path / "out")


def sweep(tmp_path, choose_by="val_loss"):
    (tmp_path / "some.toml").write_text(TWO.format(choose_by=choose_by))
    return Sweep.load(tmp_path / "some.toml")


def chosen(out):
    return {cell.method: cell.factor for cell in Sweep.load(out / "final" / "sweep.toml").cells}


def test_one_command_chooses_trains_judges_and_reports(tmp_path, made, capsys):
    out = tmp_path / "out"
    outcome = stages.run(sweep(tmp_path), out)
    # A cell with a diverged repeat is not chosen, though the other repeat has the lowest loss.
    assert chosen(out) == {"none": None, "weight_decay": 0.001, "spectral": 0.01}
    names = [name.partition("/")[2] for name in made() if name.startswith("final/")]
    assert sorted({name[-1] for name in names}) == ["2", "3", "4"] and len(names) == 9
    assert outcome.report == out / "report" / "report.html"
    text = (out / "report" / "report.md").read_text()
    assert text.split("\n\n")[1].startswith(f"**{outcome.answer}**")
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"""\
some: digits, lenet
  in {out}
  grid: 12 runs of 4 epochs
  choice: the cell of best val_loss of each of 3 methods
  final: 9 runs of the choices, 3 of each with new seeds; judged by noise, pgd_margin, on 6 images
  in all 21 runs; the time left is shown after the first
"""
    )
    assert "spectral: spectral-0.01-lr0.01-b32" in shown
    assert re.search("^Left after the first run, with the second stage: .*[a-z]\\.$", shown, re.M)
    assert str(outcome).endswith(outcome.answer)
    assert list(outcome.failures) == list(DIVERGES)

    # The same command again makes nothing, and says the same.
    count = len(made())
    again = stages.run(sweep(tmp_path), out)
    assert len(made()) == count and str(again) == str(outcome)
    assert (out / "report" / "report.md").read_text() == text


@pytest.mark.parametrize(("choose_by", "factor"), [("val_loss", 0.01), ("val_accuracy", 0.1)])
def test_the_choice_is_by_what_the_file_says(tmp_path, made, monkeypatch, choose_by, factor):
    original = workers.FolderReader.read_metrics

    def read(self):
        content = original(self)
        accuracy = 0.95 if "spectral-0.1-" in self.path.name else 0.9
        return content | {"val_accuracy": accuracy}

    monkeypatch.setattr(workers.FolderReader, "read_metrics", read)
    stages.run(sweep(tmp_path, choose_by), tmp_path / "out")
    assert chosen(tmp_path / "out")["spectral"] == factor


def test_a_method_whose_every_cell_diverged_is_told(tmp_path, made, capsys):
    made.diverging = {f"{cell}-seed0" for cell in LOSSES if cell.startswith("weight")}
    outcome = stages.run(sweep(tmp_path), tmp_path / "out")
    assert set(chosen(tmp_path / "out")) == {"none", "spectral"}
    why = "none of its 2 cells has finished all its repeats (RunError: Training diverged"
    assert why in capsys.readouterr().out and f"weight_decay: nothing is chosen: {why}" in str(
        outcome
    )
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "Weight decay is missing: each of its cells failed" in text.split("\n## ")[0]


def test_nothing_to_choose(tmp_path, made):
    made.diverging = {f"{cell}-seed0" for cell in LOSSES}
    with pytest.raises(RunError, match="No cell of any method .*--retry-failed"):
        stages.run(sweep(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "final").exists()


def test_another_choice_does_not_go_on_with_the_second_stage(tmp_path, made, finished):
    """As where a failed run was repaired, whose cell is the best."""
    made.diverging = set()
    with pytest.raises(RunError, match=r"another cell is the\s+best now. Move .*final away"):
        stages.run(sweep(tmp_path), finished, retry_failed=True)
    (finished / "final").rename(tmp_path / "before")
    stages.run(sweep(tmp_path), finished)
    assert chosen(finished)["spectral"] == 1


def test_a_run_whose_evaluation_was_removed_is_judged_again(tmp_path, made, finished):
    name = "none-lr0.01-b32-seed3"
    before = (finished / "final" / name / "evaluation.json").read_text()
    (finished / "final" / name / "evaluation.json").unlink()
    stages.run(sweep(tmp_path), finished)
    assert made() == [f"final/{name}"]
    assert (finished / "final" / name / "evaluation.json").read_text() == before


def test_the_time_that_is_left(tmp_path, made):
    """Of what was timed; for the others a guess; divided among the workers."""
    plan, out = sweep(tmp_path), tmp_path / "out"
    out.mkdir()
    with Ledger.open(plan, out, None, None) as ledger:
        assert durations.left(ledger, 100) is None
        for seconds in (10.0, 14.0):
            claim = ledger.take()
            metrics = {"val_loss": 1.0, "test_accuracy": 0.5, "test_loss": 1, "step_seconds": 0.32}
            ledger.succeed(claim, metrics, seconds=seconds)
            ledger.locks.release(claim.name, claim.descriptor)
        assert durations.timed(ledger) == {"none": 12.0}
        # Four runs of weight decay as long, six of the spectral norm 2.2 times as long; then three
        # of each. Judging is 25 forward passes and 32 steps of an attack, for each of 6 images.
        grid, final = 12 * (4 + 6 * 2.2), 3 * 12 * (1 + 1 + 2.2)
        judging = 9 * 6 * (25 / 3 + 32) * 0.32 / 32
        assert durations.left(ledger, 100) == pytest.approx(grid + final + judging)
        ledger.take()
        ledger.take()
        assert durations.left(ledger, 100) == pytest.approx((grid + final + judging) / 2)
    shown = [durations.shown(s) for s in (20, 61, 300, 7200)]
    assert shown == ["less than a minute", "1 minute", "5 minutes", "2.0 hours"]


def test_data_and_network_beside_the_sweep(tmp_path, monkeypatch):
    seen = {}

    def run(plan, out, **_):
        seen.update(plan=plan, out=out)
        return stages.Outcome(workers.Summary(2, [], {}))

    monkeypatch.setattr(stages, "run", run)
    sweep(tmp_path)
    command = ["--sweep", str(tmp_path / "some.toml")]
    assert train.main([*command, "--dataset", "kmnist", "--network", "lenet"]) == 0
    assert seen["plan"].any_config.dataset == "kmnist"
    assert str(seen["out"]) == "runs/some-kmnist-lenet"
    assert train.main(command) == 0 and str(seen["out"]) == "runs/some"


# --- kill -9 ---


def killed_in(stage, plan, out, made, patch):
    """Two workers, processes of their own, of which the first dies in a stage; both exit statuses.

    The process of a run is a function here, so that nothing but files is at stake.
    """
    process, save = workers._process, report.figures.save

    def dying(ledger, claim, bar):
        folder = ledger.out / claim.name
        if {"grid": out.name, "final": "final"}.get(stage) == ledger.out.name:
            (folder / "config.json").write_text("{")  # As far as it came.
            os.kill(os.getpid(), signal.SIGKILL)
        if stage == "judging" and ledger.out.name == "final":
            process(ledger, claim, bar)
            (folder / "evaluation.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return process(ledger, claim, bar)

    def drawing(figure, path):
        if stage == "report":
            os.kill(os.getpid(), signal.SIGKILL)
        save(figure, path)

    children = []
    for worker in (0, 1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if worker == 0:
                    patch.setattr(workers, "_process", dying)
                    patch.setattr(report.figures, "save", drawing)
                stages.run(plan, out)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
        if worker == 0 and stage is not None:
            _, first = os.waitpid(child, 0)
    if stage is None:
        _, first = os.waitpid(children[0], 0)
    _, second = os.waitpid(children[1], 0)
    return os.waitstatus_to_exitcode(first), os.waitstatus_to_exitcode(second)


def test_two_workers_share_every_stage(tmp_path, made, whole, monkeypatch):
    monkeypatch.setattr(workers, "_count_test_images", lambda ledger: 6)
    monkeypatch.setattr(workers, "_POLL", 0.05)
    plan = sweep(tmp_path)
    assert killed_in(None, plan, tmp_path / "pair", made, monkeypatch) == (0, 0)
    assert folders(tmp_path / "pair") == folders(whole[0])


@pytest.mark.parametrize("stage", ["grid", "final", "judging", "report"])
def test_the_next_worker_goes_on_where_one_was_killed(tmp_path, made, whole, monkeypatch, stage):
    """With the answer and the files of an undisturbed one."""
    monkeypatch.setattr(workers, "_count_test_images", lambda ledger: 6)
    monkeypatch.setattr(workers, "_POLL", 0.05)
    # Of one name, which the report has in its headings.
    plan, out, (whole_folder, outcome) = sweep(tmp_path), tmp_path / "out", whole
    assert killed_in(stage, plan, out, made, monkeypatch) == (-signal.SIGKILL, 0)
    assert folders(out) == folders(whole_folder) and len(folders(out)) == 30
    assert str(stages.run(plan, out)) == str(outcome)
    texts = [
        (place / "report" / "report.md").read_text().replace(str(place), "")
        for place in (out, whole_folder)
    ]
    assert texts[0] == texts[1]


def folders(out):
    """What the runs came to, the choice among it."""
    paths = [*out.glob("**/metrics.json"), *out.glob("final/*/evaluation.json")]
    assert (out / "report" / "report.html").exists()
    found = {str(path.relative_to(out)): path.read_text() for path in paths}
    return {**found, "choice": (out / "final" / "sweep.toml").read_text()}


# --- real runs ---

REAL = """
dataset = "digits"
epochs = 2
repeats = 1
[methods.none]
[methods.spectral]
factor = [0.01, 0.1]
[final]
repeats = 1
whole_training_set = true
judge = ["noise", "pgd"]
"""


@pytest.mark.slow
def test_real_runs_from_the_file_to_the_path_of_the_report(tmp_path, nursery):
    (tmp_path / "some.toml").write_text(REAL)
    out, log = tmp_path / "out", tmp_path / "log"
    child = nursery.start("train", "--sweep", tmp_path / "some.toml", "--out", out, log=log)
    deadline = time.monotonic() + DEADLINE
    while child.poll() is None:
        assert time.monotonic() < deadline, child.output
        time.sleep(0.05)
    assert child.poll() == 0, child.output
    # The nursery adds a line of its own.
    *_, answer, path, _ = child.output.rstrip().splitlines()
    assert path == f"  in {out}/report/report.html" and (out / "report" / "report.html").exists()
    assert f"**{answer}**" in (out / "report" / "report.md").read_text()
    final = sorted(out.glob("final/*/evaluation.json"))
    assert [p.parent.name.partition("-")[0] for p in final] == ["none", "spectral"]
    for evaluation in final:
        judged = json.loads(evaluation.read_text())
        assert {"noise", "pgd"} < judged.keys() and "pgd_margin" not in judged
        config = json.loads((evaluation.parent / "config.json").read_text())
        assert (config["seed"], config["whole_training_set"]) == (1, True)
