"""AnyExperts against fixed top-k, AdaMoE and dynamic top-p on three real tasks, by the real experts a token uses.

    python benchmarks/anyexperts.py --seeds 3            # all of it, half an hour on one core
    python benchmarks/anyexperts.py --quick              # small sizes, no download

Per task and seed one top-4 model is trained at a constant learning rate; every contestant continues from it, on the
same rows in the same order, while the rate decays to zero. AnyExperts is converted from it at the budget that it then
keeps; AdaMoE gets copies of its gate rows as null experts, as many as bring it to the budget; the threshold of dynamic
top-p is set on training rows, before and after. All have one learning rate and the coefficients of their presets:
nothing was searched for any of them.

Every finished run lies under `--runs` and is read when the same is asked again. `--train-only` leaves out what needs a
quiet machine; call again without it for the times and the report.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from anyexperts_report import draw_curves, draw_pictures, saving_within_noise, summary_tables
from common import FOLDER, interleaved_ms, keep_freed_memory, make_parser, median, publish
from tasks import LANGUAGE_MODEL, Task, autocast, load_task, real_experts, routing_of, score, without_labels
from transformers import AutoConfig, TrainingArguments
from transformers.utils import logging

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.conversion import convert_router, set_objectives
from hf_moe.training.parts import train_only
from hf_moe.training.trainer import HfMoeTrainer


TASKS = ("image", "text_dense", "text")
TOP_K = 4
MOE = {
    "layers": "all",
    "num_experts": 16,
    "num_experts_per_tok": TOP_K,
    "expert_intermediate_size": 64,
    "router": {"name": "top_k"},
    "objectives": {"load_balance": 0.001, "router_z": 0.001},
}
# Mean real experts, as shares of TOP_K. A fixed top-k has whole numbers only.
BUDGETS = {
    "top_k": (1.0, 0.75, 0.5),
    "anyexperts": (1.0, 0.9, 0.75, 0.6),
    "adamoe": (0.75,),
    "dynamic_moe_top_p": (0.75,),
}
QUICK_BUDGETS = {"top_k": (1.0,), "anyexperts": (0.9,), "adamoe": (0.75,), "dynamic_moe_top_p": (0.75,)}
ANYEXPERTS = {"min_slots": 2, "max_slots": 8, "max_virtual_share": 0.2}
ADAMOE_SLOTS = 6
# The model whose budget is moved after training, and where to.
ELASTIC_FROM = 0.9
ELASTIC = (0.6, 0.75, 1.0, 1.25)
# Some 800 tokens a step in every task.
BATCH_SIZES = {"image": 32, "text_dense": 16, "text": 12}
SETTINGS = {"base_steps": 250, "steps": 120, "learning_rate": 2e-3, "importance_scale": 5.0}
QUICK = {**SETTINGS, "base_steps": 3, "steps": 2}
# (tokens, hidden, expert width, experts, layers): experts as wide as those of small models in use.
WIDE = (1024, 576, 1536, 8, 4)
QUICK_WIDE = (64, 64, 96, 8, 2)
REPETITIONS, WIDE_REPETITIONS = 11, 5
PARTS = ("connector", "routers", "experts", "embeddings", "backbone")


def read_or_run(folder: Path, settings: dict[str, Any], run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return what `run` has left in `folder` for these settings, or run it."""
    path = folder / "result.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        known = json.loads(path.read_text())
        if known["settings"] == settings:
            return known["result"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = run(folder)
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=2) + "\n")
    return result


def train(model: Any, task: Task, folder: Path, settings: dict[str, Any], seed: int, base: bool) -> None:
    """Train all but the tower; a base model at a constant rate, another until the rate is zero."""
    train_only(model, PARTS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings["base_steps" if base else "steps"],
        per_device_train_batch_size=BATCH_SIZES[task.name],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant_with_warmup" if base else "cosine",
        warmup_steps=20 if base else 10,
        weight_decay=0.01,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed if base else 1000 + seed,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = HfMoeTrainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        data_collator=task.collate,
        learning_rate_scales={} if base else {"routers/importance_*": settings["importance_scale"]},
    )
    trainer.train()
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    model.save_pretrained(folder)


def start(base: Path, name: str, budget: float, task: Task, seed: int) -> Any:
    """Return the base model with a contestant's router, at a budget."""
    wanted = budget * TOP_K
    experts = MOE["num_experts"]
    fields: dict[str, Any] = {}
    if name == "top_k":
        fields = {"num_experts_per_tok": round(wanted)}
    elif name == "adamoe":
        fields = {
            "num_experts_per_tok": ADAMOE_SLOTS,
            # K E / (E + M) real experts per token.
            "router": {"name": name, "num_null_experts": round(experts * (ADAMOE_SLOTS / wanted - 1))},
            # The paper's 0.01: its shares sum to K, those of this library to 1.
            "objectives": {"null_load": 0.01 * ADAMOE_SLOTS, "router_z": 0.001},
        }
    elif name == "dynamic_moe_top_p":
        # Renormalised as in the model it starts from.
        fields = {
            "router": {"name": name, "norm_topk_prob": True},
            "objectives": {"load_balance": 0.01, "local_entropy": 0.0001},
        }
    config = HfMoeConfig.from_pretrained(base).to_dict()
    config = HfMoeConfig.from_dict({**config, "moe_config": {**config["moe_config"], **fields}})
    torch.manual_seed(seed)
    model = HfMoeForConditionalGeneration.from_pretrained(base, config=config)
    if name == "anyexperts":
        convert_router(model, name, seed=seed, target_slots=wanted, **ANYEXPERTS)
        budgeted = {"load_balance": 0.001, "slot_budget": {"coef": 1.0, "budget": wanted}, "router_z": 0.001}
        set_objectives(model, budgeted)
    elif name == "dynamic_moe_top_p":
        set_threshold(model, task, wanted)
    return model


def set_threshold(model: Any, task: Task, wanted: float) -> None:
    """Set the threshold with which dynamic top-p takes the wanted number of experts on training rows."""
    rows = [task.collate([task.train[index] for index in range(64)])]

    def use(threshold: float) -> float:
        for layer in model.moe_layers().values():
            layer.router.top_p_threshold = threshold
        return real_experts(routing_of(model, rows))

    bisect(use, wanted, 0.0, 1.0)
    model.config.moe_config.router["top_p_threshold"] = next(iter(model.moe_layers().values())).router.top_p_threshold


def bisect(use: Callable[[float], float], wanted: float, low: float, high: float) -> None:
    """Leave `use`, which grows with its argument, called with the argument that gives the wanted value."""
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if use(middle) < wanted else (low, middle)


class Runs:
    """The runs of one task and seed, each in a folder of its own."""

    def __init__(self, root: Path, task: str, seed: int, quick: bool):
        self.folder = root / task / f"seed{seed}"
        self.name, self.seed, self.quick = task, seed, quick
        self.budgets = QUICK_BUDGETS if quick else BUDGETS
        self.settings = QUICK if quick else SETTINGS
        sizes = {"model": LANGUAGE_MODEL, "moe_config": MOE, "batch_size": BATCH_SIZES[task]}
        self.common = {**sizes, "seed": seed, **self.settings}

    @property
    def task(self) -> Task:
        return cached_task(self.name, self.quick)

    def contestants(self) -> list[tuple[str, float]]:
        return [(name, budget) for name, budgets in self.budgets.items() for budget in budgets]

    def base(self) -> Path:
        """Return the folder of the model that all contestants start from."""

        def run(folder: Path) -> dict[str, Any]:
            model, _ = self.task.build(MOE, self.seed)
            train(model, self.task, folder, self.settings, self.seed, base=True)
            return score(model, self.task)

        folder = self.folder / "base"
        read_or_run(folder, self.common, run)
        return folder

    def contestant(self, name: str, budget: float) -> dict[str, Any]:
        base = self.base()

        def run(folder: Path) -> dict[str, Any]:
            model = start(base, name, budget, self.task, self.seed)
            train(model, self.task, folder, self.settings, self.seed, base=False)
            if name == "dynamic_moe_top_p":
                set_threshold(model, self.task, budget * TOP_K)
                model.save_pretrained(folder)
            return score(model, self.task)

        asked = {**self.common, "contestant": name, "budget": budget, "options": ANYEXPERTS, "slots": ADAMOE_SLOTS}
        return read_or_run(self.model_folder(name, budget), asked, run)

    def model_folder(self, name: str, budget: float) -> Path:
        return self.folder / f"{name}-{budget}"

    def model(self, name: str, budget: float) -> Any:
        return HfMoeForConditionalGeneration.from_pretrained(self.model_folder(name, budget))

    def elastic(self) -> dict[str, list[dict[str, Any]]]:
        """Return the scores of trained models whose number of experts is moved at inference."""

        def run(folder: Path) -> dict[str, Any]:
            model, rows = self.model("anyexperts", ELASTIC_FROM), []
            for budget in ELASTIC:
                model.set_expert_budget(budget * TOP_K)
                rows.append({"budget": budget, **score(model, self.task)})
            fixed, fixed_rows = self.model("top_k", 1.0), []
            for slots in (2, 3):
                for layer in fixed.moe_layers().values():
                    layer.router.spec = replace(layer.router.spec, num_experts_per_tok=slots)
                fixed_rows.append({"budget": slots / TOP_K, **score(fixed, self.task)})
            return {"anyexperts": rows, "top_k": fixed_rows}

        return read_or_run(self.folder / "elastic", {**self.common, "from": ELASTIC_FROM, "to": ELASTIC}, run)

    def times(self) -> dict[str, dict[str, float]]:
        """Return the seconds of a training step and of a prefill of every model, interleaved."""

        def run(folder: Path) -> dict[str, Any]:
            repetitions = 1 if self.quick else REPETITIONS
            models = {f"{name}-{budget}": self.model(name, budget) for name, budget in self.contestants()}
            train_rows = [self.task.train[index] for index in range(BATCH_SIZES[self.name])]
            prompts = next(iter(self.task.test.values()))[0]
            return timed(models, self.task.collate(train_rows), without_labels(prompts), autocast, repetitions)

        return read_or_run(
            self.folder / "times", {**self.common, "budgets": self.budgets, "repetitions": REPETITIONS}, run
        )


@cache
def cached_task(name: str, quick: bool) -> Task:
    return load_task(name, quick)


def timed(
    models: dict[str, Any], batch: dict, prompts: dict, cast: Callable, repetitions: int
) -> dict[str, dict[str, float]]:
    """Time whole training steps and prefills of models side by side; the weights stay as they are."""

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        with cast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def prefill(model: Any) -> None:
        with cast():
            model(**prompts, logits_to_keep=1)

    steps = {}
    for name, model in models.items():
        train_only(model, PARTS)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps[name] = partial(step, model.train(), torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True))
    times = {"step_seconds": interleaved_ms(steps, repetitions)}
    prefills = {name: partial(prefill, model.eval()) for name, model in models.items()}
    times["prefill_seconds"] = interleaved_ms(prefills, repetitions)
    return {
        name: {kind: median(value / 1000 for value in values[name]) for kind, values in times.items()}
        for name in models
    }


def wide_times(quick: bool) -> list[dict[str, Any]]:
    """Time a stack of wide experts at every budget, with random bfloat16 weights and tokens of unequal importance."""
    tokens, hidden, width, experts, layers = QUICK_WIDE if quick else WIDE
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 2048}
    text = AutoConfig.for_model(**{**LANGUAGE_MODEL, **sizes})
    moe = {**MOE, "num_experts": experts, "expert_intermediate_size": width}
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(2048, (tokens // 64, 64))}
    models, rows = {}, {}
    budgets = (QUICK_BUDGETS if quick else BUDGETS)["anyexperts"]
    for name, budget in [("top_k", 1.0)] + [("anyexperts", budget) for budget in budgets]:
        model = HfMoeForConditionalGeneration._from_config(HfMoeConfig(text_config=text, moe_config=moe))
        if name == "anyexperts":
            convert_router(model, name, **ANYEXPERTS)
            for layer in model.moe_layers().values():
                torch.nn.init.normal_(layer.router.importance_out)
            spend(model, batch, budget * TOP_K)
        key = f"{name}-{budget}"
        models[key] = model.bfloat16()
        for layer in model.moe_layers().values():
            layer.gate.float()
        real = real_experts(routing_of(model, [batch]))
        rows[key] = {"contestant": name, "budget": budget, "real_experts_per_token": round(real, 4)}
    seconds = timed(
        models, {**batch, "labels": batch["input_ids"]}, batch, nullcontext, 1 if quick else WIDE_REPETITIONS
    )
    return [{**rows[key], **seconds[key]} for key in rows]


def wide_rows(root: Path, quick: bool) -> list[dict[str, Any]]:
    settings = {"sizes": QUICK_WIDE if quick else WIDE, "options": ANYEXPERTS, "moe_config": MOE}
    return read_or_run(root / "wide", settings, lambda folder: {"rows": wide_times(quick)})["rows"]


def spend(model: Any, batch: dict[str, torch.Tensor], wanted: float) -> None:
    """Move the slot target to where the tokens of a batch use the wanted number of real experts."""

    def use(target: float) -> float:
        model.set_expert_budget(target)
        return real_experts(routing_of(model, [batch]))

    bisect(use, wanted, ANYEXPERTS["min_slots"], ANYEXPERTS["max_slots"])


def task_rows(runs: list[Runs]) -> dict[str, Any]:
    """Return the rows of one task: every contestant, budget and seed."""
    rows: dict[str, Any] = {name: [] for name in BUDGETS}
    for run in runs:
        seconds = run.times()
        for name, budget in run.contestants():
            row = {"seed": run.seed, "budget": budget, **run.contestant(name, budget)}
            rows[name].append({**row, **seconds[f"{name}-{budget}"]})
    rows["elastic"] = [{"seed": run.seed, **run.elastic()} for run in runs]
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/anyexperts"), help="default: runs/anyexperts")
    parser.add_argument("--train-only", action="store_true", help="no times and no report")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    keep_freed_memory()
    root = arguments.runs / ("quick" if arguments.quick else "full")
    # Seeds outermost: what an interrupted run leaves is complete for its seeds.
    runs = [Runs(root, task, seed, arguments.quick) for seed in range(arguments.seeds) for task in TASKS]
    for run in runs:
        for name, budget in run.contestants():
            result = run.contestant(name, budget)
            print(run.name, run.seed, name, budget, result, flush=True)
        run.elastic()
    if arguments.train_only:
        return
    tasks = {task: task_rows([run for run in runs if run.name == task]) for task in TASKS}
    for rows in tasks.values():
        rows |= saving_within_noise(rows)
    wide = wide_rows(root, arguments.quick)
    if arguments.json or not arguments.quick:
        folder = arguments.json.parent if arguments.json else FOLDER / "results"
        draw_curves(tasks, folder / "anyexperts_curves.png")
        image = next(run for run in runs if run.name == "image")
        draw_pictures(image.task, image.model("anyexperts", ELASTIC_FROM), folder)
    settings = {**(QUICK if arguments.quick else SETTINGS), "moe_config": MOE, "options": ANYEXPERTS}
    result = {"settings": settings, "tasks": list(TASKS), **tasks, "wide": wide}
    publish("anyexperts", arguments, result, summary_tables(tasks, wide))


if __name__ == "__main__":
    main()
