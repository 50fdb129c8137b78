"""The settings of a run: what is filled in and what is refused."""

import pytest

from tfjacreg import datasets, networks
from tfjacreg.experiments.config import RunConfig, file_name

BAD_SETTINGS = {
    "dataset": ({"dataset": "mnist"}, "digits.*fashion_mnist.*Received: dataset='mnist'"),
    "password": ({"dataset": "https://me:hunter2@h/x.npz"}, "`dataset` must be one of"),
    "network": ({"network": "alexnet"}, "lenet.*vgg16.*Received"),
    "regularizer": ({"regularizer": "l1"}, "spectral_bound.*Received"),
    "factor": ({"factor": -1.0}, "`factor`.*Received: factor=-1.0"),
    "epochs": ({"epochs": 0}, "`epochs` must be an integer >= 1"),
    "batch_size": ({"batch_size": -3}, "`batch_size` must be an integer >= 1"),
    "learning_rate": ({"learning_rate": 0.0}, "`learning_rate` must be a positive number"),
    "schedule": ({"schedule": "step"}, "constant.*cosine.*Received"),
    "seed": ({"seed": -1}, "`seed`.*Received"),
    "width": ({"width": 0.5}, "`width` is for vgg16"),
    "initialization": ({"initialization": "he"}, "`initialization` must be one of.*'he'"),
    "initialization_of": (
        {"network": "vgg16", "initialization": "pytorch"},
        "`initialization` is for lenet; vgg16 .*Received: initialization='pytorch'",
    ),
    "width_sign": ({"network": "vgg16", "width": -1.0}, "`width` must be a positive number.*-1"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        RunConfig.of(**settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, name) for name in (*datasets.NAMES, *networks.NAMES)),
        ("some/mine.npz", "mine"),
        ("some/mine.v2.keras", "mine-v2"),
        ("some/flowers/", "flowers"),
        ("some/flowers.2", "flowers-2"),
        ("tfds:mnist", "tfds-mnist"),
        ("tfds:cifar10_corrupted/brightness_1", "tfds-cifar10_corrupted-brightness_1"),
        ("tfds:mnist:3.0.1", "tfds-mnist-3-0-1"),
        ("my_networks:make", "my_networks-make"),
        ("models.small:net", "models-small-net"),
    ],
)
def test_names_in_folders_keep_what_differs(name, expected):
    assert file_name(name) == expected


def test_a_run_without_a_penalty_names_no_factor():
    assert RunConfig.of(regularizer="none").named() == "digits, lenet, none"
    assert RunConfig.of(factor=0.1).named() == "digits, lenet, spectral, factor 0.1"


def test_defaults_follow_the_network():
    lenet, vgg = RunConfig.of(), RunConfig.of(network="vgg16", dataset="cifar10")
    assert (lenet.epochs, lenet.batch_size, lenet.learning_rate) == (50, 32, 0.01)
    assert (lenet.schedule, lenet.augment) == ("constant", False)
    assert (vgg.epochs, vgg.batch_size, vgg.learning_rate) == (100, 128, 0.1)
    assert (vgg.schedule, vgg.augment) == ("cosine", True)
    assert RunConfig.of(epochs=3).epochs == 3
    with pytest.raises(TypeError, match="epochs"):
        RunConfig(network="lenet")


def test_initial_weights_are_the_networks():
    networks = {}
    for initialization in ("keras", "pytorch"):
        config = RunConfig.of(initialization=initialization)
        networks[initialization] = config.make_network((28, 28, 1), 10)
    assert not networks["keras"].get_layer("conv1").bias.numpy().any()
    assert networks["pytorch"].get_layer("conv1").bias.numpy().all()
    names = {RunConfig.of(initialization=i).default_folder().name for i in ("keras", "pytorch")}
    assert names == {
        "digits-lenet-spectral-0.01-seed0",
        "digits-lenet-spectral-0.01-pytorch-seed0",
    }
    narrow = RunConfig.of(network="vgg16", dataset="cifar10", width=0.25)
    assert narrow.make_network((32, 32, 3), 10).layers[1].filters == 16
