"""Sweep files: what they mean, and what is wrong with a bad one."""

import dataclasses
import itertools
import json
import tomllib
from pathlib import Path

import pytest

from tfjacreg import regularizers
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.measures import PERTURBATIONS, POINTWISE
from tfjacreg.experiments.sweep import Cell, Sweep, _in_toml

SWEEPS = Path(__file__).parents[2] / "sweeps"
METHODS = {"none", *regularizers.BY_NAME}

GOOD = """
dataset = "digits"
epochs = 3
repeats = 2

[grid]
learning_rate = [0.1, 0.01]
factor = [0.001]

[methods.none]
[methods.spectral]
factor = [0.01, 0.1]
learning_rate = [1]
[methods.frobenius]
"""


def load(tmp_path, text, **options):
    (tmp_path / "some.toml").write_text(text)
    return Sweep.load(tmp_path / "some.toml", **options)


def test_cells_in_order(tmp_path):
    """Methods in the file's order; a method's own axes take the place of the grid's."""
    sweep = load(tmp_path, GOOD)
    assert (sweep.name, sweep.repeats, sweep.content) == ("some", 2, GOOD.encode())
    assert [cell.name for cell in sweep.cells] == [
        "none-lr0.1-b32",
        "none-lr0.01-b32",
        "spectral-0.01-lr1-b32",
        "spectral-0.1-lr1-b32",
        "frobenius-0.001-lr0.1-b32",
        "frobenius-0.001-lr0.01-b32",
    ]
    assert sweep.cells[0] == Cell("none", None, 0.1, 32)
    assert sweep.cells[3] == Cell("spectral", 0.1, 1.0, 32)


def test_configurations_and_folders(tmp_path):
    sweep = load(tmp_path, GOOD)
    configs = sweep.configs("somewhere")
    assert list(configs) == [(cell, repeat) for cell in sweep.cells for repeat in (0, 1)]
    shared = {"dataset": "digits", "epochs": 3, "batch_size": 32, "data_dir": "somewhere"}
    assert configs[sweep.cells[3], 1] == RunConfig.of(
        regularizer="spectral", factor=0.1, learning_rate=1.0, seed=1, **shared
    )
    # A run without penalty is the one that train.py makes: its factor is the default.
    assert configs[sweep.cells[0], 0] == RunConfig.of(
        regularizer="none", learning_rate=0.1, seed=0, **shared
    )
    assert sweep.folder(configs[sweep.cells[3], 1]) == "spectral-0.1-lr1-b32-seed1"
    assert sweep.folder(configs[sweep.cells[0], 0]) == "none-lr0.1-b32-seed0"
    for (cell, repeat), config in configs.items():
        assert Cell.of(config) == cell and config.seed == repeat


def test_axes_that_are_not_given_are_the_networks_own(tmp_path):
    text = 'dataset = "cifar10"\nnetwork = "resnet20"\nrepeats = 1\n[methods.weight_decay]'
    sweep = load(tmp_path, text)
    assert sweep.cells == (Cell("weight_decay", regularizers.DEFAULT_FACTOR, 0.1, 128),)
    (config,) = sweep.configs().values()
    assert (config.epochs, config.schedule, config.augment) == (100, "cosine", True)


# Appendix A.2, by hand: LeNet has 2 rates x 2 batch sizes, without penalty and for each of 4
# methods with 4 factors: 4 x (1 + 16) = 68. VGG16 has 1 + 4 x 5 = 21. Five repeats of each.
FILES = {
    "paper_fashion_mnist": (68, 5, {0.01, 0.001}, {16, 32}, {0.0001, 0.001, 0.01, 0.1}),
    "paper_kmnist": (68, 5, {0.01, 0.001}, {16, 32}, {0.0001, 0.001, 0.01, 0.1}),
    "paper_cifar10": (21, 5, {0.1}, {128}, {0.00001, 0.0001, 0.001, 0.01, 0.1}),
    "quick": (9, 2, {0.01}, {32}, {0.001, 0.01}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_come_along(name):
    cells, repeats, rates, sizes, factors = FILES[name]
    sweep = Sweep.load(SWEEPS / f"{name}.toml")
    configs = sweep.configs()
    assert len(set(sweep.cells)) == len(sweep.cells) == cells and sweep.repeats == repeats
    assert len({sweep.folder(config) for config in configs.values()}) == cells * repeats
    assert {cell.method for cell in sweep.cells} == METHODS
    for method in METHODS:
        own = [cell for cell in sweep.cells if cell.method == method]
        assert {cell.learning_rate for cell in own} == rates
        assert {cell.batch_size for cell in own} == sizes
        assert {cell.factor for cell in own} == ({None} if method == "none" else factors)
    assert {config.dataset for config in configs.values()} == {
        "digits" if name == "quick" else name.removeprefix("paper_")
    }


ARCHIVE = SWEEPS.parent / "results" / "archive"


def test_archived_factors_are_those_of_lowest_validation_loss():
    """In the archived results of the sweep over factors."""
    results = ARCHIVE / "fashion_mnist_factors"
    chosen = Sweep.load(ARCHIVE / "fashion_mnist_chosen" / "sweep.toml")
    factors = Sweep.load(results / "sweep.toml")
    for method in METHODS:
        losses = {
            cell.factor: json.loads(
                (results / factors.folder(config) / "metrics.json").read_text()
            )["val_loss"]
            for (cell, _), config in factors.configs().items()
            if cell.method == method
        }
        own = {cell.factor for cell in chosen.cells if cell.method == method}
        assert min(losses, key=losses.get) in own and len(own) <= 2


GRID = "fashion_mnist_grid"


def test_no_method_has_a_finer_grid_than_another():
    """Every rate with every batch size, and half-decades of the factor around each one's best."""
    grid = Sweep.load(SWEEPS / f"{GRID}.toml")
    assert {cell.learning_rate for cell in grid.cells} == {0.01, 0.001}
    assert {cell.batch_size for cell in grid.cells} == {16, 32}
    assert {c.epochs for c in grid.configs().values()} == {50} and grid.repeats == 1
    counts = {"none": 1, "spectral": 4, "frobenius": 5, "weight_decay": 4, "spectral_bound": 4}
    for method in METHODS:
        factors = {cell.factor for cell in grid.cells if cell.method == method}
        assert len(factors) == counts[method]
        assert len([c for c in grid.cells if c.method == method]) == 4 * counts[method]
        if method != "none":
            ratios = [b / a for a, b in itertools.pairwise(sorted(factors))]
            assert all(2.99 < ratio <= 10.01 for ratio in ratios)


def grid_metrics():
    """Of every cell of the committed grid."""
    results = SWEEPS.parent / "results" / "fashion_mnist" / "grid"
    grid = Sweep.load(results / "sweep.toml")
    assert grid.content == (SWEEPS / f"{GRID}.toml").read_bytes()
    return {
        cell: json.loads((results / grid.folder(config) / "metrics.json").read_text())
        for (cell, _), config in grid.configs().items()
    }


FINAL, BY_TEST = "fashion_mnist_final", "fashion_mnist_by_test"


@pytest.mark.parametrize(
    ("name", "loss", "repeats"),
    [
        (FINAL, lambda metrics: metrics["val_loss"], 5),
        (BY_TEST, lambda metrics: metrics["lowest_test_loss"]["test_loss"], 3),
    ],
)
def test_final_cells_are_those_of_lowest_loss(name, loss, repeats):
    """Among all cells of the grid; each trained anew on the whole training set."""
    losses = {cell: loss(metrics) for cell, metrics in grid_metrics().items()}
    sweep = Sweep.load(SWEEPS / f"{name}.toml")
    best = {
        method: min((c for c in losses if c.method == method), key=losses.get) for method in METHODS
    }
    if name == BY_TEST:
        # Trained already: both choices are the same cell.
        assert best.pop("spectral_bound") in Sweep.load(SWEEPS / f"{FINAL}.toml").cells
    assert {cell.method: cell for cell in sweep.cells} == best
    assert len(sweep.cells) == len(best) and sweep.repeats == repeats
    for config in sweep.configs().values():
        assert (config.whole_training_set, config.epochs) == (True, 50)


DIGITS = "digits"


def test_on_the_digits_every_method_has_as_many_factors():
    digits = Sweep.load(SWEEPS / f"{DIGITS}.toml")
    assert digits.repeats == 5 and {c.epochs for c in digits.configs().values()} == {50}
    assert {(cell.learning_rate, cell.batch_size) for cell in digits.cells} == {(0.01, 32)}
    for method in METHODS:
        factors = [cell.factor for cell in digits.cells if cell.method == method]
        assert len(set(factors)) == len(factors) == (1 if method == "none" else 4)
    # The default, and the neighbours that show whether it serves.
    assert regularizers.DEFAULT_FACTOR in {c.factor for c in digits.cells if c.method == "spectral"}


JUDGE = "fashion_mnist_judge"


def test_judged_factors_are_those_of_lowest_validation_loss():
    """In the quarter of the grid that they come from; and the next of two methods."""
    judge = Sweep.load(SWEEPS / f"{JUDGE}.toml")
    grid = grid_metrics()
    (quarter,) = {(cell.learning_rate, cell.batch_size) for cell in judge.cells}
    for method in METHODS:
        losses = {
            cell.factor: metrics["val_loss"]
            for cell, metrics in grid.items()
            if cell.method == method and (cell.learning_rate, cell.batch_size) == quarter
        }
        own = {cell.factor for cell in judge.cells if cell.method == method}
        assert min(losses, key=losses.get) in own
        further = {"spectral": {0.1}, "frobenius": {0.01}}.get(method, set())
        assert own - {min(losses, key=losses.get)} == further


COMPARE, PROTOCOL = "compare", "fashion_mnist"


def test_the_comparison_for_data_of_ones_own_gives_every_method_as_many_factors():
    sweep = Sweep.load(SWEEPS / f"{COMPARE}.toml")
    assert sweep.methods == ("none", "weight_decay", "frobenius", "spectral")
    for method in sweep.methods[1:]:
        factors = [cell.factor for cell in sweep.cells if cell.method == method]
        ratios = [b / a for a, b in itertools.pairwise(factors)]
        assert len(factors) == 3 and all(2.99 < ratio < 3.4 for ratio in ratios)
    assert len(sweep.cells) == 10 and sweep.repeats == 1 and sweep.final.repeats == 3
    # What the report's first table shows.
    assert sweep.final.judgement.names == ("noise", "pgd_margin")


def test_the_papers_protocol_is_the_grid_and_its_final_runs():
    """In one file what the committed results took two and a command for."""
    sweep, grid, final = (Sweep.load(SWEEPS / f"{n}.toml") for n in (PROTOCOL, GRID, FINAL))
    assert (sweep.cells, sweep.settings, sweep.repeats) == (grid.cells, grid.settings, grid.repeats)
    second = sweep.second_stage(final.cells)
    assert (second.cells, second.settings, second.repeats) == (
        final.cells,
        final.settings,
        final.repeats,
    )
    assert set(second.judgement.names) == {*PERTURBATIONS, *POINTWISE}
    assert second.judgement.limit == 2000


def test_every_file_is_tested():
    assert {path.stem for path in SWEEPS.glob("*.toml")} == {
        *FILES,
        COMPARE,
        PROTOCOL,
        BY_TEST,
        DIGITS,
        FINAL,
        GRID,
        JUDGE,
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paper_fashion_mnist", ("lenet", 50, "constant", False)),
        ("paper_kmnist", ("lenet", 50, "constant", False)),
        ("paper_cifar10", ("vgg16", 100, "cosine", True)),
    ],
)
def test_settings_of_the_paper(name, expected):
    for config in Sweep.load(SWEEPS / f"{name}.toml").configs().values():
        assert (config.network, config.epochs, config.schedule, config.augment) == expected
        assert config.width == 1


def _with(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


FINAL_TABLE = """
[final]
choose_by = "val_accuracy"
repeats = 3
whole_training_set = true
judge = ["pgd_margin", "sigma"]
limit = 7
"""


def test_the_second_stage_is_a_sweep_of_the_chosen_cells(tmp_path):
    """With seeds that the grid has not; another file, or another choice, is another sweep."""
    sweep = load(tmp_path, GOOD + FINAL_TABLE)
    assert load(tmp_path, GOOD).final is None
    assert sweep.final.choose_by == "val_accuracy"
    chosen = [sweep.cells[1], sweep.cells[3]]
    second = sweep.second_stage(chosen)
    (tmp_path / "second.toml").write_bytes(second.content)
    again = Sweep.load(tmp_path / "second.toml")
    assert dataclasses.replace(again, name="some") == second and second.final is None
    assert list(second.cells) == chosen and list(second.seeds) == [2, 3, 4]
    assert second.judgement.names == ("pgd_margin", "sigma") and second.judgement.limit == 7
    for config in second.configs().values():
        assert (config.epochs, config.dataset, config.whole_training_set) == (3, "digits", True)
    others = [
        sweep.second_stage(sweep.cells[:1]),
        load(tmp_path, GOOD + FINAL_TABLE + "# changed").second_stage(chosen),
    ]
    assert len({other.content for other in (second, *others)}) == 3


@pytest.mark.parametrize("how", ["in the file", "beside it"])
def test_names_of_any_characters_reach_the_second_stage(tmp_path, how):
    name = '\N{CAMERA WITH FLASH} \N{GRINNING FACE} \u00e4"\\.npz'
    sweep = load(tmp_path, GOOD + FINAL_TABLE, **({"dataset": name} if how == "beside it" else {}))
    if how == "in the file":
        text = sweep.content.decode()
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        sweep = load(tmp_path, text.replace('"digits"', f'"{quoted}"'))
    assert sweep.settings["dataset"] == name
    assert sweep.second_stage(sweep.cells[:1]).settings["dataset"] == name


def test_every_string_is_one_of_toml():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert tomllib.loads(f"text = {_in_toml(everything)}") == {"text": everything}


@pytest.mark.parametrize("where", ["", 'network = "lenet"\n', "# dataset = 1\n"])
def test_data_and_network_given_beside_the_file_take_the_place_of_its_own(tmp_path, where):
    """And the copy in the sweep's folder says so."""
    (tmp_path / "some.toml").write_text(where + GOOD)
    sweep = Sweep.load(tmp_path / "some.toml", dataset="kmnist", network="lenet")
    assert sweep.settings == {"dataset": "kmnist", "network": "lenet", "epochs": 3}
    assert sweep.cells == load(tmp_path, GOOD).cells
    (tmp_path / "copy.toml").write_bytes(sweep.content)
    assert Sweep.load(tmp_path / "copy.toml").settings == sweep.settings
    assert b"[0.01, 0.1]" in sweep.content


def test_a_value_that_cannot_be_replaced_is_refused(tmp_path):
    (tmp_path / "some.toml").write_text(GOOD.replace('"digits"', '"""\ndigits"""'))
    with pytest.raises(ValueError, match="`dataset` must have a line of its own"):
        Sweep.load(tmp_path / "some.toml", dataset="kmnist")


BAD = {
    "an unknown key of the second stage": (
        GOOD + FINAL_TABLE + "epochs = 3",
        r"\[final\] has keys out of .*Received: epochs",
    ),
    "no seeds left for the second stage": (
        f"first_seed = {2**31 - 1}\n" + GOOD + FINAL_TABLE,
        r"\[final\] gives no second stage: `first_seed` must be .*Received: first_seed=2147483649",
    ),
    "no repeats of the second stage": (
        GOOD + "[final]",
        r"\[final\] `repeats` is missing.*`repeats = 3`",
    ),
    "a choice": (
        GOOD + FINAL_TABLE.replace("val_accuracy", "test_loss"),
        r"choose_by` must be one of \('val_loss', 'val_accuracy'\). Received: 'test_loss'",
    ),
    "an attack": (
        GOOD + FINAL_TABLE.replace("sigma", "fgsm"),
        r"\[final\] `judge` must be a list of some of .*'pgd_margin'.*fgsm",
    ),
    "an attack twice": (GOOD + FINAL_TABLE.replace("sigma", "pgd_margin"), "name each once"),
    "images": (GOOD + FINAL_TABLE.replace("limit = 7", "limit = 0"), r"limit` must be an integer"),
    "images for nothing": ("limit = 3\n" + GOOD, "`limit` is for `judge`"),
    "truth in the second stage": (
        GOOD + FINAL_TABLE.replace("true", "1"),
        r"`\[final\] whole_training_set` must be true or false.*1",
    ),
    "nothing to choose by": (
        "whole_training_set = true\n" + GOOD + FINAL_TABLE,
        r"\[final\] needs a validation split",
    ),
    "a first seed": ("first_seed = -1\n" + GOOD, "must be an integer >= 0"),
    "no toml": ("repeats = ", "is not a TOML file: "),
    "unknown key": (_with("epochs", "epoch"), r"keys out of .*'epochs'.*'grid'.*Received: epoch$"),
    "an axis outside the grid": ("factor = 0.1\n" + GOOD, "keys out of .*Received: factor$"),
    "seed": ("seed = 1\n" + GOOD, "keys out of .*Received: seed$"),
    "no repeats": (_with("repeats = 2", ""), "`repeats` is missing.*`repeats = 5`"),
    "repeats": (_with("repeats = 2", "repeats = 0"), "`repeats` must be an integer >= 1.*0"),
    "repeats of another type": (_with("repeats = 2", 'repeats = "2"'), "`repeats` must be an int"),
    "setting": (_with("epochs = 3", "epochs = 0"), "`epochs` must be an integer >= 1"),
    "type of a setting": (_with("epochs = 3", "epochs = 3.5"), "`epochs` must be an integer.*3.5"),
    "truth as a number": (_with("epochs = 3", "epochs = true"), "`epochs` must be an int.*True"),
    "a number as truth": ("augment = 1\n" + GOOD, "`augment` must be true or false.*1"),
    "type of a name": (_with('"digits"', "7"), "`dataset` must be a string. Received: 7"),
    "name": (_with('"digits"', '"mnist"'), "`dataset` must be one of.*digits.*'mnist'"),
    "unknown axis": (
        _with("learning_rate = [0.1", "rate = [0.1"),
        r"\[grid\] has keys out.*: rate",
    ),
    "empty list": (_with("[0.001]", "[]"), r"\[grid\] `factor` must be a list.*Received: \[\]"),
    "no list": (_with("[0.001]", "0.001"), r"\[grid\] `factor` must be a list.*Received: 0.001"),
    "empty list of a method": (
        _with("factor = [0.01, 0.1]", "factor = []"),
        r"\[methods.spectral\] `factor` must be a list",
    ),
    "type in a list": (_with("[0.001]", '["a"]'), r"`\[grid\] factor` must be a number.*'a'"),
    "value in a list": (_with("[0.001]", "[-1.0]"), "`factor` must be a finite number >= 0"),
    "rate": (_with("[1]", "[nan]"), "`learning_rate` must be a positive number.*nan"),
    "part of an example": (
        _with("[0.001]", "[0.001]\nbatch_size = [1.5]"),
        r"`\[grid\] batch_size` must be an integer.*1.5",
    ),
    "unknown method": (_with("frobenius", "l1"), r"\[methods\] has keys out of .*'none'.*: l1"),
    "no method": ("repeats = 1", r"\[methods\] must have a table for each method"),
    "methods as a list": ('repeats = 1\nmethods = ["none"]', r"\[methods\] must be a table"),
    "grid as a number": ("repeats = 1\ngrid = 1", r"\[grid\] must be a table. Received: 1"),
    "a factor of none": (
        _with("[methods.none]", "[methods.none]\nfactor = [0.1]"),
        r"\[methods.none\] has keys out of \('learning_rate', 'batch_size'\).*: factor",
    ),
    "value twice": (_with("[0.001]", "[0.001, 0.001]"), "listed once.*frobenius-0.001-lr0.1-b32"),
    "values with one name": (_with("[0.001]", "[0.001, 0.00100000001]"), "first six digits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    """Every message names the file."""
    text, message = BAD[case]
    with pytest.raises(ValueError, match=rf"some\.toml(?s:.*){message}"):
        load(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot read the sweep file.*none\.toml"):
        Sweep.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.toml is not a TOML file"):
        Sweep.load(tmp_path / "binary.toml")


def test_a_sweep_cannot_be_changed(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(tmp_path, GOOD).repeats = 3


@pytest.mark.slow
def test_reading_a_sweep_needs_no_optuna(fresh_python):
    code = "import sys, tfjacreg.experiments.sweep; sys.exit('optuna' in sys.modules)"
    fresh_python.run(code)


HEAD = 'dataset = "digits"\nepochs = 1\n'
MANY = "[" + ", ".join(f"{(i + 1) / 1000}" for i in range(1000)) + "]"
SIZES = "[" + ", ".join(map(str, range(1, 1001))) + "]"
BEYOND = {
    "nested lists": ("repeats = 1\nx = " + "[" * 5000 + "]" * 5000, "deep in others"),
    "nested tables": ("repeats = 1\nx = " + "{a=" * 2000 + "1" + "}" * 2000, "deep in others"),
    "a long key": (f"repeats = 1\n{'x' * 5000} = 1", r"Received: x{200}\.\.\."),
    "a key of controls": ('repeats = 1\n"\\u001b[2J" = 1', r"Received: \\x1b"),
    "401 digits": (f"repeats = 1\nwidth = 1{'0' * 400}", "below 1.8e308"),
    "5001 digits": (f"repeats = 1\nwidth = 1{'0' * 5000}", "is not a TOML file"),
    "a factor": (f"repeats = 1\n[grid]\nfactor = [1{'0' * 400}]", "below 1.8e308"),
    "a size": (f"repeats = 1\n[grid]\nbatch_size = [1{'0' * 400}]", "batch_size"),
    "repeats": ("repeats = 2147483647", "at most 100000 runs.*Received: 2147483647"),
    "repeats of 400 digits": (f"repeats = 1{'0' * 400}", "repeats"),
    "cells": (
        f"repeats = 1\n[grid]\nfactor = {MANY}\nlearning_rate = {MANY}\nbatch_size = {SIZES}",
        "at most 100000 runs",
    ),
    "a giant": ("repeats = 1\n#" + "x" * (1 << 20), "at most 1048576 bytes"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_is_beyond_any_sweep_is_one_sentence(tmp_path, case):
    text, message = BEYOND[case]
    (tmp_path / "s.toml").write_text(f"{HEAD}{text}\n[methods.spectral]\n")
    with pytest.raises(ValueError, match=message) as caught:
        Sweep.load(tmp_path / "s.toml")
    assert len(str(caught.value)) < 1500
