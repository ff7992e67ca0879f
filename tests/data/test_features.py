"""Cached features of a frozen tower."""

import pytest
import torch
from datasets import Dataset

from hf_moe.data import FeatureCache, VisionLanguageCollator
from hf_moe.data.pictures import undecoded


def build(vlm, processor, rows, folder, **options):
    return FeatureCache.build(vlm, processor, rows, cache_dir=folder, dtype=torch.float32, **options)


def test_cached_features_give_the_logits_of_pixels(vlm, processor, rows, tmp_path):
    cache = build(vlm, processor, rows, tmp_path, batch_size=2)
    assert len(cache) == 3
    from_pixels = VisionLanguageCollator(processor)(rows)
    from_cache = VisionLanguageCollator(processor, feature_cache=cache)(rows)
    assert "pixel_values" not in from_cache
    with torch.no_grad():
        expected = vlm(**from_pixels).logits
        torch.testing.assert_close(vlm(**from_cache).logits, expected, atol=1e-5, rtol=1e-5)
        wrong = from_cache | {"image_features": from_cache["image_features"].flip(0)}
        assert (vlm(**wrong).logits - expected).abs().max() > 1e-3


def test_half_precision_features_stay_close(vlm, processor, rows, tmp_path):
    pictures = [rows[2]["images"][1], rows[0]["images"][0]]
    exact = build(vlm, processor, rows, tmp_path).lookup(pictures)
    for dtype in (torch.float16, torch.bfloat16):
        cache = FeatureCache.build(vlm, processor, rows, cache_dir=tmp_path, dtype=dtype)
        assert cache.features.dtype == dtype
        torch.testing.assert_close(cache.lookup(pictures).float(), exact, atol=5e-2, rtol=1e-2)
    assert len(list(tmp_path.iterdir())) == 3


def test_second_build_reads_the_file_and_a_change_makes_another(vlm, processor, rows, tmp_path, picture):
    first = build(vlm, processor, rows, tmp_path)
    runs = []
    vlm.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    again = build(vlm, processor, rows, tmp_path)
    assert not runs and torch.equal(first.features, again.features)

    next(vlm.model.vision_tower.parameters()).add_(0.1)
    build(vlm, processor, rows, tmp_path)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    build(vlm, processor, rows, tmp_path)
    rows[0]["images"] = rows[3]["images"] = [picture(3)]
    build(vlm, processor, rows, tmp_path)
    assert len(runs) == 3 and len(list(tmp_path.iterdir())) == 4


def test_damaged_file_is_computed_again_with_a_warning(vlm, processor, rows, tmp_path, caplog):
    first = build(vlm, processor, rows, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again = build(vlm, processor, rows, tmp_path)
    assert "damaged" in caplog.text
    assert torch.equal(first.features, again.features)


def test_trainable_tower_is_refused(vlm, processor, rows, tmp_path):
    vlm.model.vision_tower.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen tower"):
        build(vlm, processor, rows, tmp_path)


def test_build_leaves_the_mode_of_the_tower(vlm, processor, rows, tmp_path):
    vlm.model.vision_tower.train()
    build(vlm, processor, rows, tmp_path)
    assert vlm.model.vision_tower.training


def test_datasets_are_read_undecoded(vlm, processor, rows, tmp_path):
    dataset = Dataset.from_list([rows[0], rows[3]])
    cache = build(vlm, processor, dataset, tmp_path)
    assert len(cache) == 1
    expected = cache.lookup([rows[0]["images"][0]])
    assert torch.equal(cache.lookup(undecoded(dataset)[1]["images"]), expected)
    assert torch.equal(cache.lookup(dataset[1]["images"]), expected)
