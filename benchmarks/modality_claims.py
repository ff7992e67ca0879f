"""What systems claim about modalities, as directions: with the mechanism and without, on images and prose.

    OMP_NUM_THREADS=1 python benchmarks/modality_claims.py --seeds 3      # half an hour on one core
    python benchmarks/modality_claims.py --only smar vlmo                 # some of the systems
    python benchmarks/modality_claims.py --quick                          # few rows, nothing is fetched

A small decoder is trained from scratch on rows with an image (the shape or the colour in a picture of easy-VQA, the
category of an emoji; a frozen EfficientNet-Lite0 sees them) and on rows of prose (Python's own documentation), which
share one vocabulary. All arms of a seed see the same rows in the same order at the same learning rate. Experts are so
wide that a token computes as much as in the dense model. Coefficients are those of the records; nothing was tuned. A
claim holds in a seed where the measure differs in the direction that the paper says.

Every finished arm lies under `--runs` and is read when the same is asked again.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anyexperts import read_or_run
from common import keep_freed_memory, make_parser, markdown_table, publish
from datasets import concatenate_datasets
from tasks import (
    IMAGE_MODEL,
    LANGUAGE_MODEL,
    autocast,
    documents,
    emoji_rows,
    shape_rows,
    train_byte_tokenizer,
    without_labels,
)
from torch.nn import functional as F
from transformers.utils import logging

from hf_moe.analysis.routing_statistics import RoutingStatistics
from hf_moe.configuration.systems import load_system
from hf_moe.construction.build import build_model
from hf_moe.data import FeatureCache
from hf_moe.modeling.context import routers_of
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.inputs import conditions_read
from hf_moe.training.parts import train_only


PARTS = ("connector", "routers", "experts", "embeddings", "backbone")
# Rows of an image and of prose in a step; `tuning` has one row of prose in 40, as SMAR's.
ROWS = {
    **{"both": (12, 12), "image": (24, 0), "text": (0, 24), "tuning": (39, 1)},
    **{"image of both": (12, 0), "text of both": (0, 12)},
}
SETTINGS = {
    **{"steps": 120, "learning_rate": 2e-3, "length": 32, "pictures": 2000, "test_rows": 200, "experts": 8},
    "model": LANGUAGE_MODEL,
}
QUICK = {**SETTINGS, "steps": 2, "pictures": 32, "test_rows": 16}
DENSE: dict[str, Any] = {"layers": []}


@dataclass(frozen=True)
class Arm:
    """A training.

    Attributes:
        moe: the `moe_config`.
        rows: which rows it sees, by their name in `ROWS`.
        base: the arm whose weights it starts from.
        parts: what is trained.
    """

    moe: dict[str, Any]
    rows: str = "both"
    base: str | None = None
    parts: tuple[str, ...] = PARTS


def system(key: str, **fields: Any) -> dict[str, Any]:
    """Return the `moe_config` of a record in all layers, with other fields."""
    return load_system(key).fields("model", given={"layers": "all", **fields})


EXPERTS = SETTINGS["experts"]
# Two of eight experts of half the width, or one of the whole width: as much as the dense feed-forward.
PAIR = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "expert_intermediate_size": LANGUAGE_MODEL["intermediate_size"] // 2,
}
ONE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "expert_intermediate_size": LANGUAGE_MODEL["intermediate_size"],
}
# A quarter and six tenths of the experts, as of the paper's 32.
LIMOE_MINIMA = {"text": 2, "image": 5}
LIMOE = system("limoe", **ONE)
SMAR = system("smar", **PAIR)

UNIPERCEIVER = system("uniperceiver_moe", **PAIR)
# A shared and a routed expert of half the width.
PROMOE = system("promoe_prototypical", num_experts=EXPERTS)
# A feed-forward for each modality below, eight experts for both at the top.
EVE = {**load_system("eve").fields("model"), **ONE, "num_experts": {"default": 2, "last_1": EXPERTS}}


def eve_router(options: dict[str, Any]) -> dict[str, Any]:
    hard = {"name": "modality", "modalities": ["text", "image"]}
    return {"default": hard, "last_1": {"name": "top_k", **options}}


ARMS: dict[str, Arm] = {
    "limoe": Arm({**LIMOE, "objectives": {**LIMOE["objectives"], "global_entropy": {
        **LIMOE["objectives"]["global_entropy"], "min_experts": LIMOE_MINIMA}}}, "image"),
    "limoe, no entropies": Arm({**LIMOE, "objectives": {
        name: LIMOE["objectives"][name] for name in ("load_balance", "router_z")}}, "image"),
    "prose, top_k": Arm({"layers": "all", "objectives": {"load_balance": 0.01}, **PAIR}, "text"),
    "smar": Arm(SMAR, "tuning", "prose, top_k"),
    "smar, no band": Arm({**SMAR, "objectives": {"load_balance": 0.01}}, "tuning", "prose, top_k"),
    "dense": Arm(DENSE),
    "dense, images alone": Arm(DENSE, "image of both"),
    "dense, prose alone": Arm(DENSE, "text of both"),
    "uniperceiver_moe": Arm(UNIPERCEIVER),
    "uniperceiver_moe, images alone": Arm(UNIPERCEIVER, "image of both"),
    "uniperceiver_moe, prose alone": Arm(UNIPERCEIVER, "text of both"),
    "promoe_prototypical": Arm(PROMOE),
    "promoe_prototypical, no contrast": Arm({**PROMOE, "objectives": {}}),
    "promoe_prototypical, load balance": Arm({**PROMOE, "objectives": {"load_balance": 0.01}}),
    "eve": Arm({**EVE, "router": eve_router({"modality_bias": "input"})}),
    "eve, blind gate": Arm({**EVE, "router": eve_router({})}),
    "moma": Arm(system("moma", **ONE)),
    "expert_choice": Arm(system("expert_choice", **ONE)),
    "vlmo, before": Arm(system("vlmo", layers="except_last_1")),
    "vlmo": Arm(system("vlmo", layers="except_last_1"), "image", "vlmo, before", ("connector", "experts/image.*")),
    "vlmo, all trained": Arm(system("vlmo", layers="except_last_1"), "image", "vlmo, before"),
}  # fmt: skip

Result = dict[str, Any]
# The results of all arms of a seed by name.
Seed = dict[str, Result]


@dataclass(frozen=True)
class Claim:
    """What a system says of a measure.

    Attributes:
        system: its key.
        text: the claim.
        measure: what is measured, with its unit.
        arms: with the mechanism, and without.
        value: returns the measure of an arm among those of its seed.
        higher: whether it is higher with the mechanism.
        margin: how much worse still holds, for claims that something does no harm.
        alone: whether each arm is compared with itself on rows of one kind alone.
    """

    system: str
    text: str
    measure: str
    arms: tuple[str, str]
    value: Callable[[Seed, str], float]
    higher: bool
    margin: float = 0.0
    alone: bool = False

    def needs(self) -> list[str]:
        """Return the arms that the measure reads."""
        kinds = ("", ", images alone", ", prose alone") if self.alone else ("",)
        return [f"{arm}{kind}" for arm in self.arms for kind in kinds]


def figure(*path: str) -> Callable[[Seed, str], float]:
    """Return what reads a number of an arm's result."""

    def read(results: Seed, arm: str) -> float:
        found: Any = results[arm]
        for name in path:
            found = found[name]
        return float(found)

    return read


def forgotten(results: Seed, arm: str) -> float:
    """Return by how much the loss on prose has risen since the arm's base."""
    return results[arm]["text_loss"] - results[ARMS[arm].base or arm]["text_loss"]


def image_interference(results: Seed, arm: str) -> float:
    """Return by how much an arm is less accurate on images than it is without rows of prose."""
    return results[f"{arm}, images alone"]["image_accuracy"] - results[arm]["image_accuracy"]


def text_interference(results: Seed, arm: str) -> float:
    """Return by how much the loss of an arm on prose is higher than without rows of images."""
    return results[arm]["text_loss"] - results[f"{arm}, prose alone"]["text_loss"]


def outside(results: Seed, arm: str, low: float = 1.5, high: float = 2.0) -> float:
    """Return how far the divergence of the modalities is from SMAR's band, the mean over layers."""
    return statistics.mean(max(low - d, d - high, 0.0) for d in results[arm]["divergence"].values())


CLAIMS = [
    Claim("limoe", "text, the minority, spreads over more experts", "experts that text uses",
          ("limoe", "limoe, no entropies"), figure("experts_used", "text"), True),
    Claim("limoe", "less of the minority is dropped", "dropped share of text",
          ("limoe", "limoe, no entropies"), figure("dropped", "text"), False),
    Claim("limoe", "and quality rises", "accuracy on images",
          ("limoe", "limoe, no entropies"), figure("image_accuracy"), True),
    Claim("smar", "the divergence of the modalities stays in its band", "nats from the band",
          ("smar", "smar, no band"), outside, False),
    Claim("smar", "less of language is forgotten", "rise of the loss on prose",
          ("smar", "smar, no band"), forgotten, False),
    Claim("smar", "at no cost to images (two points)", "accuracy on images",
          ("smar", "smar, no band"), figure("image_accuracy"), True, margin=0.02),
    Claim("vlmo", "training on images costs no language where attention is frozen", "rise of the loss on prose",
          ("vlmo", "vlmo, all trained"), forgotten, False),
    Claim("vlmo", "and images are learnt further", "accuracy on images",
          ("vlmo", "vlmo, before"), figure("image_accuracy"), True),
    Claim("eve", "modality-aware experts learn images better than one feed-forward", "accuracy on images",
          ("eve", "dense"), figure("image_accuracy"), True),
    Claim("eve", "and prose", "loss on prose", ("eve", "dense"), figure("text_loss"), False),
    Claim("eve", "a gate that is told the modality parts them further", "divergence of the top layer, nats",
          ("eve", "eve, blind gate"), figure("divergence", "1"), True),
    Claim("uniperceiver_moe", "prose interferes less with images", "accuracy that is lost by training on both",
          ("uniperceiver_moe", "dense"), image_interference, False, alone=True),
    Claim("uniperceiver_moe", "and images with prose", "loss on prose that is gained by training on both",
          ("uniperceiver_moe", "dense"), text_interference, False, alone=True),
    Claim("promoe_prototypical", "the contrast lets more experts be used", "experts that text uses",
          ("promoe_prototypical", "promoe_prototypical, no contrast"), figure("experts_used", "text"), True),
    Claim("promoe_prototypical", "and is better than a balance loss on images", "accuracy on images",
          ("promoe_prototypical", "promoe_prototypical, load balance"), figure("image_accuracy"), True),
    Claim("promoe_prototypical", "and on prose", "loss on prose",
          ("promoe_prototypical", "promoe_prototypical, load balance"), figure("text_loss"), False),
    Claim("moma", "experts of a modality beat mixed ones on images", "accuracy on images",
          ("moma", "expert_choice"), figure("image_accuracy"), True),
    Claim("moma", "and on prose", "loss on prose", ("moma", "expert_choice"), figure("text_loss"), False),
    Claim("moma", "and a dense model on images", "accuracy on images",
          ("moma", "dense"), figure("image_accuracy"), True),
    Claim("moma", "and on prose", "loss on prose", ("moma", "dense"), figure("text_loss"), False),
]  # fmt: skip


class Data:
    """The rows of all arms as tensors: ids and labels (N, length), and features of the images (N, P, C)."""

    def __init__(self, settings: dict[str, Any], quick: bool):
        length, pictures = settings["length"], settings["pictures"]
        sources = [list(shape_rows((pictures, settings["test_rows"])))]
        if not quick:
            sources.append(list(emoji_rows()))
        learnt, held_out = documents(quick)
        questions = [" ".join(turn_texts(row)) for pair in sources for row in pair[0].select(range(8))["messages"]]
        self.tokenizer_texts = [*learnt, *questions]
        model, processor = self.build(DENSE, 0)
        tokenizer, image_token = processor.tokenizer, model.config.image_token_id
        self.patches = processor.image_seq_length
        images = [part.select_columns(["images", "image_id"]) for pair in sources for part in pair]
        model.model.vision_tower.requires_grad_(False)
        cache = FeatureCache.build(model, processor, concatenate_datasets(images))

        def image_rows(part: int) -> dict[str, torch.Tensor]:
            rows = [(turn_texts(row["messages"]), row["images"][0]) for pair in sources for row in pair[part]]
            ids = torch.full((len(rows), length), tokenizer.eos_token_id)
            labels, real = torch.full_like(ids, -100), torch.zeros_like(ids)
            for index, ((question, answer), _) in enumerate(rows):
                asked = [image_token] * self.patches + tokenizer(question)["input_ids"]
                told = [*tokenizer(" " + answer)["input_ids"], tokenizer.eos_token_id]
                row = torch.tensor((asked + told)[:length])
                ids[index, : len(row)] = row
                real[index, : len(row)] = 1
                labels[index, len(asked) : len(row)] = row[len(asked) :]
            features = cache.lookup([image for _, image in rows])
            return {"input_ids": ids, "labels": labels, "attention_mask": real, "image_features": features}

        def text_rows(texts: list[str], limit: int | None) -> dict[str, torch.Tensor]:
            flat = [token for row in tokenizer(texts)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
            ids = torch.tensor(flat[: len(flat) // length * length]).view(-1, length)[:limit]
            return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

        self.image_token = image_token
        self.train = {"image": image_rows(0), "text": text_rows(learnt, None)}
        self.test = {"image": image_rows(1), "text": text_rows(held_out, settings["test_rows"])}

    def build(self, moe_config: dict[str, Any], seed: int) -> tuple[Any, Any]:
        tokenizer = train_byte_tokenizer(self.tokenizer_texts)
        return build_model(LANGUAGE_MODEL, tokenizer=tokenizer, moe_config=moe_config, seed=seed, **IMAGE_MODEL)

    def batch(self, split: dict[str, dict[str, torch.Tensor]], rows: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the rows of these indices, images first."""
        parts = [{name: tensor[index] for name, tensor in split[kind].items()} for kind, index in rows.items()]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "image_features"}
        joined["mm_token_type_ids"] = (joined["input_ids"] == self.image_token).long()
        return joined | {name: part[name] for part in parts for name in part if name == "image_features"}

    def order(self, name: str, steps: int, seed: int) -> Iterator[dict[str, Any]]:
        """Give the batches of a training, every row of a kind once before any comes again."""
        counts = {kind: count for kind, count in zip(("image", "text"), ROWS[name], strict=True) if count}
        drawn = {kind: self._drawn(kind, steps * count, seed).split(count) for kind, count in counts.items()}
        for step in range(steps):
            yield self.batch(self.train, {kind: chosen[step] for kind, chosen in drawn.items()})

    def _drawn(self, kind: str, number: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = len(self.train[kind]["input_ids"])
        rounds = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(number / rows))]
        return torch.cat(rounds)[:number]


def turn_texts(messages: list[dict[str, Any]]) -> list[str]:
    """Return the question and the answer of a row."""
    return ["".join(part["text"] or "" for part in turn["content"]) for turn in messages]


def attributes(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return what Uni-Perceiver's gate is told of the rows, if a model has one.

    It is whether the inputs hold an image and text, whether the targets do, whether there are targets, and that
    attention is causal.
    """
    if "attribute" not in conditions_read(routers_of(model).values()):
        return {}
    bits = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0]).repeat(len(batch["input_ids"]), 1)  # (B, 6)
    bits[:, 0] = (batch["mm_token_type_ids"] == 1).any(-1).float()
    return {"condition_ids": {"attribute": bits}}


def train(model: Any, batches: Iterator[dict[str, Any]], arm: Arm, settings: dict[str, Any]) -> None:
    """Train an arm's parts; the learning rate rises for ten steps, and falls to zero."""
    train_only(model, arm.parts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.01)
    steps = settings["steps"]

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    for batch in batches:
        with autocast():
            loss = model(**batch, **attributes(model, batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def score(model: Any, data: Data) -> Result:
    """Return the accuracy on images, the loss on prose, and what the routers do with both."""
    found, dropped = RoutingStatistics(), RoutingStatistics()
    sums: dict[Any, torch.Tensor] = {}
    results: dict[str, list[torch.Tensor]] = {"image": [], "text": []}
    for kind, rows in data.test.items():
        for index in torch.arange(len(rows["input_ids"])).split(100):
            batch = data.batch(data.test, {kind: index})
            inputs = {**without_labels(batch), **attributes(model, batch), "output_routing": True}
            with autocast():
                output = model.eval()(**inputs)
            labels, logits = batch["labels"][:, 1:], output.logits[:, :-1].float()
            if kind == "image":  # an answer is right if the likeliest tokens are all its own
                results[kind].append(((logits.argmax(-1) == labels) | (labels == -100)).all(-1).float())
                with autocast():  # capacities are those of training
                    dropped.update(model.train()(**inputs).routing)
            else:
                results[kind].append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
            found.update(output.routing)
            add_probabilities(sums, output.routing)
    means = {kind: torch.cat(values).mean().item() for kind, values in results.items()}
    result: Result = {"image_accuracy": round(means["image"], 4), "text_loss": round(means["text"], 5)}
    if not found.tables:
        return result
    used = torch.stack([effective(found.shares(site)[:2]) for site in found.tables]).mean(0)  # (2,)
    result["experts_used"] = {"text": round(used[0].item(), 3), "image": round(used[1].item(), 3)}
    result["divergence"] = {str(site): round(divergence(total), 4) for site, total in sums.items()}
    if all("dropped" in signals for signals in dropped.signals.values()):
        share = torch.stack([dropped.signal_means(site, "dropped")[:2] for site in dropped.signals]).mean(0)
        result["dropped"] = {"text": round(share[0].item(), 4), "image": round(share[1].item(), 4)}
    return result


def add_probabilities(sums: dict[Any, torch.Tensor], context: Any) -> None:
    """Add the routing distributions of real tokens of text and of images, (2, E) for every site."""
    mask = context.tokens("token_mask", context.token_mask.device)
    modality = F.one_hot(context.tokens("modality_ids", mask.device), 2)[mask].float()  # (T, 2)
    for site, decision in context.decisions.items():
        if isinstance(decision, ExpertAssignment) and decision.router_probs is not None:
            sums[site] = sums.get(site, 0) + modality.T @ decision.expert_probs[mask]


def effective(shares: torch.Tensor) -> torch.Tensor:
    """Return the effective number of experts of shares (G, E): exp of their entropy, (G,)."""
    return torch.special.entr(shares).sum(-1).exp()


def divergence(total: torch.Tensor) -> float:
    """Return the symmetric KL divergence of the mean distributions of text and images, from their sums (2, E)."""
    mean = (total / total.sum(-1, keepdim=True)).clamp(min=1e-6)
    return (0.5 * (mean[0] - mean[1]) @ (mean[0].log() - mean[1].log())).item()


class Runs:
    """The arms of one seed, each in a folder of its own."""

    def __init__(self, root: Path, seed: int, data: Callable[[], Data], settings: dict[str, Any]):
        self.folder, self.seed, self.data, self.settings = root / f"seed{seed}", seed, data, settings

    def path(self, name: str) -> Path:
        return self.folder / name.replace(", ", "_").replace(" ", "_")

    def result(self, name: str) -> Result:
        """Return the result of an arm, which is run if it must be."""
        arm = ARMS[name]
        before = None if arm.base is None else self.result(arm.base)
        asked = {**self.settings, "rows": ROWS[arm.rows], "seed": self.seed, "arm": vars(arm), "base": before}
        return read_or_run(self.path(name), asked, partial(self.run, arm))

    def run(self, arm: Arm, folder: Path) -> Result:
        data = self.data()
        model, _ = data.build(arm.moe, self.seed)
        if arm.base is not None:
            state = torch.load(self.path(arm.base) / "weights.pt", weights_only=True)
            model.load_state_dict(state, strict=False)
        torch.manual_seed(self.seed)
        train(model, data.order(arm.rows, self.settings["steps"], self.seed), arm, self.settings)
        if any(other.base is not None and ARMS[other.base] is arm for other in ARMS.values()):
            kept = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
            torch.save(kept, folder / "weights.pt")
        return score(model, data)


def judge(claim: Claim, seeds: list[Seed]) -> dict[str, Any]:
    """Return a claim's numbers: the measure of both arms by seed, and in how many seeds it holds."""
    values = [[claim.value(results, arm) for results in seeds] for arm in claim.arms]
    sign = 1 if claim.higher else -1
    gains = [sign * (own - other) for own, other in zip(*values, strict=True)]
    holds = [gain > 0 or gain > -claim.margin for gain in gains]
    rounded = [[round(value, 4) for value in row] for row in values]
    facts = {"system": claim.system, "claim": claim.text, "measure": claim.measure, "compared with": claim.arms[1]}
    means = {"mean": round(statistics.mean(values[0]), 4), "mean without": round(statistics.mean(values[1]), 4)}
    return {**facts, **means, "with": rounded[0], "without": rounded[1], "holds": sum(holds), "seeds": len(seeds)}


def table(judged: list[dict[str, Any]]) -> str:
    """Return the claims as a table."""
    return markdown_table(
        [
            {
                "system": f"`{row['system']}`",
                "claim": row["claim"],
                "measure": row["measure"],
                "with (mean, range)": spread(row["with"]),
                "without": spread(row["without"]),
                "without is": row["compared with"],
                "seeds where it holds": f"{row['holds']} of {len(row['with'])}",
            }
            for row in judged
        ]
    )


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser: argparse.ArgumentParser = make_parser(__doc__)
    runs = Path("runs/modality_claims")
    parser.add_argument("--runs", type=Path, default=runs, help=f"default: {runs}")
    parser.add_argument("--only", nargs="+", default=sorted({claim.system for claim in CLAIMS}), metavar="KEY")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep_freed_memory()
    settings = QUICK if arguments.quick else SETTINGS
    claims = [claim for claim in CLAIMS if claim.system in arguments.only]
    held: list[Data] = []

    def data() -> Data:
        if not held:
            held.append(Data(settings, arguments.quick))
        return held[0]

    seeds: list[Seed] = []
    for seed in range(arguments.seeds):
        runs = Runs(arguments.runs / ("quick" if arguments.quick else "full"), seed, data, settings)
        seeds.append({})
        for name in dict.fromkeys(name for claim in claims for name in claim.needs()):
            for needed in filter(None, (ARMS[name].base, name)):
                seeds[-1][needed] = runs.result(needed)
            print(seed, name, seeds[-1][name], flush=True)
    judged = [judge(claim, seeds) for claim in claims]
    by_system = {key: [row for row in judged if row["system"] == key] for key in arguments.only}
    publish("modality_claims", arguments, {"settings": settings, "claims": by_system, "arms": seeds}, table(judged))


if __name__ == "__main__":
    main()
