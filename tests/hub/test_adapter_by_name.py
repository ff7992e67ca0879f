"""Adapters in repositories open by name, on one of our own models and on somebody else's remote code.

Where the package cannot be imported: `test_by_name.py`.
"""

import json

import pytest
import torch
from helpers.hub.odd_model import OddConfig, OddModel
from helpers.peft_version import transformers_takes_this_peft
from huggingface_hub import HfApi
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from hf_moe import MoeLoraConfig
from hf_moe.hub.adapter_folder import cached_commit
from hf_moe.hub.push import push_checkpoint


IDS = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
OWN = MoeLoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
ODD = MoeLoraConfig(target_modules=["mix"], router_input="target", init_lora_weights=False)


@torch.no_grad()
def logits(model):
    return model.eval()(**IDS)["logits"]


def push_odd(folder, width=32):
    """Push somebody else's model, and return its commit."""
    torch.manual_seed(0)
    OddModel(OddConfig(width=width)).save_pretrained(folder / "odd")
    HfApi().create_repo("owner/base", exist_ok=True)
    return HfApi().upload_folder(repo_id="owner/base", folder_path=folder / "odd").oid


def revision_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())["revision"]


@pytest.mark.parametrize(("kind", "config"), [("own", OWN), ("odd", ODD)])
def test_it_opens_by_its_name_and_in_its_folder_with_the_base_that_it_names(hub, tmp_path, checkpoint, kind, config):
    commit = push_checkpoint(checkpoint, "owner/base").commit if kind == "own" else push_odd(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained("owner/base", trust_remote_code=True)
    model = get_peft_model(base, config)
    expected = logits(model)
    model.push_to_hub("owner/experts")
    model.save_pretrained(tmp_path / "experts")
    recorded = json.loads(hub.files("owner/experts")["adapter_config.json"])
    assert (recorded["base_model_name_or_path"], recorded["revision"]) == ("owner/base", commit)
    for source in ("owner/experts", tmp_path / "experts"):
        opened = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
        assert type(opened).__module__.startswith(f"transformers_modules.owner.base.{commit}.")
        torch.testing.assert_close(logits(opened), expected)


@pytest.mark.parametrize(("kind", "config"), [("own", OWN), ("odd", ODD)])
def test_what_was_opened_is_saved_as_an_adapter_again(hub, tmp_path, checkpoint, kind, config):
    push_checkpoint(checkpoint, "owner/base") if kind == "own" else push_odd(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained("owner/base", trust_remote_code=True)
    model = get_peft_model(base, config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "experts")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "experts", trust_remote_code=True)
    with transformers_takes_this_peft():
        opened.save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(logits(again), expected)


def test_the_commit_of_a_base_is_recorded_where_the_cache_tells_it(hub, tmp_path):
    assert cached_commit("owner/base") is None
    for number in range(2):
        commit = push_odd(tmp_path, width=8 * (number + 1))
        base = AutoModelForImageTextToText.from_pretrained("owner/base", trust_remote_code=True)
        get_peft_model(base, ODD).save_pretrained(tmp_path / "adapter")
        assert revision_in(tmp_path / "adapter") == (commit if number == 0 else None)
    get_peft_model(base, ODD, revision="v2").save_pretrained(tmp_path / "adapter")
    assert revision_in(tmp_path / "adapter") == "v2"
    assert cached_commit(str(tmp_path)) is None
