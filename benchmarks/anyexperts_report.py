"""What `anyexperts.py` makes of its rows: tables, the saving within the noise, curves and pictures."""

import statistics
from pathlib import Path
from typing import Any

import torch
from common import markdown_table
from PIL import Image
from tasks import Task, routing_of, without_labels

from hf_moe.analysis.allocation import LINE_COLORS, draw_importance, draw_slot_histogram, draw_virtual_share
from hf_moe.modeling.image_loading import open_image


CONTESTANTS = ("top_k", "anyexperts", "adamoe", "dynamic_moe_top_p")


def metric_of(rows: dict[str, Any]) -> str:
    return "loss" if "loss" in rows["top_k"][0] else "accuracy"


def at_budget(rows: list[dict[str, Any]], budget: float) -> list[dict[str, Any]]:
    return [row for row in rows if row["budget"] == budget]


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def spread(values: list[float]) -> float:
    """Return the standard deviation over seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def shortfall(rows: dict[str, Any], own: list[dict[str, Any]]) -> dict[str, float]:
    """Return by how much `own` is worse than top-k at its full number of experts.

    Returns:
        `mean`, over seeds, above 0 for worse; `paired`, the standard deviation of the differences of equal seeds,
        whose models have one start; `pooled`, the square root of the mean of the two variances over seeds.
    """
    metric = metric_of(rows)
    sign = 1 if metric == "loss" else -1
    pairs = [(row[metric], best[metric]) for row, best in zip(own, at_budget(rows["top_k"], 1.0), strict=True)]
    differences = [sign * (value - best) for value, best in pairs]
    variances = [spread(list(values)) ** 2 for values in zip(*pairs, strict=True)]
    return {
        "mean": statistics.mean(differences),
        "paired": spread(differences),
        "pooled": statistics.mean(variances) ** 0.5,
    }


def saving_within_noise(rows: dict[str, Any]) -> dict[str, Any]:
    """Return the largest share of top-k's real experts that was saved within the noise.

    `saving_within_noise`: of AnyExperts, where its mean metric is worse than top-k's by at most the pooled standard
    deviation over seeds. `saving_within_paired_noise`: by at most the standard error of the paired differences, which
    is the stricter test: it leaves out what the start of a seed does to all that continue from it.
    `savings_of_others`: the two for the other contestants, also for fewer experts of fixed number.
    """
    full = mean(at_budget(rows["top_k"], 1.0), "real_experts_per_token")

    def largest(name: str, paired: bool) -> float:
        savings = [0.0]
        for budget in {row["budget"] for row in rows[name]}:
            own = at_budget(rows[name], budget)
            gap = shortfall(rows, own)
            noise = gap["paired"] / len(own) ** 0.5 if paired else gap["pooled"]
            if gap["mean"] <= noise:
                savings.append(round(1.0 - mean(own, "real_experts_per_token") / full, 4))
        return max(savings)

    tests = {"within_noise": False, "within_paired_noise": True}
    both = {name: {test: largest(name, paired) for test, paired in tests.items()} for name in CONTESTANTS}
    own = both.pop("anyexperts")
    return {**{f"saving_{kind}": value for kind, value in own.items()}, "savings_of_others": both}


def summary_tables(tasks: dict[str, Any], wide: list[dict[str, Any]]) -> str:
    """Return the tables of the report."""
    text = []
    for task, rows in tasks.items():
        text += [f"### AnyExperts, {task}", task_table(rows), savings_line(rows), elastic_table(rows)]
    text += ["### AnyExperts, wide experts", wide_table(wide)]
    return "\n\n".join(text)


def task_table(rows: dict[str, Any]) -> str:
    metric = metric_of(rows)
    full = at_budget(rows["top_k"], 1.0)
    lines = []
    for name in CONTESTANTS:
        for budget in sorted({row["budget"] for row in rows[name]}, reverse=True):
            own = at_budget(rows[name], budget)
            gap = shortfall(rows, own)
            lines.append(
                {
                    "router": name,
                    "budget": budget,
                    "real experts": mean(own, "real_experts_per_token"),
                    metric: f"{mean(own, metric):.4f} ± {spread([row[metric] for row in own]):.4f}",
                    "worse than top-4 by": f"{gap['mean']:+.4f} ± {gap['paired']:.4f}",
                    **{
                        f"{kind} / top-4": mean(own, f"{kind}_seconds") / mean(full, f"{kind}_seconds")
                        for kind in ("step", "prefill")
                    },
                }
            )
    return markdown_table(lines)


def savings_line(rows: dict[str, Any]) -> str:
    own = {kind: rows[f"saving_{kind}"] for kind in ("within_noise", "within_paired_noise")}
    savings = {"anyexperts": own, **rows["savings_of_others"]}
    listed = (
        f"{name} {found['within_noise']:.0%} ({found['within_paired_noise']:.0%})" for name, found in savings.items()
    )
    return f"Real experts saved within the noise over seeds (of paired differences): {', '.join(listed)}."


def elastic_means(rows: dict[str, Any], name: str) -> list[tuple[float, float, float]]:
    """Return budget, mean real experts and mean metric of a model whose number of experts was moved at inference."""
    metric = metric_of(rows)
    by_budget = zip(*(row[name] for row in rows["elastic"]), strict=True)
    return [
        (seeds[0]["budget"], mean(list(seeds), "real_experts_per_token"), mean(list(seeds), metric))
        for seeds in by_budget
    ]


def elastic_table(rows: dict[str, Any]) -> str:
    lines = [
        {"moved at inference": name, "budget": budget, "real experts": real, metric_of(rows): f"{value:.4f}"}
        for name in ("top_k", "anyexperts")
        for budget, real, value in elastic_means(rows, name)
    ]
    return markdown_table(lines)


def wide_table(wide: list[dict[str, Any]]) -> str:
    full = wide[0]
    lines = [
        {
            "router": row["contestant"],
            "real experts": row["real_experts_per_token"],
            "step ms": 1000 * row["step_seconds"],
            "step / top_k": row["step_seconds"] / full["step_seconds"],
            "prefill ms": 1000 * row["prefill_seconds"],
            "prefill / top_k": row["prefill_seconds"] / full["prefill_seconds"],
        }
        for row in wide
    ]
    return markdown_table(lines)


def draw_curves(tasks: dict[str, Any], path: Path) -> None:
    """Draw every task's metric against the real experts per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (task, rows) in zip(figure.subplots(1, len(tasks)), tasks.items(), strict=True):
        metric = metric_of(rows)
        for name, color in zip(CONTESTANTS, LINE_COLORS, strict=True):
            groups = [at_budget(rows[name], budget) for budget in sorted({row["budget"] for row in rows[name]})]
            real = [mean(group, "real_experts_per_token") for group in groups]
            values = [mean(group, metric) for group in groups]
            errors = [spread([row[metric] for row in group]) for group in groups]
            axes.errorbar(real, values, errors, marker="o", color=color, capsize=2, label=name)
        for name, color in zip(("top_k", "anyexperts"), LINE_COLORS, strict=False):
            _, real, values = zip(*elastic_means(rows, name), strict=True)
            axes.plot(real, values, color=color, linestyle=":", marker=".", label=f"{name}, moved at inference")
        axes.set_title(task, fontsize=10, loc="left")
        axes.set_xlabel("real experts per token", fontsize=9)
        axes.set_ylabel(metric, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    shrink(path)


@torch.no_grad()
def draw_pictures(task: Task, model: Any, folder: Path) -> None:
    """Draw where a model spends its experts: over an image and its question, by modality, by layer."""
    found = routing_of(model, (batch for batches in task.test.values() for batch in batches))
    batch = next(iter(task.test.values()))[0]
    routing = model(**without_labels(batch), output_routing=True, logits_to_keep=1).routing
    tokens = task.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    picture = open_image(task.examples[0]["images"][0])
    drawn = [
        draw_importance(routing, tokens, picture, folder / "anyexperts_importance.png"),
        draw_slot_histogram(found, folder / "anyexperts_slots.png"),
        draw_virtual_share(found, folder / "anyexperts_virtual.png"),
    ]
    for path in drawn:
        shrink(path)


def shrink(path: Path) -> None:
    """Keep few colours: the pictures are committed."""
    Image.open(path).convert("RGB").quantize(192).save(path, optimize=True)
