"""Systems against each other on two small tasks, by `hf-moe compare`.

    OMP_NUM_THREADS=1 python benchmarks/compare.py --seeds 3    # routers; an hour or two on one core
    OMP_NUM_THREADS=1 python benchmarks/compare.py --seeds 3 --group compare_experts    # experts, attention, layers
    OMP_NUM_THREADS=1 python benchmarks/compare.py --seeds 3 --group compare_adapters    # LoRA experts, ten minutes
    python benchmarks/compare.py --quick                        # two systems, two steps

`shapes`: the shape or the colour of what a picture of easy-VQA shows. `emoji`: the category and the group of a Noto
emoji, of which every third is held out. The recipes are in `benchmarks/recipes`. Every finished run lies under
`--runs` and is read when the same is asked again, so that systems can be added.
"""

import argparse
from pathlib import Path
from typing import Any

from common import FOLDER, commit, make_parser, publish
from datasets import DatasetDict
from tasks import emoji_rows, shape_rows

from hf_moe.training.comparison import Comparison, compare
from hf_moe.training.comparison_report import comparison_table, conditions, draw_comparison
from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import run_recipe


# The first of a group is what the others are measured against.
GROUPS = {
    "compare": (
        "top_k", "moiie", "smar", "ming_multi_router", "evomoe_dtr", "moma", "expert_choice", "anyexperts", "adamoe",
        "dynamic_moe_top_p", "deepseek_v3", "chain_of_experts",
    ),
    "compare_experts": (
        "top_k", "aoe", "grove_moe", "mole_latent", "mote_ternary", "hmoe_heterogeneous",
        "chain_of_experts", "llava", "mot_transformers", "mixture_of_depths",
    ),
    "compare_adapters": ("lora", "omni_smola", "top_k"),
}  # fmt: skip
# All have two of eight experts per token, except where another number is what the system is about.
OWN_FIELDS = {
    "adamoe": ["num_experts_per_tok=4"],  # half of them on null experts
    "anyexperts": ["router={name: anyexperts, min_slots: 1, max_slots: 4, max_virtual_share: 0.2}"],
    "evomoe_dtr": ["num_experts_per_tok=1"],
    "grove_moe": ["experts={name: grove_moe, adjugate_size: 16}"],  # a sixth of the width, as in the paper
    # Its variant with equal numbers of experts for all tokens.
    "hmoe_heterogeneous": [
        "router=top_k",
        "objectives={load_balance: {coef: 0.01, by_width: true, shares: tokens}}",
    ],
    "moma": ["num_experts_per_tok=1"],
    "mote_ternary": ["num_experts_per_tok=1"],  # beside the shared one
}
# Of LoRA experts; a scaling of 1 for all.
ADAPTER_FIELDS = {
    "lora": ["r=22", "lora_alpha=22"],
    "omni_smola": ["num_experts=12"],  # four of each branch, in place of 16
}
# The base of adapters is trained for a quarter of the steps, without experts.
BASE_STEPS = 60
TASKS = ("shapes", "emoji")
QUICK = ["training.max_steps=2", "data.train.limit=32", "data.eval.limit=16"]


def write_rows(task: str, folder: Path, quick: bool) -> None:
    """Write the rows of a task, unless they are there."""
    if not (folder / "dataset_dict.json").is_file():
        train, test = (
            shape_rows((64, 32) if quick else (3000, 1000)) if task == "shapes" else emoji_rows(3, groups=True)
        )
        DatasetDict(train=train, test=test).save_to_disk(str(folder))


def train_base(task: str, folder: Path, overrides: list[str]) -> Path:
    """Return the checkpoint of a dense decoder that has seen a little of a task; train it if there is none."""
    if not (folder / "checkpoint").is_dir():
        given = [*overrides, "model.moe_config={layers: []}", f"training.max_steps={BASE_STEPS}", "data.eval=null"]
        recipe = load_recipe(str(FOLDER / "recipes" / f"compare_{task}.yaml"), [*given, "evaluation={}"])
        run_recipe(recipe, folder)
    return folder / "checkpoint"


def compare_on(task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the comparison of a task."""
    quick = "-quick" if arguments.quick else ""
    rows = arguments.runs / "rows" / f"{task}{quick}"
    write_rows(task, rows, arguments.quick)
    systems = (
        arguments.systems.split(",")
        if arguments.systems
        else list(GROUPS[arguments.group])[: 2 if arguments.quick else None]
    )
    recipe, own = f"compare_{task}", OWN_FIELDS
    overrides = [f"data.{part}={{path: {rows}}}" for part in ("train", "eval")] + QUICK * arguments.quick
    folder = arguments.runs / f"{task}{quick}"
    if arguments.group == "compare_adapters":
        base = train_base(task, arguments.runs / "base" / f"{task}{quick}", overrides)
        recipe, own, folder = arguments.group, ADAPTER_FIELDS, arguments.runs / f"adapters-{task}{quick}"
        overrides += [f"model.base={base}", f"name=compare_adapters_{task}"]
    return compare(
        Comparison(
            recipe=str(FOLDER / "recipes" / f"{recipe}.yaml"),
            systems=systems,
            folder=folder,
            seeds=arguments.seeds,
            overrides=overrides,
            overrides_of={name: given for name, given in own.items() if name in systems},
            provenance={"commit": commit()},
        )
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--group", choices=GROUPS, default="compare", help="which systems, and where they are kept")
    parser.add_argument("--systems", help="names of systems, separated by commas (default: all of the group)")
    arguments = parser.parse_args()
    found, tables = {}, []
    for task in TASKS[: 1 if arguments.quick else None]:
        found[task] = compare_on(task, arguments)
        tables.append(f"### Systems, {task}\n\n{conditions(found[task])}\n\n{comparison_table(found[task])}")
        pictures = FOLDER / "results" if arguments.json is None and not arguments.quick else arguments.runs
        draw_comparison(found[task], pictures / f"{arguments.group}_{task}.png")
    publish(arguments.group, arguments, found, "\n\n".join(tables))


if __name__ == "__main__":
    main()
