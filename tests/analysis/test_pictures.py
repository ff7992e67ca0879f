import pytest
import torch
from PIL import Image

from hf_moe.analysis.drawing import draw_routing
from hf_moe.analysis.routing_statistics import RoutingStatistics


def statistics_of(tables: dict[int, list[list[int]]], tokens: list[int]) -> RoutingStatistics:
    """Return statistics from slot counts (modality, E + 1) by layer."""
    statistics = RoutingStatistics()
    for layer, rows in tables.items():
        rows = rows + [[0] * len(rows[0])] * (4 - len(rows))
        statistics.tables[layer] = torch.tensor(rows)
        statistics.tokens[layer] = torch.tensor(tokens + [0] * (4 - len(tokens)))
    return statistics


def dark_share(path) -> float:
    """Return the share of strongly blue pixels: the cells with most of the slots."""
    image = bytearray(Image.open(path).convert("RGB").tobytes())
    pixels = torch.frombuffer(image, dtype=torch.uint8).view(-1, 3).float()
    return (pixels[:, 2] - pixels[:, 0] > 80).float().mean().item()


def test_the_picture_is_written_and_grows_with_modalities_and_layers(tmp_path):
    text = [[5, 5, 0, 0, 0]]
    one = draw_routing(statistics_of({1: text}, [5]), tmp_path / "pictures" / "one.png")
    both = draw_routing(statistics_of({1: text + text}, [5, 5]), tmp_path / "both.png")
    deep = draw_routing(statistics_of(dict.fromkeys(range(6), text), [5]), tmp_path / "deep.png", title="deep")
    sizes = [Image.open(path).size for path in (one, both, deep)]
    assert one == tmp_path / "pictures" / "one.png"
    assert sizes[1][0] > 1.5 * sizes[0][0]
    assert sizes[2][1] > 1.5 * sizes[0][1]


def test_collapsed_routing_looks_unlike_balanced_routing(tmp_path):
    balanced = draw_routing(statistics_of({0: [[5, 5, 5, 5, 0]]}, [10]), tmp_path / "balanced.png")
    collapsed = draw_routing(statistics_of({0: [[20, 0, 0, 0, 0]]}, [10]), tmp_path / "collapsed.png")
    assert dark_share(balanced) > 2 * dark_share(collapsed)


def test_layers_of_different_width_and_many_experts_are_drawn(tmp_path):
    narrow, wide = [[3, 3, 0]], [[1] * 40 + [0]]
    path = draw_routing(statistics_of({0: narrow, 1: wide}, [6]), tmp_path / "wide.png")
    assert Image.open(path).format == "PNG"


def test_empty_statistics_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="output_routing=True"):
        draw_routing(RoutingStatistics(), tmp_path / "none.png")
    with pytest.raises(ValueError, match="output_routing=True"):
        draw_routing(statistics_of({0: [[0, 0, 0]]}, [0]), tmp_path / "none.png")
