"""Cached features of a frozen tower."""

import base64
import io
import os
import time
import zipfile

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import SiglipImageProcessor

from hf_moe.data import FeatureCache, VisionLanguageCollator
from hf_moe.data.row_images import content_key, read_row_image, undecoded


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
    modes = []
    vlm.model.vision_tower.register_forward_hook(lambda tower, *_: modes.append(tower.training))
    build(vlm, processor, rows, tmp_path)
    assert vlm.model.vision_tower.training and modes == [False]


def test_tower_of_packed_patches_is_refused(vlm, processor, rows, tmp_path):
    processor.image_processor.model_input_names = ["pixel_values", "pixel_attention_mask"]
    with pytest.raises(ValueError, match="differ in their number of patches"):
        build(vlm, processor, rows, tmp_path)


def test_features_that_do_not_fit_their_type_are_refused(vlm, processor, rows, tmp_path):
    vlm.model.vision_tower.register_forward_hook(
        lambda _, __, outputs: outputs.__setitem__("last_hidden_state", outputs.last_hidden_state * 1e6)
    )
    with pytest.raises(ValueError, match="do not fit torch.float16: pass dtype=torch.bfloat16"):
        FeatureCache.build(vlm, processor, rows, cache_dir=tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_picture_that_changes_meanwhile_is_refused(vlm, processor, tmp_path):
    class Changing(io.BytesIO):
        reads = 0

        def read(self, *_):
            self.reads += 1
            return as_bytes(RED if self.reads == 1 else BLUE)

    with pytest.raises(ValueError, match="Row 0 of the dataset has no readable image 0: .*has changed since"):
        build(vlm, processor, [question(Changing())], tmp_path)


def test_datasets_are_read_undecoded(vlm, processor, rows, tmp_path):
    dataset = Dataset.from_list([rows[0], rows[3]])
    cache = build(vlm, processor, dataset, tmp_path)
    assert len(cache) == 1
    expected = cache.lookup([rows[0]["images"][0]])
    assert torch.equal(cache.lookup(undecoded(dataset)[1]["images"]), expected)
    assert torch.equal(cache.lookup(dataset[1]["images"]), expected)


RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))


def as_bytes(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def in_folders(folder):
    for name, image in (("a", RED), ("b", BLUE)):
        (folder / name).mkdir()
        image.save(folder / name / "1.png")
    return str(folder / "a/1.png"), str(folder / "b/1.png")


def in_archives(folder):
    paths = []
    for name, image in (("a", RED), ("b", BLUE)):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            archive.writestr("1.png", as_bytes(image))
        paths.append({"path": f"zip://1.png::{folder / name}.zip", "bytes": None})
    return paths


def in_tables(folder):
    records = []
    for name, image in (("a", RED), ("b", BLUE)):
        table = Dataset.from_dict({"images": [[{"path": "1.png", "bytes": as_bytes(image)}]]})
        table.to_parquet(folder / f"{name}.parquet")
        records += Dataset.from_parquet(str(folder / f"{name}.parquet"), cache_dir=str(folder / "cache"))["images"][0]
    return records


def in_memory(folder):
    for image in (RED, BLUE):
        image.filename = "1.png"
    return RED, BLUE


# Two pictures that bear one name.
NAMESAKES = {
    "folders": in_folders,
    "archives": in_archives,
    "parquet": in_tables,
    "images in memory": in_memory,
    "records": lambda _: [{"path": "1.png", "bytes": as_bytes(image)} for image in (RED, BLUE)],
    "arrays": lambda _: [np.asarray(RED), np.asarray(BLUE)],
    "equal bytes, other size": lambda _: [np.arange(192, dtype=np.uint8).reshape(*s, 3) for s in ((4, 16), (16, 4))],
    "tensors": lambda _: [torch.from_numpy(np.asarray(image).copy()) for image in (RED, BLUE)],
    "files of one name": lambda _: [io.BytesIO(as_bytes(image)) for image in (RED, BLUE)],
    "data URLs": lambda _: [f"data:image/png;base64,{base64.b64encode(as_bytes(i)).decode()}" for i in (RED, BLUE)],
}


def question(image, **fields):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    return {"messages": messages, "images": [image], **fields}


def check_features(vlm, processor, cache, images):
    """Every image has the features of its own pixels."""
    pixels = processor.image_processor([processor.open_image(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        expected = vlm.model.vision_tower(**pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(cache.lookup(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", NAMESAKES)
def test_namesakes_have_their_own_features(kind, vlm, processor, tmp_path):
    first, second = NAMESAKES[kind](tmp_path)
    rows = [question(image, image_id="1.png") for image in (first, second)]
    cache = build(vlm, processor, rows, tmp_path / "features")
    assert len(cache) == 2
    if kind != "archives":
        check_features(vlm, processor, cache, [first, second])
    assert not torch.equal(cache.lookup([first]), cache.lookup([second]))
    alone = build(vlm, processor, rows[1:], tmp_path / "features")
    torch.testing.assert_close(alone.lookup([second]), cache.lookup([second]))
    with pytest.raises(ValueError, match="has an image 0 that is not in the feature cache of 1 pictures"):
        alone.lookup([first])


def replaced(path, kept):
    """Put the blue picture in the place of the red one: other content, and all that `kept` names as before."""
    before = path.stat()
    if "inode" in kept:
        path.write_bytes(as_bytes(BLUE, "BMP"))
    else:
        other = path.with_suffix(".new")
        other.write_bytes(as_bytes(BLUE, "BMP"))
        os.replace(other, path)
    if "time" in kept:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("kept", [[], ["time"], ["inode", "time"]], ids=["nothing", "time", "inode and time"])
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_changed_file_is_another_picture(kept, link, vlm, processor, tmp_path):
    path = named = tmp_path / "1.bmp"
    RED.save(path)
    if link:
        named = tmp_path / "link.bmp"
        named.symlink_to(path)
    rows = [question(str(named), image_id="1")]
    first = build(vlm, processor, rows, tmp_path / "features")
    red = first.lookup([str(named)])
    replaced(path, kept)
    with pytest.raises(ValueError, match="is new or has changed"):
        VisionLanguageCollator(processor, feature_cache=first)(rows)
    again = build(vlm, processor, rows, tmp_path / "features")
    check_features(vlm, processor, again, [str(named)])
    assert not torch.equal(again.lookup([str(named)]), red)


def test_equal_pictures_share_an_entry_whatever_they_are_called(vlm, processor, tmp_path):
    RED.save(tmp_path / "a.png")
    RED.save(tmp_path / "b.bmp")
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    images = [tmp_path / "a.png", tmp_path / "b.bmp", tmp_path / "c.png", RED, np.asarray(RED), as_bytes(RED)]
    runs = []
    vlm.model.vision_tower.register_forward_hook(lambda _, inputs, __: runs.append(len(inputs[0])))
    cache = build(vlm, processor, [question(image) for image in images], tmp_path / "features")
    assert len(cache) == 1 and runs == [1]
    assert cache.lookup(images).shape[0] == len(images)
    assert build(vlm, processor, [question(image) for image in images[::-1]], tmp_path / "features") and runs == [1]


def test_a_picture_is_found_in_another_form_than_it_was_built_from(vlm, processor, tmp_path):
    RED.save(tmp_path / "a.png")
    for built, other in ((tmp_path / "a.png", RED), (as_bytes(RED), as_bytes(RED, "BMP")), (RED, as_bytes(RED))):
        cache = build(vlm, processor, [question(built)], tmp_path / "features")
        assert torch.equal(cache.lookup([other]), cache.lookup([built]))


def test_an_encoded_picture_is_never_taken_for_pixels():
    pixels = RED.tobytes()
    assert content_key("a file", b"pixels (8, 8)" + pixels) != content_key("an image", RED)


def namesake(part):
    """Make an object another class of the same name, from another module."""
    part.__class__ = type(type(part).__name__, (type(part),), {"__module__": "elsewhere"})


TOWERS = {
    "tower class": lambda vlm, processor: namesake(vlm.model.vision_tower),
    "processor class": lambda vlm, processor: namesake(processor.image_processor),
    "a weight": lambda vlm, processor: next(vlm.model.vision_tower.parameters()).data.add_(0.1),
    "activation": lambda vlm, processor: setattr(vlm.model.vision_tower.config, "hidden_act", "relu"),
    "number of heads": lambda vlm, processor: setattr(vlm.model.vision_tower.config, "num_attention_heads", 2),
    "precision": lambda vlm, processor: vlm.model.vision_tower.to(torch.bfloat16),
    "layer": lambda vlm, processor: setattr(vlm.config, "vision_feature_layer", -2),
    "prefix": lambda vlm, processor: setattr(vlm.config, "vision_prefix_tokens", 0),
    "mean": lambda vlm, processor: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3]),
    "size": lambda vlm, processor: setattr(processor.image_processor, "do_center_crop", False),
    "resampling": lambda vlm, processor: setattr(processor.image_processor, "resample", 0),
    "class": lambda vlm, processor: setattr(
        processor, "image_processor", SiglipImageProcessor(size={"height": 16, "width": 16})
    ),
}


@pytest.mark.parametrize("change", TOWERS)
def test_another_tower_or_processor_takes_another_file(change, vlm, processor, rows, tmp_path):
    build(vlm, processor, rows, tmp_path)
    TOWERS[change](vlm, processor)
    runs = []
    vlm.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    build(vlm, processor, rows, tmp_path)
    assert runs and len(list(tmp_path.iterdir())) == 2


def test_place_of_the_tower_is_not_its_identity(vlm, processor, rows, tmp_path):
    build(vlm, processor, rows, tmp_path)
    vlm.model.vision_tower.config._name_or_path = "elsewhere"
    build(vlm, processor, rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_without_images_need_no_features(vlm, processor, rows, tmp_path):
    cache = build(vlm, processor, rows[1:2], tmp_path)
    assert len(cache) == 0 and not list(tmp_path.iterdir())
    batch = VisionLanguageCollator(processor, feature_cache=cache)(rows[1:2])
    assert "image_features" not in batch and vlm(**batch).loss.isfinite()


def test_keys_cost_little_beside_the_tower(tmp_path):
    paths = []
    for number in range(300):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(paths[-1])
    started = time.perf_counter()
    assert len({content_key(*read_row_image(str(path))) for path in paths}) == 300
    assert time.perf_counter() - started < 1  # a third of a second for the 5,000 pictures of the demo
