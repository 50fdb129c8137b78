"""Trains a network with a Jacobian penalty, or without one, and exports it.

    python train.py                            # LeNet on digits, no download
    python train.py --dataset fashion_mnist --regularizer none --epochs 3
    python train.py --sweep sweeps/quick.toml  # many runs: docs/sweeps.md

The same command continues where it was interrupted. docs/training.md explains
the run folder.
"""

if __name__ == "__main__":
    import tfjacreg_arguments
    import tfjacreg_startup

    tfjacreg_startup.prepare()
    tfjacreg_arguments.train(__doc__)  # --help and mistakes end here, before seconds of imports.
    tfjacreg_startup.import_tensorflow()

import sys
from pathlib import Path
from typing import Any

import tfjacreg_arguments
from tfjacreg import cli, optional_packages
from tfjacreg.printable import printable

with optional_packages.script_importing("experiments", "train.py"):
    from tfjacreg.experiments import stopped
    from tfjacreg.experiments.config import RunConfig, file_name
    from tfjacreg.experiments.folder_reader import FolderReader
    from tfjacreg.experiments.run import run


def main(argv: list[str] | None = None) -> int:
    """Trains one configuration or a sweep and prints the result."""
    settings = vars(tfjacreg_arguments.train(__doc__, argv))
    if "sweep" in settings:
        out = settings.setdefault("out", _sweep_folder(**settings))
        return cli.run("train.py", lambda: _sweep(**settings), lambda: stopped.sweep(out))
    what = {name: value for name, value in settings.items() if name not in ("overwrite", "wait")}
    overwrite = "overwrite" in settings
    return cli.run(
        "train.py",
        lambda: _one(**settings),
        lambda: stopped.run(*_run(**what), overwrite=overwrite),
    )


def _run(*, out: Path | None = None, **settings: Any) -> tuple[RunConfig, Path]:
    config = RunConfig.of(**settings)
    return config, out or config.default_folder()


def _one(*, overwrite: bool = False, wait: bool = False, **settings: Any) -> int:
    config, out = _run(**settings)
    finished = FolderReader(out).finished and not overwrite
    cli.say(f"{config.described()}\n  in {out}\n")
    verbose = 1 if sys.stdout.isatty() else 2
    metrics = run(config, out, overwrite=overwrite, wait=wait, verbose=verbose)
    if finished:
        cli.say(f"{out} has this run, finished; --overwrite repeats it.")
    print(f"\n{config.named()}")
    for label, value in (
        ("test accuracy", f"{metrics['test_accuracy']:.4f}"),
        ("test loss", f"{metrics['test_loss']:.4f}"),
        ("mean exact sigma", f"{metrics['test_spectral_norm']:.4f}"),
        ("seconds per step", f"{metrics['step_seconds']:.5f}"),
    ):
        print(f"  {label:<17} {value:>8}")
    for name, accuracy in metrics.get("test_accuracy_by_class", {}).items():
        shown = "no image" if accuracy is None else f"{accuracy:.4f}"
        print(f"    {printable(name, limit=40):<15} {shown:>8}")
    cli.say(f"  in {out}")
    return 0


def _sweep_folder(*, sweep: Path, dataset: str = "", network: str = "", **_: Any) -> Path:
    """The folder of a sweep if none is given; its name includes a data set or network given."""
    given = (file_name(name) for name in (dataset, network) if name)
    return Path("runs") / "-".join((sweep.stem, *given))


def _sweep(
    *,
    sweep: Path,
    out: Path,
    dataset: str | None = None,
    network: str | None = None,
    **options: Any,
) -> int:
    with optional_packages.importing("experiments", "A sweep"):
        # Optuna and matplotlib take a second, for sweeps only.
        from tfjacreg.experiments import stages
        from tfjacreg.experiments.sweep import Sweep

    plan = Sweep.load(sweep, dataset=dataset, network=network)
    outcome = stages.run(plan, out, **options)
    cli.say(f"\n{outcome}\n  in {outcome.report or out}")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
