"""The settings of a run, with the paper's as defaults (appendix A.2)."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Self

import keras

from tfjacreg import arguments, datasets, networks, regularizers
from tfjacreg.experiments import data_readers, data_sources, network_sources
from tfjacreg.printable import shown

DEFAULTS: dict[str, dict[str, Any]] = {
    "lenet": {"epochs": 50, "batch_size": 32, "learning_rate": 0.01, "schedule": "constant"},
    "vgg16": {"epochs": 100, "batch_size": 128, "learning_rate": 0.1, "schedule": "cosine"},
    "resnet20": {"epochs": 100, "batch_size": 128, "learning_rate": 0.1, "schedule": "cosine"},
}
# A network of your own has LeNet's defaults.
OWN_DEFAULTS = DEFAULTS["lenet"]
SCHEDULES = ("constant", "cosine")
# Crops and flips suit natural images: digits and clothes are not symmetric.
AUGMENTED_DATASETS = ("cifar10",)
# The values of settings for a config.json that was written before they existed.
EARLIER: dict[str, Any] = {
    "whole_training_set": False,
    "initialization": "keras",
    "pretrained": False,
    "image_size": None,
    "data_digest": None,
    "network_digest": None,
}
# Settings that name a file, and the setting with the digest of its content: the digest counts, not
# the name.
_DIGESTS = {"dataset": "data_digest", "image_size": "data_digest", "network": "network_digest"}


class RunError(ValueError):
    """A run cannot start or continue, or its folder cannot be used; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of a run. `RunConfig.of` fills in what is not given.

    Attributes:
        dataset: A name in `datasets.NAMES`, `FILE.npz`, a folder or `tfds:NAME`.
        network: A name in `networks.NAMES`, `FILE.keras` or `MODULE:FUNCTION`.
        pretrained: Whether the run starts from the weights in `FILE.keras`.
        image_size: `(H, W)` that the images of a folder or of `tfds:NAME` are resized to; None if
            they are of one size.
        width: Width of vgg16 and resnet20 relative to the published network.
        initialization: How the weights of lenet start, a name in `networks.INITIALIZATIONS`.
        regularizer: `"none"` or a name in `regularizers.BY_NAME`.
        factor: The weight lambda of the penalty.
        epochs: Passes over the training split.
        batch_size: Examples in a step.
        learning_rate: Of SGD with momentum 0.8; for a cosine schedule the initial one.
        schedule: `"constant"` or `"cosine"` (annealed to 0 over the run).
        augment: Whether to use random crops (4 pixels of padding) and horizontal flips.
        whole_training_set: Whether to train on the validation split too. Then there are no
            validation figures, and only the test split is left to choose an epoch or a cell by.
        seed: Seed of the initial weights, the order of the examples and the random vectors.
        data_dir: The folder in which tensorflow-datasets keeps its data; None for its default.
        data_digest: The SHA-256 of the images and labels of a data set of your own; None for one in
            `datasets.NAMES`, and before `identified` is called.
        network_digest: The SHA-256 of the file of a network of your own, or of its function's
            module; None likewise.

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
    pretrained: bool = False
    image_size: tuple[int, int] | None = None
    data_digest: str | None = None
    network_digest: str | None = None

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Takes the given settings, and for the others the defaults of network and data set.

        Args:
            given: Settings by their names.

        Raises:
            ValueError: If a setting is out of range; the message lists what is valid.
        """
        network = given.get("network", cls.network)
        _check_network(network)
        augment = given.get("dataset", cls.dataset) in AUGMENTED_DATASETS
        defaults = DEFAULTS.get(network, OWN_DEFAULTS)
        return cls(**{**defaults, "augment": augment, **given})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def __post_init__(self) -> None:
        """Checks every setting."""
        if not data_sources.is_valid(self.dataset):
            raise ValueError(
                f"`dataset` must be one of {datasets.NAMES}, FILE.npz, a folder that is there "
                f"(./NAME) or tfds:NAME. Received: dataset={shown(self.dataset)}"
            )
        _check_network(self.network)
        for name, valid in (
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
            "seed": arguments.fixed_seed(self.seed, below=2**32),  # NumPy's limit.
        }
        checked["pretrained"] = arguments.boolean("pretrained", self.pretrained)
        if self.image_size is not None:
            sides = self.image_size
            if not isinstance(sides, tuple | list) or len(sides) != 2:
                raise ValueError(
                    f"`image_size` must be (height, width). Received: image_size={sides!r}"
                )
            checked["image_size"] = tuple(
                arguments.positive_integer("image_size", side) for side in sides
            )
            if self.dataset in datasets.NAMES:
                raise ValueError(
                    f"`image_size` is for folders and tfds:NAME; {self.dataset} has one. "
                    f"Received: image_size={sides!r}"
                )
        if self.pretrained and not self.network.endswith(".keras"):
            raise ValueError(
                "`pretrained` is for a network out of FILE.keras, which has weights. Received: "
                f"network={self.network!r}"
            )
        if self.data_dir is not None:
            checked["data_dir"] = str(arguments.path("data_dir", self.data_dir))
        if self.network not in ("vgg16", "resnet20") and self.width != 1:
            raise ValueError(
                f"`width` is for vgg16 and resnet20; {self.network} has one. "
                f"Received: width={self.width}"
            )
        if self.network != "lenet" and self.initialization != "keras":
            raise ValueError(
                f"`initialization` is for lenet; {self.network} starts as it is made. "
                f"Received: initialization={self.initialization!r}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # As Python numbers, for JSON.

    def identified(self) -> Self:
        """The same settings with the digests of your own data and network.

        A digest stays None if the data or the file is not there.

        Raises:
            ValueError: If the data set is there and something in it is wrong.
        """
        return dataclasses.replace(
            self,
            data_digest=data_sources.digest_of(self.dataset, self.data_dir, self.image_size),
            network_digest=network_sources.digest(self.network),
        )

    def make_regularizer(self) -> regularizers.Regularizer | None:
        """Makes the penalty that the settings describe."""
        if self.regularizer == "none":
            return None
        penalty = regularizers.BY_NAME[self.regularizer]
        # Weight decay has no random vectors.
        seed = {} if penalty is regularizers.WeightDecay else {"seed": self.seed}
        return penalty(factor=self.factor, **seed)

    def make_network(self, input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
        """Makes the network that the settings describe, with new weights or `pretrained` ones.

        Args:
            input_shape: `(H, W, C)`.
            num_classes: The number of logits.

        Raises:
            ValueError: If a network of your own cannot be loaded or does not fit.
        """
        if self.network not in networks.NAMES:
            return network_sources.make(
                self.network, input_shape, num_classes, pretrained=self.pretrained
            )
        options: dict[str, Any] = {"width": self.width}
        if self.network == "lenet":
            options = {"initialization": self.initialization}
        return networks.get(self.network, input_shape, num_classes, **options)

    def differences(self, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from a `config.json`: the value there and the value here.

        Where the data lies does not count, and neither does the name of a file with the same
        digest: they do not change the run. A digest that is None here is not compared.

        Args:
            settings: What `FolderReader.read_config` returns.
        """
        different = {}
        for name, value in dataclasses.asdict(self).items():
            there = settings.get(name)
            there = tuple(there) if isinstance(there, list) else there
            unknown = name in _DIGESTS.values() and value is None
            digest = getattr(self, _DIGESTS[name]) if name in _DIGESTS else None
            same = digest is not None and digest == settings.get(_DIGESTS[name])
            if name != "data_dir" and there != value and not unknown and not same:
                different[name] = (there, value)
        return different

    def named(self) -> str:
        """Data set, network and penalty; a run without a penalty has no factor."""
        factor = "" if self.regularizer == "none" else f", factor {self.factor:g}"
        return f"{self.dataset}, {self.network}, {self.regularizer}{factor}"

    def described(self) -> str:
        """The settings in two lines, to print when the run starts."""
        parts = [
            f"{self.epochs} epoch{'s' * (self.epochs != 1)}",
            f"batches of {self.batch_size}",
            f"learning rate {self.learning_rate:g} ({self.schedule})",
        ]
        if self.width != 1:
            parts.append(f"width {self.width:g}")
        if self.initialization != "keras":
            parts.append(f"initial weights of {self.initialization}")
        if self.pretrained:
            parts.append("pretrained")
        if self.image_size is not None:
            parts.append("images of {}x{}".format(*self.image_size))
        if self.augment:
            parts.append("images cropped and flipped")
        if self.whole_training_set:
            parts.append("whole training set")
        return f"{self.named()}, seed {self.seed}\n  {', '.join(parts)}"

    def default_folder(self) -> Path:
        """The folder of the run if none is given."""
        method = self.regularizer
        if method != "none":
            method += f"-{self.factor:g}"
        if self.whole_training_set:
            method += "-whole"
        if self.initialization != "keras":
            method += f"-{self.initialization}"
        if self.pretrained:
            method += "-pretrained"
        dataset, network = file_name(self.dataset), file_name(self.network)
        return Path("runs") / f"{dataset}-{network}-{method}-seed{self.seed}"


def file_name(name: str) -> str:
    """The name of a data set or network as a part of a folder's name.

    Of a path the last part, without .npz or .keras; a function and a set of tensorflow-datasets
    have names that differ in any part.
    """
    if not name.startswith(data_readers.TFDS) and not network_sources.is_function(name):
        name = Path(name).name.removesuffix(".npz").removesuffix(".keras")
    return re.sub(r"\W+", "-", name).strip("-") or "own"


def _check_network(name: Any) -> None:
    if not network_sources.is_valid(name):
        way_out = ""
        if isinstance(name, str) and (name.endswith((".h5", ".hdf5")) or os.path.isdir(name)):
            way_out = ". Make one in Python: keras.models.load_model(...).save('mine.keras')"
        raise ValueError(
            f"`network` must be one of {networks.NAMES}, FILE.keras or MODULE:FUNCTION. "
            f"Received: network={shown(name)}{way_out}"
        )
