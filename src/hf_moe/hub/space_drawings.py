"""Drawings of the routing for the page of a Space, as HTML and SVG."""

import base64
import io
from html import escape

import torch

from .host_facts import MODALITIES
from .space_checkpoint import IMAGE, TEXT, Trace


COLORS = ("#3b6ea5", "#d98032", "#6a9f58", "#9b6a9e")
CSS = """
.routing { color: var(--body-text-color); font-size: 0.9rem; }
.routing h4 { margin: 0 0 8px; }
.routing svg { width: 100%; max-width: 420px; display: block; border-radius: 6px; }
.routing svg.course { max-width: none; height: 56px; border: 1px solid #9aa7b3; }
.routing .words { line-height: 3.2; }
.routing .word { padding: 3px 6px; margin-right: 4px; border-radius: 5px; position: relative; white-space: pre; }
.routing .word small { position: absolute; left: 0; right: 0; top: 2.2em; line-height: 1; text-align: center;
  font-size: 0.65rem; opacity: 0.75; }
.routing .answer { outline: 1.5px solid var(--body-text-color); }
.routing .bar { display: grid; grid-template-columns: 5.5rem 1fr 3rem; gap: 8px; align-items: center; }
.routing .bar i { display: block; height: 9px; border-radius: 3px; }
.routing .expert { margin-bottom: 7px; padding: 2px 6px; }
.routing .chosen { background: var(--background-fill-secondary); border-radius: 6px; font-weight: 600; }
.routing table { border-collapse: collapse; }
.routing th, .routing td { padding: 3px 12px 3px 0; text-align: right; border: none; }
.routing .scale { display: inline-block; width: 90px; height: 9px; vertical-align: middle; border-radius: 3px;
  background: linear-gradient(90deg, rgba(217, 128, 50, 0), rgba(217, 128, 50, 1)); border: 1px solid #9aa7b3; }
"""


def described(weights: torch.Tensor) -> str:
    """Return the experts of one token and their weights in words, the heaviest first."""
    used = [(weight, expert) for expert, weight in enumerate(weights.tolist()) if weight > 0]
    return ", ".join(f"expert {expert}: {weight:.2f}" for weight, expert in sorted(used, reverse=True)) or "no expert"


def draw_patches(trace: Trace, layer: int, expert: int) -> str:
    """Draw one expert's weight over the picture, one cell per patch."""
    if trace.picture is None:
        return "" if trace.moments else "<p>The question came without a picture.</p>"
    if trace.grid is None:
        return f"<p>The {len(trace.rows(IMAGE))} image tokens of this model form no grid over the picture.</p>"
    rows, columns = trace.grid
    spots = [(x, y, f"row {y + 1}, column {x + 1}") for y in range(rows) for x in range(columns)]
    cells, used, strongest = _tinted(trace, layer, expert, IMAGE, spots)
    buffer = io.BytesIO()
    trace.picture.convert("L").save(buffer, "JPEG", quality=90)
    picture = base64.b64encode(buffer.getvalue()).decode()
    label = f"Weight of expert {expert} in layer {layer} over the picture"
    return (
        f'<h4>Patches</h4><svg viewBox="0 0 {columns} {rows}" stroke="white" stroke-width="0.01" role="img" '
        f'aria-label="{label}"><image href="data:image/jpeg;base64,{picture}" width="{columns}" height="{rows}" '
        f'preserveAspectRatio="none"/>{cells}</svg>'
        f'<p>Weight: 0&nbsp;<span class="scale"></span>&nbsp;{strongest:.2f}. {used} patches. '
        "The picture is as the model saw it, without its colours.</p>"
    )


def draw_course(trace: Trace, layer: int, expert: int) -> str:
    """Draw one expert's weight over a video and a sound, moment by moment."""
    drawings = []
    for modality, steps in trace.moments.items():
        rows = len(trace.rows(modality)) // steps
        spots = [(x, y, f"moment {x + 1} of {steps}") for x in range(steps) for y in range(rows)]
        cells, used, _ = _tinted(trace, layer, expert, modality, spots)
        name = MODALITIES[modality]
        drawings.append(
            f'<h4>{name.capitalize()}</h4><svg class="course" viewBox="0 0 {steps} {rows}" preserveAspectRatio="none" '
            f'role="img" aria-label="Weight of expert {expert} in layer {layer} over the {name}">{cells}</svg>'
            f"<p>From beginning to end. {used} tokens.</p>"
        )
    return "".join(drawings)


def _tinted(trace: Trace, layer: int, expert: int, modality: int, spots: list[tuple]) -> tuple[str, str, float]:
    """Return a cell at each spot (column, row, description) of a modality's tokens, the use, the largest weight."""
    weights = trace.weights[layer][trace.rows(modality)]  # (P, E)
    strongest = max(trace.weights[layer].max().item(), 1e-6)
    cells = [
        f'<rect x="{x}" y="{y}" width="1" height="1" fill="{COLORS[modality]}" '
        f'fill-opacity="{0.9 * token[expert].item() / strongest:.3f}"><title>{spot}: {described(token)}</title></rect>'
        for (x, y, spot), token in zip(spots, weights, strict=True)
    ]
    used = (weights[:, expert] > 0).float().mean().item()
    return "".join(cells), f"Expert {expert} works on {used:.0%} of the {len(weights)}", strongest


def draw_words(trace: Trace, layer: int, expert: int) -> str:
    """Draw the words, tinted by one expert's weight, with the numbers of all their experts below."""
    weights = trace.weights[layer]
    strongest = max(weights.max().item(), 1e-6)
    items = []
    for position in trace.rows(TEXT):
        share = weights[position, expert].item() / strongest
        used = ", ".join(str(index) for index in weights[position].nonzero().flatten().tolist())
        word = trace.words[position].strip() or "·"
        kind = "word answer" if position >= trace.answer else "word"
        items.append(
            f'<span class="{kind}" style="background: rgba(59, 110, 165, {0.08 + 0.6 * share:.3f})" '
            f'title="{described(weights[position])}">{escape(word)}<small>{used or "–"}</small></span>'
        )
    return (
        f'<h4>Words and their experts</h4><div class="words">{" ".join(items)}</div>'
        f"<p>Tinted: the weight of expert {expert}. Framed: the answer.</p>"
    )


def draw_shares(trace: Trace, layer: int, expert: int) -> str:
    """Draw how the slots of each modality spread over the experts of a layer."""
    used = trace.weights[layer] > 0
    seen = [modality for modality in range(len(MODALITIES)) if modality in trace.modality]
    counts = {modality: used[trace.rows(modality)].sum(0) for modality in seen}
    blocks = []
    for index in range(used.shape[1]):
        bars = ""
        for modality in seen:
            share = counts[modality][index].item() / max(counts[modality].sum().item(), 1)
            bars += (
                f'<div class="bar"><span>{MODALITIES[modality]}</span><i style="width: {share:.1%}; '
                f'background: {COLORS[modality]}"></i><span>{share:.0%}</span></div>'
            )
        blocks.append(f'<div class="expert{" chosen" if index == expert else ""}">expert {index}{bars}</div>')
    return f"<h4>Share of the slots, by modality</h4>{''.join(blocks)}"


def draw_runs(runs: list[dict[str, float | None]]) -> str:
    """Draw what the last questions cost."""
    names = [name for name in runs[-1] if any(run[name] is not None for run in runs)]
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join('<td>–</td>' if run[name] is None else f'<td>{run[name]:,.1f}</td>' for name in names)}</tr>"
        for run in reversed(runs)
    )
    return f'<div class="routing"><table><tr>{head}</tr>{body}</table></div>'


def draw(trace: Trace | None, layer: int, expert: int) -> tuple[str, str, str]:
    """Draw media, words and shares of one layer, with one expert in the foreground."""
    if trace is None:
        return "", "", ""
    shown = draw_patches(trace, layer, expert) + draw_course(trace, layer, expert)
    drawings = (shown, draw_words(trace, layer, expert), draw_shares(trace, layer, expert))
    media, words, shares = (f'<div class="routing">{drawn}</div>' for drawn in drawings)
    return media, words, shares
