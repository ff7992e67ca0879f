"""Adapter folders say what they need, and are not pushed with a base that nobody else has."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from helpers.hosts import families
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_moe import MoeLoraConfig, __version__
from hf_moe.adapters.checkpoints import EARLIER_TYPE
from hf_moe.hub.adapter_folder import auto_class, set_base
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
        assert "MOE_LORA" in str(error), error
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


def test_a_process_without_the_package_is_told_the_missing_method(llama, own_adapter, tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    base = type(llama()).from_pretrained(tmp_path / "llama")
    get_peft_model(base, MoeLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "llama-adapter")
    run(WITHOUT_THE_PACKAGE, tmp_path / "llama", tmp_path / "llama-adapter", tmp_path / "own", own_adapter)


def test_one_of_our_own_models_opens_its_adapter_without_an_import(own_adapter, tmp_path):
    run(WITHOUT_AN_IMPORT, own_adapter, tmp_path / "inputs.pt", tmp_path / "expected.pt")


def test_the_config_names_the_method_and_earlier_ones_are_read(llama, tmp_path):
    model = get_peft_model(llama(), MoeLoraConfig(target_modules=["q_proj"], num_experts=3))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["peft_type"] == "MOE_LORA"
    for peft_type in ("MOE_LORA", EARLIER_TYPE):
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
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny-llama", revision="0123abcd")' in result.snippet
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


@pytest.mark.parametrize(
    "host, name",
    [
        ("vit", "AutoModelForImageClassification"),
        ("qwen2_vl", "AutoModelForImageTextToText"),
        ("bart", "AutoModelForSeq2SeqLM"),
        ("bert", "AutoModelForSequenceClassification"),
        ("gpt2", "AutoModelForCausalLM"),
        ("clip", "AutoModel"),
    ],
)
def test_the_snippet_takes_the_class_that_loads_the_base(tmp_path, host, name):
    host = families.HOSTS[host]
    config = MoeLoraConfig(target_modules=host.targets, router_input="target", task_type="CAUSAL_LM")
    if host.decodes and "sequence" not in host.refuses:
        config.router_input = "decoder_layer"
    base = host.build()
    assert auto_class(type(base).__name__) == name
    wrapped = get_peft_model(base, config) if hasattr(base, "prepare_inputs_for_generation") else None
    if wrapped is None:
        config.task_type = None
        wrapped = get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path)
    set_base(tmp_path, "someone/base")
    assert f'= {name}.from_pretrained("someone/base")' in push_checkpoint(tmp_path, "a/b", dry_run=True).snippet


@pytest.fixture
def cut_short():
    def cut(folder, size):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return cut


@pytest.mark.parametrize("size", [0, 4, 100, -40])
def test_weights_that_are_cut_short_are_named_on_loading_and_on_pushing(folder, llama, cut_short, size):
    set_base(folder, "someone/tiny-llama")
    cut_short(folder, size)
    with pytest.raises(OSError, match="adapter_model.safetensors is damaged or cut short"):
        PeftModel.from_pretrained(llama(), folder)
    with pytest.raises(OSError, match="adapter_model.safetensors is damaged or cut short"):
        push_checkpoint(folder, "someone/adapter", dry_run=True)


def test_damaged_weights_of_an_own_base_are_named_by_the_auto_class(own_adapter, cut_short):
    cut_short(own_adapter, -40)
    with pytest.raises(OSError, match="of the adapter .*own-adapter is damaged or cut short"):
        AutoModelForImageTextToText.from_pretrained(own_adapter, trust_remote_code=True)


def without(folder, part):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if part not in name}, path)


@pytest.mark.parametrize("part", ["moe_lora_router", "moe_lora_B"])
def test_weights_that_lack_tensors_are_refused_with_their_names(folder, llama, own_adapter, part):
    without(folder, part)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors lack .* among them .*{part}"):
        PeftModel.from_pretrained(llama(), folder)
    without(own_adapter, part)
    with pytest.raises(ValueError, match=f"own-adapter lacks .* among them .*{part}"):
        AutoModelForImageTextToText.from_pretrained(own_adapter, trust_remote_code=True)


def test_an_adapter_with_objectives_of_another_run_is_complete(llama, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, MoeLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = MoeLoraConfig.from_pretrained(tmp_path / "adapter")
    config.objectives = {"load_balance": 0.01, "router_z": 0.001}
    PeftModel.from_pretrained(llama(), tmp_path / "adapter", config=config)


def test_the_version_that_saved_is_recorded_and_a_newer_one_is_said(folder, llama):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["hf_moe_version"] == __version__
    path.write_text(json.dumps({**config, "hf_moe_version": "99.0", "new_field": 3}))
    with pytest.warns(UserWarning, match=f"saved by hf_moe 99.0, and this is {__version__}"):
        PeftModel.from_pretrained(llama(), folder)
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "hf_moe_version"}))
    assert PeftModel.from_pretrained(llama(), folder).peft_config["default"].hf_moe_version is None


def test_a_broken_dependency_is_no_missing_package(own_model, own_adapter, monkeypatch):
    model = own_model()
    monkeypatch.setitem(sys.modules, "hf_moe.adapters", None)  # as without the package
    model.load_adapter(own_adapter)
    model = own_model()

    broken = EntryPoint("broken", "peft:missing", "hf_moe.peft_methods")
    monkeypatch.setattr("hf_moe.modeling.base.entry_points", lambda group: [broken])
    with pytest.raises(AttributeError, match="missing"):
        model.load_adapter(own_adapter)
