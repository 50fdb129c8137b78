"""The paper's experiment: runs, sweeps, evaluations, reports. The library does not import it."""
