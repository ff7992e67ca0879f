"""`hf-moe compare`: what is equal between systems, what a stopped comparison keeps, what it writes and refuses."""

import json

import pytest
import torch
from helpers.comparisons import write_recipe
from PIL import Image

from hf_moe.cli import main
from hf_moe.training import comparison as module
from hf_moe.training.comparison import Comparison, compare, plan
from hf_moe.training.comparison_run import take_start


# The third has four experts per token and a shared one, the last four slots, half of them on nulls.
SYSTEMS = ["top_k", "moiie", "deepseek_v3", "adamoe"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def compared(recipe_file, tmp_path_factory):
    comparison = Comparison(
        recipe=recipe_file, systems=SYSTEMS, folder=tmp_path_factory.mktemp("compared"), seeds=2, tolerance=0.05
    )
    return comparison, compare(comparison)


def runs_of(result, name):
    return result["systems"][name]["runs"]


def test_systems_of_a_seed_see_the_same_rows_in_one_order(compared):
    _, result = compared
    orders = [[run["data_order"] for run in runs_of(result, name)] for name in SYSTEMS]
    assert orders == [orders[0]] * len(SYSTEMS) and orders[0][0] != orders[0][1]


def test_active_parameters_are_within_the_tolerance(compared):
    _, result = compared
    systems = result["systems"]
    reached = {name: systems[name]["mean_active"] / systems["top_k"]["mean_active"] for name in SYSTEMS}
    assert all(abs(ratio - 1) <= 0.05 for ratio in reached.values()), reached
    assert [systems[name]["width"] for name in SYSTEMS] == [64, 64, 24, 64]
    # Where no slot is empty, the trained model has as many as the one that was planned.
    assert runs_of(result, "deepseek_v3")[0]["active"] == systems["deepseek_v3"]["active"]


def test_all_but_routers_and_other_widths_start_equal(compared):
    _, result = compared
    for name in SYSTEMS:
        start = runs_of(result, name)[0]["start"]
        own = {part for part, count in start.items() if count["own"]}
        assert own == ({"routers", "experts"} if name == "deepseek_v3" else {"routers"})


def test_the_start_is_that_of_the_first_system(recipe_file, tmp_path):
    systems = ["top_k", "deepseek_v3"]
    contestants, rows = plan(Comparison(recipe=recipe_file, systems=systems, folder=tmp_path, tolerance=0.1))
    start = module.initial_state(contestants[0].recipe, rows, tmp_path)
    model = module.build(contestants[1].recipe, rows, tmp_path).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    take_start(model, start)
    own = {name for name, value in model.named_parameters() if not torch.equal(value, start.get(name, value + 1))}
    assert {name.split(".")[5] for name in own} == {"gate", "experts", "shared_expert"}


def test_what_is_kept_is_not_run_again_and_what_is_missing_is(compared, monkeypatch):
    comparison, result = compared
    ran = []
    train = module.train_contestant

    def watched(recipe, *args):
        ran.append((recipe.model["system"], recipe.seed))
        return train(recipe, *args)

    monkeypatch.setattr(module, "train_contestant", watched)
    (comparison.folder / "moiie" / "seed1.json").unlink()
    again = compare(comparison)
    assert ran == [("moiie", 1)]
    timed = ("step_cpu_seconds", "train_seconds")
    old, new = ({k: v for k, v in runs_of(r, "moiie")[1].items() if k not in timed} for r in (result, again))
    assert old == new
    compare(Comparison(**{**vars(comparison), "systems": [*SYSTEMS, "switch_transformer"], "seeds": 1}))
    assert ran[1:] == [("switch_transformer", 0)]


@pytest.mark.parametrize(
    ("changed", "first_run"),
    [
        ({"overrides": ["training.learning_rate=0.01"]}, "top_k, seed 0"),
        ({"overrides_of": {"moiie": ["objectives.load_balance=0.5"]}}, "moiie, seed 0"),
        ({"seeds": 3}, "top_k, seed 2"),
    ],
)
def test_another_recipe_system_or_seed_is_another_run(compared, monkeypatch, changed, first_run):
    comparison, _ = compared

    def refuse(recipe, *args):
        pytest.fail(f"{recipe.model['system']}, seed {recipe.seed}")

    monkeypatch.setattr(module, "train_contestant", refuse)
    compare(comparison)
    with pytest.raises(pytest.fail.Exception, match=first_run):
        compare(Comparison(**{**vars(comparison), **changed}))


def test_a_run_that_fails_says_which_it_was(recipe_file, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(module, "train_contestant", broken)
    with pytest.raises(RuntimeError) as caught:
        compare(Comparison(recipe=recipe_file, systems=["top_k"], folder=tmp_path))
    assert "top_k with seed 0; the same command goes on" in caught.value.__notes__[0]


def test_other_data_than_before_are_refused(compared):
    comparison, _ = compared
    path = comparison.folder / "adamoe" / "seed0.json"
    kept = path.read_text()
    content = json.loads(kept)
    content["result"]["data_order"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="adamoe saw other data than top_k"):
        compare(comparison)
    path.write_text(kept)


def test_table_numbers_and_picture_hold_every_system(compared):
    comparison, result = compared
    table = (comparison.folder / "comparison.md").read_text()
    named = ("accuracy", "active, text", "active, image", "CPU ms per step", "entropy, image", "experts per token")
    assert all(f"| {words}" in table.splitlines()[0] for words in named)
    assert all(f"| `{name}` |" in table for name in SYSTEMS)
    assert "experts: deepseek_v3 " in table and "same order" in table and "not interleaved" in table
    assert json.loads((comparison.folder / "comparison.json").read_text())["recipe"] == result["recipe"]
    with Image.open(comparison.folder / "comparison.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    for name in SYSTEMS:
        for run in runs_of(result, name):
            assert 0 <= run["accuracy"] <= 1 and run["loss"] > 0 and run["step_cpu_seconds"] > 0
            assert set(run["entropy"]) == set(run["active"]) == {"text", "image"}
            assert all(0 <= value <= 1 for value in run["entropy"].values())


def test_a_list_trains_nothing_and_shows_sizes(recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "train_contestant", lambda *args: pytest.fail("trained"))
    arguments = ["compare", "--systems", "top_k, adamoe", "--recipe", recipe_file, "--output-dir", str(tmp_path)]
    options = ["--tolerance", "0.1", "--set-for", "adamoe:num_experts_per_tok=2", "--seeds", "2", "--list"]
    assert main([*arguments, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| `top_k` | 0, 1 | 4 | 2 | 64 |" in lines[2] and lines[2].endswith("| 1.000 | 0 of 2 |")
    assert "| `adamoe` | 0, 1 | 4 | 2 |" in lines[3]


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        ("becotta", "becotta: The system 'becotta' has no form 'model': use hf_moe.MoeLoraConfig"),
        ("cumo", "cumo: it mixes experts outside of the decoder"),
        ("top_kk", "top_kk: .*'top_k'"),
        ("condition", "condition: its routing on this recipe is refused"),
        ("anyexperts", r"anyexperts: .*moe_config.*max_slots"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(recipe_file, tmp_path, system, reason):
    with pytest.raises(ValueError, match=f"Not all of these can be compared.*{reason}"):
        compare(Comparison(recipe=recipe_file, systems=["top_k", system], folder=tmp_path))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["training.max_steps=-1"], "needs data.eval, to score, and training.max_steps"),
        (["model.moe_config.router=top_k"], "sets router in its moe_config, which every system would get"),
        (["stages=[{name: one, trainable: [experts]}]"], "has stages"),
    ],
)
def test_a_recipe_that_cannot_compare_says_what_it_lacks(recipe_file, tmp_path, overrides, reason):
    with pytest.raises(ValueError, match=reason):
        compare(Comparison(recipe=recipe_file, systems=["top_k"], folder=tmp_path, overrides=overrides))


def test_a_width_that_is_given_stays(recipe_file, tmp_path):
    own = {"moiie": ["expert_intermediate_size=40"]}
    given = Comparison(recipe=recipe_file, systems=["top_k", "moiie", "meo"], folder=tmp_path, overrides_of=own)
    # Merged experts run as one, which is as wide as two.
    assert [item.facts["width"] for item in plan(given)[0]] == [64, 40, 128]
    with pytest.raises(ValueError, match="system of --set-for.*'moiie'"):
        Comparison(**{**vars(given), "overrides_of": {"moie": ["num_experts=2"]}})


def test_a_difference_beyond_the_tolerance_is_refused(recipe_file, tmp_path):
    with pytest.raises(ValueError, match="moiie: with experts of width 64 .* times .*--tolerance"):
        plan(Comparison(recipe=recipe_file, systems=["top_k", "moiie"], folder=tmp_path, tolerance=0.0))


@pytest.mark.parametrize("system", ["mot_transformers", "llava"])
def test_what_has_no_experts_is_fitted_by_its_feed_forwards(recipe_file, tmp_path, system):
    comparison = Comparison(recipe=recipe_file, systems=["top_k", system], folder=tmp_path, seeds=1)
    contestants, rows = plan(comparison)
    first, other = (item.facts for item in contestants)
    # Two of four experts of width 64, without their router.
    assert other["layers"] == [] and other["width"] == 128
    assert other["mean_active"] == pytest.approx(first["mean_active"], rel=0.03)
    run = compare(comparison)["systems"][system]["runs"][0]
    assert run["active"] == other["active"] and run["experts_per_token"] == run["entropy"] == {}
    line = next(text for text in (tmp_path / "comparison.md").read_text().splitlines() if f"`{system}`" in text)
    assert line.count("| – ") == 3  # no experts, and of text and images no entropy


def test_banks_of_several_widths_keep_their_proportions(recipe_file, tmp_path):
    own = {"hmoe_heterogeneous": ["router=top_k", "objectives={}"]}
    comparison = Comparison(
        recipe=recipe_file, systems=["top_k", "hmoe_heterogeneous"], folder=tmp_path, overrides_of=own, tolerance=0.1
    )
    contestants, _ = plan(comparison)
    banks = contestants[1].recipe.model["moe_config"]["expert_banks"]
    widths = [bank["intermediate_size"] for bank in banks.values()]
    assert sum(widths) / 8 == pytest.approx(contestants[1].facts["width"], abs=0.5)
    assert widths == pytest.approx([n / 16 * contestants[1].facts["width"] for n in range(9, 24, 2)], abs=0.51)
    assert contestants[1].facts["mean_active"] == pytest.approx(contestants[0].facts["mean_active"], rel=0.1)
