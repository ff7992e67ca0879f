"""Right inputs of every kind give one result; wrong ones are refused by row and number."""

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor

from hf_moe import HfMoeProcessor


@pytest.fixture
def image(picture):
    return picture(0)


WRONG_INPUTS = {
    "placeholder, no image": (lambda i: {"text": "<image> red"}, "Row 0 has 1 <image> placeholders and 0 images"),
    "placeholder in row 1": (
        lambda i: {"text": ["red", "<image> <image>"]},
        "Row 1 has 2 <image> placeholders and 0 images",
    ),
    "empty list of images": (
        lambda i: {"text": "<image>", "images": []},
        "Row 0 has 1 <image> placeholders and 0 images",
    ),
    "image, no placeholder": (lambda i: {"text": "red", "images": i}, "Row 0 has 0 <image> placeholders and 1 images"),
    "two images, one place": (
        lambda i: {"text": "<image>", "images": [i, i]},
        "Row 0 has 1 <image> placeholders and 2 images",
    ),
    "nested, row 1 wrong": (
        lambda i: {"text": ["<image>", "<image> <image>"], "images": [[i], [i]]},
        "Row 1 has 2 <image> placeholders and 1 images",
    ),
    "nested, row 0 empty": (
        lambda i: {"text": ["<image>", "<image>"], "images": [[], [i, i]]},
        "Row 0 has 1 <image> placeholders and 0 images",
    ),
    "nested, row None": (
        lambda i: {"text": ["<image>", "<image>"], "images": [[i], None]},
        "Row 1 has 1 <image> placeholders and 0 images",
    ),
    "flat, total wrong": (
        lambda i: {"text": ["<image>", "<image> <image>"], "images": [i, i]},
        r"The 2 texts have 3 <image> placeholders \(\[1, 2\] by row\), but 2 images were given",
    ),
    "more rows of images": (
        lambda i: {"text": ["<image>"], "images": [[i], [i]]},
        "There are 1 texts and images for 2 rows",
    ),
    "fewer rows of images": (
        lambda i: {"text": ["<image>", "red", "red"], "images": [[i], []]},
        "There are 3 texts and images for 2 rows",
    ),
    "row of images, row alone": (
        lambda i: {"text": ["<image>", "<image>"], "images": [[i], i]},
        "Row 1 of the images is .* where other rows are lists",
    ),
    "image lists too deep": (
        lambda i: {"text": ["<image>"], "images": [[[i]]]},
        r"Row 0, image 0: .* \(list\) is not a picture",
    ),
    "image None": (lambda i: {"text": ["<image>"], "images": [None]}, r"Image 0: None \(NoneType\) is not a picture"),
    "image number": (lambda i: {"text": "<image>", "images": 3}, r"Image 0: 3 \(int\) is not a picture"),
    "image generator": (
        lambda i: {"text": "<image>", "images": (x for x in [i])},
        r"Image 0: .* \(generator\) is not a picture",
    ),
    "missing file": (
        lambda i: {"text": ["<image>", "<image>"], "images": [[i], ["nowhere.png"]]},
        "Row 1, image 0: there is no file 'nowhere.png'",
    ),
    "text bytes": (lambda i: {"text": b"<image>", "images": i}, "a string or a list of strings, got bytes"),
    "text number": (lambda i: {"text": 7}, "a string or a list of strings, got int"),
    "text set": (lambda i: {"text": {"red"}}, "a string or a list of strings, got set"),
    "text of bytes": (lambda i: {"text": ["red", b"red"]}, "Row 1 of the text is of type bytes"),
    "text of None": (lambda i: {"text": [None]}, "Row 0 of the text is of type NoneType"),
    "text of numbers": (lambda i: {"text": ["red", 7]}, "Row 1 of the text is of type int"),
    "text of lists": (lambda i: {"text": [["red"], ["blue"]]}, "Row 0 of the text is of type list"),
    "text of nothing": (lambda i: {"text": []}, "The text is an empty list"),
    "empty text": (lambda i: {"text": ["red", ""]}, "Row 1 is an empty text, of which the tokenizer makes no token"),
    "nothing": (lambda i: {}, "at least one input"),
    "no images, no text": (lambda i: {"images": []}, "at least one input"),
    "video": (lambda i: {"text": "red", "videos": [np.zeros((2, 4, 4, 3))]}, "takes images and text, got videos"),
    "audio": (lambda i: {"text": "red", "audio": np.zeros(9)}, "takes images and text, got audio"),
    "cut in an image": (
        lambda i: {
            "text": ["red", "red <image>"],
            "images": [i],
            "truncation": True,
            "max_length": 3,
            "padding": True,
        },
        "Row 1 has 4 image tokens, of which truncation to 3 tokens left 2",
    ),
    "cut before an image": (
        lambda i: {"text": "red red red <image>", "images": i, "truncation": True, "max_length": 2},
        "Row 0 has 4 image tokens, of which truncation to 2 tokens left 0",
    ),
    "floats left unscaled": (
        lambda i: {"text": "<image>", "images": np.zeros((4, 4, 3)), "do_rescale": False},
        "do_rescale=False does not fit pictures of floats",
    ),
    "floats left unscaled, nested": (
        lambda i: {"text": "<image>", "images": [[torch.zeros(3, 4, 4)]], "images_kwargs": {"do_rescale": False}},
        "do_rescale=False does not fit pictures of floats",
    ),
    "unknown return type": (lambda i: {"text": "red", "return_tensors": "xx"}, "xx"),
}


@pytest.mark.parametrize("kind", WRONG_INPUTS)
def test_wrong_input_is_refused_by_row(kind, processor, image):
    inputs, reason = WRONG_INPUTS[kind]
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        processor(**{"return_tensors": "pt", **inputs(image)})


WRONG_CHATS = {
    "no picture": ([{"type": "image"}], "Row 0 has 1 <image> placeholders and 0 images"),
    "two sources": ([{"type": "image", "image": "a", "url": "b"}], "A content part has images under image and url"),
    "missing file": ([{"type": "image", "path": "nowhere.png"}], "Row 0, image 0: there is no file 'nowhere.png'"),
    "picture None": ([{"type": "image", "image": None}], "Row 0 has 1 <image> placeholders and 0 images"),
    "placeholder in words": ([{"type": "text", "text": "<image>"}], "Row 0 has 1 <image> placeholders and 0 images"),
}


@pytest.mark.parametrize("kind", WRONG_CHATS)
def test_wrong_part_of_a_message_is_refused(kind, processor):
    content, reason = WRONG_CHATS[kind]
    messages = [{"role": "user", "content": content}]
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True)


def test_empty_fields_of_a_part_are_left_out_and_the_users_stay(processor, image):
    content = [{"type": "image", "image": image, "url": None, "text": None}, {"type": "text", "text": "red"}]
    messages = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = processor.apply_chat_template(messages, **options)
    expected = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image}, content[1]]}], **options
    )
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert content[0] == {"type": "image", "image": image, "url": None, "text": None}


def test_rows_with_and_without_images_go_together(processor, image):
    for missing in ([], None, ()):
        batch = processor(images=[[image], missing], text=["<image> red", "red"], padding=True, return_tensors="pt")
        assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [4, 0]
        assert batch["mm_token_type_ids"].sum().item() == 4 and len(batch["pixel_values"]) == 1
    for none in (None, [], [[]], [None, []]):
        images = none if none is None or len(none) < 2 else none
        texts = ["red"] * max(1, len(images or []))
        assert "pixel_values" not in processor(images=images, text=texts, return_tensors="pt")


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_every_kind_of_tensor_is_returned(kind, processor, image):
    batch = processor(images=[image], text=["<image> red"], return_tensors=kind)
    expected = processor(images=[image], text=["<image> red"], return_tensors="pt")
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        found = np.stack([np.asarray(row) for row in batch[name]])
        assert np.array_equal(found, value.numpy()), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer": None}, "needs a tokenizer, got NoneType"),
        ({"image_processor": None}, "needs an image processor, got NoneType"),
        ({"image_seq_length": 0}, "number of placeholders per image, got 0"),
        ({"image_seq_length": -4}, "number of placeholders per image, got -4"),
        ({"image_seq_length": "4"}, "number of placeholders per image, got '4'"),
        ({"image_seq_length": 4.0}, "number of placeholders per image, got 4.0"),
        ({"image_seq_length": True}, "number of placeholders per image, got True"),
        ({"image_token": None}, "image_token is the text of a token, .*got None"),
        ({"image_token": ""}, "image_token is the text of a token, .*got ''"),
        ({"image_token": "<picture>"}, "The tokenizer has no token '<picture>'"),
    ],
)
def test_wrong_part_of_a_processor_is_refused(change, reason, processor):
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "image_seq_length": 4}
    with pytest.raises(ValueError, match=reason):
        HfMoeProcessor(**parts | change)


def test_parts_in_the_wrong_order_are_refused(processor):
    with pytest.raises(ValueError, match="needs a tokenizer, got CLIPImageProcessor"):
        HfMoeProcessor(processor.tokenizer, CLIPImageProcessor())


def test_processor_without_a_length_says_so(processor, image):
    processor.image_seq_length = None
    assert processor(text=["red"])["input_ids"] == [[processor.tokenizer.convert_tokens_to_ids("red")]]
    with pytest.raises(ValueError, match="The processor has no image_seq_length"):
        processor(images=[image], text=["<image>"])


def test_padding_and_cutting_after_an_image_are_fine(processor, image):
    batch = processor(
        images=[image], text=["<image> red red red"], truncation=True, max_length=6, padding="max_length",
        return_tensors="pt",
    )  # fmt: skip
    assert batch["input_ids"].shape == (1, 6)
