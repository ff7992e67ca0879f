"""Pictures of how a router with a slot budget spends its experts: by image patch and word, by modality, by layer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..configuration.configuration_hf_moe import MODALITIES
from ..modeling.decisions import ExpertAssignment
from ..modeling.routing_context import RoutingContext
from .drawing import FAINT, INK, dress_scale, new_figure, write_figure
from .routing_statistics import RoutingStatistics


LINE_COLORS = ("#3b6ea5", "#d98032", "#6a9f58", "#9b6a9e")
IMAGE = MODALITIES.index("image")
# In inches, of the panel with the words; and the width of a character there, in parts of the panel's width.
WORDS_WIDTH = 4.6
CHARACTER = 0.0175


def draw_importance(
    routing: RoutingContext,
    tokens: list[str],
    picture: Any,
    path: str | Path,
    *,
    row: int = 0,
    layers: list[int] | None = None,
    signal: str = "importance",
) -> Path:
    """Draw a signal over the patches of a row's image and its words, one line of panels per layer; return the path.

    Args:
        routing (`RoutingContext`): of a forward pass with `output_routing=True`.
        tokens (`list[str]`): the row's tokens as text, padding included.
        picture (`Any`): the row's image (`PIL.Image.Image`), the first if it has several.
        path (`str` or `Path`): the PNG file to write.
        row (`int`, *optional*, defaults to `0`): of the batch.
        layers (`list[int]`, *optional*): all that report the signal when absent.
        signal (`str`, *optional*, defaults to `'importance'`): one value per token, 0 to 1, or any number for other
            signals than `importance`.

    Raises:
        ValueError: if no layer reports the signal, or the row has no image with a square number of tokens.
    """
    found = {
        layer: decision.signals[signal].detach().float().cpu().view(routing.token_mask.shape)[row]
        for layer, decision in routing.decisions.items()
        if isinstance(decision, ExpertAssignment) and signal in decision.signals
        if layers is None or layer in layers
    }
    if not found:
        raise ValueError(f"No layer reports {signal!r}: routers with a slot budget do, such as 'anyexperts'.")
    mask = routing.token_mask[row].cpu()
    patches = (routing.modality_ids[row].cpu() == IMAGE) & mask
    side = round(int(patches.sum()) ** 0.5)
    if side == 0 or side * side != int(patches.sum()):
        raise ValueError(f"Row {row} has {int(patches.sum())} image tokens, which are no square of patches.")
    words = [index for index in range(len(tokens)) if mask[index] and not patches[index]]
    values = torch.cat([item[mask] for item in found.values()])
    low, high = values.min().item(), max(values.max().item(), values.min().item() + 1e-6)

    figure = new_figure((2.4 + WORDS_WIDTH, 2.0 * len(found) + 0.3))
    axes = figure.subplots(len(found), 2, squeeze=False, width_ratios=[2.2, WORDS_WIDTH])
    for (image_axes, word_axes), (layer, signals) in zip(axes, found.items(), strict=True):
        grid = signals[patches].view(side, side)
        image_axes.imshow(picture.convert("L"), cmap="gray", extent=(0, side, side, 0), alpha=0.75)
        levels = {"cmap": "inferno", "vmin": low, "vmax": high, "alpha": 0.7}
        heat = image_axes.imshow(grid.tolist(), extent=(0, side, side, 0), **levels)
        image_axes.set_title(f"layer {layer}", color=INK, fontsize=10, loc="left")
        image_axes.set_axis_off()
        _draw_words(word_axes, [(tokens[index], signals[index].item()) for index in words], low, high)
    scale = figure.colorbar(heat, ax=axes, fraction=0.025, pad=0.02)
    scale.solids.set_alpha(1.0)
    dress_scale(scale, signal)
    return write_figure(figure, path)


def _draw_words(axes: Any, words: list[tuple[str, float]], low: float, high: float) -> None:
    from matplotlib import colormaps

    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    left, top = 0.0, 0.9
    for word, value in words:
        text = word.strip() or "·"
        width = (len(text) + 2) * CHARACTER
        if left > 0 and left + width > 1:
            left, top = 0.0, top - 0.17
        share = (value - low) / (high - low)
        color = "white" if share < 0.55 else INK
        box = {"boxstyle": "round,pad=0.25", "facecolor": colormaps["inferno"](share), "edgecolor": "none"}
        axes.text(left, top, text, fontsize=8, color=color, bbox=box, va="top", family="monospace")
        axes.text(left, top - 0.085, f"{value:.2f}", fontsize=6, color=INK, va="top", family="monospace")
        left += width + 0.012


def draw_slot_histogram(statistics: RoutingStatistics, path: str | Path) -> Path:
    """Draw how many slots the tokens of each modality get, over all layers that report it, and return the path.

    Raises:
        ValueError: if no layer reports `slots`.
    """
    histograms = statistics.slot_histograms.values()
    if not histograms:
        raise ValueError("No layer reported 'slots': it comes from routers with a slot budget, such as 'anyexperts'.")
    widest = max(counts.shape[1] for counts in histograms)
    total = torch.zeros(len(MODALITIES), widest)
    for counts in histograms:
        total[:, : counts.shape[1]] += counts
    shares = total / total.sum(1, keepdim=True)
    means = (shares * torch.arange(widest)).sum(1).tolist()
    seen = [modality for modality in range(len(MODALITIES)) if total[modality].sum() > 0]
    used = total.sum(0).nonzero().flatten()
    figure = new_figure((5.6, 3.2))
    axes = figure.subplots()
    for modality, bars in _bars(axes, {modality: shares[modality].tolist() for modality in seen}):
        bars.set_label(f"{MODALITIES[modality]} (mean {means[modality]:.2f})")
    axes.set_xlim(used.min().item() - 0.6, used.max().item() + 0.6)
    axes.set_xticks(range(int(used.min()), int(used.max()) + 1))
    _dress(axes, "expert slots of a token", "share of tokens")
    return write_figure(figure, path)


def draw_virtual_share(statistics: RoutingStatistics, path: str | Path) -> Path:
    """Draw the share of virtual slots by layer and modality, and return the path of the picture.

    Raises:
        ValueError: if no layer reports `virtual_share`.
    """
    layers = [layer for layer in sorted(statistics.signals) if "virtual_share" in statistics.signals[layer]]
    if not layers:
        raise ValueError("No layer reported 'virtual_share': it comes from the router 'anyexperts'.")
    means = torch.stack([statistics.signal_means(layer, "virtual_share") for layer in layers])  # (layers, modalities)
    seen = [m for m in range(len(MODALITIES)) if any(statistics.tokens[layer][m] > 0 for layer in layers)]
    figure = new_figure((max(3.6, 0.5 * len(layers) + 2.2), 3.0))
    axes = figure.subplots()
    for modality, bars in _bars(axes, {modality: means[:, modality].tolist() for modality in seen}):
        bars.set_label(MODALITIES[modality])
        axes.bar_label(bars, fmt="%.2f", fontsize=7, color=INK if means[:, modality].max() > 0 else FAINT)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylim(0.0, max(axes.get_ylim()[1], 0.05))
    _dress(axes, "layer", "share of virtual slots")
    return write_figure(figure, path)


def _bars(axes: Any, heights: dict[int, list[float]]) -> Iterator[tuple[int, Any]]:
    """Draw groups of bars, the modalities side by side, and give the bars of each."""
    width = 0.8 / len(heights)
    for place, (modality, values) in enumerate(heights.items()):
        positions = [group + (place - (len(heights) - 1) / 2) * width for group in range(len(values))]
        yield modality, axes.bar(positions, values, width=width * 0.92, color=LINE_COLORS[modality])


def _dress(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(across, color=INK, fontsize=9)
    axes.set_ylabel(up, color=INK, fontsize=9)
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    # Above the bars, which may fill the whole panel.
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=len(MODALITIES), **place)
