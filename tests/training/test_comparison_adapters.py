"""`hf-moe compare` of LoRA experts: one frozen base, equal active parameters by rank."""

import pytest
import torch
import yaml
from helpers.comparisons import write_recipe

from hf_moe.training.comparison import Comparison, compare, plan
from hf_moe.training.comparison_adapters import build_adapter, initial_adapter, take_adapter
from hf_moe.training.comparison_run import build
from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import load_sources


OWN = {"lora": ["r=15", "lora_alpha=15"], "omni_smola": ["num_experts=6"], "mov_molora": ["variant=molora"]}
TARGETS = {"model_part": "language_model", "target_modules": ["q_proj", "v_proj", "up_proj"]}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    whole = write_recipe(folder)
    recipe = load_recipe(whole, ["model.moe_config.layers=[]"])
    build(recipe, load_sources(recipe), folder).save(folder / "base")
    with open(whole) as file:
        content = yaml.safe_load(file)
    (folder / "adapters.yaml").write_text(
        yaml.safe_dump({**content, "model": {"base": str(folder / "base")}, "adapter": TARGETS})
    )
    return str(folder / "adapters.yaml")


def comparison(recipe, folder, systems=("lora", "omni_smola"), **fields):
    own = {name: given for name, given in OWN.items() if name in systems}
    options = {"seeds": 1, "tolerance": 0.1, "overrides_of": own, **fields}
    return Comparison(recipe=recipe, systems=list(systems), folder=folder, **options)


def test_the_rank_is_fitted_to_the_parameters_at_work(recipe_file, tmp_path):
    contestants, _ = plan(comparison(recipe_file, tmp_path, ["lora", "omni_smola", "top_k"]))
    lora, smola, top_k = (item.facts for item in contestants)
    sizes = 2 * (32 + 32 + 32 + 32 + 32 + 48)  # a rank of the three targets in two layers; values are as wide
    assert lora["active"] == {"text": 15 * sizes, "image": 15 * sizes} and lora["width"] == 15
    # Of six experts a token uses the two of its modality and the two for all; gates (6, 32) for each target.
    assert smola["active"]["image"] == 4 * smola["width"] * sizes + 6 * 6 * 32
    # Two experts, and one gate for all targets of a layer.
    assert top_k["active"]["text"] == 2 * top_k["width"] * sizes + 2 * 4 * 32
    assert (smola["width"], top_k["width"]) == (3, 7)
    adapter = contestants[1].recipe.adapter
    assert (adapter["r"], adapter["lora_alpha"]) == (3, 3) and lora["layers"] == [0, 1]


def test_adapters_train_on_one_base_and_are_written_down(recipe_file, tmp_path):
    given = comparison(recipe_file, tmp_path)
    result = compare(given)
    runs = {name: system["runs"][0] for name, system in result["systems"].items()}
    assert len({run["data_order"] for run in runs.values()}) == 1
    assert len({run["base_accuracy"] for run in runs.values()}) == 1
    assert runs["lora"]["active"] == result["systems"]["lora"]["active"]
    assert runs["omni_smola"]["parameters"] > 1.3 * runs["lora"]["parameters"]
    assert runs["omni_smola"]["experts_per_token"] == pytest.approx({"text": 4, "image": 4})
    assert all(run["start"]["base"]["own"] == 0 and run["loss"] > 0 for run in runs.values())
    text = (tmp_path / "comparison.md").read_text()
    assert "| rank | trained |" in text and "one frozen base" in text and "The rank of the experts is fitted" in text
    assert (tmp_path / "comparison.png").is_file() and compare(given)["systems"] == result["systems"]


def test_what_an_adapter_shares_with_the_first_starts_equal(recipe_file, tmp_path):
    contestants, rows = plan(comparison(recipe_file, tmp_path, ["lora", "omni_smola"]))
    start = initial_adapter(contestants[0].recipe, rows, tmp_path)
    model = build_adapter(contestants[0].recipe, rows, tmp_path).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert take_adapter(model, start)["experts"]["own"] == 0
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert found.keys() == start.keys() and all(torch.equal(found[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("systems", "overrides", "reason"),
    [
        (["lora", "meo"], [], "meo: The system 'meo' has no form 'adapter'|meo: its adapter .*ParameterMixture"),
        (["lora", "cumo"], [], "cumo: The system 'cumo' has no form 'adapter'"),
        (["lora"], ["adapter.model_part=null"], "lora: it has experts on model.vision_tower.*whose use by a token"),
        (["lora", "smora"], [], "smora: with experts of rank 1 its active parameters"),
        (["lora"], ["adapter.r=4"], "sets r in its adapter, which every system would get"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(recipe_file, tmp_path, systems, overrides, reason):
    with pytest.raises(ValueError, match=reason):
        plan(comparison(recipe_file, tmp_path, systems, overrides=overrides, tolerance=0.03))
