"""Importing the package stays light, its names resolve, and registration is explicit and repeatable."""

import json
import subprocess
import sys

import pytest

import hf_moe


def test_importing_loads_no_model_code_and_nothing_optional():
    code = "import json, sys, hf_moe; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    heavy = {"accelerate", "datasets", "evaluate", "matplotlib", "peft", "timm", "torchvision", "trl"}
    assert not heavy & loaded
    assert not {"transformers.modeling_utils", "transformers.processing_utils", "transformers.trainer"} & loaded
    assert not {name for name in loaded if name.startswith("hf_moe.modeling.")}


@pytest.mark.parametrize("name", hf_moe.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hf_moe, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_moe.no_such_name


def test_the_lists_name_what_can_be_built():
    assert {"top_k", "moiie", "ernie45_vl"} <= set(hf_moe.list_mechanisms("router"))
    assert {"load_balance", "router_z", "null_load"} <= set(hf_moe.list_mechanisms("objective"))
    systems = {system.key: system for system in hf_moe.list_systems()}
    assert systems["moiie"].arxiv == "2508.09779" and systems["moiie"].family == "routing"
    with pytest.raises(ValueError, match="router"):
        hf_moe.list_mechanisms("routers")


def test_registration_makes_the_installed_classes_win_and_may_be_repeated():
    code = (
        "import hf_moe; hf_moe.register(); hf_moe.register()\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText\n"
        "config = AutoConfig.for_model('hf_moe', text_config={'model_type': 'llama', 'hidden_size': 16,"
        " 'intermediate_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'vocab_size': 8})\n"
        "hosted = hf_moe.HfMoeConfig(host_type='gpt2', n_embd=16, n_layer=1, n_head=2, vocab_size=8)\n"
        "assert isinstance(config, hf_moe.HfMoeConfig)\n"
        "for auto_class in (AutoModel, AutoModelForImageTextToText):\n"
        "    for item in (config, hosted):\n"
        "        assert isinstance(auto_class.from_config(item), hf_moe.HfMoeForConditionalGeneration)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
