"""The main job: fine-tune a multimodal MoE on real images and questions, then load it where hf_moe is not installed.

python scripts/demo.py [--set training.max_steps=300]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from hf_moe.training.recipe import load_recipe
from hf_moe.training.run import run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="runs/demo")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()

    report = run_recipe(load_recipe("easyvqa_demo", args.overrides), args.output_dir)
    checkpoint = Path(args.output_dir) / "checkpoint"
    print(f"\nLoading {checkpoint} in a new process in which hf_moe cannot be imported:", flush=True)
    ask = Path(__file__).with_name("ask_without_hf_moe.py")
    subprocess.run([sys.executable, str(ask), str(checkpoint)], check=True)
    shown = (
        "accuracy",
        "blind_accuracy",
        "accuracy_by_question_type",
        "train_seconds",
        "total_seconds",
        "peak_memory_gib",
        "parameters_total",
        "parameters_active",
    )
    print("\n" + json.dumps({key: report[key] for key in shown}, indent=2))
    print(f"\nThe checkpoint with its card: {checkpoint}/README.md; the report: {args.output_dir}/report.json")


if __name__ == "__main__":
    main()
