"""Measures how robust trained classifiers are, to noise, attacks and distances.

    python evaluate.py runs/none runs/spectral --limit 1000
    python evaluate.py runs/none --attacks pgd_margin --distance --sigma
    python evaluate.py mine.keras --dataset mine.npz --pixels 0..255

The same command continues where it was interrupted. docs/robustness.md explains
the numbers. `python -m tfjacreg report` writes the report of a whole sweep.
"""

from __future__ import annotations

if __name__ == "__main__":
    import tfjacreg_arguments
    import tfjacreg_startup

    tfjacreg_startup.prepare()
    tfjacreg_arguments.evaluate(__doc__)  # --help and mistakes end here, before seconds of imports.
    tfjacreg_startup.import_tensorflow()

import argparse
import sys

import tfjacreg_arguments
from tfjacreg import cli, optional_packages

with optional_packages.script_importing("experiments", "evaluate.py"):
    from tfjacreg.experiments import evaluation, measures, stopped
    from tfjacreg.experiments.classifier_files import Scale


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    return tfjacreg_arguments.evaluate(__doc__, argv)


def run(args: argparse.Namespace) -> None:
    """Evaluates every run given and prints the tables."""
    with evaluation.owned(args.runs, args.out, wait=args.wait):
        targets = evaluation.find_targets(
            args.runs,
            dataset=args.dataset,
            data_dir=args.data_dir,
            out=args.out,
            image_size=tuple(args.image_size) if args.image_size else None,
            scale=Scale.of(args.pixels, args.mean, args.std),
        )
        names = [*args.attacks, *_pointwise(args)]
        images = f"the first {args.limit} " if args.limit else "all "
        where = f"numbers in {_files(targets)}, figures in {args.out}"
        cli.say(f"Measures {', '.join(names)} on {images}test images\n  {where}\n")
        tables = evaluation.judge(
            targets,
            args.out,
            perturbations=args.attacks,
            pointwise=_pointwise(args),
            limit=args.limit,
            examples=args.adversarial_examples,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    cli.say("\n\n".join(table.text(cli.columns()) for table in tables))
    cli.say(f"\n  {where}")


def _files(targets: list[evaluation.Target]) -> str:
    """The lines that say where the numbers are."""
    first, *others = (target.folder.reader.evaluation_file for target in targets)
    return f"{first} and {len(others)} more of that name" if others else str(first)


def _pointwise(args: argparse.Namespace) -> list[str]:
    return [name for name in measures.POINTWISE if getattr(args, name)]


def _stopped(args: argparse.Namespace) -> str:
    folders = evaluation.folders(args.runs, args.out)
    names = [*args.attacks, *_pointwise(args)]
    return stopped.evaluation(folders, names, overwrite=args.overwrite)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = parse(argv)

    def judge() -> int:
        run(args)
        return 0

    return cli.run("evaluate.py", judge, lambda: _stopped(args))


if __name__ == "__main__":
    sys.exit(main())
