"""The scripts that a user copies, through their command lines, on small models and rows made on the spot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hosts.processors import HOSTS
from helpers.hub.checkpoints import hub_settings
from helpers.hub.server import running_hub
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig
from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.modeling.parts import host_parts, part_of


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TRAINER = (
    "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --report_to none --logging_steps 1 --learning_rate 0.1"
)


def run_script(name: str, output: Path, *arguments: object, hub=None) -> subprocess.CompletedProcess:
    """Run a script in a process of its own: it registers classes for all that is loaded after it."""
    command = [sys.executable, SCRIPTS / name, *arguments, "--output_dir", output, *TRAINER.split()]
    settings = {} if hub is None else hub_settings(hub.url, output.parent / "home")
    environment = {**os.environ, **settings}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def assert_runs(*arguments: object, hub=None) -> None:
    done = run_script(*arguments, hub=hub)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory):
    """A tiny LLaVA with its processor."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    host = HOSTS["llava"]()
    host.model().save_pretrained(folder)
    host.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny decoder and a tiny vision tower, in folders of their own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = train_word_tokenizer(["what colour ?", "red blue green white"])
    decoder, tower = tmp_path_factory.mktemp("decoder"), tmp_path_factory.mktemp("tower")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tower)
    side = {"height": 16, "width": 16}
    CLIPImageProcessor(size=side, crop_size=side).save_pretrained(tower)
    return ["--language_model", decoder, "--vision_tower", tower]


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    """A folder with a file of rows for each split, whose images are elsewhere."""
    folder, pictures = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("pictures")
    for split, colours in (("train", ("red", "blue", "green", "white")), ("test", ("red", "blue"))):
        rows = []
        for colour in colours:
            Image.new("RGB", (16, 16), colour).save(pictures / f"{colour}.png")
            rows.append({"question": "what colour ?", "answer": colour, "image": str(pictures / f"{colour}.png")})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def moved_parts(model, before) -> set[str]:
    parts = host_parts(model)
    changed = (name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name]))
    return {part_of(name, parts) for name in changed}


def test_a_host_becomes_a_moe_is_pushed_and_trained_further(host_folder, rows_folder, tmp_path):
    output = tmp_path / "moe"
    with running_hub(tmp_path) as hub:
        model = ["--model_name_or_path", host_folder, "--system", "moiie", "--moe_config", '{"num_experts": 4}']
        push = ["--trainable", "routers", "experts", "--eval_strategy", "steps", "--eval_steps", 2, "--push_to_hub"]
        push += ["--hub_model_id", "owner/moe"]
        assert_runs("finetune.py", output, *model, "--dataset_name", rows_folder, *push, hub=hub)
        assert {"README.md", "router_moiie.py", "model.safetensors"} <= set(hub.files("owner/moe"))
    trained = HfMoeForConditionalGeneration.from_pretrained(output)
    logs = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in logs) and any("objective/load_balance" in entry for entry in logs)
    further = tmp_path / "further"
    rows = ["--dataset_name", rows_folder / "train.jsonl", "--trainable", "routers"]
    assert_runs("finetune.py", further, "--model_name_or_path", output, *rows)
    before = dict(trained.named_parameters())
    assert moved_parts(HfMoeForConditionalGeneration.from_pretrained(further), before) == {"routers"}


def test_a_decoder_and_a_tower_are_put_together_and_trained(parts, rows_folder, tmp_path):
    moe = ["--moe_config", '{"num_experts": 3, "num_experts_per_tok": 2}', "--dataset_name", rows_folder]
    assert_runs("finetune.py", tmp_path, *parts, *moe)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.config.moe_config.num_experts == 3


@pytest.mark.parametrize(
    "arguments", [[], ["--model_name_or_path", "a", "--language_model", "b"]], ids=["none", "both"]
)
def test_one_source_of_a_model_is_asked_for(arguments, tmp_path):
    done = run_script("finetune.py", tmp_path, *arguments, "--dataset_name", "easy_vqa")
    assert "one of --model_name_or_path and --language_model" in done.stderr


def test_lora_experts_on_a_base_of_the_hub_are_pushed(rows_folder, tmp_path):
    output = tmp_path / "experts"
    with running_hub(tmp_path) as hub:
        host = HOSTS["llava"]()
        base = host.model()
        base.push_to_hub("owner/base")
        host.processor.push_to_hub("owner/base")
        system = ["--system", "octavius", "--adapter_config", '{"r": 2, "router": {"end_token_id": 256}}']
        data = ["--dataset_name", rows_folder, "--eval_strategy", "steps", "--eval_steps", 2]
        push = ["--push_to_hub", "--hub_model_id", "owner/experts"]
        assert_runs("finetune_lora.py", output, "--model_name_or_path", "owner/base", *system, *data, *push, hub=hub)
        pushed = hub.files("owner/experts")
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    model = PeftModel.from_pretrained(base, output)
    assert model.peft_config["default"].system == "octavius"
    trained = [tensor for name, tensor in model.named_parameters() if "moe_lora_B" in name]
    assert trained and any(tensor.abs().sum() > 0 for tensor in trained)


def test_fields_of_experts_come_from_the_command_line(parts, tmp_path):
    rows = [{"question": "what colour ?", "answer": "red", "task_ids": task} for task in (0, 1, 0, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    fields = {"target_modules": ["q_proj"], "num_experts": 2, "router": {"name": "condition", "condition": "task"}}
    given = ["--adapter_config", json.dumps(fields), "--dataset_name", tmp_path / "rows.jsonl"]
    assert_runs("finetune_lora.py", tmp_path / "experts", "--model_name_or_path", parts[1], *given)
    assert MoeLoraConfig.from_pretrained(tmp_path / "experts").num_experts == 2


@pytest.mark.parametrize("name", ["finetune.py", "finetune_lora.py"])
def test_help_tells_the_arguments(name):
    done = subprocess.run([sys.executable, SCRIPTS / name, "--help"], capture_output=True, text=True, check=True)
    assert "--dataset_name" in done.stdout and "--push_to_hub" in done.stdout
