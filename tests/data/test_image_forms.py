"""A picture is the same picture through every door, in every mode and in every form in which it comes."""

import base64
import io
import json
import pathlib
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from datasets.utils import are_progress_bars_disabled
from PIL import Image as PILImage
from PIL import ImageCms
from transformers import ImageTextToTextPipeline
from transformers.utils.chat_template_utils import Chat

from hf_moe.data import FeatureCache, VisionLanguageCollator, load_rows, tokenize_rows
from hf_moe.data.row_images import read_row_image, undecoded
from hf_moe.modeling.image_loading import decode_image, open_image


ORIENTATION = 0x0112
MODES = (
    "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16 I;16L I;16B I;16N F P+transparency L+transparency "
    "RGB+transparency I;16+transparency"
).split()
SIZE = (10, 6)


def colours() -> PILImage.Image:
    levels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return PILImage.fromarray(levels)


def alpha() -> PILImage.Image:
    return PILImage.fromarray(np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint8))


def see_through() -> PILImage.Image:
    image = colours().convert("RGBA")
    image.putalpha(alpha())
    return image


def in_mode(mode: str) -> PILImage.Image:
    """An image of a mode, with transparency where the mode or its name has some."""
    base, _, transparency = mode.partition("+")
    grey = colours().convert("L")
    if base.startswith("I;16"):
        # Pillow itself converts only to the plain mode.
        wide = np.asarray(grey).astype(np.uint16) * 257
        order = ">u2" if base == "I;16B" else "<u2"
        image = PILImage.frombytes(base, SIZE, wide.astype(order).tobytes())
    elif base == "I":
        image = PILImage.fromarray(np.asarray(grey).astype(np.int32) * 257)
    elif base == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(colours(), *profiles, outputMode="LAB")
    elif base in ("LA", "La"):
        image = grey.convert("LA")
        image.putalpha(alpha())
        image = image.convert(base)
    elif base == "PA":
        image = colours().convert("P").convert("PA")
        image.putalpha(alpha())
    elif base in ("RGBA", "RGBa"):
        image = see_through().convert(base)
    else:
        image = colours().convert(base)
    if transparency:
        pixel = image.getpixel((3, 2))
        image.info["transparency"] = pixel
    return image


def encoded(image: PILImage.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated(orientation: int, form: str = "PNG") -> bytes:
    exif = PILImage.Exif()
    exif[ORIENTATION] = orientation
    return encoded(colours(), form, exif=exif)


def row(image, **fields) -> dict:
    question = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    answer = [{"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image], **fields}


def chat(image) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this ?"}]
    return [{"role": "user", "content": content}]


def through_every_door(image, processor, vlm) -> dict[str, torch.Tensor]:
    """The pixels that every door makes of a picture."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    in_part = row(image)
    in_part["messages"][0]["content"][0] = {"type": "image", "image": in_part.pop("images")[0]}
    pipe = ImageTextToTextPipeline(model=vlm, processor=processor)
    collate = VisionLanguageCollator(processor)
    asked = VisionLanguageCollator(processor, train=False)
    doors = {
        "processor": processor(images=[image], text=["<image> red"], return_tensors="pt"),
        "processor, nested": processor(images=[[image]], text=["<image> red"], return_tensors="pt"),
        "processor, alone": processor(images=image, text="<image> red", return_tensors="pt"),
        "chat template": processor.apply_chat_template(chat(image), **options),
        "pipeline": pipe.preprocess(Chat(chat(image))),
        "collator": collate([row(image)]),
        "collator, alone": collate([row(image) | {"images": image}]),
        "collator, image": collate([{"messages": row(image)["messages"], "image": image}]),
        "collator, content part": collate([in_part]),
        "evaluation": asked([row(image)]),
        "space": processor(images=[processor.open_image(image)], text=["<image> red"], return_tensors="pt"),
    }
    return {name: batch["pixel_values"] for name, batch in doors.items()}


def check_doors(image, processor, vlm, folder) -> torch.Tensor:
    pixels = through_every_door(image, processor, vlm)
    expected = processor.image_processor([open_image(image)], return_tensors="pt")["pixel_values"]
    for name, found in pixels.items():
        assert torch.equal(found, expected), name
    cache = FeatureCache.build(vlm, processor, [row(image)], cache_dir=folder, dtype=torch.float32)
    with torch.no_grad():
        features = vlm.model.vision_tower(expected).last_hidden_state[:, 1:]
    torch.testing.assert_close(cache.lookup([image]), features, atol=1e-5, rtol=1e-5)
    return expected


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_one_picture_through_every_door(mode, processor, vlm, tmp_path):
    image = in_mode(mode)
    check_doors(image, processor, vlm, tmp_path)
    for form in ("PNG", "TIFF", "GIF", "WEBP", "JPEG"):
        path = tmp_path / f"picture.{form.lower()}"
        try:
            with warnings.catch_warnings(action="ignore"):
                image.save(path)
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
            continue
        if mode.partition("+")[0] in ("YCbCr", "RGBX") and form == "TIFF":
            continue  # Pillow cannot read back what it writes there
        in_bytes = open_image(path.read_bytes())
        assert np.array_equal(in_bytes, open_image(path)) and np.array_equal(in_bytes, open_image(PILImage.open(path)))
        if form in ("PNG", "TIFF") and not mode.endswith("transparency"):
            assert np.array_equal(in_bytes, open_image(image)), form


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_shows_what_was_drawn(mode):
    base = mode.partition("+")[0]
    image = in_mode(mode)
    found = np.asarray(open_image(image)).astype(float)
    reference = colours() if base not in ("1", "P", "PA") else colours().convert(base).convert("RGB")
    grey = base[0] in "LIF" and base != "LAB"
    expected = np.asarray(colours().convert("L").convert("RGB") if grey else reference).astype(float)
    if base in ("LA", "La", "PA", "RGBA", "RGBa"):
        share = np.asarray(alpha())[..., None] / 255
        expected = expected * share + 255 * (1 - share)
    if mode.endswith("transparency"):
        chosen = np.asarray(image) == np.asarray(image)[2, 3]
        chosen = chosen.all(-1) if chosen.ndim == 3 else chosen
        assert chosen.any()
        expected[chosen] = 255
    difference = np.abs(found - expected)
    # Other colour spaces round.
    assert difference.mean() < 2 and (base in ("LAB", "HSV", "YCbCr") or difference.max() <= 2)
    assert open_image(image).mode == "RGB" and open_image(image).size == SIZE


def test_hidden_colours_are_not_seen():
    image = PILImage.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(image).getcolors() == [(16, (255, 255, 255))]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(form):
    ramp = PILImage.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    for image in (ramp, encoded(ramp, form), np.asarray(ramp), torch.from_numpy(np.asarray(ramp).astype(np.int32))):
        levels = np.asarray(open_image(image)).astype(float)
        assert abs(levels.mean() - 127.5) < 0.1 and levels.min() == 0 and levels.max() == 255


def test_dark_sixteen_bits_stay_dark():
    dark = np.full((4, 4), 257, dtype=np.uint16) - 100
    for image in (dark, PILImage.fromarray(dark), encoded(PILImage.fromarray(dark)), dark.astype(">u2")):
        assert open_image(image).getcolors() == [(16, (1, 1, 1))]
    assert open_image(dark.astype(np.int32)).getcolors() == [(16, (157, 157, 157))]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_applied_once_in_every_form(orientation, form, processor, vlm, tmp_path):
    content = rotated(orientation, form)
    upright = colours() if form in ("PNG", "TIFF") else PILImage.open(io.BytesIO(encoded(colours(), form)))
    turns = {
        2: PILImage.Transpose.FLIP_LEFT_RIGHT, 3: PILImage.Transpose.ROTATE_180, 4: PILImage.Transpose.FLIP_TOP_BOTTOM,
        5: PILImage.Transpose.TRANSPOSE, 6: PILImage.Transpose.ROTATE_270, 7: PILImage.Transpose.TRANSVERSE,
        8: PILImage.Transpose.ROTATE_90,
    }  # fmt: skip
    expected = upright if orientation == 1 else upright.transpose(turns[orientation])
    record = {"path": None, "bytes": content}
    decoded = Image().decode_example(record)
    for image in (content, io.BytesIO(content), PILImage.open(io.BytesIO(content)), record, decoded):
        opened = open_image(image)
        assert np.array_equal(opened, expected) and np.array_equal(open_image(opened), expected)
    if form == "JPEG":
        (tmp_path / "photo.jpg").write_bytes(content)
        check_doors(str(tmp_path / "photo.jpg"), processor, vlm, tmp_path)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [PILImage.new("RGB", SIZE, colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
    opened = PILImage.open(io.BytesIO(content))
    assert opened.n_frames == 3
    assert open_image(content).getpixel((0, 0)) == open_image(opened).getpixel((0, 0)) == (255, 0, 0)
    opened.seek(2)
    assert open_image(opened).getpixel((0, 0)) == (0, 0, 255)


# One transparent picture in every form in which a user may hold it; `at` has its `path`, `content` and `pixels`.
WAYS = {
    "path": lambda at: str(at.path),
    "Path": lambda at: at.path,
    "link": lambda at: str(at.link),
    "file URL": lambda at: at.path.as_uri(),
    "data URL": lambda at: f"data:image/png;base64,{at.base64}",
    "base64": lambda at: at.base64,
    "base64 with line breaks": lambda at: base64.encodebytes(at.content).decode(),
    "bytes": lambda at: at.content,
    "bytearray": lambda at: bytearray(at.content),
    "memoryview": lambda at: memoryview(at.content),
    "BytesIO": lambda at: io.BytesIO(at.content),
    "opened file": lambda at: at.path.open("rb"),
    "PIL": lambda at: see_through(),
    "PIL, lazy": lambda at: PILImage.open(at.path),
    "record of a path": lambda at: {"path": str(at.path), "bytes": None},
    "record of bytes": lambda at: {"path": None, "bytes": at.content},
    "record of both": lambda at: {"path": "elsewhere.png", "bytes": at.content},
    "record, path alone": lambda at: {"path": str(at.path)},
    "record, bytes alone": lambda at: {"bytes": at.content},
    "numpy HWC": lambda at: at.pixels,
    "numpy CHW": lambda at: at.pixels.transpose(2, 0, 1),
    "numpy 0 to 1": lambda at: at.pixels / 255,
    "numpy float": lambda at: at.pixels.astype(np.float32),
    "numpy int": lambda at: at.pixels.astype(np.int64),
    "numpy 16-bit": lambda at: at.pixels.astype(np.uint16) * 257,
    "numpy strided": lambda at: np.flip(at.pixels[::-1].copy(), 0),
    "torch CHW": lambda at: torch.from_numpy(at.pixels).permute(2, 0, 1),
    "torch HWC": lambda at: torch.from_numpy(at.pixels),
    "torch 0 to 1": lambda at: torch.from_numpy(at.pixels / 255).permute(2, 0, 1).requires_grad_(),
    "part, image": lambda at: {"type": "image", "image": str(at.path)},
    "part, url": lambda at: {"type": "image", "url": f"data:image/png;base64,{at.base64}"},
    "part, path": lambda at: {"type": "image", "path": at.path},
    "part, base64": lambda at: {"type": "image", "base64": at.base64},
    "part, empty fields": lambda at: {"type": "image", "text": None, "image": None, "url": str(at.path)},
    "part, OpenAI": lambda at: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{at.base64}"}},
}


@pytest.fixture
def at(tmp_path):
    content = encoded(see_through())
    path, link = tmp_path / "a picture.png", tmp_path / "link.png"
    path.write_bytes(content)
    link.symlink_to(path)
    text = base64.b64encode(content).decode()
    return SimpleNamespace(path=path, link=link, content=content, base64=text, pixels=np.array(see_through()))


@pytest.mark.parametrize("way", WAYS)
def test_a_form_is_one_picture_through_every_door(way, at, processor, vlm, tmp_path):
    image = WAYS[way](at)
    pixels = check_doors(image, processor, vlm, tmp_path)
    expected = processor.image_processor([open_image(see_through())], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected)
    # Every epoch opens it again.
    assert np.array_equal(open_image(image), open_image(see_through()))


@pytest.mark.parametrize("key", ["image", "url", "path", "base64"])
def test_parts_of_messages_are_read_as_the_pipeline_reads_them(key, at, processor, vlm):
    value = at.base64 if key == "base64" else str(at.path)
    question = [{"type": "image", "text": None, key: value}, {"type": "text", "text": "what ?", "image": None}]
    asked = [{"role": "user", "content": question}]
    found = ImageTextToTextPipeline(model=vlm, processor=processor).preprocess(Chat(asked))
    answered = [*asked, {"role": "assistant", "content": "red"}]
    batch = VisionLanguageCollator(processor)([{"messages": answered}])
    expected = processor.image_processor([open_image(see_through())], return_tensors="pt")["pixel_values"]
    assert torch.equal(found["pixel_values"], expected) and torch.equal(batch["pixel_values"], expected)
    tokenized = tokenize_rows(Dataset.from_list([{"messages": [*asked, row(None)["messages"][1]]}]), processor)
    assert torch.equal(VisionLanguageCollator(processor)(list(tokenized))["pixel_values"], expected)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 4), (1, 1), (3, 5, 3), (4, 2, 4), (1, 4, 3)])
def test_ambiguous_arrays_have_their_channels_last(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert open_image(pixels).size == shape[1::-1]
    expected = open_image(PILImage.fromarray(pixels))
    assert np.array_equal(open_image(pixels), expected)
    if len(shape) == 3:
        first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
        assert np.array_equal(open_image(first), expected)


def test_one_pixel_is_a_picture(processor, vlm, tmp_path):
    check_doors(PILImage.new("RGB", (1, 1), "red"), processor, vlm, tmp_path)


@pytest.mark.parametrize("batch", [list, tuple, np.stack, lambda images: torch.from_numpy(np.stack(images))])
def test_batches_and_lists_of_images_are_rows_in_order(batch, processor):
    images = [np.asarray(colours()), np.asarray(colours())[::-1].copy()]
    expected = processor.image_processor([open_image(image) for image in images], return_tensors="pt")["pixel_values"]
    texts = ["<image> red", "<image> blue"]
    assert torch.equal(processor(images=batch(images), text=texts, return_tensors="pt")["pixel_values"], expected)
    nested = [[image] for image in images]
    assert torch.equal(processor(images=nested, text=texts, return_tensors="pt")["pixel_values"], expected)
    two = row(images) | {"images": batch(images)}
    two["messages"][0]["content"].insert(0, {"type": "image"})
    assert torch.equal(VisionLanguageCollator(processor)([two])["pixel_values"], expected)


@pytest.fixture
def served():
    """Serve what is put into a dict of paths, on this machine."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched_or_refused(served, processor, vlm, tmp_path, at):
    address, files = served
    files["/a.png"] = at.content
    pixels = check_doors(f"{address}/a.png", processor, vlm, tmp_path)
    assert torch.equal(pixels, check_doors(at.path, processor, vlm, tmp_path))
    with pytest.raises(
        ValueError, match=r"Row 0 of the batch has no readable image 0: http.*b.png cannot be fetched.*404"
    ):
        VisionLanguageCollator(processor)([row(f"{address}/b.png")])


def truncated(form: str) -> bytes:
    large = PILImage.effect_noise((200, 200), 80)
    content = encoded(large, form)
    return content[: len(content) // 2]


BAD = {
    "missing": ("nowhere.png", "there is no file 'nowhere.png'"),
    "missing Path": (pathlib.Path("nowhere.png"), "there is no file 'nowhere.png'"),
    "missing record": ({"path": "nowhere.png", "bytes": None}, "there is no file 'nowhere.png'"),
    "missing file URL": ("file:///nowhere.png", "there is no file '/nowhere.png'"),
    "folder": (str(pathlib.Path(__file__).parent), "cannot be read: Is a directory"),
    "empty text": ("", "an empty text names no picture"),
    "empty bytes": (b"", "it is empty"),
    "not a picture": (b"hello world", "its format is unknown to Pillow"),
    "code": (__file__, r"test_image_forms.py cannot be read as a picture: its format"),
    "truncated PNG": (truncated("PNG"), "cannot be read as a picture: .*truncated"),
    "truncated JPEG": (truncated("JPEG"), "cannot be read as a picture: .*truncated"),
    "truncated TIFF": (truncated("TIFF"), "cannot be read as a picture"),
    "truncated GIF": (truncated("GIF"), "cannot be read as a picture"),
    "truncated WebP": (truncated("WEBP"), "cannot be read as a picture"),
    "cut after its head": (encoded(colours())[:30], "cannot be read as a picture"),
    "damaged inside": (encoded(colours())[:50] + b"x" * 20 + encoded(colours())[70:], "cannot be read as a picture"),
    "broken data URL": ("data:image/png;base64,@@", "is not base64"),
    "text as base64": ("aGVsbG8gd29ybGQ=", "names no file and was taken as base64, cannot be read"),
    "None": (None, r"None \(NoneType\) is not a picture"),
    "number": (7, r"7 \(int\) is not a picture"),
    "set": ({1}, r"\(set\) is not a picture"),
    "record of nothing": ({"path": None, "bytes": None}, "no picture under its keys"),
    "empty record": ({}, "no picture under its keys"),
    "record of two": ({"url": "a.png", "image": "b.png"}, "pictures under image and url: give exactly one"),
    "record of numbers": ({"bytes": [1, 2]}, r"the bytes of a picture are \[1, 2\] \(list\)"),
    "opened as text": (io.StringIO("a"), "open it with mode 'rb'"),
    "zero width": (PILImage.new("RGB", (0, 3)), "it has no pixels, its size is 0 x 3"),
    "empty array": (np.zeros((0, 3, 3)), r"the array of shape \(0, 3, 3\)"),
    "vector": (np.zeros(7), r"the array of shape \(7,\)"),
    "seven channels": (np.zeros((5, 6, 7)), "of 1, 3 or 4 channels"),
    "not numbers": (np.full((4, 4), "a"), "numbers are of type <U1"),
    "nan": (np.full((4, 4), np.nan), "go from nan to nan"),
    "infinite": (torch.full((3, 4, 4), torch.inf), "go from inf to inf"),
    "normalised": (torch.full((3, 4, 4), -1.5), "go from -1.5 to -1.5: floats go from 0 to 1 or 255"),
    "too large": (np.full((4, 4), 70000), "integers from 0 to 255 or 65535"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_names_its_row_in_every_door(kind, processor, vlm, tmp_path):
    image, reason = BAD[kind]
    good = row(see_through())
    rows = [good, row(image if kind == "number" else [image], id="q7")]
    named = r"\(id 'q7'\) has no readable image 0: "
    if image is None:
        named, reason = r"\(id 'q7'\) has no image 0 among", "null|None"
    for train in (True, False):
        with pytest.raises(ValueError, match=rf"(?s)Row 1 of the batch {named}.*{reason}"):
            VisionLanguageCollator(processor, train=train)(rows)
    with pytest.raises(ValueError, match=rf"(?s)Row 1 of the dataset {named}.*{reason}"):
        FeatureCache.build(vlm, processor, rows, cache_dir=tmp_path)
    cache = FeatureCache.build(vlm, processor, rows[:1], cache_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)Row 1 of the batch {named}.*{reason}"):
        VisionLanguageCollator(processor, feature_cache=cache)(rows)
    with pytest.raises(ValueError, match=rf"(?s)Row 1, image 0: .*{reason}"):
        processor(images=[[see_through()], [image]], text=["<image> red", "<image> red"])
    with pytest.raises(ValueError, match=rf"(?s)Image 1: .*{reason}"):
        processor(images=[see_through(), image], text=["<image> red", "<image> red"])


def test_a_huge_picture_is_refused_by_name(processor, monkeypatch, tmp_path):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 20)
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(colours()))
    with pytest.raises(ValueError, match=r"Row 0 of the batch .*bomb.png.*60 pixels.*exceeds limit"):
        VisionLanguageCollator(processor)([row(str(path))])


def test_a_row_of_two_doors_is_refused(processor, at):
    both = row(at.path)
    both["messages"][0]["content"][0] = {"type": "image", "image": str(at.path)}
    with pytest.raises(
        ValueError, match="Row 0 of the batch has 1 image parts, 1 of which bring their image, and 1 images"
    ):
        VisionLanguageCollator(processor)([both])


IN_A_FILE = {
    "text": lambda at: "a picture.png",
    "list": lambda at: ["a picture.png"],
    "record": lambda at: {"path": "a picture.png", "bytes": None},
    "part": lambda at: {"type": "image", "path": "a picture.png"},
    "part, base64 with line breaks": lambda at: {"type": "image", "base64": WAYS["base64 with line breaks"](at)},
    "part, base64 of a data URL": lambda at: {"type": "image", "base64": WAYS["data URL"](at)},
    "address": lambda at: f"{at.address}/a.png",
    "part, address": lambda at: {"type": "image", "url": f"{at.address}/a.png"},
    **{name: WAYS[name] for name in ("file URL", "data URL", "base64", "base64 with line breaks", "part, OpenAI")},
}


@pytest.mark.parametrize("form", IN_A_FILE)
def test_rows_of_a_file_name_their_pictures_in_any_form(form, at, tmp_path, processor, served):
    at.address, files = served
    files["/a.png"] = at.content
    line, image = row(None), IN_A_FILE[form](at)
    if form.startswith("part"):
        del line["images"]
        line["messages"][0]["content"][0] = image
    else:
        line["images"] = image
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    expected = processor.image_processor([open_image(see_through())], return_tensors="pt")["pixel_values"]
    assert torch.equal(VisionLanguageCollator(processor)(list(rows))["pixel_values"], expected)


@pytest.mark.parametrize(
    "image, said",
    [
        ("bG9zdA==", "no image at .*bG9zdA=="),
        ("A" * 10_000, "no image at .*AAAA"),
        ("data:image/png;base64,@", "the data URL .* is not base64"),
        ({"base64": "@"}, "the base64 of a picture is '@', which is none"),
        ({"base64": 7}, "the base64 of a picture is '7', which is none"),
        ("http://127.0.0.1:9/a.png", "127.0.0.1:9/a.png cannot be fetched"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_no_picture_in_a_file_of_rows_names_its_row(image, said, tmp_path, at):
    lines = [row("a picture.png"), row(image)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises((ValueError, FileNotFoundError), match=f"Row 1 of .*{said}") as error:
        load_rows(str(tmp_path / "rows.jsonl"))
    assert len(str(error.value)) < 600


def test_records_of_a_stream_are_read_where_they_lie(tmp_path, at):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("inside.png", at.content)
    inside = {"path": f"zip://inside.png::{tmp_path / 'pictures.zip'}", "bytes": None}
    assert np.array_equal(decode_image(*read_row_image(inside)), open_image(at.path))
    with pytest.raises(ValueError, match=r"the file zip://absent.png::.* cannot be read"):
        read_row_image({"path": inside["path"].replace("inside", "absent"), "bytes": None})


def test_rows_are_left_undecoded_without_a_bar(picture, capfd):
    rows = Dataset.from_list([{"images": [picture(0)]}, {"images": []}])
    capfd.readouterr()
    assert "bytes" in undecoded(rows)[0]["images"][0]
    assert capfd.readouterr().err == "" and not are_progress_bars_disabled()
