"""The scripts of examples/ run, and what they print says that the penalty did its work."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = r"(-?\d+\.\d+)"


def numbers(text, label):
    """Every number that follows a label, in the order of the lines."""
    return [float(found) for found in re.findall(rf"{re.escape(label)}:? {NUMBER}", text)]


def measure(text):
    errors = [float(found) for found in re.findall(rf"{NUMBER}% too low", text)]
    power_1, power_4, lanczos_4 = errors
    assert power_1 > power_4 > lanczos_4 >= 0
    (sigma,), (largest,) = numbers(text, "exact sigma: mean"), numbers(text, "largest")
    (along_v,) = numbers(text, "along v")
    (along_noise,) = numbers(text, "along a random direction")
    # A unit step changes the logits by sigma, to first order.
    assert along_v == pytest.approx(sigma, rel=0.03)
    assert along_noise < along_v / 3
    (frobenius,), (bound,) = numbers(text, "Frobenius norm: mean"), numbers(text, "layers' norms")
    assert sigma <= frobenius <= 10**0.5 * sigma
    assert largest <= bound


def regularize(text):
    plain, penalized = numbers(text, ", sigma")
    assert penalized < 0.8 * plain
    (estimate,) = re.findall(f"{NUMBER} in 8", text)
    assert 0 < float(estimate) < penalized
    noisy, noisy_penalized = numbers(text, "accuracy under noise")
    assert noisy_penalized > noisy - 0.02


def finetune_application(text):
    _, plain, _, penalized = numbers(text, "mean sigma")
    assert penalized < plain / 2
    frozen, unfrozen = numbers(text, "accuracy")[2:]
    assert unfrozen > frozen > 0.3


def own_layer(text):
    plain, penalized = numbers(text, "slope of the margin")
    assert penalized < plain / 1.5
    distance, penalized_distance = numbers(text, "margin / slope")
    assert penalized_distance > distance


def several_inputs(text):
    plain, penalized = numbers(text, "mean sigma")
    assert penalized < 0.85 * plain
    assert min(numbers(text, "test accuracy")) > 0.7


def transformer(text):
    plain, penalized = numbers(text, "mean sigma")
    assert penalized < plain / 3
    assert min(numbers(text, "accuracy")) > 0.9


def denoiser(text):
    """Slopes above 1 go, those below it stay, and the images are as good as before."""
    plain, penalized = numbers(text, "sigma > 1 at")
    assert plain > 50 and penalized < 30
    plain, penalized = numbers(text, "mean sigma")
    assert plain > 1.05 and 0.8 < penalized < 1.02
    plain, penalized = numbers(text, "error")
    assert penalized < 1.05 * plain < 0.2
    # The monitor finds the same on other images, while the training runs.
    largest, watched = numbers(text, "largest"), re.findall("epochs 1, 4, 7, 10: (.*)", text)
    for test, validation in zip(largest, watched, strict=True):
        first, *_, last = map(float, validation.split(", "))
        assert last == pytest.approx(test, rel=0.15) and last != first


CHECKS = [
    measure,
    regularize,
    finetune_application,
    own_layer,
    several_inputs,
    transformer,
    denoiser,
]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_an_example_prints(fresh_python, tmp_path, check):
    done = fresh_python.run(ROOT / "examples" / f"{check.__name__}.py", cwd=tmp_path)
    check(done.stdout)


def test_every_example_is_tested_and_in_the_guide():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {check.__name__ for check in CHECKS}
    guide = (ROOT / "docs" / "guide.md").read_text()
    for name in names:
        assert f"](../examples/{name}.py)" in guide, name
