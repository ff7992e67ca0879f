"""Two tasks that contradict each other on one base: single LoRA against routed LoRA experts.

    OMP_NUM_THREADS=1 python benchmarks/lora_tasks.py --seeds 3    # half an hour on one core
    python benchmarks/lora_tasks.py --quick                        # two steps on a tiny random base

Every cell is a run of the recipe `smollm2_opposite_tasks`, which adapts SmolLM2-135M-Instruct. Both tasks ask the same
questions ("Is a spoon a tool?"), and the instruction before the question says which of two opposite answers is right.
No word of the test questions occurs in training. All contestants have the same number of steps and, but for the
routers, of trainable parameters:

- `lora`: one LoRA of rank r for both tasks.
- `token`: two experts of rank r / 2; a learned router (`top_k`) picks one for each token.
- `sequence`: the same experts; a learned router picks one for each row, from the text of its instruction.
- `condition`: the same experts; the number of the task picks the expert.
- `alone`: one LoRA of rank r / 2 per task, trained on the rows of its task alone, in batches half as large.

A finished cell is kept under `runs/lora_tasks` and read, not run again.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import keep_freed_memory, make_parser, markdown_table, publish
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.data import load_rows
from hf_moe.data.opposite_tasks import INSTRUCTIONS
from hf_moe.training.recipe import Recipe, load_recipe
from hf_moe.training.run import run_recipe


RECIPE = "smollm2_opposite_tasks"
ROWS = 16


def single(rank: int) -> list[str]:
    """Return what makes the recipe's adapter a plain LoRA of this rank; the scaling of all contestants is 2."""
    fields = {"router": "constant", "num_experts": 1, "r": rank, "lora_alpha": 2 * rank}
    return [f"adapter.{name}={value}" for name, value in fields.items()]


ARMS = {
    "lora": single(8),
    "token": ["adapter.router=top_k"],
    "sequence": [],
    "condition": ["adapter.router=condition"],
}
ARMS |= {
    f"alone_{task}": [
        *single(4),
        f"data.train.where={{question_type: {task}}}",
        f"data.eval.where={{question_type: {task}}}",
        f"training.per_device_train_batch_size={ROWS // 2}",
    ]
    for task in INSTRUCTIONS
}


def tiny_base(folder: Path) -> list[str]:
    """Save a small random decoder and return what makes the recipe train two steps on it."""
    rows = load_rows("opposite_tasks")
    tokenizer = train_word_tokenizer(turn["content"][0]["text"] for row in rows for turn in row["messages"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    return [
        f"model={{base: {folder}}}",
        "adapter.layers_to_transform=[1, 2]",
        f"adapter.router.end_token_id={end}",
        "training.max_steps=2",
        "training.logging_steps=1",
        "data.eval.limit=32",
    ]


def cell_recipe(arm: str, seed: int, quick: list[str]) -> Recipe:
    """Return the recipe of one cell."""
    return load_recipe(RECIPE, [*quick, *ARMS[arm], f"seed={seed}"])


def cell(arm: str, seed: int, runs: Path, quick: list[str]) -> dict[str, Any]:
    """Return the result of one cell, from the report of an earlier run of the same recipe if there is one."""
    recipe = cell_recipe(arm, seed, quick)
    path = runs / f"{arm}-{seed}" / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if report.get("config") != json.loads(json.dumps(recipe.to_dict())):
        report = run_recipe(recipe, path.parent)
    losses = [entry["loss"] for entry in report["log_history"] if "loss" in entry]
    result = {
        "seed": seed,
        "contestant": arm,
        "trainable": sum(report["trainable_parameters"].values()),
        "routers": report["trainable_parameters"].get("routers", 0),
        "final_loss": round(losses[-1], 4),
        "seconds": report["train_seconds"],
        **report["accuracy_by_question_type"],
        "base": report["base_accuracy_by_question_type"],
    }
    print(json.dumps(result), flush=True)
    return result


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the accuracies of every contestant, mean and range over the seeds."""
    seeds = sorted({row["seed"] for row in rows})
    by_cell = {(row["contestant"], row["seed"]): row for row in rows}
    lines = [{"contestant": "the base itself", "trainable": 0, "routers": 0, **_scores([rows[0]["base"]])}]
    for arm in ("lora", "token", "sequence", "condition", "alone"):
        parts = [f"alone_{task}" for task in INSTRUCTIONS] if arm == "alone" else [arm]
        found = [[by_cell[part, seed] for part in parts] for seed in seeds]
        counts = {name: sum(row[name] for row in found[0]) for name in ("trainable", "routers")}
        merged = [{task: row[task] for row in cells for task in INSTRUCTIONS if task in row} for cells in found]
        lines.append({"contestant": arm, **counts, **_scores(merged)})
    return markdown_table(lines)


def _scores(seeds: list[dict[str, Any]]) -> dict[str, str]:
    """Return mean and range of the accuracies on both tasks and of their mean."""
    values = {task: [seed[task] for seed in seeds] for task in INSTRUCTIONS}
    values["both"] = [statistics.mean(pair) for pair in zip(*values.values(), strict=True)]
    return {
        name: f"{statistics.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})" for name, found in values.items()
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/lora_tasks"), help="folder of the finished cells")
    arguments = parser.parse_args()
    keep_freed_memory()
    runs = arguments.runs / "quick" if arguments.quick else arguments.runs
    quick = tiny_base(runs / "base") if arguments.quick else []
    rows = [cell(arm, seed, runs, quick) for seed in range(arguments.seeds) for arm in ARMS]
    publish("lora_tasks", arguments, {"recipe": RECIPE, "rows": rows}, summary(rows))


if __name__ == "__main__":
    main()
