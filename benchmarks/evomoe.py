"""EvoMoE on easy-VQA: evolved against replicated experts, the dynamic token-aware router against a linear one.

    OMP_NUM_THREADS=1 python benchmarks/evomoe.py --seeds 3    # an hour on one core
    python benchmarks/evomoe.py --quick                        # two steps a stage

Every variant is the recipe evomoe_easyvqa with another last stage. The variants of a seed share the warm-up and the
stage in which expert 1 is tuned while the others evolve: replicated experts are copies of expert 1 at its end. All
have the same data order, steps, learning rates and balance loss; none was searched for any of them.
Evolved experts stay frozen in the last stage and a token uses one, as in EvoMoE; replicated experts are trained with
their router and a token uses two, as in MoE-LLaVA. The matched pair trains both kinds and uses one, and `dense` tunes
expert 1 alone for the same steps.

What is finished stays in `runs/evomoe/seed<N>` and is read again: stages, checkpoints, reports and measures.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, interleaved_ms, keep_freed_memory, make_parser, markdown_table, median, publish

from hf_moe import HfMoeForConditionalGeneration, HfMoeProcessor
from hf_moe.analysis.experts import expert_similarity, mean_similarity, modality_divergence, shuffle_test
from hf_moe.configuration.configuration_hf_moe import MODALITIES
from hf_moe.construction.conversion import convert_router
from hf_moe.data import VisionLanguageCollator, load_rows
from hf_moe.modeling.block import Block
from hf_moe.training.parts import train_only
from hf_moe.training.recipe import Recipe, load_recipe
from hf_moe.training.run import collect_routing, run_recipe
from hf_moe.training.stages import kept_features


RECIPE = "evomoe_easyvqa"
# Half of the recipe's warm-up: after the whole of it the variants have little left to differ in.
SETTINGS = [
    "stages.0.training.max_steps=600",
    "data.eval.limit=2500",
    "evaluation={batch_size: 256, bf16: true}",
]
QUICK = [
    "training.per_device_train_batch_size=8",
    "data.train.limit=32",
    "data.eval.limit=16",
    "model.image_size=64",
    *(f"stages.{stage}.training.max_steps=2" for stage in range(3)),
]
BALANCE = {"load_balance": 0.001}


def evolved(trainable: tuple[str, ...] = ("routers",), **moe_config: Any) -> dict[str, Any]:
    """Return a last stage on evolved experts."""
    construct = {"assemble": {"system": "evomoe_dtr", "moe_config": moe_config}}
    return {"construct": construct, "trainable": list(trainable)}


def replicated(slots: int, noise_std: float = 0.0, **moe_config: Any) -> dict[str, Any]:
    """Return a last stage on copies of expert 1, trained with their router; a token uses `slots` of them."""
    moe_config = {"num_experts_per_tok": slots, "objectives": BALANCE, **moe_config}
    construct = {"upcycle": {"system": "moe_llava", "moe_config": moe_config, "noise_std": noise_std}}
    return {"construct": construct, "trainable": ["experts", "routers"]}


DTR = {"name": "evomoe_dtr"}
VARIANTS = {
    "evomoe": evolved(),
    "replicated_linear": replicated(2),
    "evolution_only": evolved(router="top_k"),
    "dtr_only": replicated(2, router=DTR),
}
# Equal in all but the experts that the last stage starts from.
MATCHED = {
    "evolved, experts trained with the router": evolved(("experts", "routers")),
    "replicated, DTR, top-1": replicated(1, router=DTR),
}
# Without a MoE: the evolution names the feed-forwards to train, and no expert evolves.
DENSE = {
    "dense before the last stage": None,
    "dense": {"construct": None, "trainable": ["experts"], "evolve": {"layers": "every_2", "beta_ranges": []}},
}
# The paper's other ways to make experts differ, all with its router and one slot, and its other routers.
ALTERNATIVES = {
    "replicated, linear router, top-1": replicated(1),
    "evolved, linear router per modality": evolved(router="ming_multi_router"),
    "evolved, DTR with a linear router added": evolved(router={**DTR, "shared_router": True}),
    "evolved, one hypernetwork for all": evolved(router={**DTR, "per_modality": False}),
    "copies with noise": replicated(1, 0.1, router=DTR),
    "copies with expert dropout": replicated(1, router=DTR, experts={"name": "ffn", "dropout": 0.1}),
    "copies with a contrastive loss": replicated(1, router=DTR, objectives={**BALANCE, "expert_contrast": 0.01}),
    "copies with a local entropy loss": replicated(1, router=DTR, objectives={**BALANCE, "local_entropy": 0.01}),
    "evolved in the warm-up": evolved(("experts", "routers")),
}


def make_recipe(name: str, last_stage: dict[str, Any] | None, seed: int, quick: bool) -> Recipe:
    """Return the recipe of one variant: the shipped one with another last stage, or without one."""
    recipe = load_recipe(RECIPE, [f"seed={seed}", *SETTINGS, *(QUICK if quick else [])])
    warm_up, evolution, last = recipe.stages
    if last_stage is None:
        return replace(recipe, stages=[warm_up, evolution])
    last = replace(last, name=name.replace(",", "").replace(" ", "_"), **deepcopy(last_stage))
    stages = [warm_up, evolution, last]
    if name == "evolved in the warm-up":
        # Its experts are all trained from then on, for the steps of the two stages left.
        trainable = [*warm_up.trainable, "experts"]
        warm_up = replace(warm_up, name="warm_up_with_evolution", trainable=trainable, evolve=evolution.evolve)
        steps = evolution.training["max_steps"] + last.training["max_steps"]
        stages = [warm_up, replace(last, training={**evolution.training, "max_steps": steps})]
    return replace(recipe, stages=stages)


def run_variant(name: str, last_stage: dict[str, Any] | None, seed: int, quick: bool, root: Path) -> dict[str, Any]:
    """Run one variant of a seed and measure it, or read what an earlier run has left."""
    recipe = make_recipe(name, last_stage, seed, quick)
    folder = root / f"seed{seed}" / recipe.stages[-1].name
    kept = folder / "measures.json"
    if kept.is_file():
        content = json.loads(kept.read_text())
        if content["recipe"] == json.loads(json.dumps(recipe.to_dict())):
            return content["measures"]
    shared = {"stages": root / f"seed{seed}" / "stages", "features": root / "features"}
    folder.mkdir(parents=True, exist_ok=True)
    for link, target in shared.items():
        target.mkdir(exist_ok=True)
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target.resolve())
    report = run_recipe(recipe, folder, resume=True)
    measures = {
        "seed": seed,
        "accuracy": report["accuracy"],
        "accuracy_by_question_type": report["accuracy_by_question_type"],
        "parameters_trained": report["trainable_parameters"],
        "parameters_active": report["parameters_active"],
        "train_seconds_last_stage": report["stages"][-1]["train_seconds"],
        **(measure_experts(recipe, folder) if report["routing"] else {}),
    }
    kept.write_text(json.dumps({"recipe": recipe.to_dict(), "measures": measures}))
    return measures


def load_run(recipe: Recipe, folder: Path) -> tuple[HfMoeForConditionalGeneration, VisionLanguageCollator, Any]:
    """Return a finished run's model, a collator over the cached features, and the test rows."""
    model = HfMoeForConditionalGeneration.from_pretrained(folder / "checkpoint").eval()
    processor = HfMoeProcessor.from_pretrained(folder / "checkpoint", trust_remote_code=False)
    rows = {part: load_rows(recipe.data[part], split) for part, split in {"train": "train", "eval": "test"}.items()}
    features = kept_features(recipe, model, processor, rows, [], folder)
    return model, VisionLanguageCollator(processor, feature_cache=features), rows["eval"]


def measure_experts(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return how the experts of a finished run differ and what uses them, on the first test questions."""
    model, collator, rows = load_run(recipe, folder)
    rows = rows.select(range(min(512, len(rows))))
    batches = [
        collator(list(rows.select(range(start, min(start + 128, len(rows)))))) for start in range(0, len(rows), 128)
    ]
    similarity = expert_similarity(model, batches[0])
    routing = collect_routing(model, collator, rows)
    shares = {layer: routing.shares(layer)[: len(MODALITIES)][routing.tokens[layer] > 0] for layer in similarity}
    shuffled = shuffle_test(model, batches)
    return {
        "expert_cosine": statistics.mean(mean_similarity(item["outputs"]) for item in similarity.values()),
        "weight_cosine": statistics.mean(mean_similarity(item["weights"]) for item in similarity.values()),
        "modality_js": statistics.mean(modality_divergence(routing).values()),
        "largest_share": statistics.mean(share.amax(-1).mean().item() for share in shares.values()),
        "loss": shuffled["loss"],
        "shuffle_loss_change": shuffled["change"],
        "output_similarity": {str(layer): item["outputs"].tolist() for layer, item in similarity.items()},
        "shares": {str(layer): share.tolist() for layer, share in shares.items()},
    }


def router_cost(recipe: Recipe, folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Return what the router of a finished EvoMoE costs beside a linear one in the same model.

    A step is that of the router's stage, on a batch of its size; a prefill answers as many questions.
    """
    model, collator, rows = load_run(recipe, folder)
    linear = deepcopy(model)
    convert_router(linear, "top_k")
    size = recipe.training["per_device_train_batch_size"]
    batch = collator(list(rows.select(range(min(size, len(rows))))))
    questions = {name: tensor for name, tensor in batch.items() if name != "labels"}
    runs: dict[str, Callable[[], None]] = {}
    costs = []
    for name, contestant in (("evomoe_dtr", model), ("top_k", linear)):
        train_only(contestant, ["routers"])
        optimizer = torch.optim.AdamW(p for p in contestant.parameters() if p.requires_grad)
        runs[f"{name}_step"] = partial(train_step, contestant, optimizer, batch)
        runs[f"{name}_prefill"] = partial(prefill, contestant, questions)
        layers = contestant.moe_layers().values()
        own, expert = (statistics.mean(map(count, layers)) for count in (router_multiply_adds, expert_multiply_adds))
        costs.append(
            {
                "router": name,
                "parameters_per_layer": sum(p.numel() for layer in layers for p in layer.gate.parameters())
                // len(layers),
                "multiply_adds_per_token": own,
                "of_an_expert": own / expert,
            }
        )
    times = interleaved_ms(runs, repetitions)
    for row in costs:
        for kind in ("step", "prefill"):
            row[f"{kind}_ms"] = median(times[f"{row['router']}_{kind}"])
            # A pair of one round met the same moment of the machine.
            pairs = zip(times[f"{row['router']}_{kind}"], times[f"top_k_{kind}"], strict=True)
            row[f"{kind}_share_over_linear"] = statistics.median(1 - base / own for own, base in pairs)
    return costs


def router_multiply_adds(layer: Block) -> int:
    """Return those of a token's matrix products: with the scorer, and with the matrices of one hypernetwork."""
    parameters = list(layer.gate.parameters())
    return layer.gate.weight.numel() + sum(network[0].numel() for network in parameters if network.dim() == 3)


def expert_multiply_adds(layer: Block) -> int:
    """Return those of a token in one expert."""
    return sum(stack[0].numel() for stack in layer.experts.parameters())


def train_step(
    model: HfMoeForConditionalGeneration, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> None:
    """Run a whole training step."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def prefill(model: HfMoeForConditionalGeneration, questions: dict[str, torch.Tensor]) -> None:
    """Run the forward pass that answers."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()(**questions, logits_to_keep=1)


def summary(name: str, rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a line of the printed tables: means over the seeds, and the accuracy's spread."""
    accuracies = [100 * row["accuracy"] for row in rows]
    pairs = [100 * (row["accuracy"] - base["accuracy"]) for row, base in zip(rows, baseline, strict=True)]

    def mean(key: str, form: str) -> str:
        return form.format(statistics.mean(row[key] for row in rows)) if key in rows[0] else "–"

    active = rows[0]["parameters_active"].get("text")  # none of a dense model
    return {
        "variant": name,
        "active parameters": f"{active / 1e6:.2f} M" if active else "–",
        "trained at last": f"{sum(rows[0]['parameters_trained'].values()) / 1e6:.2f} M",
        "accuracy %, by seed": " ".join(f"{value:.1f}" for value in accuracies),
        "mean": f"{statistics.mean(accuracies):.2f}",
        "spread": f"{max(accuracies) - min(accuracies):.2f}",
        "against baseline": f"{statistics.mean(pairs):+.2f} ({min(pairs):+.1f} to {max(pairs):+.1f})",
        "output cosine": mean("expert_cosine", "{:.3f}"),
        "weight cosine": mean("weight_cosine", "{:.3f}"),
        "modality JS, bits": mean("modality_js", "{:.3f}"),
        "largest share": mean("largest_share", "{:.2f}"),
        "shuffled loss": mean("shuffle_loss_change", "{:+.1%}"),
    }  # fmt: skip


def draw(folder: Path, variants: dict[str, dict[str, Any]]) -> None:
    """Draw the experts' similarity and the modalities' use of them, one column of panels per MoE layer."""
    pictures = {
        "evomoe_similarity.png": ("output_similarity", "Cosine between the outputs of experts, same tokens"),
        "evomoe_modalities.png": ("shares", "Share of each expert in the tokens of a modality"),
    }
    for file, (key, title) in pictures.items():
        draw_panels(folder / file, title, {name: measures[key] for name, measures in variants.items()})


def draw_panels(path: Path, title: str, variants: dict[str, dict[str, Any]]) -> None:
    """Draw matrices as annotated heat maps: a row of panels per variant, a column per layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = list(next(iter(variants.values())))
    height = sum(len(matrices[layers[0]]) * 0.4 + 0.8 for matrices in variants.values())
    figure = Figure(figsize=(2.9 * len(layers) + 0.6, height + 0.4), layout="constrained")
    ratios = [len(matrices[layers[0]]) for matrices in variants.values()]
    axes = figure.subplots(len(variants), len(layers), squeeze=False, height_ratios=ratios)
    for line, (name, matrices) in zip(axes, variants.items(), strict=True):
        for axis, layer in zip(line, layers, strict=True):
            matrix = matrices[layer]
            axis.imshow(matrix, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
            for row, values in enumerate(matrix):
                for column, value in enumerate(values):
                    color = "white" if value > 0.6 else "#22303c"
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
            square = len(matrix) == len(matrix[0])
            labels = range(1, len(matrix) + 1) if square else MODALITIES[: len(matrix)]
            axis.set_yticks(range(len(matrix)), [str(label) for label in labels], fontsize=8)
            axis.set_xticks(range(len(matrix[0])), [str(number + 1) for number in range(len(matrix[0]))], fontsize=8)
            axis.set_title(f"{name}, layer {layer}", fontsize=9)
            axis.tick_params(length=0)
    figure.suptitle(title, fontsize=10)
    FigureCanvasAgg(figure).print_figure(path, dpi=110, facecolor="white")


def tables(result: dict[str, Any]) -> str:
    """Return the three tables."""
    baseline = result["variants"]["replicated_linear"]
    seeds = {**result["variants"], **result["matched"], **result["dense"]}
    main = [summary(name, rows, baseline) for name, rows in seeds.items()]
    first = result["variants"]["evomoe"][:1]
    others = [summary(name, rows, first) for name, rows in {"evomoe": first, **result["alternatives"]}.items()]
    for row in others:
        del row["spread"], row["mean"]
    cost = [
        {
            "router": row["router"],
            "parameters per layer": f"{row['parameters_per_layer']:,}",
            "multiply-adds per token": f"{row['multiply_adds_per_token']:,}",
            "of an expert's": f"{row['of_an_expert']:.1%}",
            "step ms": row["step_ms"],
            "of a step, over linear": f"{row['step_share_over_linear']:.1%}",
            "prefill ms": row["prefill_ms"],
            "of a prefill, over linear": f"{row['prefill_share_over_linear']:.1%}",
        }
        for row in result["router_cost"]
    ]
    return "\n\n".join(
        [
            "Against `replicated_linear`, seed by seed:",
            markdown_table(main),
            "The paper's alternatives, seed 0, against `evomoe`:",
            markdown_table(others),
            "The router in the same model, a batch of its training:",
            markdown_table(cost),
        ]
    )


def run(seeds: int, quick: bool, root: Path) -> dict[str, Any]:
    """Run everything that is not finished and return the result."""
    everything = {**VARIANTS, **MATCHED, **DENSE}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in everything}
    for seed in range(seeds):
        for name, stage in everything.items():
            rows[name].append(run_variant(name, stage, seed, quick, root))
    names = list(ALTERNATIVES)[-1:] if quick else list(ALTERNATIVES)
    alternatives = {name: [run_variant(name, ALTERNATIVES[name], 0, quick, root)] for name in names}
    recipe = make_recipe("evomoe", VARIANTS["evomoe"], 0, quick)
    cost = router_cost(recipe, root / "seed0" / "evomoe", 3 if quick else 15)
    groups = {"variants": VARIANTS, "matched": MATCHED, "dense": DENSE}
    result = {group: {name: rows[name] for name in names} for group, names in groups.items()}
    return {"recipe": recipe.to_dict(), **result, "alternatives": alternatives, "router_cost": cost}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/evomoe; quick: a temporary one)")
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.runs or Path(temporary if arguments.quick else "runs/evomoe")
        result = run(arguments.seeds, arguments.quick, root)
        pictured = {name: result["variants"][name][0] for name in ("evomoe", "replicated_linear")}
        draw(root if arguments.quick else FOLDER / "results", pictured)
    publish("evomoe", arguments, result, tables(result))


if __name__ == "__main__":
    main()
