"""Evaluations with numbers that are easy to compute by hand."""

from tfjacreg.experiments.curves import Evaluation


def judged(clean=0.9, drops=(0.1, 0.5), distances=(1.0, None, 3.0), wrong=(1,), name="pgd"):
    strength = "variance" if name == "noise" else "iterations"
    return {
        "clean_accuracy": clean,
        name: {strength: [1, 4], "accuracy": [clean - d for d in drops]},
        "boundary_distance": list(distances),
        "boundary": {"misclassified": list(wrong), "beyond_max_radius": []},
    }


def measured_at_points(distances, sigma, margin, wrong=(), nearer=0.5):
    """The entries of one run, with the nearest image at a share of the distance in directions."""
    return judged(distances=distances, wrong=wrong) | {
        "minimal_distance": [None if d is None else nearer * d for d in distances],
        "distance": {"misclassified": list(wrong), "not_found": []},
        "sigma": list(sigma),
        "margin": list(margin),
    }


RUNS = [
    Evaluation("digits", "none", judged(0.9, (0.2, 0.6))),
    Evaluation("digits", "none", judged(0.8, (0.4, 0.8))),
    Evaluation("digits", "spectral 0.01", judged(0.85, (0.1, 0.3), (2.0, 2.5, None), (2,))),
    Evaluation("kmnist", "none", judged(0.7, (0.0, 0.1), (None, 4.0, 5.0, None), (3,))),
]
