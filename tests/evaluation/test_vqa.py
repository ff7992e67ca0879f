"""Answers of a model, and their score."""

import json

import pytest
import torch
from datasets import Dataset

from hf_moe.analysis.routing_statistics import RoutingStatistics
from hf_moe.data import FeatureCache, VisionLanguageCollator
from hf_moe.evaluation.report import write_report
from hf_moe.evaluation.vqa import evaluate_vqa, predict_answers, reference_answers


@pytest.fixture
def forwards(vlm):
    """Return a list that grows by the shape of the tokens of every forward."""
    calls = []
    vlm.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    return calls


@pytest.fixture
def trained(vlm, processor, rows):
    """The model, once it knows the answers of all rows by heart."""
    batch = VisionLanguageCollator(processor)(rows)
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=1e-2)
    vlm.train()
    for _ in range(40):
        optimizer.zero_grad()
        vlm(**batch).loss.backward()
        optimizer.step()
    return vlm.eval()


def test_trained_model_answers_by_one_prefill_per_question(trained, processor, questions, forwards):
    result = evaluate_vqa(trained, processor, questions, batch_size=1)
    assert result["predictions"] == ["circle", "yes"]
    assert result["accuracy"] == 1.0 and result["count"] == 2
    assert result["accuracy_by_question_type"] == {"shape": 1.0, "yes/no": 1.0}
    assert len(forwards) == 2


def test_prefill_under_padding_is_what_generation_says(vlm, processor, questions, rows):
    longer = {**questions[1], "messages": [rows[2]["messages"][2], rows[2]["messages"][3], *questions[1]["messages"]]}
    questions = Dataset.from_list([*questions, longer])
    one_by_one = predict_answers(vlm, processor, questions, batch_size=1, generate=True, max_new_tokens=1)
    assert predict_answers(vlm, processor, questions, batch_size=3) == one_by_one
    assert predict_answers(vlm, processor, questions, generate=True, max_new_tokens=1) == one_by_one


def test_answers_of_several_tokens_are_generated(trained, processor, questions, forwards):
    assert predict_answers(trained, processor, questions, candidates=["red and blue"]) == ["circle", "yes"]
    assert len(forwards) > 1
    with pytest.raises(ValueError, match="prefill"):
        predict_answers(trained, processor, questions, candidates=["red and"], statistics=RoutingStatistics())


@pytest.mark.parametrize("generate", [False, True])
def test_cached_features_give_the_same_answers(trained, processor, questions, tmp_path, generate):
    cache = FeatureCache.build(trained, processor, questions, cache_dir=tmp_path)
    answers = predict_answers(trained, processor, questions, feature_cache=cache, generate=generate)
    assert answers == ["circle", "yes"]


@pytest.mark.parametrize("cached", [False, True])
def test_zeroed_images_cannot_be_seen(vlm, processor, questions, tmp_path, cached):
    cache = FeatureCache.build(vlm, processor, questions, cache_dir=tmp_path) if cached else None
    connected = []
    vlm.model.connector.register_forward_pre_hook(lambda _, args: connected.append(args[0]))
    predict_answers(vlm, processor, questions, feature_cache=cache)
    predict_answers(vlm, processor, questions, feature_cache=cache, zero_images=True)
    predict_answers(vlm, processor, questions, feature_cache=cache, zero_images=True, generate=True)
    assert [features.abs().sum().item() > 0 for features in connected] == [True, False, False]


def test_statistics_count_every_real_token_of_the_prompts(vlm, processor, questions):
    statistics = RoutingStatistics()
    predict_answers(vlm, processor, questions, statistics=statistics)
    batch = VisionLanguageCollator(processor, train=False)(list(questions))
    assert all(tokens.sum() == batch["attention_mask"].sum() for tokens in statistics.tokens.values())
    assert all(tokens[1] == 8 for tokens in statistics.tokens.values())


def test_training_mode_is_left_as_it_was(vlm, processor, questions):
    predict_answers(vlm.train(), processor, questions)
    assert vlm.training


def test_streamed_rows_are_answered(trained, processor, questions):
    assert evaluate_vqa(trained, processor, questions.to_iterable_dataset())["accuracy"] == 1.0


def test_right_answers_come_from_the_columns_or_the_last_turn(rows):
    assert reference_answers({"answers": ["a", "b"], "answer": "c"}) == ["a", "b"]
    assert reference_answers({"answer": "c"}) == ["c"]
    assert reference_answers(rows[0]) == ["circle"]
    with pytest.raises(ValueError, match="assistant turn at its end"):
        reference_answers({"messages": rows[0]["messages"][:1]})


def test_report_holds_config_seed_versions_and_numbers(tmp_path):
    path = tmp_path / "runs" / "report.json"
    write_report(path, config={"batch_size": 2}, seed=3, accuracy=0.5)
    report = json.loads(path.read_text())
    assert report["config"] == {"batch_size": 2} and report["seed"] == 3 and report["accuracy"] == 0.5
    assert set(report["versions"]) == {"hf_moe", "torch", "transformers", "python"}
    with pytest.raises(TypeError):
        write_report(path, config={}, seed=3, accuracy=object())
    assert json.loads(path.read_text()) == report
    assert list(path.parent.iterdir()) == [path]
