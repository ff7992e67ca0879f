"""Checkpoints open in a process that cannot import the package; one process opens them all."""

import importlib
import json
import re
import sys

import pytest
import torch
from helpers.hub.checkpoints import (
    TEXT,
    open_without_package,
    record,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_moe import list_mechanisms
from hf_moe.hub.bundle import CONFIGURATION, MODELING, bundle_files
from hf_moe.modeling import registry
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import KINDS


# Two processes may sum in another order: the blocking of a matrix product follows the alignment of its memory.
TOLERANCE = 1e-6
MOIIE = {"router": "moiie", "objectives": {"load_balance": 0.01}}

USER_ROUTER = '''
import torch
from hf_moe import ExpertAssignment, Router, register_router
from user_scores import last_first


@register_router("last_experts")
class LastExperts(Router):
    """Every token goes to the last experts, the last one first."""

    def forward(self, hidden_states, context):
        index = last_first(hidden_states, self.spec.num_experts, self.spec.num_experts_per_tok)
        weight = torch.full_like(index, 1 / index.shape[-1], dtype=torch.float32)
        return ExpertAssignment(index, weight, self.spec.num_experts)
'''
USER_HELPER = """
import torch


def last_first(rows, num_experts, slots):
    return (num_experts - 1 - torch.arange(slots)).expand(len(rows), slots)
"""


def save_full(folder, processor):
    model = tiny_model(tiny_config(**MOIIE))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    record(folder, model, processor)


def save_user_router(folder, processor):
    source = folder.with_name("user_source")
    source.mkdir()
    (source / "user_router.py").write_text(USER_ROUTER)
    (source / "user_scores.py").write_text(USER_HELPER)
    sys.path.insert(0, str(source))
    try:
        importlib.import_module("user_router")
        model = tiny_model(tiny_config(router="last_experts"))
        model.save_pretrained(folder)
    finally:
        sys.path.remove(str(source))
        registry._REGISTERED["router"].pop("last_experts", None)
    record(folder, model, processor)


def save_merged_adapter(folder, processor):
    model = get_peft_model(tiny_model(tiny_config()), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    record(folder, merged, processor)


def save_trainer_checkpoint(folder, processor):
    model = tiny_model(tiny_config(**MOIIE))
    ids = torch.tensor([5, 6, 7, 8])
    arguments = TrainingArguments(folder.with_name("trainer"), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": ids, "labels": ids}] * 2
    Trainer(model, arguments, train_dataset=rows, processing_class=processor).train()
    (folder.with_name("trainer") / "checkpoint-1").rename(folder)
    record(folder, model, processor)


def save_with_every_mechanism(folder, processor):
    tiny_config().save_pretrained(folder)
    mechanisms = {kind: {name: get_mechanism(kind, name) for name in list_mechanisms(kind)} for kind in KINDS}
    for name, text in bundle_files([CONFIGURATION, MODELING], mechanisms).items():
        (folder / name).write_text(text)


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def save_broken(folder, processor):
    model = tiny_model(tiny_config(**MOIIE))
    model.save_pretrained(folder, max_shard_size="60KB" if folder.name == "missing_shard" else "1GB")
    record(folder, model, processor)
    if folder.name == "cut_short":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif folder.name == "damaged":
        (folder / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"no json at all, x")
    elif folder.name == "missing_weights":
        (folder / "model.safetensors").unlink()
    elif folder.name == "missing_shard":
        next(iter(folder.glob("model-00002-of-*"))).unlink()
    elif folder.name == "missing_code":
        (folder / "router_moiie.py").unlink()
    elif folder.name == "unknown_mechanism":
        change_config(folder, moe_config=model.config.moe_config.to_dict() | {"router": {"name": "moiiie"}})
    elif folder.name == "newer_format":
        change_config(folder, config_format=99)


BROKEN = {
    "cut_short": r"OSError: A weights file .*cut_short is damaged or cut short: .*download it again",
    "damaged": r"OSError: A weights file .*damaged is damaged or cut short",
    "missing_weights": r"OSError: .*no file named model.safetensors.*missing_weights",
    "missing_shard": r"FileNotFoundError: .*missing_shard/model-00002-of",
    "missing_code": r"FileNotFoundError: .*missing_code/router_moiie.py",
    "unknown_mechanism": r"does not carry the router 'moiiie' that its config.json asks for, only: moiie\.",
    "newer_format": r"config format 99; this code reads formats up to 1\. Upgrade",
}
SAVES = {
    "full": save_full,
    "user_router": save_user_router,
    "merged_adapter": save_merged_adapter,
    "trainer_checkpoint": save_trainer_checkpoint,
    "every_mechanism": save_with_every_mechanism,
    "config_alone": lambda folder, processor: tiny_config(**MOIIE).save_pretrained(folder),
    "processor_alone": lambda folder, processor: processor.save_pretrained(folder),
    **dict.fromkeys(BROKEN, save_broken),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the process without the package finds in every checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    processor = tiny_processor()
    for name, save in SAVES.items():
        save(root / name, processor)
    # A processor alone has no model to record the inputs of.
    (root / "processor_alone" / "reference.pt").write_bytes((root / "full" / "reference.pt").read_bytes())
    return open_without_package([root / name for name in SAVES], root / "modules")


@pytest.mark.parametrize("name", ["full", "user_router", "merged_adapter", "trainer_checkpoint"])
def test_checkpoint_answers_as_the_saved_model_did(found, name):
    assert found[name]["class"] == "HfMoeForConditionalGeneration"
    assert found[name]["difference"] < TOLERANCE
    assert found[name]["ids_equal"]


@pytest.mark.parametrize("name", ["full", "trainer_checkpoint", "processor_alone"])
def test_processor_prepares_the_same_inputs(found, name):
    assert found[name]["processor"] == "HfMoeProcessor"
    assert found[name]["inputs_equal"]


def test_every_auto_class_gives_the_generating_model(found):
    assert max(found["full"]["AutoModel"], found["full"]["AutoModelForCausalLM"]) < TOLERANCE


def test_pipeline_answers(found):
    assert found["full"]["pipeline"].startswith(TEXT)


def test_checkpoint_saved_again_from_the_remote_classes_opens(found):
    again = found["full"]["again"]
    assert again["difference"] < TOLERANCE and again["ids_equal"] and again["inputs_equal"]


def test_without_trust_transformers_refuses_in_its_own_words(found):
    assert "trust_remote_code=True" in found["full"]["untrusted"]


@pytest.mark.parametrize("name", ["config_alone", "every_mechanism"])
def test_config_without_weights_builds_a_model(found, name):
    assert found[name] == {"class": "HfMoeForConditionalGeneration"}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_checkpoint_gives_one_clear_error(found, name):
    assert list(found[name]) == ["error"]
    assert re.search(BROKEN[name], found[name]["error"]), found[name]["error"]
