"""What a comparison writes: one table, one file of numbers, one picture."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..analysis.drawing import BAR, FAINT, INK, new_figure, write_figure
from ..configuration.configuration_hf_moe import MODALITIES


# Of bars and dots, by modality.
COLOURS = dict(zip(MODALITIES, ("#4878a8", "#e0884a", "#5f9e6e", "#9a6fb0"), strict=True))


def write_comparison(folder: Path, result: dict[str, Any]) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(f"{comparison_table(result)}\n\n{conditions(result)}\n", encoding="utf-8")
    draw_comparison(result, folder / "comparison.png")


def comparison_table(result: dict[str, Any]) -> str:
    """Return a row per system: mean (smallest to largest) over the seeds, the best accuracy first."""
    systems, first = result["systems"], result["baseline"]
    seen, adapters = modalities(result), "adapter" in result["recipe"]
    head = ["system", "accuracy", f"over {first}", "answer loss"]
    head += [f"active, {name}" for name in seen]
    head += [f"of {first}, at the start", "at the end", "experts per token"]
    head += ["rank", "trained"] if adapters else ["expert width"]
    head += ["CPU ms per step"]
    head += [f"entropy, {name}" for name in seen]
    base = systems[first]
    lines = []
    for name in ranked(result):
        system = systems[name]
        runs = system["runs"]
        pairs = zip(runs, base["runs"], strict=True)
        over = [run["accuracy"] - other["accuracy"] for run, other in pairs]
        ended = [run["mean_active"] / other["mean_active"] for run, other in zip(runs, base["runs"], strict=True)]
        used = [statistics.mean(run["experts_per_token"].values()) for run in runs if run["experts_per_token"]]
        cells = [f"`{name}`", spread([run["accuracy"] for run in runs], "{:.4f}")]
        cells += ["–" if name == first else spread(over, "{:+.4f}"), spread([run["loss"] for run in runs], "{:.4f}")]
        cells += [f"{mean(run['active'][kind] for run in runs) / 1e6:.3f} M" for kind in seen]
        cells += [f"{system['mean_active'] / base['mean_active']:.3f}", f"{statistics.mean(ended):.3f}"]
        cells += [f"{statistics.mean(used):.2f}" if used else "–", str(system["width"])]
        cells += [f"{runs[0]['parameters'] / 1e6:.3f} M"] * adapters
        times = [1000 * run["step_cpu_seconds"] for run in runs if run["step_cpu_seconds"] is not None]
        cells.append(spread(times, "{:.0f}") if times else "–")
        mixed = [[run["entropy"][kind] for run in runs if kind in run["entropy"]] for kind in seen]
        cells += [f"{mean(values):.2f}" if values else "–" for values in mixed]
        lines.append(cells)
    return as_table([head, *lines])


def conditions(result: dict[str, Any]) -> str:
    """Return, as a paragraph, what was equal and what the numbers are."""
    systems, first = result["systems"], result["baseline"]
    training = result["recipe"]["training"]
    shares = []
    for name, system in systems.items():
        start = system["runs"][0]["start"]
        shared = {part: count["equal"] / (count["equal"] + count["own"]) for part, count in start.items()}
        shares += [(part, share, name) for part, share in shared.items() if part != "routers" and share < 1]
    others = sorted({part for part, _, _ in shares})
    named = "; ".join(
        f"{part}: {', '.join(f'{name} {share:.0%}' for kind, share, name in shares if kind == part)}"
        for part in others
    )
    size, what = "width", ""
    if "adapter" in result["recipe"]:
        base = systems[first]["runs"][0]["base_accuracy"]
        size = "rank"
        what = f" Adapters of one frozen base, whose accuracy is {base:.4f}; their parameters alone count."
    return (
        f"Recipe `{result['recipe']['name']}`, {result['seeds']} seeds, {training['max_steps']} steps of "
        f"{training.get('per_device_train_batch_size', 8)} rows in the same order for all systems of a seed (their "
        "digests agree); mean (smallest to largest) over the seeds, differences paired by seed, accuracies on "
        f"{systems[first]['runs'][0]['evaluated']:,} questions.{what} Per seed, all parameters outside of the routers "
        f"start from those of `{first}`"
        + (f", except where shapes differ (the share that is equal is given; {named})" if named else "")
        + f". The {size} of the experts is fitted to the active parameters of `{first}` at the start "
        f"within {result['tolerance']:.0%}; the end is measured on the trained models. Times are medians of the "
        "process's CPU time from step to step, in runs one after the other, not interleaved."
    )


def plan_table(facts: dict[str, dict[str, Any]], finished: dict[str, int], seeds: int) -> str:
    """Return what would run: sizes, active parameters at the start, and how many runs are finished."""
    first = next(iter(facts.values()))
    head = ["system", "MoE layers", "experts", "per token", "width or rank", "active at the start", "of the first"]
    rows = [[*head, "finished"]]
    for name, item in facts.items():
        active = ", ".join(f"{kind} {count:,}" for kind, count in item["active"].items())
        layers = ", ".join(map(str, item["layers"])) or "–"
        sizes = [str(item[key] or "–") for key in ("num_experts", "num_experts_per_tok", "width")]
        ratio = f"{item['mean_active'] / first['mean_active']:.3f}"
        rows.append([f"`{name}`", layers, *sizes, active, ratio, f"{finished[name]} of {seeds}"])
    return as_table(rows)


def ranked(result: dict[str, Any]) -> list[str]:
    """Return the systems by their mean accuracy, the best first."""
    systems = result["systems"]
    return sorted(systems, key=lambda name: -mean(run["accuracy"] for run in systems[name]["runs"]))


def modalities(result: dict[str, Any]) -> list[str]:
    """Return the modalities of the tokens that the decoders saw."""
    return list(result["systems"][result["baseline"]]["runs"][0]["active"])


def mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def spread(values: list[float], form: str) -> str:
    """Return `mean (smallest to largest)`."""
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} to {form.format(max(values))})"


def as_table(rows: list[list[str]]) -> str:
    """Return rows of cells as a Markdown table, the first as its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_comparison(result: dict[str, Any], path: Path) -> Path:
    """Draw accuracy, active parameters, time and entropy of every system, in four panels that share their rows.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    names, seen, systems = ranked(result), modalities(result), result["systems"]
    figure = new_figure((13.5, 1.6 + 0.34 * len(names)))
    quality, active, times, entropy = figure.subplots(1, 4, sharey=True, width_ratios=[1.5, 1.2, 0.9, 1.2])
    places = range(len(names))

    def values(name: str, key: str) -> list[float]:
        return [run[key] for run in systems[name]["runs"] if run[key] is not None]

    def by_kind(name: str, key: str, kind: str) -> float:
        # Without routers there are no shares of experts.
        found = [run[key][kind] for run in systems[name]["runs"] if kind in run[key]]
        return mean(found) if found else 0.0

    quality.axvline(mean(values(result["baseline"], "accuracy")), color=FAINT, linewidth=1, linestyle=":")
    for place, name in zip(places, names, strict=True):
        seeds = values(name, "accuracy")
        quality.plot([min(seeds), max(seeds)], [place, place], color=BAR, linewidth=5, solid_capstyle="round")
        quality.plot(seeds, [place] * len(seeds), "o", color=FAINT, markersize=3)
        quality.plot([mean(seeds)], [place], "D", color=INK, markersize=5)
        if spent := values(name, "step_cpu_seconds"):
            times.barh(place, 1000 * mean(spent), height=0.6, color=BAR)
            times.text(0, place, f" {1000 * mean(spent):.0f}", va="center", fontsize=8, color=INK)
    height = 0.7 / len(seen)
    for number, kind in enumerate(seen):
        offset = (number - (len(seen) - 1) / 2) * height
        rows = [place + offset for place in places]
        counts = [by_kind(name, "active", kind) / 1e6 for name in names]
        active.barh(rows, counts, height=height, color=COLOURS[kind], label=kind)
        mixed = [by_kind(name, "entropy", kind) for name in names]
        entropy.barh(rows, mixed, height=height, color=COLOURS[kind])
    titles = ("accuracy: seeds and mean", "active parameters, M", "CPU ms per step", "entropy of expert shares")
    for axis, title in zip((quality, active, times, entropy), titles, strict=True):
        axis.set_title(title, color=INK, fontsize=10, loc="left")
        axis.tick_params(length=0, labelsize=8, colors=INK)
        axis.spines[:].set_visible(False)
    entropy.set_xlim(0, 1)
    quality.set_yticks(places, names)
    quality.invert_yaxis()
    handles, labels = active.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=len(seen))
    return write_figure(figure, path, f"{result['recipe']['name']}: systems, active parameters equal at the start")
