"""How many processes there is room for."""

import os


def available_cores() -> int:
    """Cores that this process may use, where the system says; else all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
