"""What the page shows is what the routers did, and what it opens is what was uploaded."""

import base64
import io
import re

import gradio
import numpy as np
import pytest
import torch
from helpers.hub.checkpoints import tiny_processor
from helpers.hub.open_checkpoint import sample_image
from PIL import Image

from hf_moe.hub.space_app import open_uploads
from hf_moe.hub.space_checkpoint import Checkpoint, Trace, expert_weights, moments, patch_grid
from hf_moe.hub.space_drawings import draw
from hf_moe.modeling.decisions import ExpertAssignment, ParameterMixture, SlotMixture


def reader(processor) -> Checkpoint:
    """Return a checkpoint that has a processor and no model."""
    checkpoint = object.__new__(Checkpoint)
    checkpoint.processor = processor
    return checkpoint


def sample_bytes() -> bytes:
    buffer = io.BytesIO()
    sample_image().save(buffer, "PNG")
    return buffer.getvalue()


def test_an_upload_is_opened_as_the_processor_opens_it(tmp_path):
    checkpoint = reader(tiny_processor())
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save(tmp_path / "a.png", exif=rotated)
    Image.fromarray(np.full((4, 8), 40000, dtype=np.uint16)).save(tmp_path / "b.png")
    for name, colour, size in (("a.png", 255, (4, 8)), ("b.png", 156, (8, 4))):
        opened = open_uploads(checkpoint, {"image": {"path": str(tmp_path / name)}})["image"]
        assert opened.size == size and opened.getcolors() == [(32, (colour,) * 3)]
        assert opened == checkpoint.processor.open_image(tmp_path / name)


def test_an_upload_is_a_file_of_this_machine_never_an_address():
    checkpoint = reader(tiny_processor())
    content = base64.b64encode(sample_bytes()).decode()
    assert checkpoint.processor.open_image(f"data:image/png;base64,{content}").size == (16, 16)
    for kind, message in (("video", "a video"), ("audio", "a sound")):
        with pytest.raises(gradio.Error, match=f"cannot be read as {message}"):
            open_uploads(checkpoint, {kind: {"path": "https://example.org/file"}})
    with pytest.raises(gradio.Error, match="cannot be read as a picture"):
        open_uploads(checkpoint, {"image": {"path": f"data:image/png;base64,{content}"}})


def test_every_kind_of_decision_tells_the_weight_of_each_expert_in_each_token():
    assigned = ExpertAssignment(torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.6, 0.4], [1.0, 0.0]]), num_experts=3)
    assert expert_weights(assigned).tolist() == torch.tensor([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]).tolist()
    combine = torch.arange(12.0).view(1, 2, 6)  # 3 experts of 2 slots
    mixed = SlotMixture(dispatch=combine, combine=combine, num_experts=3)
    assert expert_weights(mixed).tolist() == [[1, 5, 9], [13, 17, 21]]
    merged = ParameterMixture(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([1, 0, 0]), num_experts=2)
    assert expert_weights(merged).tolist() == [[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]


SQUARE, TILES = torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 3, 8, 8)


@pytest.mark.parametrize(
    ("patches", "inputs", "grid"),
    [
        (16, {"pixel_values": SQUARE}, (4, 4)),
        (6, {"spatial_shapes": torch.tensor([[2, 3]])}, (2, 3)),
        (5, {"pixel_values": SQUARE}, None),
        (0, {}, None),
        # Four patches become one token.
        (6, {"image_grid_thw": torch.tensor([[1, 4, 6]])}, (2, 3)),
        (16, {"pixel_values": TILES}, None),
    ],
)
def test_patches_lie_on_the_grid_of_their_image(patches, inputs, grid):
    assert patch_grid(patches, inputs) == grid


def test_a_video_lies_on_its_moments_and_a_sound_on_its_tokens():
    modality = [0, 2, 2, 2, 2, 3, 3, 3]
    assert moments(modality, {"video_grid_thw": torch.tensor([[2, 4, 4]])}) == {2: 2, 3: 3}
    assert moments(modality, {}) == {2: 4, 3: 3}
    assert moments([0, 1], {}) == {}


def test_a_video_is_drawn_moment_by_moment():
    weights = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.25, 0.75], [0.0, 0.0]])
    trace = Trace(["a"] * 5, [0, 2, 2, 2, 2], 5, {0: weights}, None, None, {2: 2})
    drawn, _, shares = draw(trace, 0, 1)
    cells = re.findall(r'<rect x="(\d)" y="(\d)".*?fill-opacity="([\d.]+)"', drawn)
    assert cells == [("0", "0", "0.450"), ("0", "1", "0.000"), ("1", "0", "0.675"), ("1", "1", "0.000")]
    assert "Expert 1 works on 50% of the 4 tokens" in drawn
    assert "<span>video</span>" in shares and "without a picture" not in drawn
