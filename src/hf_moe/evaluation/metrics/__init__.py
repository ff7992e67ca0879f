"""Metric modules for `evaluate.load(metric_path(name))`, which needs no network."""

from pathlib import Path


def metric_path(name: str) -> str:
    """Return the folder of a metric.

    Raises:
        ValueError: if there is no metric of that name.
    """
    folder = Path(__file__).parent
    names = sorted(path.parent.name for path in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"No metric is named {name!r}; there are {', '.join(names)}.")
    return str(folder / name)
