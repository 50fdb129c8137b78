"""The memory of a process. Imports nothing of tfjacreg: `versions.py` measures other checkouts."""

import re
from pathlib import Path


def gib(entry: str = "VmHWM") -> float:
    """What the kernel says of the memory of this process: by default the most that it has used."""
    # Not getrusage: that high-water mark is inherited from the process that started this one.
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status must have {entry}. Received: none.")
    return int(found[1]) / 2**20
