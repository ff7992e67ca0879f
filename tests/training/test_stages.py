"""Jobs of several stages: what each trains and leaves alone, and that a stopped job goes on where it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, TrainerCallback, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.construction.evolution import ExpertEvolution
from hf_moe.training.parts import fingerprints, moved_parameters, refuse_strayed, train_only
from hf_moe.training.recipe import Stage, load_recipe
from hf_moe.training.run import run_recipe
from hf_moe.training.stages import construct
from hf_moe.training.trainer import HfMoeTrainer


SHORT = [
    "training.per_device_train_batch_size=4",
    "training.logging_steps=1",
    "training.save_steps=1",
    "training.save_total_limit=2",
    "training.warmup_steps=0",
    "data.train.limit=16",
    "data.eval.limit=4",
    "model.image_size=64",
    "model.language_model={model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4,"
    " num_attention_heads: 2, num_key_value_heads: 2}",
    "evaluation={batch_size: 4}",
    *(f"stages.{number}.training.max_steps=2" for number in range(3)),
]


def stage(folder, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "stages" / name / "model" / "model.safetensors")


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def evomoe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evomoe")
    recipe = load_recipe("evomoe_easyvqa", SHORT)
    return folder, recipe, run_recipe(recipe, folder)


def test_every_stage_moves_its_own_parameters_and_no_others(evomoe):
    folder, _, report = evomoe
    dense, tuned, routed = (stage(folder, name) for name in ("1_warm_up", "2_expert_evolution", "3_router"))
    assert moved(dense, tuned) == {name for name in dense if ".layers.1.mlp." in name or ".layers.3.mlp." in name}
    assert moved(tuned, routed) == set()
    assert [set(record["trainable_parameters"]) for record in report["stages"]] == [
        {"connector", "embeddings", "backbone"},
        {"experts"},
        {"routers"},
    ]
    experts = {name: tensor for name, tensor in routed.items() if name.endswith("experts.down_proj")}
    for layer in (1, 3):
        stack = next(tensor for name, tensor in experts.items() if f".layers.{layer}." in name)
        assert torch.equal(stack[0], tuned[f"model.language_model.layers.{layer}.mlp.down_proj.weight"])
        assert len({tensor.numpy().tobytes() for tensor in stack}) == 4


def test_the_checkpoint_is_a_moe_that_opens(evomoe):
    folder, _, report = evomoe
    model = HfMoeForConditionalGeneration.from_pretrained(folder / "checkpoint")
    assert model.config.moe_layers() == [1, 3] and model.config.system == "evomoe_dtr"
    assert model.config.text_config.num_experts == 4
    assert 0 <= report["accuracy"] <= 1 and set(report["parameters_active"]) == {"text", "image"}


def test_a_job_that_stopped_inside_a_stage_ends_as_one_that_did_not(evomoe, tmp_path):
    folder, recipe, whole = evomoe
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "stages" / "3_router")
    evolution = copy / "stages" / "2_expert_evolution"
    for done in ("model", "checkpoint-2"):
        shutil.rmtree(evolution / done)
    (evolution / "stage.json").unlink()
    first = (copy / "stages" / "1_warm_up" / "stage.json").stat().st_mtime_ns
    resumed = run_recipe(recipe, copy, resume=True)
    assert (copy / "stages" / "1_warm_up" / "stage.json").stat().st_mtime_ns == first
    for name in ("2_expert_evolution", "3_router"):
        expected = stage(folder, name)
        assert moved(stage(copy, name), expected) == set() and expected
    assert resumed["stages"][0] == json.loads(json.dumps(whole["stages"][0]))


def test_a_finished_stage_of_another_recipe_is_refused(evomoe):
    folder, _, _ = evomoe
    changed = load_recipe("evomoe_easyvqa", [*SHORT, "stages.1.evolve.rule=ema"])
    with pytest.raises(ValueError, match=r"2_expert_evolution was another: its stage differ"):
        run_recipe(changed, folder, resume=True)


def test_moe_llava_tunes_in_three_stages(tmp_path):
    steps = [f"stages.{number}.training.max_steps={count}" for number, count in enumerate((12, 30, 12))]
    limits = ["training.save_steps=100", "training.logging_steps=4", "stages.2.training.learning_rate=0.002"]
    recipe = load_recipe("moe_llava_easyvqa", [*SHORT, *steps, *limits])
    report = run_recipe(recipe, tmp_path)
    connector, dense, experts = (stage(tmp_path, name) for name in ("1_connector", "2_dense", "3_experts"))
    assert not any("vision_tower" in name for name in moved(connector, dense))
    assert moved(dense, experts) == set()  # the experts are new, everything else is frozen
    assert [set(record["trainable_parameters"]) for record in report["stages"]] == [
        {"connector", "embeddings"},
        {"connector", "embeddings", "backbone"},
        {"experts", "routers"},
    ]
    for record in report["stages"]:
        losses = [entry["loss"] for entry in record["log_history"] if "loss" in entry]
        assert losses[-1] < losses[0], record["name"]
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert model.config.moe_layers() == [0, 2] and model.config.system == "moe_llava"


def test_cumo_upcycles_every_part_in_its_third_stage(tmp_path):
    tower = "{model_type: clip_vision_model, hidden_size: 24, intermediate_size: 32, num_hidden_layers: 2, "
    tower += "num_attention_heads: 2, image_size: 64, patch_size: 16}"
    own = [f"model.vision_tower={tower}", "model.feature_stage=null", "stages.2.construct={upcycle: {system: cumo}}"]
    recipe = load_recipe("moe_llava_easyvqa", [*SHORT, *own])
    report = run_recipe(recipe, tmp_path)
    assert set(report["stages"][2]["trainable_parameters"]) == {"experts", "routers"}
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert {str(site).partition(".")[0] for site in model.moe_blocks()} == {"0", "1", "2", "3", "vision", "connector"}
    before, after = (stage(tmp_path, name) for name in ("2_dense", "3_experts"))
    assert moved(before, after) == set()


def test_anyexperts_trains_the_allocation_first_and_then_everything(tmp_path):
    recipe = load_recipe("anyexperts_easyvqa", [*SHORT, "model.moe_config.expert_intermediate_size=16"])
    report = run_recipe(recipe, tmp_path)
    base, allocation, everything = (stage(tmp_path, name) for name in ("1_top_k", "2_allocation", "3_everything"))
    assert moved(base, {name: tensor for name, tensor in allocation.items() if "objectives." not in name}) == set()
    trained = moved(allocation, everything)
    assert any(name.endswith("gate.weight") for name in trained) and any("down_proj" in name for name in trained)
    logs = [entry for entry in report["log_history"] if "objective/slot_budget" in entry]
    assert logs and "routing/image/early/importance" in logs[-1]
    saved = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert saved.moe_layers()[1].router.max_slots == 8


def test_a_frozen_parameter_that_moves_is_reported(vlm):
    counts = train_only(vlm, ["routers/wei*"])
    assert set(counts) == {"routers"}
    before = fingerprints(vlm)
    gates = [name for name, parameter in vlm.named_parameters() if parameter.requires_grad]
    assert moved_parameters(vlm, before) == (gates, []) and gates
    with torch.no_grad():
        vlm.lm_head.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"1 frozen parameters moved .* lm_head.weight"):
        refuse_strayed(moved_parameters(vlm, before)[1])


def test_learning_rate_scales_reach_their_parameters_and_the_schedule(vlm, tmp_path):
    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            self.groups = [(group["lr"], list(group["params"])) for group in optimizer.param_groups]

    ids = torch.randint(5, 20, (4, 6))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-3, lr_scheduler_type="linear", use_cpu=True,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    rates = Rates()
    HfMoeTrainer(
        model=vlm,
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[rates],
        learning_rate_scales={"routers/weight": 5.0},
    ).train()
    gate = vlm.moe_layers()[0].router.weight
    seen = {any(parameter is gate for parameter in group): rate for rate, group in rates.groups if group}
    assert seen[True] == pytest.approx(5 * seen[False]) and seen[False] > 0


def tiny_dense() -> HfMoeForConditionalGeneration:
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    return HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config={"layers": []}))


def test_copies_with_noise_and_vanilla_evolution_are_constructions_too(tmp_path):
    dense, fields = tiny_dense(), {"layers": [1], "num_experts": 2}
    noisy = construct(
        dense, Stage("x", [], construct={"upcycle": {"system": "moe_llava", "moe_config": fields, "noise_std": 0.1}}),
        None, seed=0,
    )  # fmt: skip
    experts = noisy.moe_layers()[1].experts.down_proj
    assert noisy.config.system == "moe_llava" and not torch.equal(experts[0], experts[1])
    dropped = construct(
        dense, Stage("x", [], construct={"upcycle": {"system": "drop_upcycling", "moe_config": fields}}), None, seed=0
    )
    rows = dropped.moe_layers()[1].experts.gate_up_proj
    assert torch.isin(rows, dense.model.language_model.layers[1].mlp.gate_proj.weight).any(-1).float().mean() < 0.3
    evolution = ExpertEvolution([1], beta_ranges=[0.5])
    evolution.start(dense)
    evolution.save(tmp_path)
    first = Stage("first", ["backbone", "experts"], evolve={"layers": [1], "beta_ranges": [0.5]})
    second = Stage("second", ["routers", "experts"], construct={"assemble": {"moe_config": fields}}, objectives={})
    vanilla = construct(dense, second, (first, tmp_path), seed=0)
    assert set(train_only(vanilla, second.trainable)) == {"routers", "experts"}


@pytest.mark.parametrize(
    ("given", "message"),
    [({"assemble": {}}, "give that stage 'evolve'"), ({"upcicle": {}}, "Did you mean 'upcycle'")],
)
def test_impossible_constructions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        construct(tiny_dense(), Stage("x", [], construct=given), None, seed=0)


def test_a_typo_in_a_stage_names_the_stage(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("name: x\nmodel: {}\ndata: {}\nstages: [{name: a, trainable: []}, {name: b, trainabel: []}]\n")
    with pytest.raises(ValueError, match="stage 2 of typo.yaml 'trainabel'"):
        load_recipe(str(path))
