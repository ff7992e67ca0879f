"""The cards in `model_cards/` state only what was measured, and say how to make the checkpoint."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_moe.configuration.systems import recipe_names
from hf_moe.hub.results import check_evaluation, read_evaluation


FOLDERS = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "model_cards").glob("*/README.md"))


def test_every_recipe_has_its_card():
    assert {folder.name for folder in FOLDERS} == set(recipe_names())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_number_of_a_card_has_its_file(folder):
    check_evaluation(folder)
    card = ModelCard.load(folder / "README.md")
    accuracy = read_evaluation(folder)["accuracy"]
    assert f"| all | {accuracy:.4f} |" in card.text
    assert card.data.eval_results[0].metric_value == accuracy
    pictures = re.findall(r"!\[[^\]]*\]\((.+?)\)", card.text)
    assert pictures or card.data.library_name == "peft"
    assert all((folder / picture).is_file() for picture in pictures)
