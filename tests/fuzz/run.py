"""Gives malformed input to every reader of it, and prints what became of it.

python tests/fuzz/run.py --all
python tests/fuzz/run.py --group options --show confusing silent
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parent))

from config_cases import config_cases, option_cases, override_cases  # noqa: E402
from input_cases import input_cases, recipe_cases  # noqa: E402
from outcomes import Case, Outcome, judge  # noqa: E402
from reader_cases import adapter_cases, file_cases, row_cases  # noqa: E402


WORDS = ("clear", "harmless", "confusing", "silent")
GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "config": config_cases,
    "options": option_cases,
    "overrides": override_cases,
    "adapters": adapter_cases,
    "rows": row_cases,
    "files": file_cases,
    "recipes": recipe_cases,
    "inputs": input_cases,
}


def sample(group: str, size: int, seed: int = 0) -> list[Case]:
    """Return some cases of a group, others for every seed."""
    cases = list(GROUPS[group]())
    return random.Random(seed).sample(cases, min(size, len(cases)))


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Return the shares of a run, one line per group."""
    lines = [f"| group | cases | {' | '.join(WORDS)} | clear or harmless |", "|---" * 7 + "|"]
    for group, found in outcomes.items():
        counts = Counter(outcome.word for outcome in found)
        good = (counts["clear"] + counts["harmless"]) / len(found)
        lines.append(f"| {group} | {len(found)} | {' | '.join(str(counts[word]) for word in WORDS)} | {good:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all cases; 100 of each group otherwise")
    parser.add_argument("--group", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--show", nargs="*", choices=WORDS, default=["confusing", "silent"], help="cases to list")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="file to write the table to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    outcomes: dict[str, list[Outcome]] = {}
    for group in args.group:
        for case in GROUPS[group]() if args.all else sample(group, 100, args.seed):
            outcome = judge(case)
            outcomes.setdefault(group, []).append(outcome)
            if outcome.word in args.show:
                print(f"{outcome.word:9} {case}\n          {' '.join(outcome.detail.split())[:200]}", flush=True)
    text = table(outcomes)
    print(text)
    if args.table is not None:
        args.table.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
