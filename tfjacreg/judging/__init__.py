"""The parts that attacks and robustness measures share: checked classifiers, and their searches."""
