"""The settings of a run, and what the paper sets where nothing is said (appendix A.2)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self

import keras

from tfjacreg import arguments, datasets, networks, regularizers

DEFAULTS: dict[str, dict[str, Any]] = {
    "lenet": {"epochs": 50, "batch_size": 32, "learning_rate": 0.01, "schedule": "constant"},
    "vgg16": {"epochs": 100, "batch_size": 128, "learning_rate": 0.1, "schedule": "cosine"},
    "resnet20": {"epochs": 100, "batch_size": 128, "learning_rate": 0.1, "schedule": "cosine"},
}
SCHEDULES = ("constant", "cosine")
# Crops and flips are for natural images: digits and clothes know left from right.
AUGMENTED_DATASETS = ("cifar10",)
# What a config.json means that was written before the setting existed.
EARLIER: dict[str, Any] = {"whole_training_set": False, "initialization": "keras"}


class RunError(ValueError):
    """A run cannot start or go on, or its folder cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of a run. `RunConfig.of` fills in what is not given.

    Attributes:
        dataset: A name in `datasets.NAMES`.
        network: A name in `networks.NAMES`.
        width: Width of vgg16 and resnet20 relative to the published network.
        initialization: How the weights of lenet start, a name in `networks.INITIALIZATIONS`.
        regularizer: `"none"` or a name in `regularizers.BY_NAME`.
        factor: The weight lambda of the penalty.
        epochs: Passes over the training split.
        batch_size: Examples in a step.
        learning_rate: Of SGD with momentum 0.8; where a cosine schedule starts.
        schedule: `"constant"` or `"cosine"` (annealed to 0 over the run).
        augment: Random crops (4 pixels of padding) and horizontal flips.
        whole_training_set: Whether to train on the validation split too. Then there are no
            validation figures, and nothing but the test split to choose an epoch or a cell by.
        seed: Of the initial weights, the order of the examples and the random vectors.
        data_dir: Where tensorflow-datasets keeps its data; None is its own default.

    Raises:
        ValueError: If a setting is out of range; the message lists what is valid.
    """

    dataset: str = "digits"
    network: str = "lenet"
    width: float = 1.0
    initialization: str = "keras"
    regularizer: str = "spectral"
    factor: float = regularizers.DEFAULT_FACTOR
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str
    augment: bool
    whole_training_set: bool = False
    seed: int = 0
    data_dir: str | None = None

    @classmethod
    def of(cls, **given: Any) -> Self:
        """The settings given, and for the others the defaults of the network and the data set.

        Args:
            given: Settings by their names.

        Raises:
            ValueError: If a setting is out of range; the message lists what is valid.
        """
        network = given.get("network", cls.network)
        arguments.one_of("network", network, networks.NAMES)
        augment = given.get("dataset", cls.dataset) in AUGMENTED_DATASETS
        return cls(**{**DEFAULTS[network], "augment": augment, **given})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def __post_init__(self) -> None:
        """Checks every setting."""
        for name, valid in (
            ("dataset", datasets.NAMES),
            ("network", networks.NAMES),
            ("initialization", networks.INITIALIZATIONS),
            ("regularizer", ("none", *regularizers.BY_NAME)),
            ("schedule", SCHEDULES),
        ):
            arguments.one_of(name, getattr(self, name), valid)
        checked: dict[str, Any] = {
            "width": arguments.positive("width", self.width),
            "factor": arguments.non_negative("factor", self.factor),
            "epochs": arguments.positive_integer("epochs", self.epochs),
            "batch_size": arguments.positive_integer("batch_size", self.batch_size),
            "learning_rate": arguments.positive("learning_rate", self.learning_rate),
            "augment": arguments.boolean("augment", self.augment),
            "whole_training_set": arguments.boolean("whole_training_set", self.whole_training_set),
            "seed": arguments.fixed_seed(self.seed, below=2**32),  # NumPy's own limit.
        }
        if self.data_dir is not None:
            checked["data_dir"] = str(arguments.path("data_dir", self.data_dir))
        if self.network == "lenet" and self.width != 1:
            raise ValueError(
                f"`width` is for vgg16 and resnet20; lenet has one. Received: width={self.width}"
            )
        if self.network != "lenet" and self.initialization != "keras":
            raise ValueError(
                f"`initialization` is for lenet; {self.network} starts as published. "
                f"Received: initialization={self.initialization!r}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # As Python's own numbers, for JSON.

    def make_regularizer(self) -> regularizers.Regularizer | None:
        """The penalty that the settings mean."""
        if self.regularizer == "none":
            return None
        penalty = regularizers.BY_NAME[self.regularizer]
        # Weight decay draws nothing at random.
        seed = {} if penalty is regularizers.WeightDecay else {"seed": self.seed}
        return penalty(factor=self.factor, **seed)

    def make_network(self, input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
        """The network that the settings mean, with new weights.

        Args:
            input_shape: `(H, W, C)`.
            num_classes: How many logits it gives.
        """
        options: dict[str, Any] = {"width": self.width}
        if self.network == "lenet":
            options = {"initialization": self.initialization}
        return networks.get(self.network, input_shape, num_classes, **options)

    def differences(self, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from those of a `config.json`: its value and this one's.

        Where the data lies does not count: it does not change what the run is.

        Args:
            settings: What `FolderReader.read_config` reads.
        """
        return {
            name: (settings.get(name), value)
            for name, value in dataclasses.asdict(self).items()
            if name != "data_dir" and settings.get(name) != value
        }

    def default_folder(self) -> Path:
        """Where the run goes if nothing else is said."""
        method = self.regularizer
        if method != "none":
            method += f"-{self.factor:g}"
        if self.whole_training_set:
            method += "-whole"
        if self.initialization != "keras":
            method += f"-{self.initialization}"
        return Path("runs") / f"{self.dataset}-{self.network}-{method}-seed{self.seed}"
