"""A sample of the fuzz: malformed input is refused by name, or changes nothing."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from outcomes import Case, judge

from hf_moe.configuration import checks


def load_run():
    spec = importlib.util.spec_from_file_location("fuzz_run", Path(__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_run"] = module
    spec.loader.exec_module(module)
    return module


run = load_run()
SAMPLE = 300


@pytest.mark.parametrize("group", list(run.GROUPS))
def test_malformed_input_is_refused_by_name_or_harmless(group):
    outcomes = [(case, judge(case)) for case in run.sample(group, SAMPLE)]
    silent = [str(case) for case, outcome in outcomes if outcome.word == "silent"]
    confusing = [f"{case}: {outcome.detail}" for case, outcome in outcomes if outcome.word == "confusing"]
    assert not silent
    assert len(confusing) <= 0.05 * len(outcomes), confusing


def test_a_library_that_checks_nothing_fails_the_fuzz(monkeypatch):
    monkeypatch.setattr(checks, "fits", lambda value, hint: True)
    words = {judge(case).word for case in run.sample("options", 100)}
    assert {"silent", "confusing"} <= words


def fail(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("result", "sensible", "word"),
    [
        (ValueError("width=-1 must be positive"), False, "clear"),
        (ValueError("'nothing at all' is none"), False, "clear"),
        (ValueError("invalid shape"), False, "confusing"),
        (RuntimeError("width=-1 gives a tensor no memory"), False, "confusing"),
        (ValueError("width=-1 must be positive"), True, "confusing"),
        (torch.ones(2), False, "harmless"),
        (torch.zeros(2), False, "silent"),
        (torch.zeros(2), True, "harmless"),
        (torch.full((2,), torch.nan), True, "silent"),
    ],
)
def test_every_outcome_has_its_word(result, sensible, word):
    case = Case(
        "config",
        "layer.width",
        "nothing at all",
        partial(fail, result) if isinstance(result, Exception) else lambda: result,
        lambda: torch.ones(2),
        sensible,
    )
    assert judge(case).word == word
