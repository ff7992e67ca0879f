"""Answers of hosts of Transformers about images, videos and sounds."""

import numpy as np
import pytest
import torch
from helpers.hosts.processors import HOSTS, RATE
from PIL import Image

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.analysis.routing_statistics import RoutingStatistics
from hf_moe.data import VisionLanguageCollator, load_rows
from hf_moe.evaluation.scoring import exact_match_score, score_answers
from hf_moe.evaluation.vqa import check_references, evaluate_vqa, predict_answers


ONE_OF_EACH = {
    "image": lambda level: Image.new("RGB", (16, 16), (level, 255 - level, level)),
    "video": lambda level: np.full((4, 16, 16, 3), level, np.uint8),
    "audio": lambda level: {"array": np.sin(np.arange(6000) * (level + 20) / 200), "sampling_rate": RATE},
}


def questions(kind):
    """Return three questions of unequal length, of which only the image, video or sound tells two answers."""
    asked = zip(["what?", "what is it, then?", "what?"], [10, 120, 240], strict=True)
    rows = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            f"{kind}s": [ONE_OF_EACH[kind](level)],
        }
        for (question, level), answer in zip(asked, ["ab", "cd", "ef"], strict=True)
    ]
    return load_rows(rows)


def learnt(host, rows):
    """Return the native model once it knows the answers by heart."""
    torch.manual_seed(0)
    model = host.model().train()
    batch = VisionLanguageCollator(host.processor)(list(rows))
    if host.name != "qwen2_5_vl":
        batch.pop("mm_token_type_ids")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name, kind", [("qwen2_5_vl", "video"), ("qwen2_audio", "audio"), ("llava", "image")])
def test_a_host_answers_what_it_has_learnt(name, kind):
    host, rows = HOSTS[name](), questions(kind)
    model = learnt(host, rows)
    result = evaluate_vqa(model, host.processor, rows, max_new_tokens=4)
    assert result["predictions"] == ["ab", "cd", "ef"] and result["accuracy"] == 1.0
    references = check_references(rows)
    assert score_answers(exact_match_score, result["predictions"], references, name="exact_match")["exact_match"] == 1
    # Rows of one batch do not change each other, and neither does the padding of their prompts.
    assert predict_answers(model, host.processor, rows, max_new_tokens=4, batch_size=1) == result["predictions"]
    first, _, last = rows
    swapped = [{**first, f"{kind}s": last[f"{kind}s"]}, {**last, f"{kind}s": first[f"{kind}s"]}]
    assert predict_answers(model, host.processor, load_rows(swapped), max_new_tokens=4) == ["ef", "ab"]


def test_one_token_is_generated_where_answers_are_one():
    host, rows = HOSTS["qwen2_5_vl"](), questions("image")
    model, calls = host.model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    answers = predict_answers(model, host.processor, rows, candidates=["a", "b"])
    assert len(answers) == 3 and len(calls) == 1
    predict_answers(model, host.processor, rows, candidates=["ab"])
    assert len(calls) > 2


def test_training_mode_of_a_host_is_left_as_it_was():
    host = HOSTS["llava"]()
    model = host.model().train()
    predict_answers(model, host.processor, questions("image"), candidates=["a"])
    assert model.training


def test_statistics_of_a_host_count_every_real_token():
    host, rows = HOSTS["qwen2_5_vl"](), questions("image")
    moe_config = {"num_experts": 4, "num_experts_per_tok": 2, "router": "top_k"}
    config = HfMoeConfig.on_host(host.config(), host.model_class, moe_config=moe_config)
    model, statistics = HfMoeForConditionalGeneration(config).eval(), RoutingStatistics()
    predict_answers(model, host.processor, rows, candidates=["a", "b"], statistics=statistics, batch_size=2)
    batch = VisionLanguageCollator(host.processor, train=False)(list(rows))
    images = (batch["mm_token_type_ids"] == 1).sum()
    assert images and all(tokens[1] == images for tokens in statistics.tokens.values())
    assert all(tokens.sum() == batch["attention_mask"].sum() for tokens in statistics.tokens.values())
    model(**batch)
    assert all(tokens[1] == images for tokens in statistics.tokens.values())
