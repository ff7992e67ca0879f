"""Systems against each other in one command, `hf-moe compare`: same start, data order, steps and active parameters.

A contestant is what `hf-moe train RECIPE --set model.system=KEY` would build, so what the recipe's `moe_config` says
holds for all of them, and the rest is each system's own. Then what would favour one of them is made equal:

- **Start.** Per seed, every parameter outside of the routers that the first system has too, under the same name and in
  the same shape, starts from its value there. Routers start as their paper says, and experts of another width from
  values of their own. Each run records how many parameters of each part that are.
- **Data order and steps** are those of the recipe; the digest of all token ids, in the order in which the model saw
  them, has to be the same for all systems of a seed.
- **Active parameters.** The width of the experts, in steps of `WIDTH_STEP`, is the one at which the decoder parameters
  that work on a mean token at the start are nearest to the first system's. Banks of several widths keep their
  proportions; of a system without routed feed-forwards it is the width of the dense ones. Where a router uses more or
  fewer experts as it learns, the table says where it ended.

A recipe with an adapter compares LoRA experts on its frozen base in the same way: what its `adapter` says holds for
all systems, and the rank of the experts is what is fitted, see `comparison_adapters.py`.

A run that is finished is read again by the fingerprint of what ran, so that a comparison goes on where it was stopped,
and systems can be added to it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..analysis.routing_statistics import active_parameters
from ..configuration.checks import unknown_name_message
from ..configuration.systems import list_systems, load_system
from ..data import VisionLanguageCollator
from ..evaluation.report import machine, versions
from ..modeling.mechanisms import mechanism_names
from .checks import named
from .comparison_adapters import fit_adapter, initial_adapter, train_adapter, with_rank
from .comparison_report import comparison_table, plan_table, write_comparison
from .comparison_run import COUNTED_ROWS, build, initial_state, mean_active, train_contestant
from .job import autocast, say
from .recipe import load_recipe
from .run import collect_routing, load_sources
from .sections import Recipe


# Rows of experts that are a multiple of 8 numbers long suit every backend.
WIDTH_STEP = 8
TOLERANCE = 0.03
# What every system of a comparison would get in place of its own.
OF_THE_SYSTEM = ("router", "experts", "block", "attention", "layer", "expert_banks")
OF_THE_ADAPTER = ("system", "variant", "router", "router_input", "experts", "ffn_experts", "num_experts_per_tok", "r")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Args:
        recipe: see [`load_recipe`]; with a model, `data.eval` and `training.max_steps`, and without stages.
        systems: keys of systems that have the form `model`, or names of routers; the first is what the others are
            measured against.
        folder: of the runs and the results.
        seeds: how many, from 0 on.
        overrides: `key=value` over the recipe.
        overrides_of: system -> `key=value` over its `moe_config`; an `expert_intermediate_size` is kept as given.
        tolerance: by how much the active parameters at the start may differ, relative to the first system's.
        provenance: kept with every run that is trained now, such as the commit.
    """

    recipe: str
    systems: list[str]
    folder: Path
    seeds: int = 3
    overrides: list[str] = field(default_factory=list)
    overrides_of: dict[str, list[str]] = field(default_factory=dict)
    tolerance: float = TOLERANCE
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("systems", len(self.systems)), ("seeds", self.seeds)):
            if value < 1:
                raise ValueError(f"A comparison has at least one of {name}, got {value}.")
        twice = sorted({name for name in self.systems if self.systems.count(name) > 1})
        if twice:
            raise ValueError(f"The systems {', '.join(twice)} are named twice.")
        for name in self.overrides_of:
            if name not in self.systems:
                raise ValueError(unknown_name_message("system of --set-for", name, self.systems))


@dataclass(frozen=True)
class Contestant:
    """A system in the recipe, with the width of its experts.

    Attributes:
        name: of the system or router.
        recipe: of seed 0.
        content: what decides a run besides: the fields of the record.
        facts: what is known before any training: `layers`, `num_experts`, `num_experts_per_tok`, `width`, `active` by
            modality, `mean_active`.
    """

    name: str
    recipe: Recipe
    content: dict[str, Any]
    facts: dict[str, Any]

    def seeded(self, seed: int) -> Recipe:
        """Return the recipe of a run."""
        return replace(self.recipe, seed=seed)


def compare(comparison: Comparison) -> dict[str, Any]:
    """Run what is missing of a comparison, write table and picture, and return what `comparison.json` holds.

    Raises:
        ValueError: if a system cannot be compared; it is named, and nothing is trained.
        RuntimeError: if systems saw other data, or a frozen parameter moved.
    """
    contestants, rows = plan(comparison)
    runs: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    steps = contestants[0].recipe.training["max_steps"]
    adapters = contestants[0].recipe.adapter is not None
    begin, train = (initial_adapter, train_adapter) if adapters else (initial_state, train_contestant)
    with tqdm(total=len(contestants) * comparison.seeds * steps, unit="step", desc="Comparing") as progress:
        for seed in range(comparison.seeds):
            start: dict[str, torch.Tensor] = {}
            for contestant in contestants:
                progress.set_postfix_str(f"{contestant.name}, seed {seed}")
                path, fingerprint = _run_file(comparison, contestants, contestant, seed)
                run = _kept(path, fingerprint)
                if run is None:
                    start = start or begin(contestants[0].seeded(seed), rows, comparison.folder)
                    try:
                        run = train(contestant.seeded(seed), rows, comparison.folder, start, progress)
                    except BaseException as error:
                        error.add_note(f"This was {contestant.name} with seed {seed}; the same command goes on there.")
                        raise
                    run = {"seed": seed, **run, "versions": versions(), **comparison.provenance}
                    _keep(path, fingerprint, run)
                else:
                    progress.update(steps)
                runs[contestant.name].append(run)
            _refuse_other_data(seed, runs)
    result = {
        "recipe": contestants[0].recipe.to_dict(),
        "baseline": contestants[0].name,
        "tolerance": comparison.tolerance,
        "seeds": comparison.seeds,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "systems": {
            contestant.name: {
                **contestant.facts,
                "adapter" if adapters else "moe_config": contestant.content,
                "runs": runs[contestant.name],
            }
            for contestant in contestants
        },
    }
    write_comparison(comparison.folder, result)
    return result


def plan(comparison: Comparison) -> tuple[list[Contestant], dict[str, Any]]:
    """Return the contestants with their widths fitted, and the rows, after all that can refuse one of them.

    Raises:
        ValueError: naming every system that cannot be compared, and why; or what the recipe lacks.
    """
    recipe = load_recipe(comparison.recipe, comparison.overrides)
    _check_recipe(recipe, comparison.recipe)
    rows = load_sources(recipe)
    read, refusals = {}, []
    for name in comparison.systems:
        try:
            read[name] = _read(comparison, name)
        except ValueError as error:
            refusals.append(f"{name}: {error}")
    contestants: list[Contestant] = []
    for name, (recipe, content) in read.items():
        first = contestants[0] if contestants else None
        if first is None and name != comparison.systems[0]:
            break  # nothing to fit to
        target = None if first is None else first.facts["mean_active"]
        job = {"recipe": recipe.to_dict(), "record": content, "tolerance": comparison.tolerance, "target": target}
        fingerprint = _fingerprint(job)
        path = comparison.folder / name / "plan.json"
        facts = _kept(path, fingerprint)
        if facts is None:
            say(f"Fitting the experts of {name}")
            size = "expert_intermediate_size" if recipe.adapter is None else "r"
            fixed = first is None or size in _own_names(comparison, name)
            try:
                if recipe.adapter is None:
                    facts = fit(recipe, rows, comparison, target, fixed)
                else:
                    facts = fit_adapter(recipe, rows, comparison.folder, target, comparison.tolerance, fixed)
            except ValueError as error:
                refusals.append(f"{name}: {error}")
                continue
            _keep(path, fingerprint, facts)
        contestants.append(Contestant(name, _sized(recipe, facts["sizes"]), content, facts))
    if refusals:
        raise ValueError("Not all of these can be compared. " + " ".join(refusals))
    return contestants, rows


def fit(
    recipe: Recipe, rows: dict[str, Any], comparison: Comparison, target: float | None, fixed: bool
) -> dict[str, Any]:
    """Return the facts of a contestant, with the width at which `target` parameters are active on a mean token.

    Args:
        target: of the first system; `None` for that itself.
        fixed: keep the width that there is.

    Raises:
        ValueError: if the active parameters cannot be counted, or not be brought near enough.
    """
    with named("its model on this recipe"):
        job = build(recipe, rows, comparison.folder)
    blocks = job.model.moe_blocks()
    config = job.model.config
    if any(block.spec.place for block in blocks.values()):
        raise ValueError("it mixes experts outside of the decoder, whose parameters are not counted.")
    collator = VisionLanguageCollator(job.processor, feature_cache=job.features, config=config)
    with named("its routing on this recipe"), autocast(job.model, recipe.evaluation):
        statistics = collect_routing(job.model, collator, rows["eval"], limit=COUNTED_ROWS)

    def at(width: int) -> dict[str, int]:
        with named(f"its model with experts of width {width}"):
            model = build(_sized(recipe, sizes_at(width)), rows, comparison.folder).model
        return active_parameters(model, statistics)

    width, sizes_at = _sizes(job.model)
    sizes = sizes_at(width)
    active = active_parameters(job.model, statistics)
    if fixed or target is None:
        sizes = {}
    else:
        here = mean_active(active, statistics)
        # Far from it, so that the rounding of many widths does not count.
        other = width // 2
        slope = (here - mean_active(at(other), statistics)) / (width - other)
        if slope <= 0:
            raise ValueError("its experts have widths of their own, which cannot be fitted to the first system's.")
        width = max(WIDTH_STEP, WIDTH_STEP * round((width + (target - here) / slope) / WIDTH_STEP))
        active = at(width)
        reached = mean_active(active, statistics) / target
        # Some kinds grow in steps, or bend with their width.
        while abs(reached - 1) > comparison.tolerance:
            nearer = max(WIDTH_STEP, width + (WIDTH_STEP if reached < 1 else -WIDTH_STEP))
            there = at(nearer)
            share = mean_active(there, statistics) / target
            if abs(share - 1) >= abs(reached - 1):
                break
            width, active, reached = nearer, there, share
        sizes = sizes_at(width)
        if abs(reached - 1) > comparison.tolerance:
            raise ValueError(
                f"with experts of width {width} its active parameters are {reached:.3f} times {target:,.0f}, those of "
                f"{comparison.systems[0]}: allow it by --tolerance, or choose its sizes by --set-for."
            )
    first = next(iter(blocks.values()), None)
    return {
        "layers": sorted(job.model.moe_layers()),
        "num_experts": None if first is None else first.spec.num_experts,
        "num_experts_per_tok": None if first is None else first.spec.num_experts_per_tok,
        "width": width,
        "sizes": sizes,
        "active": active,
        "mean_active": mean_active(active, statistics),
    }


def _sizes(model: Any) -> tuple[int, Callable[[int], dict[str, Any]]]:
    """Return the mean width of a model's experts, and what gives a recipe's model another: section -> its fields.

    Banks of several widths keep their proportions. Without routed feed-forwards, it is the width of the dense ones.
    """
    config, blocks = model.config, model.moe_blocks()
    if not blocks:
        text = config.get_text_config(decoder=True)
        return text.intermediate_size, lambda width: {"language_model": {"intermediate_size": width}}
    banks = config.moe_config.expert_banks or {}
    if not all(isinstance(bank, dict) and bank.get("intermediate_size") for bank in banks.values()) or not banks:
        own = next(iter(blocks.values())).spec.expert_intermediate_size
        return own, lambda width: {"moe_config": {"expert_intermediate_size": width}}
    experts = sum(bank["num_experts"] for bank in banks.values())
    mean = sum(bank["num_experts"] * bank["intermediate_size"] for bank in banks.values()) / experts

    def scaled(width: int) -> dict[str, Any]:
        factor = width / mean
        sizes = {name: max(1, round(bank["intermediate_size"] * factor)) for name, bank in banks.items()}
        return {
            "moe_config": {
                "expert_banks": {name: {**bank, "intermediate_size": sizes[name]} for name, bank in banks.items()}
            }
        }

    return round(mean), scaled


def _read(comparison: Comparison, name: str) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a system, and the fields of its record.

    Raises:
        ValueError: if there is no such system, or it has no form that can be compared.
    """
    keys, routers = [record.key for record in list_systems()], mechanism_names("router")
    if name not in (*keys, *routers):
        raise ValueError(unknown_name_message("system or router", name, list(dict.fromkeys([*keys, *routers]))))
    own = comparison.overrides_of.get(name, ())
    if load_recipe(comparison.recipe, comparison.overrides).adapter is not None:
        content, place = {"router": {"name": name}}, "adapter"
        chosen = [f"adapter.router={name}"]
        if name not in routers or name in [record.key for record in list_systems("adapter")]:
            content, chosen = load_system(name).fields("adapter"), [f"adapter.system={name}"]
    elif name in keys:
        content, place = load_system(name).fields("model"), "model.moe_config"
        # What the recipe says of MoE layers holds for systems that have some.
        chosen = [f"model.system={name}", *["model.moe_config.layers=[]"] * (content.get("layers") == [])]
        chosen += ["model.moe_config.num_experts=null"] * ("expert_banks" in content)
    else:
        content, place = {"router": {"name": name}}, "model.moe_config"
        chosen = ["model.system=null", f"model.moe_config.router={name}"]
    chosen += [f"{place}.{override}" for override in own]
    recipe = load_recipe(comparison.recipe, [*comparison.overrides, *chosen])
    # One line of log a run, and nothing that a finished run does not need.
    training = {**recipe.training, "save_strategy": "no", "logging_steps": recipe.training["max_steps"]}
    evaluation = {key: value for key, value in recipe.evaluation.items() if key in ("batch_size", "bf16")}
    return replace(recipe, training=training, evaluation=evaluation, seed=0, card={}), content


def _check_recipe(recipe: Recipe, source: str) -> None:
    if recipe.stages:
        raise ValueError(f"The recipe {source} has stages: a comparison needs one that trains in one go.")
    if recipe.data.get("eval") is None or recipe.training.get("max_steps", -1) < 1:
        raise ValueError(f"The recipe {source} needs data.eval, to score, and training.max_steps, equal for all.")
    if recipe.adapter is None:
        place, given = "moe_config", recipe.model.get("moe_config") or {}
    else:
        place, given = "adapter", recipe.adapter
    taken = [name for name in (OF_THE_SYSTEM if recipe.adapter is None else OF_THE_ADAPTER) if name in given]
    if taken:
        raise ValueError(
            f"The recipe {source} sets {', '.join(taken)} in its {place}, which every system would get in place of "
            "its own: take it out."
        )


def _own_names(comparison: Comparison, name: str) -> list[str]:
    return [override.partition("=")[0] for override in comparison.overrides_of.get(name, ())]


def _sized(recipe: Recipe, sizes: dict[str, Any]) -> Recipe:
    """Return a recipe whose model or adapter has other sizes, see [`_sizes`]."""
    if recipe.adapter is not None:
        return with_rank(recipe, sizes)
    model = dict(recipe.model)
    for section, fields in sizes.items():
        if section == "language_model" and not isinstance(model.get(section), dict):
            raise ValueError("it has no routed feed-forwards, and the width of a trained decoder cannot be changed.")
        model[section] = {**(model.get(section) or {}), **fields}
    return replace(recipe, model=model)


def _refuse_other_data(seed: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    orders = {name: done[seed]["data_order"] for name, done in runs.items()}
    first = next(iter(orders.values()))
    others = [name for name, order in orders.items() if order != first]
    if others:
        raise RuntimeError(
            f"With seed {seed}, {', '.join(others)} saw other data than {next(iter(orders))}, or in another order: the"
            " data have changed since. Compare in a new folder."
        )


def _run_file(
    comparison: Comparison, contestants: list[Contestant], contestant: Contestant, seed: int
) -> tuple[Path, str]:
    """Return where a run is kept, and the fingerprint of what decides it."""
    job = {"recipe": contestant.seeded(seed).to_dict(), "record": contestant.content}
    first = {"recipe": contestants[0].seeded(seed).to_dict(), "record": contestants[0].content}
    return comparison.folder / contestant.name / f"seed{seed}.json", _fingerprint({**job, "first": first})


def _fingerprint(job: dict[str, Any]) -> str:
    return blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=16).hexdigest()


def _kept(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return what an earlier call has left of the same; `None` where there is nothing."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["result"] if content["fingerprint"] == fingerprint else None


def _keep(path: Path, fingerprint: str, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"fingerprint": fingerprint, "result": result}, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hf-moe compare`."""
    parser.add_argument(
        "--systems", required=True, metavar="A,B,...", help="keys of `hf-moe list systems`, or names of routers; the "
        "others are measured against the first",
    )  # fmt: skip
    parser.add_argument("--recipe", required=True, help="a YAML file or a name, as of `hf-moe train`")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default: 3)")
    parser.add_argument("--output-dir", help="of runs and results; default: runs/compare-<name of the recipe>")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="for all systems: training.max_steps=10",
    )  # fmt: skip
    parser.add_argument(
        "--set-for", dest="overrides_of", action="append", default=[], metavar="SYSTEM:KEY=VALUE",
        help="in the moe_config of one system: adamoe:num_experts_per_tok=4",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="SHARE",
        help=f"by how much active parameters may differ at the start (default: {TOLERANCE})",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show what would run, with its parameters; train nothing")


def run(args: argparse.Namespace) -> int:
    """Run `hf-moe compare`."""
    overrides_of: dict[str, list[str]] = {}
    for given in args.overrides_of:
        name, separator, override = given.partition(":")
        if not separator:
            raise ValueError(f"--set-for {given!r}: expected SYSTEM:KEY=VALUE, as in adamoe:num_experts_per_tok=4.")
        overrides_of.setdefault(name, []).append(override)
    folder = args.output_dir or Path("runs") / f"compare-{load_recipe(args.recipe, args.overrides).name}"
    comparison = Comparison(
        recipe=args.recipe,
        systems=[name.strip() for name in args.systems.split(",")],
        folder=Path(folder),
        seeds=args.seeds,
        overrides=args.overrides,
        overrides_of=overrides_of,
        tolerance=args.tolerance,
    )
    if args.list:
        contestants, _ = plan(comparison)
        finished = {
            contestant.name: sum(
                _kept(*_run_file(comparison, contestants, contestant, seed)) is not None for seed in range(args.seeds)
            )
            for contestant in contestants
        }
        print(plan_table({item.name: item.facts for item in contestants}, finished, args.seeds))
        return 0
    result = compare(comparison)
    print(comparison_table(result))
    say(f"Table, numbers and picture: {folder}/comparison.md, .json and .png")
    return 0
