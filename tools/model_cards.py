"""Keeps the cards of the checkpoints that the recipes make in `model_cards/`; the weights stay with the run.

python tools/model_cards.py [NAME ...]

A card is written anew from the report and the checkpoint of the run in `runs/<name>`; where there is none, the recipe
is run first.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.hub.adapter_card import write_adapter_card
from hf_moe.hub.card import write_card
from hf_moe.hub.results import EVALUATION_FILE, check_evaluation
from hf_moe.training.adapter import load_base
from hf_moe.training.recipe import Recipe, load_recipe
from hf_moe.training.run import run_recipe


CARDS = Path(__file__).resolve().parents[1] / "model_cards"
RECIPES = (
    "easyvqa_demo",
    "smollm2_easyvqa",
    "anyexperts_easyvqa",
    "evomoe_easyvqa",
    "moe_llava_easyvqa",
    "smollm2_opposite_tasks",
    "speech_and_sight",
)
PICTURE = "routing.png"


def write(recipe: Recipe, checkpoint: Path, report: dict[str, Any]) -> list[str]:
    """Write the card of a checkpoint and return the files to keep."""
    options = {"report": report, "recipe": report["config"], **recipe.card}
    if recipe.adapter is not None:
        base, _ = load_base(recipe.model)
        write_adapter_card(checkpoint, model=PeftModel.from_pretrained(base, checkpoint), **options)
        return ["README.md", EVALUATION_FILE]
    model = HfMoeForConditionalGeneration.from_pretrained(checkpoint)
    write_card(checkpoint, model=model, pictures=[PICTURE], **options)
    return ["README.md", EVALUATION_FILE, PICTURE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=RECIPES, help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    arguments = parser.parse_args()
    for name in arguments.names:
        recipe = load_recipe(name)
        checkpoint = arguments.runs / recipe.name / "checkpoint"
        if not (checkpoint / "README.md").is_file():
            run_recipe(recipe, checkpoint.parent)
        report = json.loads((checkpoint.parent / "report.json").read_text(encoding="utf-8"))
        kept = write(recipe, checkpoint, report)
        check_evaluation(checkpoint)
        target = CARDS / name
        target.mkdir(exist_ok=True)
        for file in kept:
            shutil.copyfile(checkpoint / file, target / file)
        print(target)


if __name__ == "__main__":
    main()
