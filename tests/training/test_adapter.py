"""Recipes that train an adapter, from the command line to the adapter folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_moe.cli import main
from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.data import load_rows
from hf_moe.hub.adapter_folder import read_adapter_config
from hf_moe.hub.results import check_evaluation
from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import run_recipe


RECIPE = "smollm2_opposite_tasks"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny decoder with a tokenizer that knows the words of the two tasks."""
    folder = tmp_path_factory.mktemp("base")
    rows = load_rows("opposite_tasks")
    tokenizer = train_word_tokenizer(turn["content"][0]["text"] for row in rows for turn in row["messages"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(base):
    """What makes the shipped recipe a matter of a second."""
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|end|>")
    return [
        f"model={{base: {base}}}",
        "adapter.layers_to_transform=null",
        f"adapter.router.end_token_id={end}",
        "training.max_steps=4",
        "training.logging_steps=1",
        "data.eval.limit=32",
        "evaluation={}",
    ]


def train(folder, overrides, *arguments):
    flags = [flag for override in overrides for flag in ("--set", override)]
    assert main(["train", RECIPE, "--output-dir", str(folder), *flags, *arguments]) == 0
    return json.loads((folder / "report.json").read_text())


def losses(report):
    return [entry["loss"] for entry in report["log_history"] if "loss" in entry]


def test_the_command_leaves_an_adapter_that_peft_loads_and_its_report(base, small, tmp_path):
    report = train(tmp_path, small)
    folder = tmp_path / "checkpoint"
    config = read_adapter_config(folder)
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert (
        set(report["accuracy_by_question_type"]) == set(report["base_accuracy_by_question_type"]) == {"truth", "lie"}
    )
    assert report["evaluated"] == 32 and report["machine"]["cores"] and report["train_seconds"] > 0
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
    counted = sum(parameter.numel() for parameter in saved.parameters() if parameter.requires_grad)
    assert sum(report["trainable_parameters"].values()) == counted
    assert report["trainable_parameters"]["routers"] == 2 * 2 * 32
    assert not any(name.endswith("lora_B") for name in report["unmoved"])
    assert any(name.startswith("routing/text/") for name in report["log_history"][0])


def test_the_card_of_the_adapter_states_what_was_measured(base, small, tmp_path):
    report = train(tmp_path, [*small, "training.max_steps=1"])
    folder = tmp_path / "checkpoint"
    check_evaluation(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert f"| all | {report['accuracy']:.4f} |" in card.text
    assert (
        f"| lie, the base without the adapter | {report['base_accuracy_by_question_type']['lie']:.4f} |" in card.text
    )
    assert report["machine"]["processor"] in card.text
    assert "end_token_id" in card.text  # the recipe


def test_a_resumed_run_ends_as_one_that_was_not_stopped(small, tmp_path):
    saving = [*small, "training.save_strategy=steps", "training.save_steps=2"]
    whole = train(tmp_path / "whole", saving)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    resumed = train(tmp_path / "stopped", saving, "--resume")
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    weights = [(tmp_path / name / "checkpoint" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


CONTESTANTS = {
    "lora": ["adapter.router=constant", "adapter.num_experts=1", "adapter.r=8", "adapter.lora_alpha=16"],
    "condition": ["adapter.router=condition"],
}


def test_overrides_give_every_contestant_as_many_trainable_parameters(small, tmp_path):
    short = [*small, "training.max_steps=1"]
    counts = {
        name: run_recipe(load_recipe(RECIPE, [*short, *overrides]), tmp_path / name)["trainable_parameters"]
        for name, overrides in CONTESTANTS.items()
    }
    assert counts["lora"] == counts["condition"] and set(counts["lora"]) == {"experts"}


def test_a_system_by_name_fills_the_adapter_of_a_recipe_file(base, tmp_path, capsys):
    recipe = {
        "name": "mixlora",
        "model": {"base": str(base)},
        "adapter": {"system": "mixlora", "variant": "switch", "r": 2},
        "data": {"train": {"name": "opposite_tasks", "limit": 16}},
        "training": {"max_steps": 1, "save_strategy": "no"},
    }
    path = tmp_path / "mixlora.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path), "--output-dir", str(tmp_path / "run")]) == 0
    config = read_adapter_config(tmp_path / "run" / "checkpoint")
    assert config["ffn_experts"] and config["r"] == 2 and config["num_experts_per_tok"] == 1
    assert "accuracy" not in json.loads((tmp_path / "run" / "report.json").read_text())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=4", "'rank_pattern'"),
        ("adapter.router=sequenze", "'sequence'"),
        ("adapter.system=mixlara", "'mixlora'"),
        ("adapter.system=x_lora", "PEFT's own"),
        ("adapter.variant=switch", "name that in `system`"),
        ("adapter=null", "adapter: None"),
        ("model={language_model: x}", "needs both model.base"),
        ("model.revison=main", "'revision'"),
        ("model.dtype=float8", "'float32'"),
        ("trainable=[experts]", "what is trained is the adapter"),
        ("stages=[{name: x, trainable: []}]", "has stages"),
        ("evaluation.blind=true", "batch_size, bf16"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPE, [override])


def test_rows_without_the_condition_that_the_router_reads_are_refused_before_the_training(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Is a dog a tool?"}, {"role": "assistant", "content": "no"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    recipe = load_recipe(RECIPE, [*small, "adapter.router=condition", f"data.train={{path: {path}}}"])
    with pytest.raises(ValueError, match="data.train have no column task_ids"):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_sees_is_adapted_on_images_and_questions(tmp_path):
    short = ["training.max_steps=1", "data.train.limit=16", "data.eval.limit=4", "model.image_size=32"]
    tiny = ["model.language_model.hidden_size=32", "model.language_model.intermediate_size=48"]
    tiny += ["model.language_model.num_attention_heads=2", "model.language_model.num_key_value_heads=2"]
    options = [*short, *tiny, "evaluation={}", "model.moe_config.expert_intermediate_size=16"]
    run_recipe(load_recipe("easyvqa_demo", options), tmp_path / "base")
    recipe = {
        "name": "sees",
        "model": {"base": str(tmp_path / "base" / "checkpoint")},
        "adapter": {
            "num_experts": 2,
            "router": {"name": "modality", "modalities": ["text", "image"]},
            "num_experts_per_tok": 1,
            "target_modules": ["q_proj", "v_proj"],
        },
        "data": {part: {"name": "easy_vqa", "limit": 8} for part in ("train", "eval")},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"},
    }
    path = Path(tmp_path / "sees.yaml")
    path.write_text(yaml.safe_dump(recipe))
    report = run_recipe(load_recipe(str(path)), tmp_path / "run")
    assert report["evaluated"] == 8 and "yes/no" in report["accuracy_by_question_type"]
    assert (tmp_path / "run" / "checkpoint" / "processor_config.json").is_file()
    assert read_adapter_config(tmp_path / "run" / "checkpoint")["base_model_name_or_path"] == recipe["model"]["base"]
