"""Adapters by every field of their configuration, rows by every field, and checkpoints by every file."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from config_cases import CONFIG_FIELDS, MOE_FIELDS
from outcomes import Case
from peft import get_peft_model
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM
from values import NONSENSE, count, flag, nothing, one_of, optional, positive, real, whole

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, HfMoeProcessor, MoeLoraConfig
from hf_moe.adapters.experts import EXPERT_KINDS
from hf_moe.construction.tokenizer import add_image_token, default_chat_template, train_word_tokenizer
from hf_moe.data import VisionLanguageCollator


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def adapted(fields: dict[str, Any]) -> Any:
    """Return the logits and the loss of a training step of a small adapted decoder, with experts that are drawn.

    Of a router that no decoder takes, the configuration is all there is.
    """
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32))
    config = MoeLoraConfig(**{"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **fields})
    if config.router["name"] == "soft_moe":
        return repr(config.build_router(config.spec(0, 16, config.settings("")), config.settings("")))
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    ids = torch.arange(8, 32).view(2, 12)
    # Some routers read a condition of every row, or the modality of every token.
    router = config.router["name"]
    given = {f"{name}_ids": torch.zeros(2, dtype=torch.long) for name in CONDITIONS.get(router, ())}
    if router == "intuition_mor1e":
        given = {"intuition_ids": torch.ones(2, int(config.router.get("num_clusters", 16)))}
    given |= {"mm_token_type_ids": (ids % 2).long()} if router == "modality" else {}
    with torch.no_grad():
        logits = model(input_ids=ids, **given).logits
    torch.manual_seed(0)
    return [logits, model.train()(input_ids=ids, labels=ids, **given).loss.detach()]


usual_adapted = cache(lambda key: adapted(eval(key)))  # noqa: S307

CONDITIONS = {"becotta": ("domain",), "condition": ("task",)}
# What may stand in a field of an adapter, by hand; what is not here is covered by no value of the table.
LORA_FIELDS: dict[str, Callable[[Any], bool]] = {
    "target_modules": lambda value: value is None,
    "r": lambda value: isinstance(value, int) and count(value),
    "lora_alpha": lambda value: not isinstance(value, str) and positive(value),
    "num_experts": lambda value: isinstance(value, int) and whole(value, 2),
    "num_experts_per_tok": optional(lambda value: isinstance(value, int) and whole(value, 1, 4)),
    "shared_r": lambda value: isinstance(value, int) and whole(value, 0),
    "ffn_experts": lambda value: value is False,
    "lora_dropout": lambda value: not isinstance(value, str) and real(value, 0, 0.999),
    "use_rslora": flag,
    "init_lora_weights": flag,
    "freeze_experts": flag,
    "layers_to_transform": optional(lambda value: isinstance(value, int) and whole(value, 0, 1)),
}
LORA_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "gated": flag,
    "head_dim": optional(lambda value: whole(value, 1, 1)),
    "activation": one_of("gelu"),
    "position": one_of("parallel"),
}
LORA_HOMES: dict[str, dict[str, Any]] = {
    "rank1_pairs": {"r": 1, "num_experts": 4},
    "value_gate": {"target_modules": ["v_proj"]},
}


def adapter_cases() -> Iterator[Case]:
    """Yield every field of an adapter's configuration, and every option of its experts."""
    for name in MoeLoraConfig.__annotations__:
        for value in NONSENSE:
            run = partial(adapted, {name: value})
            sensible = LORA_FIELDS.get(name, nothing)(value)
            yield Case("adapters", name, value, run, partial(usual_adapted, "{}"), sensible)
    for name, cls in EXPERT_KINDS.items():
        home = LORA_HOMES.get(name, {})
        parameters = inspect.signature(cls).parameters.values()
        for option in (item.name for item in parameters if item.kind is item.KEYWORD_ONLY):
            usual = partial(usual_adapted, repr({**home, "experts": {"name": name}}))
            for value in NONSENSE:
                run = partial(adapted, {**home, "experts": {"name": name, option: value}})
                yield Case("adapters", option, value, run, usual, LORA_OPTIONS.get(option, nothing)(value))


@cache
def processor() -> HfMoeProcessor:
    tokenizer = train_word_tokenizer(["what is this ?", "red and blue", "a circle"])
    add_image_token(tokenizer)
    size = {"height": 8, "width": 8}
    images = CLIPImageProcessor(size=size, crop_size=size)
    return HfMoeProcessor(images, tokenizer, image_seq_length=4, chat_template=default_chat_template(tokenizer))


def row() -> dict[str, Any]:
    question = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    answer = [{"type": "text", "text": "a circle"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [Image.new("RGB", (8, 8), "red")]}


def collated(change: Callable[[dict[str, Any]], None]) -> list[torch.Tensor]:
    """Return the batch of a good row and one that was changed."""
    changed = row()
    change(changed)
    return list(VisionLanguageCollator(processor())([row(), changed]).values())


def put(path: tuple[Any, ...], value: Any, changed: dict[str, Any]) -> None:
    *parents, last = path
    target: Any = changed
    for parent in parents:
        target = target[parent]
    target[last] = value


def row_cases() -> Iterator[Case]:
    """Yield every field of a row, of a message and of a part with every value; errors name the row."""
    question, answer = ("messages", 0), ("messages", 1)
    paths: list[tuple[Any, ...]] = [("messages",), ("images",), ("images", 0), (*question, "content", 0)]
    for message in (question, answer):
        paths += [message, (*message, "role"), (*message, "content"), (*message, "content", 0, "type")]
        paths += [(*message, "content", -1, "text"), (*message, "weight")]
    usual = cache(lambda: collated(lambda changed: None))
    for path in paths:
        for value in NONSENSE:
            # Text is what is written, and so are numbers and `False`.
            sensible = path[-1] in ("text", "content") and isinstance(value, str | int | float) and value == value
            yield Case("rows", "row 1", value, partial(collated, partial(put, path, value)), usual, sensible)


@cache
def checkpoint() -> Path:
    folder = Path(tempfile.mkdtemp()) / "checkpoint"
    config = HfMoeConfig(
        text_config=LlamaConfig(**SIZES, vocab_size=32),
        vision_config=CLIPVisionConfig(**SIZES, image_size=8, patch_size=4),
        image_token_id=7,
        moe_config={"objectives": {"load_balance": 0.1}},
    )
    torch.manual_seed(0)
    HfMoeForConditionalGeneration(config).save_pretrained(folder)
    return folder


def opened(damage: Callable[[Path], None]) -> torch.Tensor:
    """Return the logits of a checkpoint, one file of which was damaged."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(checkpoint(), Path(scratch) / "checkpoint"))
        damage(folder)
        model = HfMoeForConditionalGeneration.from_pretrained(folder).eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(8, 32).view(2, 12)).logits


def edit(name: str, path: tuple[str, ...], value: Any, folder: Path) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    put(path, value, content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def as_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except TypeError:
        return False


def file_cases() -> Iterator[Case]:
    """Yield every file of a checkpoint damaged, and every field of its config with every value that JSON holds."""
    usual = cache(lambda: opened(lambda folder: None))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        data = (checkpoint() / name).read_bytes()
        for kind, content in {
            "empty": b"",
            "cut": data[: len(data) // 2],
            "without its end": data[:-3],
            "longer": data + b"xx",
            "a list": b"[]",
            "no text": b"\xff\xfe" * 50,
            "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        }.items():

            def damage(folder: Path, name: str = name, content: bytes = content) -> None:
                (folder / name).write_bytes(content)

            yield Case("files", name, kind, partial(opened, damage), usual)
        yield Case(
            "files", name, "missing", partial(opened, lambda folder, name=name: (folder / name).unlink()), usual
        )
    kept = json.loads((checkpoint() / "config.json").read_text(encoding="utf-8"))
    own = {(name,): test for name, test in CONFIG_FIELDS.items()}
    inner = {("moe_config", name): test for name, test in MOE_FIELDS.items() if name in kept["moe_config"]}
    for path, means_something in {**own, **inner}.items():
        # What means something makes the config of another model, whose weights Transformers reports as missing.
        for value in (item for item in NONSENSE if as_json(item) and not means_something(item)):
            yield Case("files", path[-1], value, partial(opened, partial(edit, "config.json", path, value)), usual)
