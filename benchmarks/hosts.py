"""One host of Transformers as a MoE, three ways, against itself: digits to hear, to see and to watch.

    OMP_NUM_THREADS=1 python benchmarks/hosts.py --seeds 3    # all of it, 20 minutes on one core
    python benchmarks/hosts.py --quick                        # a tiny host, few rows

The host is a small Qwen2.5-Omni thinker with Whisper's encoder, `hf_moe.construction.small_omni`. Per seed it is
trained dense; every contestant continues from there in place, `HfMoeForConditionalGeneration.from_host`, on the same
rows in the same order at the same learning rate. Two of four experts work on a token, each as wide as the host's
feed-forward, so `dense, widened` is the host with feed-forwards twice as wide: as many active parameters. Coefficients
are those of the presets: nothing was searched for any of them.

Every finished run lies under `--runs` and is read when the same is asked again.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from anyexperts import read_or_run
from common import FOLDER, keep_freed_memory, make_parser, markdown_table, publish
from tasks import autocast, real_experts, without_labels
from torch import nn
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.utils import logging

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.analysis.drawing import draw_routing
from hf_moe.analysis.experts import modality_divergence
from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.construction.expert_sources import feed_forward_state, take_neurons
from hf_moe.construction.small_omni import save_small_omni
from hf_moe.data import VisionLanguageCollator, load_rows
from hf_moe.modeling.host_layers import decoder_layers, ffn_name
from hf_moe.modeling.parts import text_decoder
from hf_moe.training.parts import train_only


MOE = {"layers": "all", "num_experts": 4, "num_experts_per_tok": 2}
# Beside the fields above and those of the system of that name.
SYSTEMS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "moiie": {},
    "anyexperts": {"router": {"name": "anyexperts", "min_slots": 1, "max_slots": 4, "max_virtual_share": 0.2}},
}
DENSE, WIDENED = "dense", "dense, widened"
CONTESTANTS = (DENSE, WIDENED, *SYSTEMS)
# Relative to each matrix: copies of neurons would have the same gradients.
NOISE = 0.1
SETTINGS = {"base_steps": 250, "steps": 100, "rows": 7000, "test_rows": 1400, "batch_size": 32, "learning_rate": 6e-4}
QUICK = {**SETTINGS, "base_steps": 2, "steps": 2, "rows": 28, "test_rows": 14, "batch_size": 7}
QUICK_SIZES = {"hidden_size": 64, "layers": 2}
PAD = {"input_ids": 0, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}

# All but Whisper's layers.
PARTS = ("connector", "tower/image", "routers", "experts", "embeddings", "backbone")

Row = dict[str, Any]


def read_rows(processor: Any, split: str, limit: int) -> list[Row]:
    """Return rows as the host's processor reads them: each a batch of one, with its type of question."""
    collate = VisionLanguageCollator(processor)
    rows = load_rows({"name": "speech_and_sight", "limit": limit}, split)
    return [{"batch": collate([row]), "question_type": row["question_type"]} for row in rows]


def collate(rows: list[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Join batches of one, padded on the right."""
    batches = [row["batch"] for row in rows]
    joined = {}
    for name in sorted({name for batch in batches for name in batch}):
        parts = [batch[name] for batch in batches if name in batch]
        if name in PAD:
            value = pad_id if name == "input_ids" else PAD[name]
            parts = [nn.utils.rnn.pad_sequence([part[0] for part in parts], True, float(value))]
        joined[name] = torch.cat(parts)
    return joined


class Data:
    """The rows of all runs, read once."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.train = read_rows(self.processor, "train", settings["rows"])
        self.test = read_rows(self.processor, "test", settings["test_rows"])
        self.batch_size = settings["batch_size"]

    def order(self, steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Give the batches of a training, every row once before any comes again."""
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = []
        while len(drawn) < steps * self.batch_size:
            drawn += torch.randperm(len(self.train), generator=generator).tolist()
        for step in range(steps):
            chosen = drawn[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.join([self.train[index] for index in chosen])

    def join(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        return collate(rows, self.processor.tokenizer.pad_token_id)


def train(model: Any, batches: Iterator[dict[str, torch.Tensor]], steps: int, rate: float, decay: bool) -> float:
    """Train all but Whisper's layers; the rate falls to zero where it decays. Return the seconds."""
    train_only(model, PARTS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)

    def share(step: int) -> float:
        warm = min(1.0, (step + 1) / 20)
        return warm * (0.5 * (1 + math.cos(math.pi * step / steps)) if decay else 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    start = time.perf_counter()
    for batch in batches:
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


@torch.no_grad()
def score(model: Any, data: Data) -> tuple[dict[str, Any], RoutingStatistics]:
    """Return the accuracy, over all and by type of question, and what the routers did.

    An answer is right if the likeliest tokens are all its own, given those before.
    """
    model.eval()
    right, found = defaultdict(list), RoutingStatistics()
    routed = {"output_routing": True} if isinstance(model, HfMoeForConditionalGeneration) else {}
    for start in range(0, len(data.test), 100):
        rows = data.test[start : start + 100]
        batch = data.join(rows)
        with autocast():
            output = model(**without_labels(batch), **routed)
        if routed:
            found.update(output.routing)
        labels = batch["labels"][:, 1:]
        hits = ((output.logits.argmax(-1)[:, :-1] == labels) | (labels == -100)).all(-1)
        for row, hit in zip(rows, hits.tolist(), strict=True):
            right[row["question_type"]].append(hit)
    total = sum(map(sum, right.values())) / len(data.test)
    by_type = {name: round(statistics.mean(hits), 4) for name, hits in sorted(right.items())}
    return {"accuracy": round(total, 4), "by_question_type": by_type}, found


@torch.no_grad()
def widen(model: Any, factor: int, noise: float, seed: int) -> Any:
    """Make the feed-forwards of a dense host `factor` times as wide: it computes the same but for the noise."""
    generator = torch.Generator().manual_seed(seed)
    for layer in decoder_layers(text_decoder(model)):
        ffn = getattr(layer, ffn_name(layer))
        state = feed_forward_state(ffn)
        width = factor * state["down_proj"].shape[-1]
        state = take_neurons(state, width)
        for tensor in state.values():
            tensor += torch.randn(tensor.shape, generator=generator) * noise * tensor.std()
        gate, up = state["gate_up_proj"].chunk(2)
        for name, tensor in {"gate_proj": gate, "up_proj": up, "down_proj": state["down_proj"]}.items():
            projection = getattr(ffn, name)
            projection.weight = nn.Parameter(tensor.contiguous())
            projection.out_features, projection.in_features = tensor.shape
    model.config.text_config.intermediate_size = width
    return model


def start(base: Path, name: str, seed: int) -> Any:
    """Return the host as a contestant."""
    if name in SYSTEMS:
        moe_config = {**MOE, **SYSTEMS[name]}
        return HfMoeForConditionalGeneration.from_host(
            base, system=name, moe_config=moe_config, seed=seed, noise=NOISE
        )
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(base)
    return widen(model, MOE["num_experts_per_tok"], NOISE, seed) if name == WIDENED else model


def dense_parameters(model: Any) -> int:
    """Return the parameters of decoder and head, all of which work on every token."""
    parts = (text_decoder(model), model.get_output_embeddings())
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


class Runs:
    """The runs of one seed, each in a folder of its own."""

    def __init__(self, root: Path, seed: int, quick: bool):
        self.root, self.folder, self.seed = root, root / f"seed{seed}", seed
        self.settings = QUICK if quick else SETTINGS
        self.sizes = QUICK_SIZES if quick else {}
        self.common = {"seed": seed, "sizes": self.sizes, **self.settings}

    @property
    def host(self) -> Path:
        """The folder of the fresh host and its processor."""
        folder = self.root / f"host{self.seed}"
        if not (folder / "config.json").is_file():
            save_small_omni(folder, self.seed, **self.sizes)
        return folder

    @property
    def data(self) -> Data:
        # Of every seed the same.
        return cached_data(Runs(self.root, 0, self.settings is QUICK).host, self.settings is QUICK)

    def base(self) -> Path:
        """Return the folder of the trained host that all contestants start from."""

        def run(folder: Path) -> dict[str, Any]:
            model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(self.host)
            steps = self.settings["base_steps"]
            batches = self.data.order(steps, self.seed)
            train(model, batches, steps, self.settings["learning_rate"], decay=False)
            model.save_pretrained(folder)
            return score(model, self.data)[0]

        read_or_run(self.folder / "base", self.common, run)
        return self.folder / "base"

    def contestant(self, name: str) -> dict[str, Any]:
        def run(folder: Path) -> dict[str, Any]:
            model = start(self.base(), name, self.seed)
            steps = self.settings["steps"]
            batches = self.data.order(steps, 1000 + self.seed)
            seconds = train(model, batches, steps, self.settings["learning_rate"], decay=True)
            result, found = score(model, self.data)
            result["seconds"] = round(seconds, 1)
            result["parameters"] = model.num_parameters()
            if name not in SYSTEMS:
                return {**result, "active": dense_parameters(model)}
            draw_routing(found, folder / "routing.png", title=f"{name}: experts by modality, seed {self.seed}")
            active = active_parameters(model, found)
            tokens = [int(sum(counts)) for counts in zip(*found.tokens.values(), strict=True)]
            mean = sum(a * t for a, t in zip(active.values(), tokens, strict=True)) / sum(tokens)
            result |= {"active": round(mean), "active_by_modality": active}
            result["real_experts"] = round(real_experts(found), 3)
            result["modality_js"] = round(statistics.mean(modality_divergence(found).values()), 4)
            return result

        settings = {**self.common, "name": name, "moe_config": {**MOE, **SYSTEMS.get(name, {})}, "noise": NOISE}
        return read_or_run(self.folder / name.replace(", ", "_"), settings, run)


@cache
def cached_data(folder: Path, quick: bool) -> Data:
    return Data(folder, QUICK if quick else SETTINGS)


def summary(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table: means over seeds, each with its range, and the paired difference from the host tuned on."""
    lines = []
    for name, results in rows.items():
        kinds = {kind: [row["by_question_type"][kind] for row in results] for kind in results[0]["by_question_type"]}
        line = {"contestant": name, "accuracy": spread([row["accuracy"] for row in results])}
        line |= {kind: spread(values) for kind, values in kinds.items()}
        against = [row["accuracy"] - dense["accuracy"] for row, dense in zip(results, rows[DENSE], strict=True)]
        line["over dense"] = spread(against, "+.3f") if name in CONTESTANTS else "–"
        counts = {
            key: [row[key] for row in results if key in row] for key in ("active", "real_experts", "modality_js")
        }
        line["active decoder parameters"] = millions(counts["active"])
        line["experts per token"] = f"{statistics.mean(counts['real_experts']):.2f}" if counts["real_experts"] else "–"
        line["modality JS, bits"] = spread(counts["modality_js"]) if counts["modality_js"] else "–"
        lines.append(line)
    return markdown_table(lines)


def spread(values: list[float], form: str = ".3f") -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def millions(values: list[float]) -> str:
    return f"{statistics.mean(values) / 1e6:.2f} M" if values else "–"


def main() -> None:
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/hosts"), help="default: runs/hosts")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep_freed_memory()
    root = arguments.runs / ("quick" if arguments.quick else "full")
    runs = [Runs(root, seed, arguments.quick) for seed in range(arguments.seeds)]
    rows: dict[str, list[dict[str, Any]]] = {"the host before": [], **{name: [] for name in CONTESTANTS}}
    # Seeds outermost: what an interrupted run leaves is complete for its seeds.
    for run in runs:
        before = json.loads((run.base() / "result.json").read_text())["result"]
        rows["the host before"].append({"seed": run.seed, **before})
        for name in CONTESTANTS:
            rows[name].append({"seed": run.seed, **run.contestant(name)})
            print(run.seed, name, rows[name][-1], flush=True)
    if arguments.json or not arguments.quick:
        folder = arguments.json.parent if arguments.json else FOLDER / "results"
        for name in SYSTEMS:
            (folder / f"hosts_{name}.png").write_bytes((runs[0].folder / name / "routing.png").read_bytes())
    settings = {**runs[0].settings, "moe_config": MOE, "systems": SYSTEMS, "noise": NOISE}
    publish("hosts", arguments, {"settings": settings, "contestants": rows}, summary(rows))


if __name__ == "__main__":
    main()
