"""Evaluates trained classifiers: a run folder or `.keras` file in, `evaluation.json` out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from tfjacreg import atomic_files, attacks, cli, datasets
from tfjacreg.datasets import Split
from tfjacreg.experiments import (
    checkpoint,
    classifier_files,
    data_sources,
    distributions,
    environment,
    evaluation_tables,
    figures,
    files,
    measures,
)
from tfjacreg.experiments.classifier_files import Scale
from tfjacreg.experiments.config import RunConfig
from tfjacreg.experiments.curves import Evaluation
from tfjacreg.experiments.folder import RunFolder
from tfjacreg.experiments.folder_reader import FolderReader
from tfjacreg.judging.classifiers import check_classifier, predict
from tfjacreg.printable import printable, shown


class Target(NamedTuple):
    """A classifier to evaluate.

    Attributes:
        classifier: The `.keras` file.
        folder: The folder of `evaluation.json`.
        dataset: Name of the data set.
        data_dir: Folder of the data set, or None for the default.
        method: Name of the training method; runs that differ only in the seed share it.
        seed: Seed of the training run, or None if not known.
        image_size: `(H, W)` that the images are resized to, or None.
        data_digest: If the data is your own, its digest; for a run that of the data it was trained
            on.
        scale: The scale of the pixels that a bare file takes; None for a run's classifier.
    """

    classifier: Path
    folder: RunFolder
    dataset: str
    data_dir: str | None
    method: str
    seed: int | None
    image_size: tuple[int, int] | None = None
    data_digest: str | None = None
    scale: Scale | None = None


@contextlib.contextmanager
def owned(paths: Sequence[str | Path], out: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of the folders of the evaluations.

    Args:
        paths: As for `find_targets`.
        out: As for `find_targets`.
        wait: Whether to wait for a process that works in one of them.

    Raises:
        RunError: If another process works there.
    """
    there = {folder.resolve() for folder in folders(paths, out)}
    with contextlib.ExitStack() as stack:
        for folder in sorted(there):  # In a fixed order, so that no two wait for each other.
            stack.enter_context(RunFolder(folder).owned(wait=wait))
        yield


def folders(paths: Sequence[str | Path], out: str | Path) -> list[Path]:
    """The folders of the evaluations of those classifiers that exist.

    Args:
        paths: As for `find_targets`.
        out: As for `find_targets`.
    """
    return [
        Path(out) / path.stem if path.suffix == ".keras" else path
        for path in map(Path, paths)
        if (path.suffix == ".keras" and path.is_file()) or FolderReader(path).claimed
    ]


def find_targets(
    paths: Sequence[str | Path],
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    out: str | Path = "out",
    image_size: tuple[int, int] | None = None,
    scale: Scale | None = None,
) -> list[Target]:
    """Finds the classifiers behind run folders and `.keras` files.

    Args:
        paths: Finished run folders and bare `.keras` files.
        dataset: Data set of the bare files; run folders name theirs.
        data_dir: Folder of the data sets, instead of the one in a run's configuration.
        out: Folder in which each bare file gets a folder of its name for `evaluation.json`.
        image_size: `(H, W)` that the images for bare files are resized to, or None.
        scale: The scale of the pixels that the bare files take; None for [0, 1].

    Returns:
        One target per path, in the same order.

    Raises:
        ValueError: If a path is neither, a run is broken or has not finished, a bare file comes
            without data set, or two runs are the same.
    """
    for path in map(Path, paths):
        classifier_files.refuse_other_formats(path)
    bare = [Path(path) for path in paths if Path(path).suffix == ".keras"]
    if len(bare) < len(paths) and (scale not in (None, Scale()) or image_size is not None):
        raise ValueError(
            "Run folders know their own pixels: give --pixels, --mean, --std and --image-size for "
            "bare files only."
        )
    if dataset is not None and not data_sources.is_valid(dataset):
        raise ValueError(
            f"--dataset must be one of {datasets.NAMES}, FILE.npz, a folder that is there (./NAME) "
            f"or tfds:NAME. Received: {shown(dataset)}."
        )
    if dataset is None and bare:
        raise ValueError(f"A bare classifier needs --dataset. Received: {bare[0]}.")
    if dataset is not None and len(bare) < len(paths):
        raise ValueError("Run folders name their own data set: give --dataset for bare files only.")
    if image_size is not None and dataset in datasets.NAMES:
        raise ValueError(
            f"--image-size is for folders and tfds:NAME; {dataset} has one size. Received: "
            f"--image-size {image_size[0]} {image_size[1]}."
        )
    configs = {}
    for path in map(Path, paths):
        if path not in bare:
            reader = FolderReader(path)
            reader.require_classifier()
            configs[path] = reader.read_config()
        elif not path.is_file():
            raise ValueError(f"There is no classifier at {path}.")
    digest = data_sources.digest_of(dataset, data_dir, image_size) if dataset is not None else None
    targets = []
    for path in map(Path, paths):
        if path in configs:
            folder, config = RunFolder(path), configs[path]
            target = Target(
                classifier=folder.reader.classifier_file,
                folder=folder,
                dataset=config["dataset"],
                data_dir=data_dir or config["data_dir"],
                method=_method(config, configs.values()),
                seed=config["seed"],
                image_size=tuple(config["image_size"]) if config["image_size"] else None,
                data_digest=config["data_digest"],
            )
        else:
            folder = RunFolder(Path(out) / path.stem)
            target = Target(path, folder, str(dataset), data_dir, path.stem, None, image_size)
            target = target._replace(scale=scale or Scale(), data_digest=digest)
        targets.append(target)
    seen: dict[tuple[str, str, int | None], Path] = {}
    for target in targets:
        key = (target.dataset, target.method, target.seed)
        if key in seen:
            raise ValueError(
                f"Every classifier needs its own name or its own settings and seed. Received: "
                f"{seen[key]} and {target.classifier}, both {target.method}, seed {target.seed}."
            )
        seen[key] = target.classifier
    return targets


def judge(
    targets: Sequence[Target],
    out: Path,
    *,
    perturbations: Sequence[str] = measures.PERTURBATIONS,
    pointwise: Sequence[str] = (),
    limit: int | None = None,
    examples: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> list[evaluation_tables.Table]:
    """Evaluates classifiers one after the other and draws what was measured.

    Args:
        targets: The classifiers.
        out: Folder of the figures: `robustness.png`, and one named after each of `pointwise`.
        perturbations: Some of `measures.PERTURBATIONS`.
        pointwise: Some of `measures.POINTWISE`.
        limit: The number of test images to use, from the first; None for all.
        examples: The number of images to draw before and after PGD, beside each `evaluation.json`.
        seed: Seed of everything random.
        overwrite: Whether to start anew instead of extending existing files.

    Returns:
        The tables.

    Raises:
        ValueError: If data is missing, an existing file was made with other settings, or a
            classifier cannot be loaded or evaluated.
        OSError: If a file cannot be written.
    """
    drawn = [*(["robustness"] if perturbations else []), *pointwise]
    atomic_files.check_files(*(out / f"{name}.png" for name in drawn))
    for target in targets:
        reader = target.folder.reader
        atomic_files.check_files(reader.evaluation_file, reader.examples_file)
    tests = {_place(target): test_images(target) for target in targets}
    judged = []
    for target in targets:
        test = tests[_place(target)]
        x, y = test.x[:limit], test.y[:limit]
        result = evaluate(
            target,
            x,
            y,
            perturbations=perturbations,
            pointwise=pointwise,
            seed=seed,
            overwrite=overwrite,
        )
        judged.append(Evaluation(target.dataset, target.method, result))
        if examples:
            figures.adversarial_figure(
                *adversarial_examples(target, x, y, examples, seed=seed),
                f"{target.method}, {target.dataset}: PGD, eps {attacks.EPS * 255:g}/255",
                target.folder.reader.examples_file,
            )
    tables: list[evaluation_tables.Table] = []
    if perturbations:
        tables.extend(evaluation_tables.robustness_tables(judged, perturbations))
        figures.robustness_figure(judged, perturbations, out / "robustness.png")
    if "boundary" in pointwise:
        tables.extend(evaluation_tables.distance_tables(judged))
        distributions.boundary_figure(judged, out / "boundary.png")
    if "distance" in pointwise:
        tables.extend(evaluation_tables.distance_tables(judged, "distance"))
        distributions.distance_figure(judged, out / "distance.png")
    if "sigma" in pointwise:
        tables.extend(evaluation_tables.sigma_tables(judged))
        distributions.sigma_figure(judged, out / "sigma.png")
    if set(pointwise) == set(measures.POINTWISE):
        tables.extend(evaluation_tables.ratio_tables(judged))
    return tables


def judge_run(path: Path, names: Sequence[str], *, limit: int | None = None) -> dict[str, Any]:
    """Evaluates a finished run in a folder that this process already owns; draws nothing.

    Args:
        path: The run folder.
        names: Some of `measures.PERTURBATIONS` and `measures.POINTWISE`.
        limit: The number of test images to use, from the first; None for all.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ValueError: As for `judge`.
        OSError: If the file cannot be written.
    """
    (target,) = find_targets([path])
    test = test_images(target)
    return evaluate(
        target,
        test.x[:limit],
        test.y[:limit],
        perturbations=[name for name in measures.PERTURBATIONS if name in names],
        pointwise=[name for name in measures.POINTWISE if name in names],
    )


def _place(target: Target) -> tuple[Any, ...]:
    return target.dataset, target.data_dir, target.image_size, target.data_digest


def test_images(target: Target) -> Split:
    """The test images of a classifier's data set.

    Raises:
        ValueError: If they cannot be read, or are not of the data that the run was trained on.
        FileNotFoundError: If they are not there.
    """
    data = data_sources.load(target.dataset, target.data_dir, target.image_size)
    if target.data_digest not in (None, data_sources.digest(data)):
        raise ValueError(
            f"{target.folder.path} was trained on other data than {target.dataset} has now: their "
            "digests differ. Put the data back as it was."
        )
    return data.test


def evaluate(
    target: Target,
    x: np.ndarray,
    y: np.ndarray,
    *,
    perturbations: Sequence[str] = measures.PERTURBATIONS,
    pointwise: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measures what is asked for and missing, and writes the file after each measurement.

    Args:
        target: The classifier.
        x: Test images in [0, 1], `[N, *in]`.
        y: Their labels `[N]`.
        perturbations: Some of `measures.PERTURBATIONS`.
        pointwise: Some of `measures.POINTWISE`.
        seed: Seed of everything random.
        overwrite: Whether to start anew instead of extending the existing file.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ValueError: If the existing file was made with other settings, or the classifier cannot be
            loaded or evaluated.
        OSError: If the file cannot be written.
    """
    scale = target.scale or Scale()
    header: dict[str, Any] = {
        "settings": {
            "dataset": target.dataset,
            "images": len(x),
            "seed": seed,
            "classifier_sha256": files.sha256(_file(target.classifier)),
            **({} if scale.is_plain else {"scale": str(scale)}),
            **_data_of_ones_own(target),
            **measures.PLAN,
        },
        "environment": environment.environment(),
    }
    reader = target.folder.reader
    result = None if overwrite else reader.read_evaluation()
    if result is not None:
        _refuse_other_settings(reader.evaluation_file, result, header)
    stored = load(target.classifier)
    try:
        classifier = scale.in_front_of(stored)
        if result is None:
            subject = check_classifier(classifier, x, y)
            clean = float((predict(subject).argmax(axis=1) == subject.y).mean())
            result = {**header, "clean_accuracy": clean}
        if target.scale is not None:
            about = target.classifier, stored, scale, result["clean_accuracy"], len(x)
            cli.say(classifier_files.described(*about))
            classifier_files.warn_of_scale(*about)
        # A file of an earlier version lacks the settings of measures that were added later.
        result["settings"] = {**result["settings"], **header["settings"]}
        for name in (*perturbations, *pointwise):
            if name not in result:
                run = target.method if target.seed is None else f"{target.method} #{target.seed}"
                result |= measures.measure(name, classifier, x, y, seed, f"{run} {name}")
                target.folder.write_evaluation(result)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{target.classifier}: {error}") from error
    target.folder.write_evaluation(result)
    return result


def adversarial_examples(
    target: Target, x: np.ndarray, y: np.ndarray, count: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Attacks the first `count` correctly classified images with PGD at full strength.

    Args:
        target: The classifier.
        x: Test images in [0, 1], `[N, *in]`.
        y: Their labels `[N]`.
        count: How many images.
        seed: Seed of the attack.

    Returns:
        The clean images, the perturbed ones, and the classes predicted for each.

    Raises:
        ValueError: If the classifier cannot be loaded or evaluated, or gets no image right.
    """
    classifier = (target.scale or Scale()).in_front_of(load(target.classifier))
    correct = np.flatnonzero(predict(check_classifier(classifier, x, y)).argmax(axis=1) == y)[
        :count
    ]
    if not len(correct):
        raise ValueError(f"{target.classifier}: there is no correctly classified image to attack.")
    clean, labels = x[correct], y[correct]
    x_adv = attacks.pgd(classifier, clean, labels, iterations=measures.STEPS[-1], seed=seed).x_adv
    fooled = predict(check_classifier(classifier, x_adv, labels)).argmax(axis=1)
    return clean, x_adv, labels, fooled


def load(path: Path) -> keras.Model:
    """Loads a classifier without its training state; raises ValueError if that fails."""
    return checkpoint.load(_file(path), compile=False)


def _file(path: Path) -> Path:
    """Resolves a link to a bare file; in a run folder links have been refused already."""
    return path.resolve() if path.is_symlink() else path


def _method(config: dict[str, Any], configs: Iterable[dict[str, Any]]) -> str:
    """A name made of the regularizer, its factor and any other setting in which runs differ."""
    name = str(config["regularizer"])
    if name != "none":
        name += f" {config['factor']:g}"
    named = {"dataset", "regularizer", "factor", "seed", "data_dir"}
    rivals = [c for c in configs if c["dataset"] == config["dataset"]]
    others = [
        f"{key}={value}"
        for key, value in config.items()
        if key in RunConfig.names()
        and key not in named
        and any(rival.get(key) != value for rival in rivals)
    ]
    return " ".join([name, *others])


def _data_of_ones_own(target: Target) -> dict[str, Any]:
    """The settings that say which data it is; empty for the project's own data sets."""
    if target.data_digest is None:
        return {}
    size = None if target.image_size is None else list(target.image_size)
    return {"image_size": size, "data_digest": target.data_digest}


def _refuse_other_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    settings = before.get("settings", {})
    # A file of an earlier version lacks what its measures or settings did not have then.
    later = {*measures.PLAN, "image_size", "data_digest"}
    different = {
        name: (settings.get(name), value)
        for name, value in now["settings"].items()
        if settings.get(name) != value and (name in settings or name in before or name not in later)
    }
    if "scale" in settings and "scale" not in now["settings"]:
        different["scale"] = (settings["scale"], str(Scale()))
    different |= environment.differences(before.get("environment", {}), now["environment"])
    for name, (there, here) in different.items():
        raise ValueError(
            f"{path} was made with {name}={_unquoted(there)}, now it is {here}. "
            "Ask for the same, or start afresh with --overwrite."
        )


def _unquoted(value: Any) -> str:
    """A setting in one line, without the quotes of a name."""
    return printable(repr(value)[1:-1], limit=200) if isinstance(value, str) else shown(value)
