"""Two tasks that contradict each other on one base: single LoRA against routed LoRA experts.

    OMP_NUM_THREADS=1 python benchmarks/lora_tasks.py --seeds 3    # fifteen minutes on one core
    python benchmarks/lora_tasks.py --quick                        # two steps on a tiny random base

The base is SmolLM2-135M-Instruct. Both tasks ask the same questions ("Is a spoon a tool?"), and the instruction before
the question says which of two opposite answers is right. No word of the test questions occurs in training. All
contestants see the same rows in the same order, for the same number of steps, with equal ranks in total:

- `lora`: one LoRA of rank r for both tasks.
- `token`: two experts of rank r / 2; a learned router picks one for each token.
- `task`: the same experts; the instruction picks the expert.
- `alone`: one LoRA of rank r / 2 per task, trained on the rows of its task alone: nothing interferes.

A finished cell is kept under `runs/lora_tasks` and read, not run again.
"""

import argparse
import copy
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import make_parser, markdown_table, publish
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_moe import ExpertAssignment, MoELayerSpec, MoeLoraConfig, Router, RoutingContext, register_router
from hf_moe.construction.pretrained import load_language_model


BASE = "smollm2-135m-instruct"
INSTRUCTIONS = {"truth": "Answer truthfully.", "lie": "Answer with a lie."}
WORDS = {
    "an animal": "dog cat horse cow sheep pig lion tiger bear wolf fox rabbit mouse elephant monkey frog snake eagle "
    "duck shark whale goat deer camel",
    "a fruit": "apple banana orange pear peach plum grape cherry lemon lime mango melon strawberry raspberry "
    "blueberry pineapple apricot fig kiwi papaya grapefruit coconut watermelon tangerine",
    "a vehicle": "car bus truck train bicycle motorcycle airplane helicopter boat ship tram taxi van scooter tractor "
    "submarine rocket ferry ambulance limousine jeep yacht canoe minibus",
    "a tool": "hammer screwdriver saw wrench drill chisel shovel rake axe pliers crowbar spanner trowel sander mallet "
    "hoe pickaxe hacksaw clamp ruler scissors knife spade ladder",
    "a garment": "shirt jacket sweater dress skirt coat hat scarf glove sock shoe boot belt tie vest blouse hoodie "
    "raincoat sandal cap robe kimono swimsuit cardigan",
    "an instrument": "piano guitar violin flute drum trumpet cello harp clarinet saxophone trombone banjo oboe "
    "accordion tuba bassoon mandolin ukulele harmonica viola lute organ xylophone tambourine",
}
TEST_WORDS = 8  # of every category
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8
STEPS, ROWS, LEARNING_RATE, WARMUP = 80, 16, 3e-3, 10
ARMS = {"lora": list(INSTRUCTIONS), "token": list(INSTRUCTIONS), "task": list(INSTRUCTIONS)}
ARMS |= {f"alone_{task}": [task] for task in INSTRUCTIONS}

# Task, question, and whether the answer is yes.
Row = tuple[str, str, bool]


@register_router("by_instruction")
class ByInstructionRouter(Router):
    """One expert for rows that hold the token `word`, another one for rows that do not."""

    def __init__(self, spec: MoELayerSpec, *, word: int):
        super().__init__(spec)
        self.word = word

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> ExpertAssignment:
        rows, length = context.token_mask.shape
        found = torch.zeros(rows, dtype=torch.bool)
        if context.input_ids is not None:
            found = (context.input_ids == self.word).any(-1)
        index = found.long().repeat_interleave(length)[:, None].to(hidden_states.device)  # (T, 1)
        return ExpertAssignment(index, torch.ones_like(index, dtype=torch.float32), self.spec.num_experts)


def questions(test: bool) -> list[tuple[str, bool]]:
    """Return questions and whether yes is true: two for every word, of its own category and of another one."""
    rows = []
    categories = list(WORDS)
    for number, (category, words) in enumerate(WORDS.items()):
        split = words.split()
        for position, word in enumerate(split[-TEST_WORDS:] if test else split[:-TEST_WORDS]):
            other = categories[(number + 1 + position % (len(categories) - 1)) % len(categories)]
            article = "an" if word[0] in "aeiou" else "a"
            rows += [(f"Is {article} {word} {category}?", True), (f"Is {article} {word} {other}?", False)]
    return rows


def prompt(row: Row) -> str:
    """Return what the model reads of a row."""
    return f"{INSTRUCTIONS[row[0]]} {row[1]}\nAnswer:"


def rows_of(tasks: list[str], test: bool = False) -> list[Row]:
    """Return the rows of some tasks."""
    return [(task, question, truth == (task == "truth")) for question, truth in questions(test) for task in tasks]


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows the words of these texts."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<pad>", *words])}, "<pad>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


class LowerLayers(nn.Module):
    """The frozen layers below the adapted ones, in place of the embeddings: what they make of every row, kept."""

    def __init__(self, states: dict[tuple[int, ...], torch.Tensor]):
        super().__init__()
        self.states = states

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.states[tuple(row)] for row in input_ids.tolist()])


class Base:
    """A language model with its tokenizer, and the two answers as tokens.

    Only the upper third of the layers is adapted. What the others make of the few rows of this benchmark is computed
    once, which leaves every result as it is.
    """

    def __init__(self, quick: bool):
        rows = [row for test in (False, True) for row in rows_of(list(INSTRUCTIONS), test)]
        if quick:
            self.tokenizer = word_tokenizer([*map(prompt, rows), "yes no lie"])
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
            model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(self.tokenizer)))
        else:
            model, self.tokenizer = load_language_model(BASE, dtype=torch.bfloat16)
        self.tokenizer.padding_side = "left"
        self.no, self.yes, self.lie = (self.tokenizer(word).input_ids[0] for word in (" no", " yes", " lie"))
        inputs = self.tokenizer([prompt(row) for row in rows], padding=True, return_tensors="pt")
        self.inputs = {
            row: (ids, mask) for row, ids, mask in zip(rows, inputs.input_ids, inputs.attention_mask, strict=True)
        }
        depth = 2 * len(model.model.layers) // 3
        states = {}
        with torch.no_grad():
            for ids, mask in zip(inputs.input_ids.split(32), inputs.attention_mask.split(32), strict=True):
                outputs = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
                for row, state in zip(ids.tolist(), outputs.hidden_states[depth], strict=True):
                    states[tuple(row)] = state.clone()
        model.model.embed_tokens = LowerLayers(states)
        model.model.layers = model.model.layers[depth:]
        self.model: PreTrainedModel = model

    def answer_logits(self, model: nn.Module, rows: list[Row]) -> torch.Tensor:
        """Return the logits of the token after the rows' prompts, (rows, vocabulary) float32."""
        input_ids, attention_mask = (
            torch.stack(items) for items in zip(*(self.inputs[row] for row in rows), strict=True)
        )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()

    def config(self, arm: str) -> PeftConfig:
        """Return the adapter of a contestant; the scaling of all is 2."""
        half = RANK // 2
        if arm == "lora":
            return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
        if arm.startswith("alone"):
            return LoraConfig(r=half, lora_alpha=2 * half, target_modules=TARGETS)
        router = {"name": "by_instruction", "word": self.lie} if arm == "task" else {"name": "top_k"}
        experts = {"num_experts": 2, "num_experts_per_tok": 1}
        return MoeLoraConfig(r=half, lora_alpha=2 * half, router=router, **experts, target_modules=TARGETS)


@torch.no_grad()
def accuracy(base: Base, model: nn.Module, task: str) -> float:
    """Return the share of a task's test questions whose right answer is the more probable of yes and no."""
    rows = rows_of([task], test=True)
    right = 0
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        logits = base.answer_logits(model, batch)
        found = logits[:, base.yes] > logits[:, base.no]
        right += int((found == torch.tensor([answer for _, _, answer in batch])).sum())
    return right / len(rows)


def train(base: Base, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one contestant and return what is kept of it."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    model = get_peft_model(copy.deepcopy(base.model), base.config(arm)).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    factor = [min(1.0, (step + 1) / WARMUP) * (1 - step / steps) for step in range(steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor[min(step, steps - 1)])
    answers = {True: base.yes, False: base.no}
    pool: list[Row] = []
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        if len(pool) < ROWS:
            pool = rows_of(list(INSTRUCTIONS))
            generator.shuffle(pool)
        batch, pool = [row for row in pool[:ROWS] if row[0] in ARMS[arm]], pool[ROWS:]
        logits = base.answer_logits(model, batch)
        loss = F.cross_entropy(logits, torch.tensor([answers[answer] for _, _, answer in batch]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    return {
        "seed": seed,
        "contestant": arm,
        "trainable": sum(parameter.numel() for parameter in trainable),
        "final_loss": round(statistics.mean(losses[-10:]), 4),
        "seconds": round(seconds, 1),
        **{task: accuracy(base, model, task) for task in ARMS[arm]},
    }


def cell(base: Base, arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of one cell, from the file of an earlier run of the same settings if there is one."""
    steps = 2 if arguments.quick else STEPS
    if arguments.quick:
        return train(base, arm, seed, steps)
    settings = {"steps": steps, "rows": ROWS, "rank": RANK, "learning_rate": LEARNING_RATE, "warmup": WARMUP}
    path = arguments.runs / f"{arm}-{seed}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["result"]
    result = train(base, arm, seed, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    return result


def summary(rows: list[dict[str, Any]], base_accuracy: dict[str, float]) -> str:
    """Return the accuracies of every contestant, mean and range over the seeds."""
    seeds = sorted({row["seed"] for row in rows})
    by_cell = {(row["contestant"], row["seed"]): row for row in rows}
    lines = [{"contestant": "the base itself", "trainable": 0, **_scores([base_accuracy])}]
    for arm in ("lora", "token", "task", "alone"):
        if arm == "alone":
            pairs = [[by_cell[f"alone_{task}", seed] for task in INSTRUCTIONS] for seed in seeds]
            merged = [{task: row[task] for row, task in zip(pair, INSTRUCTIONS, strict=True)} for pair in pairs]
            trainable = sum(row["trainable"] for row in pairs[0])
        else:
            merged = [by_cell[arm, seed] for seed in seeds]
            trainable = merged[0]["trainable"]
        lines.append({"contestant": arm, "trainable": trainable, **_scores(merged)})
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
    base = Base(arguments.quick)
    before = {task: accuracy(base, base.model, task) for task in INSTRUCTIONS}
    rows = [cell(base, arm, seed, arguments) for seed in range(arguments.seeds) for arm in ARMS]
    publish("lora_tasks", arguments, {"rank": RANK, "base": before, "rows": rows}, summary(rows, before))


if __name__ == "__main__":
    main()
