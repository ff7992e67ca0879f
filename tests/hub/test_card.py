import hashlib
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, HfMoeProcessor
from hf_moe.construction.pretrained import square_image_processor
from hf_moe.construction.tokenizer import train_word_tokenizer
from hf_moe.hub.card import write_card
from hf_moe.hub.results import check_evaluation
from hf_moe.modeling.parts import text_decoder


REPORT = {
    "accuracy": 0.93612,
    "blind_accuracy": 0.65123,
    "accuracy_by_question_type": {"color": 0.91234, "shape": 0.97654},
    "evaluated": 9_673,
    "train_seconds": 271.4,
    "total_seconds": 402.6,
    "peak_memory_gib": 2.345,
    "parameters_total": 6_543_210,
    "parameters_active": {"text": 1_234_567, "image": 2_345_678},
    "seed": 7,
    "versions": {"torch": "2.14.1", "transformers": "5.23.0"},
}


def tiny_text_config(vocab_size: int) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=vocab_size, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved multimodal model: its folder and itself."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cards") / "tiny"
    tokenizer = train_word_tokenizer(["What is in the picture ?", "a red circle"])
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = HfMoeConfig.from_system(
        "moiie",
        text_config=tiny_text_config(len(tokenizer)),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        moe_config={"objectives": {"load_balance": {"coef": 0.02, "scope": "sequence"}}},
    )
    model = HfMoeForConditionalGeneration(config).eval()
    processor = HfMoeProcessor(
        square_image_processor(16), tokenizer, config.image_seq_length, chat_template=tokenizer.chat_template
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.new("RGB", (40, 30), (200, 40, 90)).save(folder / "routing.png")
    return folder, model


def card_of(saved, **options) -> ModelCard:
    folder, model = saved
    return ModelCard.load(write_card(folder, model=model, **{"report": REPORT, **options}))


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)


def test_the_hub_reads_the_metadata_and_the_results(saved):
    card = card_of(saved, base_models=["timm/tower"], datasets=["easy-vqa"], license="mit")
    data = card.data
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-text-to-text", "transformers", "mit")
    assert data.tags == ["moe", "vision-language", "custom_code", "hf_moe"]
    assert (data.base_model, data.datasets, data.model_name) == (["timm/tower"], ["easy-vqa"], "tiny")
    assert (data.base_model_relation, data.language) == ("finetune", None)
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results == {"Accuracy": 0.93612, "Accuracy (color)": 0.91234, "Accuracy (shape)": 0.97654}
    assert {result.dataset_name for result in data.eval_results} == {"easy-vqa"}


def test_languages_are_listed_and_a_model_from_nothing_has_no_relation(saved):
    assert card_of(saved, language="en").data.language == ["en"]
    card = card_of(saved, language=["en", "fr"])
    assert card.data.language == ["en", "fr"]
    assert "base_model_relation" not in card.content


def test_the_card_says_what_the_model_is_and_where_it_comes_from(saved):
    text = card_of(saved).text
    assert "`pip install torch transformers pillow`" in text
    assert "| 1 | `moiie` | 4 | 2 | 64 | 0 |" in text
    assert "`clip_vision_model`. An image of 16 x 16 pixels becomes 4 tokens" in text
    assert "`load_balance` (coefficient 0.02)" in text
    assert "[arXiv:2508.09779](https://arxiv.org/abs/2508.09779)" in text
    assert "title = {MoIIE: Mixture of Intra- and Inter-Modality Experts" in text
    assert "objective `load_balance`: GShard, [arXiv:2006.16668]" in text


def test_the_card_draws_the_way_from_image_and_text_to_the_answer(saved):
    drawn = card_of(saved).text.split("```\n")[1]
    assert drawn.splitlines() == [
        "image 16 x 16 -> clip_vision_model -> mlp -> 4 tokens",
        "text -> embeddings",
        "  |",
        "  layer 0  attention, feed-forward",
        "  layer 1  attention, moiie -> 2 of 4 experts",
        "  |",
        "answer",
    ]


def test_the_card_counts_what_works_on_a_token_of_each_modality(saved):
    rows = re.findall(r"^\| (decoder.*?|tower.*?) \| (.*?) \| (.*?) \|$", card_of(saved).text, flags=re.MULTILINE)
    model = saved[1]
    held = {id(p): p.numel() for layer in model.moe_layers().values() for p in layer.experts.parameters()}
    decoder = sum(p.numel() for p in text_decoder(model).parameters()) + model.lm_head.weight.numel()
    at_most = f"{decoder - sum(held.values()) // 2:,}"
    encoders = [model.get_submodule(path) for path in ("model.vision_tower", "model.connector")]
    encoding = f"{sum(p.numel() for module in encoders for p in module.parameters()):,}"
    assert rows == [
        ("decoder, on average in the evaluation", "1,234,567", "2,345,678"),
        ("decoder, at most", at_most, at_most),
        ("tower and connector", "–", encoding),
    ]


def test_the_code_brings_its_license_and_leaves_that_of_the_weights_alone(saved):
    card_of(saved)
    license = (saved[0] / "LICENSE").read_text()
    assert "Apache License" in license
    (saved[0] / "LICENSE").write_text("MIT License")
    assert "[LICENSE-CODE](LICENSE-CODE)" in card_of(saved, license="mit").text
    assert (saved[0] / "LICENSE").read_text() == "MIT License"
    assert (saved[0] / "LICENSE-CODE").read_text() == license


def test_where_and_at_what_cost_it_was_trained_is_said(saved):
    machine = {"processor": "AMD EPYC", "cores": 2, "accelerator": None}
    emissions = {"emissions": 12.5, "source": "CodeCarbon", "training_type": "fine-tuning"}
    card = card_of(saved, report={**REPORT, "machine": machine, "co2_eq_emissions": emissions})
    assert "the whole job 403 seconds on AMD EPYC, 2 cores." in card.text
    assert "Emissions: 12.5 g of CO2-equivalent, measured by CodeCarbon." in card.text
    assert card.data.co2_eq_emissions == emissions


def test_every_number_of_the_report_is_in_the_card(saved):
    text = card_of(saved, recipe={"name": "demo", "training": {"max_steps": 12}}).text
    assert text.strip().startswith("# demo")
    shown = ["0.9361", "0.6512", "0.9123", "0.9765", "271", "403", "2.35 GiB", "6,543,210", "| 1,234,567 |"]
    for number in [*shown, "9,673 questions", " 2,345,678 |", "Seed: 7", "torch 2.14.1", "max_steps: 12"]:
        assert number in text, number


def test_a_number_that_is_absent_leaves_no_trace(saved):
    card = card_of(saved, report={}, datasets=["easy-vqa"])
    assert card.data.eval_results is None
    for word in (
        "Results",
        "Parameters:",
        "on average",
        "Seed",
        "GiB",
        "Versions",
        "without sight",
        "None",
        "Undefined",
    ):
        assert word not in card.text, word
    assert "No quality has been measured." in card.text


def test_the_card_lists_the_digest_of_every_file_of_code(saved):
    text = card_of(saved).text
    files = sorted(saved[0].glob("*.py"))
    assert "router_moiie.py" in [path.name for path in files]
    for path in files:
        assert f"| `{path.name}` | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in text


def test_pictures_are_shown_and_missing_ones_refused(saved):
    assert "![Expert shares by modality and layer](routing.png)" in card_of(saved, pictures=["routing.png"]).text
    with pytest.raises(FileNotFoundError, match="has no absent.png"):
        card_of(saved, pictures=["routing.png", "absent.png"])


@pytest.mark.parametrize("index", [0, 1])
def test_the_snippets_of_the_card_answer_a_question(saved, index, monkeypatch, capsys):
    code = snippets(card_of(saved, recipe={"name": "demo"}))[index]
    monkeypatch.chdir(saved[0].parent)
    Image.new("RGB", (20, 20), (200, 40, 90)).save("picture.png")
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_hub_reads_the_results_and_people_find_the_numbers(saved):
    card_of(saved, datasets=["easy-vqa"])
    folder = saved[0]
    assert json.loads((folder / "evaluation.json").read_text()) == REPORT
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "easy-vqa.yaml").read_text()))
    assert {(entry.dataset_id, entry.task_id, entry.value) for entry in entries} == {
        ("easy-vqa", "default", 0.93612),
        ("easy-vqa", "color", 0.91234),
        ("easy-vqa", "shape", 0.97654),
    }
    check_evaluation(folder)


def test_files_of_an_earlier_report_go(saved):
    card_of(saved, datasets=["easy-vqa"])
    card_of(saved, report={})
    assert not (saved[0] / "evaluation.json").exists()
    assert not (saved[0] / ".eval_results").exists()
    check_evaluation(saved[0])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("README.md", "| 0.9361 |", "| 0.9461 |", "README.md: all 0.9461"),
        ("README.md", "| color | 0.9123 |", "| color | 0.9765 |", "README.md: color 0.9765"),
        ("README.md", "9,673 questions", "9,999 questions", "README.md: questions 9,999"),
        ("README.md", "value: 0.91234", "value: 0.97654", r"metadata: color 0.97654"),
        ("evaluation.json", '"blind_accuracy": 0.65123', '"blind_accuracy": 0.1', "set to zero 0.6512"),
        (".eval_results/easy-vqa.yaml", "value: 0.97654", "value: 0.98", "easy-vqa.yaml: shape 0.98"),
        (".eval_results/easy-vqa.yaml", "task_id: default", "task_id: shape", "easy-vqa.yaml: shape 0.93612"),
    ],
)
def test_a_result_without_a_file_behind_it_is_an_error(saved, file, old, new, message):
    card_of(saved, datasets=["easy-vqa"])
    path = saved[0] / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        check_evaluation(saved[0])


def test_a_text_model_gets_a_text_card(tmp_path):
    model = HfMoeForConditionalGeneration(HfMoeConfig(text_config=tiny_text_config(32), moe_config={"num_experts": 4}))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(write_card(tmp_path, model=model, report={}))
    assert card.data.pipeline_tag == "text-generation"
    assert "vision-language" not in card.content
    assert "AutoModelForCausalLM" in snippets(card)[0]


def test_a_folder_without_a_checkpoint_is_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="save the model and the processor there first"):
        write_card(tmp_path, model=saved[1], report={})
