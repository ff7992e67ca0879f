"""Every reader of a checkpoint refuses a damaged one with an error that names the file."""

import json
import re

import pytest
import torch
from helpers.hub.checkpoints import tiny_config, tiny_model, tiny_processor
from safetensors.torch import load_file, save_file

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, HfMoeProcessor
from hf_moe.hub.inspection import inspect_checkpoint
from hf_moe.hub.push import push_checkpoint
from hf_moe.hub.refresh import refresh_checkpoint


READERS = {
    "config": HfMoeConfig.from_pretrained,
    "model": HfMoeForConditionalGeneration.from_pretrained,
    "processor": HfMoeProcessor.from_pretrained,
    "inspect": inspect_checkpoint,
    "refresh": refresh_checkpoint,
    "push": lambda folder: push_checkpoint(folder, "owner/tiny", dry_run=True),
}
BYTES = {"cut": None, "empty": b"", "a_list": b"[]", "null": b"null", "no_text": b"\xff\xfe{}"}
INDEX = "model.safetensors.index.json"


def message_of(reader, source):
    """Return the error of a reader; for inspect, which describes what it can, the problems that it lists count too."""
    with pytest.raises((ValueError, OSError)) as caught:
        found = READERS[reader](source)
        if reader == "inspect" and found["problems"]:
            raise ValueError("; ".join(found["problems"]))
    # A decoder's error is a ValueError, and names no file.
    assert type(caught.value) in (ValueError, OSError, FileNotFoundError)
    return str(caught.value)


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if BYTES[how] is None else BYTES[how])


def change(path, **fields):
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


@pytest.fixture(scope="module")
def sharded_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "tiny"
    tiny_model(tiny_config()).save_pretrained(folder, max_shard_size="60KB")
    tiny_processor().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.mark.parametrize("how", BYTES)
@pytest.mark.parametrize(
    ("file", "readers"),
    [
        ("config.json", ["config", "model", "processor", "inspect", "refresh", "push"]),
        ("generation_config.json", ["model", "push"]),
        ("processor_config.json", ["processor", "refresh", "push"]),
        ("tokenizer_config.json", ["processor", "refresh", "push"]),
        ("tokenizer.json", ["processor", "push"]),
        (INDEX, ["model", "push"]),
    ],
)
def test_a_damaged_json_file_is_named(checkpoint, file, readers, how):
    if file == INDEX:
        (checkpoint / file).write_text('{"weight_map": {"lm_head.weight": "model.safetensors"}}')
    damage(checkpoint / file, how)
    for reader in readers:
        assert file in message_of(reader, checkpoint)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "absent"}, "model_type"),
        ({"text_config": "absent"}, "text_config"),
        ({"text_config": [1]}, "text_config"),
        ({"text_config": {"hidden_size": 32}}, "text_config"),
        ({"moe_config": "absent"}, "moe_config"),
        ({"moe_config": "top_k"}, "moe_config"),
        ({"vision_config": []}, "vision_config"),
        ({"connector": ["mlp"]}, "connector"),
        ({"image_token_id": "four"}, "image_token_id"),
        ({"auto_map": "modeling"}, "auto_map"),
    ],
    ids=str,
)
def test_a_field_of_the_config_is_named(checkpoint, fields, named):
    change(checkpoint / "config.json", **fields)
    for reader in ("config", "model", "inspect", "refresh", "push"):
        message = message_of(reader, checkpoint)
        assert "config.json" in message and named in message


@pytest.mark.parametrize("content", [None, b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n" * 9])
def test_a_damaged_weights_file_is_named(checkpoint, content):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    for reader in ("model", "push", *([] if content is None else ["inspect"])):
        assert "model.safetensors" in message_of(reader, checkpoint)


@pytest.mark.parametrize("change_tensors", ["lacks", "holds more", "other shape"])
def test_a_tensor_is_named(checkpoint, change_tensors):
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if ".gate." in name)
    tensors |= {"extra.weight": torch.ones(2)} if change_tensors == "holds more" else {name: torch.ones(3, 3)}
    if change_tensors == "lacks":
        del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for reader in ("model", "inspect", "push"):
        assert ("extra.weight" if change_tensors == "holds more" else name) in message_of(reader, checkpoint)


def change_head(folder, make):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = make(tensors["lm_head.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_integers_for_weights_are_named(checkpoint):
    change_head(checkpoint, torch.Tensor.long)
    for reader in ("model", "inspect", "push"):
        message = message_of(reader, checkpoint)
        assert "lm_head.weight" in message and "float" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_pushed(checkpoint, value):
    change_head(checkpoint, lambda tensor: torch.full_like(tensor, value))
    assert "NaN or infinity in lm_head.weight" in message_of("push", checkpoint)


def test_a_token_id_that_is_spelt_is_a_number(checkpoint):
    change(checkpoint / "config.json", image_token_id="4")
    assert HfMoeConfig.from_pretrained(checkpoint).image_token_id == 4


def test_tensors_of_other_shapes_are_taken_where_the_user_says_so(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(3, 3)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    model, report = HfMoeForConditionalGeneration.from_pretrained(
        checkpoint, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.lm_head.weight.shape == (32, 32) and report["mismatched_keys"]


@pytest.mark.parametrize("wrong", [{}, [], "model.safetensors", {"lm_head.weight": 3}, {"lm_head.weight": "no.file"}])
def test_an_index_that_names_no_files_is_named(sharded_checkpoint, tmp_path, wrong):
    for path in sharded_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path / INDEX, weight_map=wrong)
    for reader in ("model", "push"):
        assert re.search(r"index.json|no\.file", message_of(reader, tmp_path))


def test_an_index_that_puts_a_tensor_elsewhere_is_refused(sharded_checkpoint, tmp_path):
    for path in sharded_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    first, *_, last = weight_map
    change(tmp_path / INDEX, weight_map=weight_map | {first: weight_map[last]})
    assert INDEX in message_of("push", tmp_path)


@pytest.mark.parametrize(
    ("file", "readers"),
    [
        ("config.json", ["config", "model", "inspect", "refresh", "push"]),
        ("model.safetensors", ["model", "inspect", "push"]),
        ("router_moiie.py", ["inspect", "push"]),
        ("modeling_hf_moe.py", ["inspect", "push"]),
        ("processor_config.json", ["processor", "push"]),
        ("tokenizer.json", ["processor"]),
    ],
)
def test_a_missing_file_is_named(checkpoint, file, readers):
    (checkpoint / file).unlink()
    for reader in readers:
        assert file.partition(".safetensors")[0] in message_of(reader, checkpoint) or "weights file" in file


@pytest.mark.parametrize("content", [b"def (", b"\xff\xfe", b"a\0b"])
def test_damaged_code_is_named(checkpoint, content):
    (checkpoint / "router_moiie.py").write_bytes(content)
    for reader in ("inspect", "push"):
        assert "router_moiie.py" in message_of(reader, checkpoint)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_processor": []}, "image_processor"),
        ({"image_processor": "absent"}, "image_processor"),
        ({"image_seq_length": "four"}, "image_seq_length"),
        ({"image_token": "<img>"}, "<img>"),
        ({"image_seq_len": 4}, "image_seq_length"),
    ],
    ids=str,
)
def test_a_field_of_the_processor_is_named(checkpoint, fields, named):
    change(checkpoint / "processor_config.json", **fields)
    assert named in message_of("processor", checkpoint)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("source", ["/nowhere/checkpoint", "./nowhere", "runs/nowhere/checkpoint"])
def test_a_missing_folder_is_not_taken_for_a_repository(reader, source):
    assert "There is no folder" in message_of(reader, source)
