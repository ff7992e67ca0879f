"""Features of frozen hosts, kept on disk."""

import numpy as np
import pytest
import torch
from helpers.hosts.processors import HOSTS, RATE
from PIL import Image
from transformers import Trainer, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.data import FeatureCache, VisionLanguageCollator, load_rows, tokenize_rows
from hf_moe.evaluation.vqa import predict_answers
from hf_moe.modeling.parts import host_parts


SEEING = [name for name in HOSTS if name != "qwen2_audio"]


def picture(level):
    return Image.fromarray(np.random.default_rng(level).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def row(*kinds, level=0):
    messages = [
        {"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "this"},
    ]
    found = {
        "images": [picture(level + place) for place in range(kinds.count("image"))],
        "videos": [{"frames": [picture(level + 5), picture(level + 6)], "fps": 2}] * kinds.count("video"),
    }
    return {"messages": messages, **{name: items for name, items in found.items() if items}}


@pytest.fixture
def hosted():
    """Return how to make a host and its frozen MoE."""

    def make(name):
        torch.manual_seed(0)
        host = HOSTS[name]()
        config = HfMoeConfig.on_host(
            host.config(), host.model_class, moe_config={"num_experts": 2, "num_experts_per_tok": 1, "router": "top_k"}
        )
        model = HfMoeForConditionalGeneration(config).eval()
        parts = host_parts(model)
        for parameter_name, parameter in model.named_parameters():
            if parts.holder(parameter_name):
                parameter.requires_grad_(False)
        return host, model

    return make


@pytest.fixture
def ran(monkeypatch):
    """Return how to count what ran of a model's towers."""

    def count(model):
        calls = []
        for path in host_parts(model).towers:
            model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
        return calls

    return count


@pytest.mark.parametrize("name", SEEING)
def test_cached_features_give_the_same_logits(name, hosted, ran, tmp_path):
    host, model = hosted(name)
    kinds = ("image",) if name in ("smolvlm", "internvl") or "video" not in host.kinds else ("image", "video")
    rows = [row("image", *kinds), row(), row("image", level=9)]
    cache = FeatureCache.build(model, host.processor, load_rows(rows), tmp_path, dtype=torch.float32)
    calls = ran(model)
    with torch.no_grad():
        expected = model(**VisionLanguageCollator(host.processor)(rows)).logits
        count = len(calls)
        batch = VisionLanguageCollator(host.processor, feature_cache=cache)(rows)
        assert not any(key.startswith("pixel") for key in batch)
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert count and len(calls) == count


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_kept_features_are_read_again(name, hosted, ran, tmp_path):
    host, model = hosted(name)
    rows = [row("image", "image"), row("image", level=1)]
    first = FeatureCache.build(model, host.processor, rows, tmp_path)
    calls = ran(model)
    again = FeatureCache.build(model, host.processor, rows, tmp_path)
    assert not calls and len(again) == len(first) == 2
    collators = [VisionLanguageCollator(host.processor, feature_cache=cache) for cache in (first, again)]
    with torch.no_grad():
        logits = [model(**collator(rows)).logits for collator in collators]
    assert torch.equal(*logits)
    next(iter(tmp_path.iterdir())).write_bytes(b"damaged")
    FeatureCache.build(model, host.processor, rows, tmp_path)
    assert calls
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if host_parts(model).holder(n)).add_(1)
    FeatureCache.build(model, host.processor, rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", SEEING)
def test_a_trainable_connector_is_refused(name, hosted, tmp_path):
    host, model = hosted(name)
    parts = host_parts(model)
    path = next(path for path in parts.connectors if "image" in parts.modalities[path])
    model.get_submodule(path).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"Row 0 of the dataset has images whose .*of images {path}\.\S+ .*freeze"):
        FeatureCache.build(model, host.processor, [row("image")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_host_that_takes_no_encoded_input_is_refused(hosted, tmp_path):
    host, model = hosted("llava")
    model.base_model.forward = lambda pixel_values=None: None
    with pytest.raises(ValueError, match="takes no encoded images"):
        FeatureCache.build(model, host.processor, [row("image")], tmp_path)


def test_features_that_depend_on_others_are_refused(hosted, tmp_path, monkeypatch):
    host, model = hosted("llava")
    whole = model.base_model.get_image_features

    def mixed(pixel_values, **options):
        output = whole(pixel_values, **options)
        output.pooler_output = [features + len(pixel_values) for features in output.pooler_output]
        return output

    monkeypatch.setattr(model.base_model, "get_image_features", mixed)
    with pytest.raises(ValueError, match=r"other features \(pooler_output\) of two images together"):
        FeatureCache.build(model, host.processor, [row("image"), row("image", level=3)], tmp_path)


def test_an_image_that_the_cache_lacks_names_its_row(hosted, tmp_path):
    host, model = hosted("qwen2_5_vl")
    cache = FeatureCache.build(model, host.processor, [row("image")], tmp_path)
    with pytest.raises(ValueError, match="Row 1 of the batch has image 1, which is not in the feature cache of 1 im"):
        VisionLanguageCollator(host.processor, feature_cache=cache)([row("image"), row("image", "image")])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_host_without_sight_answers_all_pictures_alike(name, cached, hosted, tmp_path):
    host, model = hosted(name)
    rows = load_rows([row("image"), row("image", level=7)])
    cache = FeatureCache.build(model, host.processor, rows, tmp_path, dtype=torch.float32) if cached else None
    seen = []
    model.register_forward_hook(lambda _, __, outputs: seen.append(outputs.logits[:, -1]))
    for zero_images in (False, True):
        predict_answers(model, host.processor, rows, feature_cache=cache, candidates=["t"], zero_images=zero_images)
    assert not torch.allclose(*seen[0]) and torch.allclose(*seen[1])


def test_a_model_without_hearing_is_refused(hosted):
    host, model = hosted("qwen2_audio")
    heard = {"array": np.ones(3000, np.float32), "sampling_rate": RATE}
    rows = load_rows([{**row(), "audios": [heard]}])
    with pytest.raises(ValueError, match="zero_images leaves sounds as they are"):
        predict_answers(model, host.processor, rows, zero_images=True)


@pytest.mark.parametrize("cached", [False, True])
def test_plain_trainer_trains_a_host_on_rows(cached, hosted, tmp_path):
    host, model = hosted("qwen3_vl")
    rows = load_rows([row("image", "video"), row(), row("video", level=3)])
    cache = FeatureCache.build(model, host.processor, rows, tmp_path / "cache") if cached else None
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    collator = VisionLanguageCollator(host.processor, feature_cache=cache, config=model.config)
    Trainer(model, arguments, train_dataset=tokenize_rows(rows, host.processor), data_collator=collator).train()
    assert not torch.equal(model.lm_head.weight, before)
