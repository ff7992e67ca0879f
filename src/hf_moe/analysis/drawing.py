"""A picture of the routing: which experts the tokens of each modality use, layer by layer."""

from pathlib import Path
from typing import Any

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.layer_spec import Site
from .routing_statistics import RoutingStatistics


# Up to this many experts the share is written in every cell.
FEW_EXPERTS = 16
# Up to this many columns the panels are side by side, then one above the other.
COLUMNS = 24

INK = "#22303c"
FAINT = "#9aa7b3"
BAR = "#d5dde4"


def draw_routing(statistics: RoutingStatistics, path: str | Path, title: str | None = None) -> Path:
    """Draw the expert shares of every modality as a heat map, beside the mean number of active experts.

    One panel per modality that the statistics saw; rows are MoE layers, columns experts, a row of a panel sums to 1.

    Args:
        statistics (`RoutingStatistics`): counts of at least one forward pass.
        path (`str` or `Path`): the PNG file to write; it is returned.
        title (`str`, *optional*): of the picture, *optional*.

    Raises:
        ValueError: if the statistics saw no real token.
        ImportError: if matplotlib is not installed.
    """
    layers = list(statistics.tables)
    seen = [m for m in range(len(MODALITIES)) if any(statistics.tokens[layer][m] > 0 for layer in layers)]
    if not seen:
        raise ValueError("The statistics are empty: update() them with the routing of a call (output_routing=True).")
    experts = max(statistics.tables[layer].shape[1] - 1 for layer in layers)
    rows, columns = (1, len(seen)) if experts * len(seen) <= COLUMNS else (len(seen), 1)
    # In inches: a cell holds a written share or is a thin stripe; what is added holds bars, labels and the scale.
    width = max(experts * 0.58, 2.3) if experts <= FEW_EXPERTS else min(max(experts * 0.13, 6.0), 14.0)
    height = max(len(layers) * (0.42 if len(layers) <= 12 else 0.27), 0.8)
    size = (columns * (width + 1.4) + 1.2, rows * (height + 0.95) + 0.4 * (title is not None))
    figure = new_figure(size)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, sharey=True, width_ratios=[width, 0.9] * columns)
    panels = axes.reshape(-1, 2)  # a heat map and its bars

    shares = {m: [statistics.shares(layer)[m] for layer in layers] for m in seen}
    active = {m: [statistics.active_experts(layer)[m].item() for layer in layers] for m in seen}
    highest_share = max(share.max().item() for rows in shares.values() for share in rows)
    most_active = max(max(values) for values in active.values())
    for (heat, bars), modality in zip(panels, seen, strict=True):
        tokens = max(int(statistics.tokens[layer][modality]) for layer in layers)
        heat.set_title(f"{MODALITIES[modality]} tokens ({tokens:,})", color=INK, fontsize=11, loc="left")
        image = _draw_shares(heat, shares[modality], layers, experts, highest_share)
        _draw_active(bars, active[modality], most_active)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer", color=INK, fontsize=9)
    scale = figure.colorbar(image, ax=axes, aspect=size[1] / 0.16, fraction=0.16 / size[0], pad=0.02)
    dress_scale(scale, "share of slots")
    return write_figure(figure, path, title)


def _draw_shares(axes: Any, rows: list[Any], layers: list[Site], experts: int, highest: float) -> Any:
    """Draw one modality's shares; the cells of experts that a narrower layer does not have stay grey."""
    cells = [row.tolist() + [float("nan")] * (experts - len(row)) for row in rows]
    image = axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0.0, vmax=highest)
    axes.set_facecolor("#dddddd")
    if experts <= FEW_EXPERTS:
        for position, row in enumerate(rows):
            for expert, share in enumerate(row.tolist()):
                color = "white" if share > 0.6 * highest else INK if share > 0 else FAINT
                text = f"{share:.2f}" if share > 0 else "–"
                axes.text(expert, position, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("expert", color=INK, fontsize=9)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    step = 1 if experts <= FEW_EXPERTS else 8
    axes.set_xticks(range(0, experts, step))
    _bare(axes)
    if experts <= FEW_EXPERTS:
        axes.set_xticks([edge - 0.5 for edge in range(1, experts)], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(1, len(layers))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
    return image


def _draw_active(axes: Any, values: list[float], most: float) -> None:
    axes.barh(range(len(values)), values, height=0.7, color=BAR)
    for position, value in enumerate(values):
        axes.text(0.06 * most, position, f"{value:.2f}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, max(most, 1e-6))
    axes.set_xticks([])
    axes.set_xlabel("active experts\nper token", color=INK, fontsize=9)
    _bare(axes)
    axes.tick_params(labelleft=False)


def _bare(axes: Any) -> None:
    axes.tick_params(which="both", length=0, labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)


def new_figure(size: tuple[float, float]) -> Any:
    """Return a figure of a size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf-moe[train]'") from error
    return Figure(figsize=size, layout="constrained")


def dress_scale(scale: Any, label: str) -> None:
    """Label the scale of colours of a figure."""
    scale.set_label(label, color=INK, fontsize=9)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0, labelsize=8, colors=INK)


def write_figure(figure: Any, path: str | Path, title: str | None = None) -> Path:
    """Write a figure as PNG, and return its path."""
    if title is not None:
        figure.suptitle(title, color=INK, fontsize=12, fontweight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
