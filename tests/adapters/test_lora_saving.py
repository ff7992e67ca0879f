"""Adapter folders are PEFT's: they hold the adapter alone, and open in a new process."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.near import assert_near
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from hf_moe import MoeLoraConfig


OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
import hf_moe.adapters
from peft import AutoPeftModelForCausalLM, PeftModel

base, adapter, inputs, expected = sys.argv[1:]
input_ids, expected = torch.load(inputs), torch.load(expected)
for model in (
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, adapter_name="renamed"),
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True),
    AutoModelForCausalLM.from_pretrained(adapter),
    AutoPeftModelForCausalLM.from_pretrained(adapter),
):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=input_ids).logits, expected, atol=1e-6, rtol=1e-5)
"""


@pytest.fixture
def saved(llama, randomise, text, tmp_path):
    """A base model on disk, and an adapter of it that has taken a step."""
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    config = MoeLoraConfig(
        target_modules=["q_proj", "v_proj", "down_proj"],
        router={"name": "adamoe"},
        objectives={"load_balance": 0.01},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    randomise(model)
    model.train()(**text).loss.backward()
    model.eval().save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "base", tmp_path / "adapter"


def test_an_adapter_opens_in_a_new_process_by_every_door(saved, text, tmp_path):
    model, base, adapter = saved
    with torch.no_grad():
        torch.save(model(input_ids=text["input_ids"]).logits, tmp_path / "expected.pt")
    torch.save(text["input_ids"], tmp_path / "inputs.pt")
    arguments = [str(item) for item in (base, adapter, tmp_path / "inputs.pt", tmp_path / "expected.pt")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OPEN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "UNEXPECTED" not in done.stderr and "MISSING" not in done.stderr


def test_the_folder_holds_the_adapter_alone_without_its_name(saved):
    model, _, adapter = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors and all("moe_lora_" in name and "default" not in name for name in tensors)
    routers = [name for name in tensors if "moe_lora_router" in name]
    assert len(routers) == 2 * 2  # real and null rows, one router a layer
    kept = {name for name, _ in model.named_parameters() if "moe_lora_" in name}
    assert len(kept) == len([name for name in tensors if "objectives" not in name])


def test_what_the_router_reads_and_the_base_are_recorded(saved):
    _, base, adapter = saved
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOE_LORA" and config["router_input"] == "decoder_layer"
    assert config["router"] == {"name": "adamoe"} and config["base_model_name_or_path"] == str(base)


def test_a_base_that_is_a_folder_is_recorded_with_a_warning(saved, tmp_path):
    model, base, _ = saved
    with pytest.warns(UserWarning, match="names its base by a folder"):
        model.save_pretrained(tmp_path / "again")
    model.peft_config["default"].base_model_name_or_path = "someone/tiny-llama"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path / "shared", save_embedding_layers=False)
    assert not [item for item in caught if "folder" in str(item.message)]
    assert str(base) not in (tmp_path / "shared" / "adapter_config.json").read_text()


def test_an_adapter_of_one_of_our_own_models_opens_with_the_base_it_carries(
    own_model, image_rows, tmp_path, randomise
):
    own_model().save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", trust_remote_code=True)
    assert type(base).__module__.startswith("transformers_modules")
    targets = r".*language_model.*(q_proj|down_proj)"
    model = get_peft_model(base, MoeLoraConfig(target_modules=targets, router="moiie", objectives={"router_z": 0.1}))
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    with torch.no_grad():
        expected = model(**image_rows)
        found = opened.eval()(**image_rows)
    assert_near(found.logits, expected.logits, 1e-6)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_second_adapter_loads_beside_the_first(llama, saved, text, tmp_path, randomise):
    model, _, adapter = saved
    other = get_peft_model(llama(), MoeLoraConfig(num_experts=24, target_modules=["up_proj"], router_input="target"))
    randomise(other, seed=4)
    other.eval().save_pretrained(tmp_path / "other")
    both = PeftModel.from_pretrained(llama(), adapter, adapter_name="first")
    both.load_adapter(tmp_path / "other", adapter_name="second")
    both.eval()
    with torch.no_grad():
        for name, single in (("first", model), ("second", other)):
            both.set_adapter(name)
            expected = single(input_ids=text["input_ids"]).logits
            assert_near(both(input_ids=text["input_ids"]).logits, expected, 1e-6)
