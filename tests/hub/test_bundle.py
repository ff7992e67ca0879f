"""What a save writes: exactly the code in use, in the form Transformers can copy, or nothing at all."""

import ast
import json
import re
import sys

import pytest
from helpers.hub.checkpoints import tiny_config, tiny_model, tiny_processor
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, Router, list_mechanisms, register_router
from hf_moe.hub.bundle import CONFIGURATION, MARK, MODELING, PROCESSING, bundle_files, used_mechanisms
from hf_moe.modeling import registry
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import KINDS


MOIIE = {"router": "moiie", "objectives": {"load_balance": 0.01}}


def mechanism_files(folder):
    known = {f"{kind}_{name}" for kind in KINDS for name in list_mechanisms(kind)}
    return sorted(known & {path.stem for path in folder.glob("*.py")})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bundle_holds_exactly_the_mechanisms_used(tmp_path):
    tiny_config(**MOIIE).save_pretrained(tmp_path)
    expected = ["block_moe", "connector_mlp", "experts_ffn", "host_composed", "objective_load_balance", "router_moiie"]
    assert mechanism_files(tmp_path) == expected


def test_every_value_of_a_layer_map_that_some_layer_uses_is_bundled(tmp_path):
    router = {"default": {"name": "top_k"}, "1": {"name": "moiie"}}
    tiny_config(router=router).save_pretrained(tmp_path / "both")
    assert mechanism_files(tmp_path / "both") == [
        "block_moe",
        "connector_mlp",
        "experts_ffn",
        "host_composed",
        "router_moiie",
        "router_top_k",
    ]
    tiny_config(router=router, layers=[1]).save_pretrained(tmp_path / "one")
    assert mechanism_files(tmp_path / "one") == [
        "block_moe",
        "connector_mlp",
        "experts_ffn",
        "host_composed",
        "router_moiie",
    ]


def test_text_only_model_carries_no_connector():
    config = HfMoeConfig(moe_config=MOIIE)
    assert used_mechanisms(config)["connector"] == {}


def test_second_save_removes_its_stale_files_and_leaves_the_users(tmp_path):
    model = tiny_model(tiny_config(**MOIIE))
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "router_notes.py").write_text("# my own notes\n")
    tiny_model(tiny_config(router="top_k")).save_pretrained(tmp_path)
    assert mechanism_files(tmp_path) == [
        "block_moe",
        "connector_mlp",
        "experts_ffn",
        "host_composed",
        "router_top_k",
    ]
    assert (tmp_path / "router_notes.py").read_text() == "# my own notes\n"
    assert (tmp_path / "processing_hf_moe.py").exists()


def test_processor_saved_alone_leaves_the_models_code(tmp_path):
    tiny_config(**MOIIE).save_pretrained(tmp_path)
    before = set(contents(tmp_path))
    tiny_processor().save_pretrained(tmp_path)
    assert before < set(contents(tmp_path))


def test_failed_save_leaves_the_old_checkpoint_whole(tmp_path):
    class LocalRouter(Router):
        pass

    tiny_config(**MOIIE).save_pretrained(tmp_path)
    before = contents(tmp_path)
    register_router("local")(LocalRouter)
    try:
        with pytest.raises(ValueError, match="router 'local' .*my_router.py"):
            tiny_config(router="local").save_pretrained(tmp_path)
    finally:
        del registry._REGISTERED["router"]["local"]
    assert contents(tmp_path) == before


def test_save_refuses_to_overwrite_a_file_it_did_not_write(tmp_path):
    (tmp_path / "routing.py").write_text("mine = True\n")
    with pytest.raises(ValueError, match="routing.py is in the way"):
        tiny_config().save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {"routing.py"}


def test_auto_maps_name_every_door(tmp_path):
    config = tiny_config()
    config.auto_map = {"AutoConfig": "elsewhere.Config"}
    config.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_hf_moe.HfMoeConfig"
    for door in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert auto_map[door] == "modeling_hf_moe.HfMoeForConditionalGeneration"
    for name in ("processor_config.json", "tokenizer_config.json"):
        auto_map = json.loads((tmp_path / name).read_text())["auto_map"]
        assert auto_map["AutoProcessor"] == "processing_hf_moe.HfMoeProcessor"


def test_config_survives_the_way_through_a_dict():
    config = tiny_config(**MOIIE)
    assert HfMoeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_package_classes_stay_unregistered_while_bundled_copies_register(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert HfMoeConfig._auto_class is None and HfMoeForConditionalGeneration._auto_class is None
    for name in ("configuration_hf_moe.py", "modeling_hf_moe.py"):
        assert ".register_for_auto_class(" in (tmp_path / name).read_text().splitlines()[-1]


def test_model_reopened_with_the_package_saves_a_complete_checkpoint(tmp_path):
    tiny_model(tiny_config(**MOIIE)).save_pretrained(tmp_path / "first")
    HfMoeForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert set(contents(tmp_path / "second")) == set(contents(tmp_path / "first"))


@pytest.fixture(scope="module")
def everything():
    """The bundle of a model with every mechanism of the library."""
    mechanisms = {kind: {name: get_mechanism(kind, name) for name in list_mechanisms(kind)} for kind in KINDS}
    return bundle_files([CONFIGURATION, MODELING, PROCESSING], mechanisms)


def test_every_import_that_travels_has_the_form_transformers_follows(everything, tmp_path):
    for name, text in everything.items():
        path = tmp_path / name
        path.write_text(text)
        assert text.startswith(f"{MARK}\n")
        lines = text.splitlines()
        relative = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("hf_moe") for alias in node.names), name
            if not isinstance(node, ast.ImportFrom):
                continue
            assert node.module and not node.module.startswith("hf_moe"), f"{name}:{node.lineno}"
            assert node.module != "__future__" or name != "modeling_hf_moe.py"
            if node.level:
                assert node.level == 1 and f"{node.module}.py" in everything, f"{name}:{node.lineno}"
                assert re.match(r"\s*from \.\w+ import ", lines[node.lineno - 1]), f"{name}:{node.lineno}"
                assert ";" not in lines[node.lineno - 1]
                relative.add(node.module)
        assert set(get_relative_imports(path)) == relative, name
        third_party = set(get_imports(path)) - sys.stdlib_module_names
        # Only the processor opens pictures, and with it come the packages of Transformers' image processors.
        pictures = {"PIL", "numpy"} if name == "image_loading.py" else set()
        assert third_party <= {"huggingface_hub", "packaging", "safetensors", "torch", "transformers"} | pictures, name


def test_no_bundled_file_compares_the_class_of_a_config(everything):
    # On a local load every entry file brings its own copy of the config classes.
    for name, text in everything.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                tested = ast.unparse(node.args[1])
                assert "HfMoeConfig" not in tested and "MoeConfig" not in tested, f"{name}:{node.lineno}"
