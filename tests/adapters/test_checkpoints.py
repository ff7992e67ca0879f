"""Adapter folders say what they need, and are not pushed with a base that nobody else has."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.hub.adapter import set_base
from hf_moe.hub.push import push_checkpoint


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["hf_moe"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

llama, llama_adapter, own, own_adapter = sys.argv[1:]
doors = {
    "PeftModel": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), llama_adapter),
    "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(llama_adapter),
    "remote code": lambda: AutoModelForImageTextToText.from_pretrained(own_adapter, trust_remote_code=True),
}
AutoModelForImageTextToText.from_pretrained(own, trust_remote_code=True)
for name, door in doors.items():
    try:
        door()
    except KeyError as error:
        assert 'pip install "hf-moe[train]"' in str(error) and "import hf_moe.adapters" in str(error), error
    else:
        raise AssertionError(f"{name} opened")
"""

WITHOUT_AN_IMPORT = """
import sys, torch
from transformers import AutoModelForImageTextToText

adapter, inputs, expected = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(adapter, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    found = model(**torch.load(inputs)).logits
torch.testing.assert_close(found, torch.load(expected), atol=1e-6, rtol=0)
"""


def run(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def own_adapter(own_model, randomise, image_rows, tmp_path):
    """An adapter of one of our own models on disk, with what it computes."""
    own_model().save_pretrained(tmp_path / "own")
    targets = r".*language_model.*(q_proj|down_proj)"
    model = get_peft_model(type(own_model()).from_pretrained(tmp_path / "own"), MoeLoraConfig(target_modules=targets))
    randomise(model)
    model.eval().save_pretrained(tmp_path / "own-adapter")
    inputs = {name: value for name, value in image_rows.items() if name != "labels"}
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, tmp_path / "expected.pt")
    return tmp_path / "own-adapter"


def test_a_process_without_the_package_is_told_what_to_install(llama, own_adapter, tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    base = type(llama()).from_pretrained(tmp_path / "llama")
    get_peft_model(base, MoeLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "llama-adapter")
    run(WITHOUT_THE_PACKAGE, tmp_path / "llama", tmp_path / "llama-adapter", tmp_path / "own", own_adapter)


def test_one_of_our_own_models_opens_its_adapter_without_an_import(own_adapter, tmp_path):
    run(WITHOUT_AN_IMPORT, own_adapter, tmp_path / "inputs.pt", tmp_path / "expected.pt")


def test_configs_with_and_without_the_hint_are_read(llama, tmp_path):
    model = get_peft_model(llama(), MoeLoraConfig(target_modules=["q_proj"], num_experts=3))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["peft_type"].startswith("MOE_LORA: run `pip install")
    for peft_type in (config["peft_type"], "MOE_LORA"):
        path.write_text(json.dumps({**config, "peft_type": peft_type}))
        found = PeftConfig.from_pretrained(tmp_path)
        assert type(found) is MoeLoraConfig and found.peft_type.value == "MOE_LORA" and found.num_experts == 3


@pytest.fixture
def folder(llama, tmp_path):
    """An adapter whose base is a folder."""
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    get_peft_model(base, MoeLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_pushed_only_with_a_base_on_the_hub(folder):
    with pytest.raises(ValueError, match="which nobody else can load"):
        push_checkpoint(folder, "someone/adapter", dry_run=True)
    set_base(folder, "someone/tiny-llama", revision="0123abcd")
    assert str(folder.parent) not in (folder / "README.md").read_text()
    result = push_checkpoint(folder, "someone/adapter", dry_run=True)
    assert set(result.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "import hf_moe.adapters\nfrom peft import PeftModel" in result.snippet
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny-llama", revision="0123abcd"' in result.snippet
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks adapter_model.safetensors"):
        push_checkpoint(folder, "someone/adapter", dry_run=True)


def test_the_snippet_of_an_own_base_is_multimodal(own_adapter):
    set_base(own_adapter, "someone/moe-vlm")
    snippet = push_checkpoint(own_adapter, "someone/adapter", dry_run=True).snippet
    assert 'AutoModelForImageTextToText.from_pretrained("someone/moe-vlm", trust_remote_code=True)' in snippet


def test_an_adapter_of_peft_itself_needs_no_import_of_ours(llama, tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    set_base(tmp_path, "someone/tiny-llama")
    assert "hf_moe" not in push_checkpoint(tmp_path, "someone/adapter", dry_run=True).snippet
