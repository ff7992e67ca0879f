"""A recipe on a host of Transformers from its first line to its report, its checkpoint opened again."""

import json

import pytest
import torch
import yaml
from test_host_recipes import HOST
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.modeling.parts import host_parts, part_of
from hf_moe.training.comparison import Comparison, compare
from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import run_recipe


SHORT = ["training.max_steps=3", "training.learning_rate=0.01", "training.per_device_train_batch_size=2"]


@pytest.fixture
def recipe_file(processor, rows, picture, tmp_path):
    """A recipe with rows of its own, on a LLaVA with weights in a folder."""
    own = LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    )
    fields = {**HOST, "image_token_index": processor.image_token_id}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    own.save_pretrained(tmp_path / "llava")
    written = []
    for index, row in enumerate(rows):
        names = []
        for number, image in enumerate(row["images"]):
            names.append(f"{index}_{number}.png")
            image.save(tmp_path / names[-1])
        answer = row["messages"][-1]["content"][0]["text"]
        written.append({"messages": row["messages"], "images": names, "answer": answer, "question_type": "any"})
    for split, chosen in {"train": written, "test": [written[0], written[3]]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    content = {
        "name": "hosted",
        "model": {"host": str(tmp_path / "llava"), "system": "moiie"},
        "trainable": ["connector", "routers", "experts"],
        "data": {"train": {"path": str(tmp_path / "train.jsonl")}, "eval": {"path": str(tmp_path / "test.jsonl")}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_host_trains_by_its_parts_and_opens_again(recipe_file, tmp_path):
    folder = tmp_path / "run"
    report = run_recipe(load_recipe(str(recipe_file), SHORT), folder)
    assert set(report["trainable_parameters"]) == {"connector", "routers", "experts"}
    assert not report["strayed"] and report["evaluated"] == 2
    assert set(report["parameters_active"]) == {"text", "image"}
    start = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").state_dict()
    saved = HfMoeForConditionalGeneration.from_pretrained(folder / "checkpoint")
    found = [key for key, value in saved.state_dict().items() if not torch.equal(value, start.get(key, value))]
    assert {part_of(key, host_parts(saved)) for key in found} == {"connector"}
    assert (folder / "checkpoint" / "processor_config.json").is_file()
    again = run_recipe(load_recipe(str(recipe_file), SHORT), folder, resume=True)
    assert again["accuracy"] == report["accuracy"]


def test_frozen_towers_and_connectors_are_run_once(recipe_file, tmp_path):
    short = [*SHORT, "trainable=[routers, experts]"]
    kept = run_recipe(load_recipe(str(recipe_file), short), tmp_path / "kept")
    computed = run_recipe(load_recipe(str(recipe_file), [*short, "data.keep_features=false"]), tmp_path / "computed")
    assert list((tmp_path / "kept" / "features").glob("*.safetensors"))
    assert not (tmp_path / "computed" / "features").exists()
    assert kept["log_history"][-1]["train_loss"] == pytest.approx(computed["log_history"][-1]["train_loss"], abs=2e-3)


def test_systems_are_compared_on_a_host(recipe_file, tmp_path):
    systems = ["moiie", "top_k"]
    own = [*SHORT, "model.moe_config={layers: all, num_experts: 8}"]
    comparison = Comparison(recipe=str(recipe_file), systems=systems, folder=tmp_path / "compared", overrides=own)
    found = compare(comparison)["systems"]
    for system in found.values():
        assert [run["seed"] for run in system["runs"]] == [0, 1, 2] and system["width"] == 48
        # Routers are their own, everything else is the host's and copies of it.
        assert {part for part, count in system["runs"][0]["start"].items() if count["own"]} == {"routers"}
