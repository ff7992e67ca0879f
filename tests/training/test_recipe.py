import pytest

from hf_moe.configuration.systems import recipe_names
from hf_moe.training.recipe import load_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_reads(name):
    assert load_recipe(name).name


def test_overrides_reach_any_depth_and_are_yaml():
    recipe = load_recipe("easyvqa_demo", ["training.max_steps=3", "data.eval.limit=7", "evaluation.blind=false"])
    assert recipe.training["max_steps"] == 3
    assert recipe.data["eval"] == {"name": "easy_vqa", "limit": 7}
    assert recipe.evaluation["blind"] is False


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="easyvqa_demo"):
        load_recipe("no_such_recipe")


def test_an_unknown_field_names_the_nearest(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("name: x\nmodel: {}\ndata: {}\ntrainnig: {}\n")
    with pytest.raises(ValueError, match="'training'"):
        load_recipe(str(path))


def test_a_missing_field_and_a_bad_override_are_named(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("name: x\n")
    with pytest.raises(ValueError, match="model, data"):
        load_recipe(str(path))
    with pytest.raises(ValueError, match="key=value"):
        load_recipe("easyvqa_demo", ["training.max_steps"])


@pytest.mark.parametrize("override", ["load_best_model_at_end=true", "eval_strategy=steps"])
@pytest.mark.parametrize("place", ["", "stages.1."])
def test_evaluation_during_the_training_is_refused_before_anything_runs(place, override):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        load_recipe("evomoe_easyvqa", [f"{place}training.{override}"])
    assert load_recipe("evomoe_easyvqa", [f"{place}training.eval_strategy=no"]).stages
