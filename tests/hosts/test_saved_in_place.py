"""A host in place is saved with its code, opens where the package is not, and keeps its names on disk."""

import copy
import json
import pickle

import pytest
import torch
from helpers.hosts.catalogue import ADOPTED, ALL, HOSTS, MODALITY_GATES, drift_apart, in_place
from helpers.hosts.open_hosts import AUTO_CLASSES, EXACT, REFERENCE, keys_of
from helpers.programs import last_line, start
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration


# Two processes may sum in another order: the blocking of a matrix product follows the alignment of its memory.
TOLERANCE = 1e-6
OPENED = ["qwen2_5_vl", "qwen2_5_omni_thinker", "gemma3", "smolvlm", "qwen2_audio", "qwen3_vl_moe", "llama"]
LOCAL = ["qwen2_5_vl", "qwen3_vl_moe", "llama"]
REST = [name for name in ALL if name not in OPENED]


def saved(name, folder):
    moe = {} if name in ADOPTED else {"num_experts": 4, "router": MODALITY_GATES, "objectives": {"load_balance": 0.01}}
    model = drift_apart(in_place(name, moe))
    model.save_pretrained(folder)
    inputs = HOSTS[name].inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = model.generate(**inputs, **EXACT)
    torch.save({"inputs": inputs, "logits": logits, "ids": ids}, folder / REFERENCE)
    return model


def open_folders(way, folders, modules_cache):
    return json.loads(last_line(start("hosts.open_hosts", way, *folders, HF_MODULES_CACHE=str(modules_cache))))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def models(root):
    return {name: saved(name, root / name) for name in OPENED}


@pytest.fixture(scope="module")
def remote(root, models):
    """What a process without the package finds in the folders."""
    return open_folders("remote", [root / name for name in models], root / "modules")


@pytest.fixture(scope="module")
def local(root, models, tmp_path_factory):
    """What a process with the package finds, which trusts no code of theirs."""
    return open_folders("local", [root / name for name in LOCAL], root / "no_modules")


def assert_opens(found):
    assert found["class"] == "HfMoeForConditionalGeneration"
    assert set(found["differences"]) == {auto_class.__name__ for auto_class in AUTO_CLASSES}
    assert max(found["differences"].values()) < TOLERANCE
    assert found["ids_equal"]
    assert found["again"] < TOLERANCE and found["same_keys"]
    assert found["files_again"] == found["files"]


@pytest.mark.parametrize("name", OPENED)
def test_a_process_without_the_package_answers_the_same(remote, name):
    assert_opens(remote[name])
    assert remote[name]["module"].startswith("transformers_modules.")


@pytest.mark.slow
def test_every_host_opens_without_the_package(tmp_path):
    folders = [tmp_path / name for name in REST]
    for folder in folders:
        saved(folder.name, folder)
    found = open_folders("remote", folders, tmp_path / "modules")
    for folder in folders:
        assert_opens(found[folder.name])


@pytest.mark.parametrize("name", LOCAL)
def test_registered_classes_open_it_and_trust_no_code(local, name):
    assert_opens(local[name])
    assert local[name]["module"].startswith("hf_moe.") and local[name]["config"].startswith("hf_moe.")


def test_only_composed_models_carry_their_connectors(remote):
    for found in remote.values():
        assert not [file for file in found["files"] if file.startswith(("connector", "processing", "vision"))]


@pytest.mark.parametrize("name", ALL)
def test_names_on_disk_are_those_of_the_model(name, tmp_path):
    """Transformers would give some of them the names of an older release, which ties a file to its tables."""
    model = in_place(name)
    model.save_pretrained(tmp_path)
    tied = set(model.all_tied_weights_keys)
    assert set(keys_of(tmp_path)) == set(model.state_dict()) - tied
    again = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert [key for key, value in again.state_dict().items() if not torch.equal(value, expected[key])] == []


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_vl_moe"])
def test_a_model_survives_pickle_and_deepcopy(name):
    model, inputs = drift_apart(in_place(name)), HOSTS[name].inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is type(model)
            assert torch.equal(twin(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_vl_moe"])
def test_half_precision_keeps_the_gates_in_float32(name, tmp_path):
    in_place(name).save_pretrained(tmp_path)
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {key: value.dtype for key, value in model.named_parameters()}
    assert {kind for key, kind in kinds.items() if ".experts." in key} == {torch.bfloat16}
    assert {kind for key, kind in kinds.items() if ".gate.weight" in key and "vision" not in key} == {torch.float32}


DEFAULT_TYPES = sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def assert_config_comes_back(config, file):
    config.to_json_file(file, use_diff=False)
    for twin in (HfMoeConfig.from_json_file(file), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is type(config)
        assert twin.to_dict() == config.to_dict()
        assert type(twin.get_text_config(decoder=True)) is type(config.get_text_config(decoder=True))


@pytest.mark.parametrize("name", ALL)
def test_its_config_comes_back_from_json_and_pickle(name, tmp_path):
    config = in_place(name).config
    assert_config_comes_back(config, tmp_path / "whole.json")
    config.save_pretrained(tmp_path)
    assert HfMoeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_configs_of_all_default_hosts_come_back(tmp_path):
    failed = {}
    for model_type in DEFAULT_TYPES:
        host = AutoConfig.for_model(model_type)
        try:
            config = HfMoeConfig.on_host(host, moe_config={"layers": [0]})
        except (AttributeError, ValueError) as error:  # no decoder of layers, see the survey
            failed[model_type] = str(error)
            continue
        assert_config_comes_back(config, tmp_path / "config.json")
    assert len(failed) < 0.05 * len(DEFAULT_TYPES), failed


def test_the_config_has_the_host_s_fields_in_their_places():
    host = HOSTS["qwen2_5_vl"].build().config
    fields = json.loads(in_place("qwen2_5_vl").config.to_json_string(use_diff=False))
    assert fields["model_type"] == "hf_moe" and fields["host_type"] == "qwen2_5_vl"
    assert fields["host_class"] == "Qwen2_5_VLForConditionalGeneration"
    for name, value in json.loads(host.to_json_string(use_diff=False)).items():
        if name not in ("model_type", "architectures", "text_config", "transformers_version", "dtype"):
            # A build says the type of the weights in every part, as loading does.
            if name.endswith("_config"):
                value["dtype"] = fields[name]["dtype"]
            assert fields[name] == value, name
