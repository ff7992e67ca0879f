"""A checkpoint on a host of Transformers: what travels with it, what is said of it, and how it is opened."""

import json
import re

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.hub.hosted import (
    hosted_model,
    processor,
    read_wave,
    sample_picture,
    save_hosted,
    write_wave,
)
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import AutoModelForMultimodalLM, audio_utils, processing_utils

from hf_moe import HfMoeProcessor, MoeLoraConfig
from hf_moe.cli import main
from hf_moe.hub.adapter_card import write_adapter_card
from hf_moe.hub.card import write_card
from hf_moe.hub.inspection import inspect_checkpoint
from hf_moe.hub.probe import ask, probe_inputs, probed
from hf_moe.hub.push import checkpoint_files, loading_snippet, push_checkpoint
from hf_moe.hub.refresh import refresh_checkpoint
from hf_moe.modeling.parts import host_parts


NAMES = ["qwen2_5_vl", "gemma3", "qwen2_audio", "qwen2_5_omni_thinker", "qwen3_vl_moe", "llama"]
TASKS = {
    "qwen2_5_vl": ("image-text-to-text", "AutoModelForImageTextToText", ["text", "image", "video"]),
    "gemma3": ("image-text-to-text", "AutoModelForImageTextToText", ["text", "image"]),
    "qwen2_audio": ("audio-text-to-text", "AutoModelForMultimodalLM", ["text", "audio"]),
    "qwen2_5_omni_thinker": ("any-to-any", "AutoModelForMultimodalLM", ["text", "image", "video", "audio"]),
    "qwen3_vl_moe": ("image-text-to-text", "AutoModelForImageTextToText", ["text", "image", "video"]),
    "llama": ("text-generation", "AutoModelForCausalLM", ["text"]),
}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A checkpoint on Qwen2.5-VL with its processor and its card, and the model; not to be changed."""
    folder = tmp_path_factory.mktemp("hosted") / "qwen-moe"
    model = save_hosted("qwen2_5_vl", folder)
    write_card(folder, model=model, report={}, base_models=["Qwen/Qwen2.5-VL-3B-Instruct"])
    return folder, model


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """The same on Qwen2-Audio."""
    folder = tmp_path_factory.mktemp("hosted") / "audio-moe"
    model = save_hosted("qwen2_audio", folder)
    write_card(folder, model=model, report={})
    return folder, model


def test_only_the_code_of_the_moe_travels(seeing):
    files = {path.name for path in seeing[0].iterdir()}
    assert {
        "modeling_hf_moe.py",
        "parts.py",
        "router_moiie.py",
        "chat_template.jinja",
        "processor_config.json",
    } <= files
    strangers = {"vision.py", "image_loading.py", "processing_hf_moe.py", "host_composed.py"}
    assert not strangers & files and not [name for name in files if name.startswith("connector_")]
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((seeing[0] / name).read_text())


def test_a_host_saved_over_a_composed_one_removes_its_code(saved_checkpoint, tmp_path):
    HfMoeProcessor.from_pretrained(saved_checkpoint).save_pretrained(tmp_path)
    assert (tmp_path / "processing_hf_moe.py").is_file()
    hosted_model("gemma3").save_pretrained(tmp_path)
    assert not (tmp_path / "processing_hf_moe.py").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_the_host_its_parts_and_its_task(tmp_path, name):
    model = hosted_model(name)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(write_card(tmp_path, model=model, report={}))
    task, auto, modalities = TASKS[name]
    assert card.data.pipeline_tag == task
    assert f"`{HOSTS[name].class_name}` of Transformers" in card.text
    assert f"from transformers import {auto}, Auto" in card.text
    assert f"| | {' | '.join(modalities)} |" in card.text
    shown = re.findall(r'"type": "(\w+)", "url"', card.text.split("## Use")[1].split("pipeline")[0])
    assert shown == modalities[1:]
    parts = host_parts(model)
    for path in (*parts.towers, *parts.connectors):
        assert f"`{path}` (`{type(model.get_submodule(path)).__name__}`)" in card.text


def test_the_host_of_a_recipe_is_the_base_model(seeing, tmp_path):
    def base(host):
        recipe = {"name": "mine", "model": {"host": host}}
        seeing[1].config.save_pretrained(tmp_path)
        return ModelCard.load(write_card(tmp_path, model=seeing[1], report={}, recipe=recipe)).data.base_model

    assert base("Qwen/Qwen2.5-VL-3B-Instruct") == ["Qwen/Qwen2.5-VL-3B-Instruct"]
    assert base("./Qwen/here") is None and base(str(tmp_path)) is None


@pytest.mark.parametrize("index", [0, 1])
def test_the_programs_of_the_card_run(seeing, index, monkeypatch, tmp_path, capsys):
    code = re.findall(r"```python\n(.*?)```", (seeing[0] / "README.md").read_text(), flags=re.DOTALL)[index]
    monkeypatch.chdir(seeing[0].parent)
    sample_picture().save(seeing[0].parent / "picture.png")
    # No decoder of videos is installed where the tests run.
    code = code.replace('    {"type": "video", "url": "video.mp4"},\n', "")
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("template", [True, False])
def test_the_program_for_a_sound_runs(hearing, template, monkeypatch, tmp_path, capsys):
    folder, model = hearing
    if not template:
        folder = tmp_path / "audio-moe"
        model.save_pretrained(folder)
        without = processor("qwen2_audio")
        without.chat_template = None
        without.save_pretrained(folder)
        write_card(folder, model=model, report={})
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert ("apply_chat_template" in code) == template
    monkeypatch.chdir(folder.parent)
    write_wave("sound.wav")
    monkeypatch.setattr(processing_utils, "load_audio", read_wave)
    monkeypatch.setattr(audio_utils, "load_audio", read_wave)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_inspect_prints_the_host(seeing, capsys):
    assert main(["inspect", str(seeing[0])]) == 0
    shown = capsys.readouterr().out
    assert "Host: Qwen2_5_VLForConditionalGeneration" in shown
    assert "towers: model.visual" in shown and "connectors: model.visual.merger" in shown
    assert "that encode it" in shown


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_audio"])
def test_a_probe_holds_all_that_the_host_takes(name):
    config = hosted_model(name).config
    assert list(probed(config, probe_inputs(config, processor=processor(name)))) == TASKS[name][2]
    assert probed(config, probe_inputs(config)) == ("text",)


def test_a_bare_process_answers_as_the_model(hearing, tmp_path):
    folder, model = hearing
    inputs = probe_inputs(model.config, processor=processor("qwen2_audio"))
    answer = ask(folder, inputs, tmp_path)
    assert answer.error is None and answer.wrong == {}
    with torch.no_grad():
        assert torch.equal(answer.logits, model(**inputs).logits)


def test_a_hosted_checkpoint_is_refreshed(tmp_path, capsys):
    folder = tmp_path / "old"
    save_hosted("qwen2_5_vl", folder)
    assert refresh_checkpoint(folder).changed == []
    text = (folder / "routing.py").read_text()
    (folder / "routing.py").write_text(text + "\n\nOLD = True\n")
    assert inspect_checkpoint(folder)["refresh"]
    result = refresh_checkpoint(folder)
    assert "routing.py" in result.changed and result.difference == 0
    assert result.compared_on == ("text", "image", "video")
    assert (folder / "routing.py").read_text() == text
    assert not (folder / "processing_hf_moe.py").exists()


def test_a_hosted_checkpoint_is_pushed_whole(seeing, hub):
    folder, _ = seeing
    push_checkpoint(folder, "owner/qwen-moe")
    assert set(hub.files("owner/qwen-moe")) == set(checkpoint_files(folder))
    assert "base_model:\n- Qwen/Qwen2.5-VL-3B-Instruct" in hub.files("owner/qwen-moe")["README.md"].decode()


def test_the_snippet_of_a_push_opens_what_hears(hearing):
    snippet = loading_snippet(hearing[0], "owner/audio-moe", "main")
    assert "AutoModelForMultimodalLM" in snippet and "processor = AutoProcessor" in snippet
    opened = AutoModelForMultimodalLM.from_pretrained(hearing[0], trust_remote_code=True)
    assert type(opened).__name__ == "HfMoeForConditionalGeneration"


def test_a_push_without_the_processor_is_refused(tmp_path):
    model = hosted_model("gemma3")
    model.save_pretrained(tmp_path)
    write_card(tmp_path, model=model, report={})
    with pytest.raises(FileNotFoundError, match="lacks processor_config.json, tokenizer_config.json"):
        checkpoint_files(tmp_path)


def test_a_model_pushed_by_its_method_is_complete(hub):
    hosted_model("qwen2_audio").push_to_hub("owner/heard")
    processor("qwen2_audio").push_to_hub("owner/heard")
    files = hub.files("owner/heard")
    assert {"README.md", "LICENSE", "model.safetensors", "chat_template.jinja", "processor_config.json"} <= set(files)
    assert "pipeline_tag: audio-text-to-text" in files["README.md"].decode()
    assert 'checkpoint = "owner/heard"' in files["README.md"].decode()


@pytest.mark.parametrize("own", [True, False])
def test_the_card_of_an_adapter_opens_its_host(tmp_path, own):
    base = hosted_model("qwen2_audio") if own else HOSTS["qwen2_audio"].build()
    base.config.architectures = [type(base).__name__]
    adapted = get_peft_model(base, MoeLoraConfig(target_modules=r".*language_model.*q_proj"))
    adapted.save_pretrained(tmp_path)
    card = ModelCard.load(write_adapter_card(tmp_path, model=adapted, report={}, base_models=["owner/base"]))
    assert card.data.pipeline_tag == "audio-text-to-text"
    opened = "AutoModelForImageTextToText" if own else "AutoModelForMultimodalLM"
    assert f"from transformers import {opened}, AutoProcessor" in card.text
    assert ("trust_remote_code=True" in card.text) == own
