"""Every section and key of a recipe is checked as it is read: unknown names, wrong types, ranges, missing files."""

from pathlib import Path
from typing import get_type_hints, is_typeddict

import pytest
import yaml
from transformers import LlamaConfig, MixtralConfig, TrainingArguments

from hf_moe.configuration.systems import RECIPES
from hf_moe.configuration.yaml_text import read_yaml
from hf_moe.training import sections
from hf_moe.training.arguments import check_training
from hf_moe.training.recipe import load_recipe
from hf_moe.training.schema import fit


MODEL, ADAPTER, STAGED = "easyvqa_demo", "smollm2_opposite_tasks", "evomoe_easyvqa"
HOSTED = str(Path(__file__).with_name("hosted.yaml"))
# Prefix of the keys, the class that declares them, a recipe that has them.
SECTIONS = {
    "": (sections.Recipe, MODEL),
    "model.": (sections.Model, MODEL),
    "model. of either kind": (sections.Upcycled, HOSTED),
    "model. on a host": (sections.Host, HOSTED),
    "data.": (sections.Data, MODEL),
    "evaluation.": (sections.Evaluation, MODEL),
    "card.": (sections.Card, MODEL),
    "model. of an adapter": (sections.Base, ADAPTER),
    "evaluation. of an adapter": (sections.AdapterEvaluation, ADAPTER),
    "stages.1.": (sections.Stage, STAGED),
    "stages.1.evolve.": (sections.Evolve, STAGED),
    "stages.2.construct.": (sections.Construct, STAGED),
    "stages.2.construct.assemble.": (sections.Assemble, STAGED),
    "stages.2.construct.upcycle.": (sections.Upcycle, STAGED),
}
KEYS = [
    (place.partition(" ")[0] + name, recipe)
    for place, (cls, recipe) in SECTIONS.items()
    for name in get_type_hints(cls)
]
NUMBERS_ONLY = {"batch_size", "generated", "seed", "max_length", "image_size", "feature_stage", "noise_std"}


def refusal(recipe, override):
    with pytest.raises((ValueError, OSError)) as caught:
        load_recipe(recipe, [override])
    message = str(caught.value)
    assert "Traceback" not in message and ".yaml" in message
    return message


@pytest.mark.parametrize(("key", "recipe"), KEYS, ids=lambda value: value)
def test_every_key_refuses_values_of_other_types_by_name(key, recipe):
    name = key.rpartition(".")[2]
    for wrong in ("{a: {b: [1]}}", "[[[]]]", ".nan", *(["-1", "true", "many"] if name in NUMBERS_ONLY else ["3.25"])):
        assert name in refusal(recipe, f"{key}={wrong}"), wrong


@pytest.mark.parametrize(("place", "cls", "recipe"), [(place, *pair) for place, pair in SECTIONS.items()])
def test_an_unknown_key_names_the_nearest_known_one(place, cls, recipe):
    name = next(iter(get_type_hints(cls)))
    message = refusal(recipe, f"{place.partition(' ')[0]}{name}x=3")
    assert f"'{name}x'" in message and f"'{name}'" in message


@pytest.mark.parametrize("name", [name for name, cls in vars(sections).items() if is_typeddict(cls)])
def test_every_section_has_its_place_in_the_tests_above(name):
    assert getattr(sections, name) in {cls for cls, _ in SECTIONS.values()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01), ('"1e-2"', 0.01), ("6.0e-4", 6e-4), ("3", 3), ('"3"', 3), ("-.5", -0.5),
    ],
)  # fmt: skip
def test_numbers_are_read_in_every_form(text, value):
    assert load_recipe(MODEL, [f"training.learning_rate={text}"] if value > 0 else []) is not None
    assert fit(read_yaml(text, "test"), float, "test") == value


@pytest.mark.parametrize("word", ["no", "off", "false", "False", '"no"', "0"])
def test_booleans_are_read_in_every_form(word):
    assert load_recipe(MODEL, [f"training.bf16={word}"]).training["bf16"] is False
    assert load_recipe(MODEL, [f"evaluation.blind={word}"]).evaluation["blind"] is False


@pytest.mark.parametrize("word", ["no", '"no"', "false"])
def test_strategies_called_no_are_text(word):
    assert load_recipe(MODEL, [f"training.save_strategy={word}"]).training["save_strategy"] == "no"


def test_every_field_of_training_arguments_refuses_a_set():
    kinds = get_type_hints(TrainingArguments)
    for name in kinds.keys() - {"output_dir", "seed", "resume_from_checkpoint"}:
        with pytest.raises(ValueError, match=rf"training\.{name}\b|'{name}'"):
            check_training({name: {1, 2}}, "recipe test.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=3", "'max_steps'"),
        ("training.lr_scheduler_type=cosin", "'cosine'"),
        ("training.optim=adamw_torchh", "'adamw_torch'"),
        ("training.output_dir=x", "--output-dir"),
        ("training.seed=3", "its own field"),
        ("training.resume_from_checkpoint=x", "--resume"),
        ("training.remove_unused_columns=true", "reads all columns"),
        ("training.eval_on_start=true", "evaluates once"),
        ("training.max_steps=0", "trains nothing"),
        ("training.per_device_train_batch_size=0", "at least 1"),
        ("training.gradient_accumulation_steps=0", "at least 1"),
        ("training.learning_rate=-1", "at least 0"),
        ("training.adam_beta1=2", "Invalid beta"),
        ("training.lr_scheduler_kwargs={num_cycle: 3}", "num_cycle"),
        ("training.lr_scheduler_type=cosine_with_min_lr", "min_lr"),
        ("training.report_to=wand", "wandb"),
        ("training.fp16=true", "fp16 and bf16"),
        ("training.accelerator_config={split_batchs: true}", "split_batchs"),
        ("training.activation_checkpointing_kwargs={use_reentrant: no}", "true or false"),
        ("name=a/b", "a folder's"),
        ("trainable=[]", "trains? nothing|nothing would be trained"),
        ("trainable=[expert]", "experts"),
        ("model.tokenizer=chars", "words"),
        ("model.language_model.model_type=lama", "'llama'"),
        ("model.language_model.hidden_sise=3", "'hidden_size'"),
        ("model.language_model.hidden_size=x", "hidden_size"),
        ("model.language_model=./gone", "no folder here"),
        ("model.vision_tower=a/b/c", "no folder here"),
        ("model.connector={name: mlpp}", "'mlp'"),
        ("model.connector={name: mlp, nrom: true}", "'norm'"),
        ("model.connector={name: mlp, norm: no}", "true or false"),
        ("model.system=moie", "'moiie'"),
        ("model.moe_config.num_expert=3", "model.moe_config .*'num_experts'"),
        ("model.moe_config.router=moiii", "model.moe_config .*'moiie'"),
        ("model.moe_config.layers=[9]", "model.moe_config .*layers 0 to 3"),
        ("model.moe_config.objectives={load_balanc: 1}", "model.moe_config .*'load_balance'"),
        ("data.train={path: gone.jsonl}", "no such file"),
        ("data.eval=gone.jsonl", "no such file"),
        ("data.eval={image_folder: gone}", "no such folder"),
        ("data.train={name: easy_vqua}", "'easy_vqa'"),
        ("data.train={}", "data.train .*one of the keys"),
        ("data.train.limit=0", "at least 1"),
        ("data.train.lmit=3", "data.train .*'lmit'.*'limit'"),
        ("data.eval={image_folder: ., questoin: x}", "data.eval .*'questoin'.*'question'"),
        ("data.train={hub: a/b, straeming: true}", "data.train .*'streaming'"),
        ("data.train={name: easy_vqa, question: x}", "data.train .*no option 'question'"),
        ("data.train.ignore=answer", "data.train .*ignore="),
        ("data.eval=null", "no data.eval to score"),
        ("card.datasets=easy-vqa", r"list\[str\]"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_data_is_read(override, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_recipe(MODEL, [override])


def test_a_source_of_every_form_that_exists_passes(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    for path in (tmp_path, tmp_path / "{split}.jsonl"):
        assert load_recipe(MODEL, [f"data.train={{path: '{path}', ignore: [a], limit: 3}}"]).data["train"]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Configs alone, of a dense decoder and of one that is a MoE."""
    folder = tmp_path_factory.mktemp("decoders")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40).save_pretrained(folder / "llama")
    MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=40, num_local_experts=4).save_pretrained(
        folder / "mixtral"
    )
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe_config.router={name: top_k, nrom: true}", "model.moe_config .*'nrom'"),
        ("model.moe_config.objectives={load_balance: {coef: 1, gate: x}}", "model.moe_config .*'gate'"),
        ("model.moe_config.layers=[9]", "model.moe_config .*layers 0 to 1"),
        ("trainable=[routers/gates]", "nothing would be trained"),
    ],
)
def test_a_pretrained_decoder_is_tried_from_its_config(decoders, override, message):
    start = [f"model.language_model={decoders / 'llama'}", "model.system=top_k", "model.vision_tower=null"]
    assert load_recipe(MODEL, start)
    with pytest.raises(ValueError, match=message):
        load_recipe(MODEL, [*start, override])


def test_a_decoder_with_experts_keeps_their_number(decoders):
    start = [f"model.language_model={decoders / 'mixtral'}", "model.system=null", "model.moe_config={}"]
    assert load_recipe(MODEL, start)
    with pytest.raises(ValueError, match=r"model.moe_config .*num_experts=8"):
        load_recipe(MODEL, [*start, "model.moe_config.num_experts=8"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.trainable=[routers]", "stage 1 .*nothing would be trained"),
        ("stages.1.training.adam_beta1=2", "stage 2 .*Invalid beta"),
        ("stages.1.evolve=null", "stage 2 .*nothing would be trained"),
        ("stages.1.evolve.layers=[9]", "evolve of stage 2 .*layers 0 to 3"),
        ("stages.1.evolve.beta_ranges=[2]", "evolve of stage 2 .*number in"),
        ("stages.1.evolve.beta_ranges=[0.5]", "stage 3 .*set num_experts=2"),
        ("stages.2.construct={upcycle: {moe_config: {num_expert: 3}}}", "stage 3 .*'num_experts'"),
        ("stages.2.construct.assemble.moe_config={layers: all}", r"stage 3 .*evolved in the layers \[1, 3\]"),
        ("stages.2.construct.assemble=null", "construct.assemble=None"),
        ("stages.0.construct={convert_router: {name: top_k}}", "the model has none"),
        ("stages.2.objectives={load_balanc: 1}", "stage 3 .*'load_balance'"),
        ("stages.2.learning_rate_scales={experts: 2}", "stage 3 .*selects nothing"),
        ("stages.2.learning_rate_scales={routers: 0}", "greater than 0"),
        ("stages.2.loss=entropy", "stage 3 .*no labels, by which the objectives"),
        ("trainable=[routers]", "each stage has its own"),
        ("stages.3.name=x", "holds 3 items"),
        ("stages.name=x", "numbered from 0"),
        ("stages.0.name.x=x", "has no field 'x'"),
        ("=3", "key=value"),
        ("training.max_steps={", "not YAML"),
    ],
)  # fmt: skip
def test_stages_are_tried_before_the_first_one_runs(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(STAGED, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "not YAML"),
        (b"name: \xff\xfe", "UTF-8"),
        (b"", "a mapping"),
        (b"- name", "a mapping"),
        (b"just words", "a mapping"),
        (b"name: x\nseed: 1\nname: y\n", "the key 'name' occurs twice"),
        (b"name: x\ntraining:\n  bf16: true\n  bf16: false\n", "the key 'bf16' occurs twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(str(path))
    assert "odd.yaml" in str(caught.value)


def test_a_missing_file_is_not_taken_for_a_shipped_recipe():
    with pytest.raises(FileNotFoundError, match="no file"):
        load_recipe("somewhere/easyvqa_demo.yaml")


def test_empty_sections_are_as_absent_ones(tmp_path):
    content = yaml.safe_load((RECIPES / f"{MODEL}.yaml").read_text())
    path = tmp_path / "empty.yaml"
    path.write_text(yaml.safe_dump({**content, "card": None, "stages": None, "evaluation": None}))
    recipe = load_recipe(str(path))
    assert recipe.card == recipe.evaluation == {} and recipe.stages == []


def test_text_that_looks_like_a_boolean_selects_rows():
    assert load_recipe(MODEL, ["data.train.where={answer: no}"]).data["train"]["where"] == {"answer": "no"}
