"""`hf-moe inspect` tells what a checkpoint is from its headers, its config and its text."""

import json

import pytest
from helpers.hub.checkpoints import TEXT, tiny_config, tiny_model, tiny_processor
from helpers.hub.open_checkpoint import sample_image
from huggingface_hub import constants
from transformers import MixtralConfig

from hf_moe import HfMoeConfig
from hf_moe.analysis.routing_statistics import RoutingStatistics, active_parameters
from hf_moe.cli import main
from hf_moe.hub.inspection import OTHER, SAME, UNKNOWN, inspect_checkpoint
from hf_moe.hub.push import push_checkpoint


BANKS = {"text": {"num_experts": 2, "intermediate_size": 32}, "vision": {"num_experts": 2, "intermediate_size": 16}}


def states(found):
    return {item["file"]: item["state"] for item in found["code"]}


def measured(model):
    """Return the active parameters that the model's own routing gives."""
    statistics = RoutingStatistics()
    inputs = tiny_processor()(images=[sample_image()], text=[TEXT], return_tensors="pt")
    statistics.update(model(**inputs, output_routing=True).routing)
    return active_parameters(model, statistics)


def mixtral_host():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=64)
    return HfMoeConfig(text_config=text)


# All slots of every token are filled: so a budget at its upper end, and p = 1.
ROUTERS = [
    "top_k",
    "moiie",
    "deepseek_v3",
    "ernie45_vl",
    {"name": "evomoe_dtr", "hyper_hidden": 3},
    {"name": "evomoe_dtr", "per_modality": False, "shared_router": True},
    {"name": "ming_multi_router", "gate": "sigmoid_bias"},
    {"name": "dynamic_moe_top_p", "top_p_threshold": 1.0},
    {"name": "dynamic_moe_top_p", "top_p_threshold": 1.0, "max_experts_per_tok": 3},
    {"name": "anyexperts", "max_slots": 3, "target_slots": 3, "max_virtual_share": 0.0, "bias_update_rate": 0.1},
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_parameters_are_those_of_the_model_and_of_its_routing(tmp_path, router):
    model = tiny_model(tiny_config(router=router, layers=[1], num_shared_experts=1))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    found = inspect_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert found["parameters_total"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters_active"] == measured(model)
    assert found["groups"]["shared experts"]["parameters"] == 3 * 32 * 64


def test_empty_slots_are_counted_as_if_they_were_filled(tmp_path):
    model = tiny_model(tiny_config(router={"name": "adamoe", "num_null_experts": 12}, num_experts_per_tok=3))
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)["parameters_active"]
    expert = 3 * 32 * 64
    assert all(count < found[name] for name, count in measured(model).items())
    routed = sum(p.numel() for layer in model.moe_layers().values() for p in layer.experts.parameters())
    decoder = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    assert found["text"] == decoder - routed + 2 * 3 * expert


def test_isolated_banks_are_counted_one_by_one(tmp_path):
    moe = {"expert_banks": BANKS, "num_experts": None, "num_experts_per_tok": 1}
    model = tiny_model(tiny_config(router="ernie45_vl", **moe))
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found["layers"][0]["banks"] == {"text": 2, "vision": 2}
    assert found["layers"][0]["expert_width"] == [16, 32]
    by_modality = measured(model)
    assert found["parameters_active"] == by_modality
    # The biases that balance the load are saved, and are no parameters.
    assert found["parameters_total"] == sum(parameter.numel() for parameter in model.parameters())


def test_experts_that_a_host_saves_one_by_one_are_counted_as_such(tmp_path):
    model = tiny_model(mixtral_host())
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found["groups"]["routed experts"]["parameters"] == 2 * 4 * 3 * 32 * 48
    assert found["layers"][0]["expert_width"] == [48]
    assert found["parameters_total"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters_active"] == {"text": found["parameters_total"] - 2 * 2 * 3 * 32 * 48}


def test_layers_of_one_kind_stand_together_with_their_options(tmp_path):
    tiny_model(tiny_config(num_experts={"default": 4, "1": 8})).save_pretrained(tmp_path)
    rows = inspect_checkpoint(tmp_path)["layers"]
    assert [(row["layers"], row["num_experts"]) for row in rows] == [([0], 4), ([1], 8)]
    assert rows[0]["router"]["name"] == "top_k"


def test_only_the_headers_of_the_weights_are_read(checkpoint):
    weights = checkpoint / "model.safetensors"
    whole = inspect_checkpoint(checkpoint)
    content = weights.read_bytes()
    weights.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    assert inspect_checkpoint(checkpoint) == whole
    assert sum(group["bytes"] for group in whole["groups"].values()) == len(content) - len(weights.read_bytes())


def test_the_bundle_is_verified_and_never_run(checkpoint):
    assert set(states(inspect_checkpoint(checkpoint)).values()) == {SAME}
    with (checkpoint / "gating.py").open("a") as file:
        file.write("raise RuntimeError\n")
    (checkpoint / "extra.py").write_text("raise RuntimeError\n")
    (checkpoint / "host.py").unlink()
    found = inspect_checkpoint(checkpoint)
    assert states(found)["gating.py"] == OTHER
    assert states(found)["extra.py"] == UNKNOWN
    assert states(found)["block.py"] == SAME
    assert found["problems"] == ["host.py is missing"]


def test_a_file_that_is_not_the_one_of_the_card_is_a_problem(checkpoint):
    found = inspect_checkpoint(checkpoint)
    rows = [f"| `{item['file']}` | `{item['sha256']}` |" for item in found["code"]]
    (checkpoint / "README.md").write_text("\n".join(rows))
    assert inspect_checkpoint(checkpoint)["problems"] == []
    (checkpoint / "README.md").write_text("\n".join(rows).replace(found["code"][0]["sha256"], "0" * 64))
    (problem,) = inspect_checkpoint(checkpoint)["problems"]
    assert problem == f"{found['code'][0]['file']} is not the file whose SHA-256 the card lists"


def test_mechanisms_come_with_the_source_that_their_files_name(checkpoint):
    sources = {(item["kind"], item["name"]): item["source"] for item in inspect_checkpoint(checkpoint)["mechanisms"]}
    assert "arXiv:2508.09779" in sources["router", "moiie"]
    assert "arXiv:2006.16668" in sources["objective", "load_balance"]
    assert ("connector", "mlp") in sources


def test_a_router_of_the_user_that_is_not_installed_is_described(checkpoint):
    (checkpoint / "router_moiie.py").rename(checkpoint / "my_router.py")
    for name in ("mechanisms.py", "config.json"):
        text = (checkpoint / name).read_text()
        changed = text.replace("router_moiie", "my_router").replace('"moiie": ', '"mine": ')
        (checkpoint / name).write_text(changed.replace('"name": "moiie"', '"name": "mine"'))
    found = inspect_checkpoint(checkpoint)
    assert found["problems"] == ["the installed package has no router 'mine'"]
    assert states(found)["my_router.py"] == UNKNOWN
    assert states(found)["experts_ffn.py"] == SAME
    assert {"kind": "router", "name": "mine"}.items() <= found["mechanisms"][0].items()
    assert "arXiv:2508.09779" in found["mechanisms"][0]["source"]


def test_a_repository_is_described_as_its_folder_and_its_weights_stay_there(hub, checkpoint):
    here = inspect_checkpoint(checkpoint)
    commit = push_checkpoint(checkpoint, "owner/tiny").commit
    asked = len(hub.requests)
    there = inspect_checkpoint("owner/tiny", revision="v1")
    assert there == here | {"source": "owner/tiny", "commit": commit}
    # A download begins with HEAD; ranges of the header do not.
    assert ("HEAD", f"/owner/tiny/resolve/{commit}/config.json") in hub.requests[asked:]
    assert [verb for verb, path in hub.requests[asked:] if path.endswith("model.safetensors")] == ["GET"]


@pytest.mark.parametrize(
    ("source", "message"),
    [("./absent", "no folder absent"), ("owner/absent", "404"), (".", "holds no config.json")],
)
def test_what_cannot_be_inspected_is_one_line(hub, tmp_path, monkeypatch, capsys, source, message):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", source]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-moe: error: ") and message in error and error.count("\n") == 1


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama'"):
        inspect_checkpoint(tmp_path)


def test_damaged_weights_are_named_as_such(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"no json at all, x")
    with pytest.raises(ValueError, match="damaged or cut short"):
        inspect_checkpoint(checkpoint)


def test_without_a_network_the_endpoint_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="owner/tiny is no folder here, and http://127.0.0.1:9 cannot be reached"):
        inspect_checkpoint("owner/tiny")


def test_the_command_prints_what_was_found(checkpoint, capsys):
    found = inspect_checkpoint(checkpoint)
    assert main(["inspect", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "0, 1: 4 experts of width 64, 2 per token, 0 shared",
        "router moiie",
        f"{found['parameters_total']:,} parameters",
        f"{found['parameters_active']['image']:,}  image",
        f"{found['groups']['routed experts']['bytes']:,}  routed experts",
        "arXiv:2508.09779",
        f"{found['code'][0]['sha256']}  {found['code'][0]['file']}: as installed",
    ):
        assert text in shown, text
