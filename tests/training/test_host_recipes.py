"""Recipes whose model is a host of Transformers: what they say, what is refused before weights are read."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from hf_moe.training.recipe import load_recipe


HOSTED = str(Path(__file__).with_name("hosted.yaml"))
HOST = yaml.safe_load(Path(HOSTED).read_text())["model"]["host"]


def test_a_host_is_a_folder_or_the_fields_of_a_config(tmp_path):
    options = dict(HOST)
    AutoConfig.for_model(options.pop("model_type"), **options).save_pretrained(tmp_path)
    recipe = load_recipe(HOSTED, [f"model.host={tmp_path}"])
    assert recipe.model["host"] == str(tmp_path) and load_recipe(HOSTED).model["host"] == HOST


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.host.model_type=lava", "model.host .*'lava' is no model of Transformers.*'llava'"),
        ("model.host={model_type: t5}", "model.host .*'t5' .*encoder-decoder|t5 is an encoder-decoder"),
        ("model.host=/no/such/folder", "model.host='/no/such/folder', which is no folder here"),
        ("model.system=moii", "model.system .*'moiie'"),
        ("model.moe_config={num_expert: 4}", "model.moe_config .*'num_experts'"),
        ("model.moe_config={layers: [7]}", "model.moe_config .*7"),
        ("model.vision_tower=efficientnet-lite0", "'vision_tower'.*host"),
        ("trainable=[tower/audio]", "trainable .* tower for image alone"),
        ("trainable=[heads]", "trainable .*'heads'"),
    ],
)
def test_what_does_not_fit_the_host_is_refused_by_its_field(override, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
        load_recipe(HOSTED, [override])
    assert "hosted.yaml" in str(caught.value)


def test_fresh_weights_need_a_processor(tmp_path):
    content = yaml.safe_load(Path(HOSTED).read_text())
    del content["model"]["processor"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"fresh host and no processor: add model\.processor"):
        load_recipe(str(tmp_path / "bare.yaml"))
