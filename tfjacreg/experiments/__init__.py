"""The paper's experiment: runs, sweeps, evaluations and reports. The library never imports it."""
