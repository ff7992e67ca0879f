"""An adapter whose base nobody else has is pushed by no method; set_base makes it fit to push."""

import json
import warnings

import pytest
import torch
from helpers.hub.checkpoints import tiny_config, tiny_model
from helpers.peft_version import transformers_takes_this_peft
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_moe import MoeLoraConfig
from hf_moe.hub.adapter_folder import check_base, set_base
from hf_moe.hub.push import push_checkpoint
from hf_moe.training.trainer import HfMoeTrainer


ROWS = [{"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([5, 6, 7, 8])}] * 2
REFUSAL = "which nobody else can load.*set_base"


def adapted(base):
    """An adapter of a tiny model, which says that it was loaded from `base`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=32)
    config.name_or_path = str(base)
    return get_peft_model(LlamaForCausalLM(config), MoeLoraConfig(target_modules=["q_proj"]))


def arguments(folder, **options):
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "hub_model_id": "owner/experts", **options}
    return TrainingArguments(folder / "trainer", **options)


def uploads(hub):
    return [path for verb, path in hub.requests if "/commit/" in path or "/preupload/" in path]


def by_the_model(model, folder):
    model.push_to_hub("owner/experts")


def by_the_transformers_model(model, folder):
    base = model.unload()
    with transformers_takes_this_peft():
        base.add_adapter(MoeLoraConfig(target_modules=["q_proj"]))
    base.push_to_hub("owner/experts")


def by_the_config(model, folder):
    model.peft_config["default"].push_to_hub("owner/experts")


def by_the_trainer(model, folder):
    Trainer(model, arguments(folder, save_strategy="no"), train_dataset=ROWS).push_to_hub()


def by_a_trainer_that_pushes_its_checkpoints(model, folder):
    Trainer(
        model, arguments(folder, save_strategy="steps", save_steps=1, push_to_hub=True), train_dataset=ROWS
    ).train()


PUSHES = [
    by_the_model,
    by_the_transformers_model,
    by_the_config,
    by_the_trainer,
    by_a_trainer_that_pushes_its_checkpoints,
]


@pytest.mark.parametrize("push", PUSHES)
def test_a_base_that_is_a_folder_is_warned_of_by_every_push(hub, tmp_path, push):
    with pytest.warns(UserWarning, match=f"names its base by a folder of this machine, '{tmp_path}'"):
        push(adapted(tmp_path), tmp_path)


def test_our_push_refuses_a_base_that_is_a_folder(hub, tmp_path):
    adapted(tmp_path).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"{tmp_path}.*{REFUSAL}"):
        push_checkpoint(tmp_path / "adapter", "owner/experts")
    assert not hub.repositories


@pytest.mark.parametrize("push", PUSHES)
def test_what_has_a_base_on_the_hub_is_pushed(hub, tmp_path, push):
    push(adapted("owner/base"), tmp_path)
    config = json.loads(hub.files("owner/experts")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"


@pytest.mark.parametrize("push_to_hub", [False, True])
def test_our_trainer_refuses_before_it_makes_a_repository(hub, tmp_path, push_to_hub):
    base = tiny_model(tiny_config())
    base.name_or_path = str(tmp_path)
    model = get_peft_model(base, MoeLoraConfig(target_modules=r".*language_model.*q_proj"))
    with pytest.raises(ValueError, match=REFUSAL):
        HfMoeTrainer(model, arguments(tmp_path, push_to_hub=push_to_hub), train_dataset=ROWS).push_to_hub()
    assert not hub.repositories
    set_base(model, "owner/base")
    HfMoeTrainer(model, arguments(tmp_path, push_to_hub=push_to_hub), train_dataset=ROWS).push_to_hub()
    assert "adapter_model.safetensors" in hub.files("owner/experts")


def test_a_checkpoint_that_stays_here_is_saved_with_a_warning(hub, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    for push in ({}, {"push_to_hub": True, "hub_strategy": "end"}):
        trainer = Trainer(adapted(tmp_path), arguments(tmp_path, **options, **push), train_dataset=ROWS)
        with pytest.warns(UserWarning, match="names its base by a folder"):
            trainer.train()


def test_a_model_whose_base_is_named_is_pushed_with_its_commit_and_no_path(hub, tmp_path):
    model = adapted(tmp_path)
    with pytest.raises(ValueError, match=r"'./base'.*which nobody else can load"):
        set_base(model, "./base")
    set_base(model, "owner/base", revision="0123abcd")
    by_the_trainer(model, tmp_path)
    files = hub.files("owner/experts")
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "0123abcd")
    assert b"base_model: owner/base\n" in files["README.md"]
    assert str(tmp_path).encode() not in files["adapter_config.json"] + files["README.md"]


@pytest.mark.parametrize("base", ["/home/x/base", "./base", "../base", "~/base", r"C:\base", "user/na me", "a/b/c"])
def test_a_path_is_recorded_with_a_warning_even_where_it_is_gone(tmp_path, base):
    with pytest.warns(UserWarning, match="names its base by a folder"):
        adapted(base).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSAL):
        check_base(base)


@pytest.mark.parametrize("base", ["", None])
def test_an_adapter_without_a_base_is_not_pushed(base):
    with pytest.raises(ValueError, match=REFUSAL):
        check_base(base)


def test_models_without_a_user_are_bases_too(hub, tmp_path):
    model = adapted("gpt2")
    by_the_model(model, tmp_path)
    assert json.loads(hub.files("owner/experts")["adapter_config.json"])["base_model_name_or_path"] == "gpt2"


@pytest.mark.parametrize("config", [MoeLoraConfig, LoraConfig])
@pytest.mark.parametrize("base", ["models/base", "base"])
def test_a_relative_folder_is_refused_from_another_folder_too(hub, tmp_path, monkeypatch, base, config):
    (tmp_path / base).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(adapted(base).unload(), config(target_modules=["q_proj"]))
    model.save_pretrained("adapter")
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match=rf"{base}'.*{REFUSAL}"):
        push_checkpoint(tmp_path / "adapter", "owner/experts")
    set_base(tmp_path / "adapter", "owner/named")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: owner/named\n" in card and "base_model:adapter:owner/named\n" in card
    assert base not in card.replace("base_model", "").replace("basemodel", "") or base == "base"
    assert push_checkpoint(tmp_path / "adapter", "owner/experts", dry_run=True).files


def test_a_relative_folder_is_no_repository(tmp_path, monkeypatch):
    check_base("models/base")
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=REFUSAL):
        check_base("models/base")


def test_a_base_on_the_hub_is_saved_without_a_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted("owner/base").save_pretrained(tmp_path)
    assert not [item for item in caught if "base by a folder" in str(item.message)]
