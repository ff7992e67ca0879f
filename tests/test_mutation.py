"""Every mechanism has tests that its mutants are tried on, and a mutant computes otherwise."""

import ast
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from hf_moe.adapters.experts import EXPERT_KINDS
from hf_moe.modeling.mechanisms import get_mechanism, mechanism_names
from hf_moe.modeling.registry import KINDS


def load(name: str):
    path = Path(__file__).parents[1] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutants = load("mutants")
mutation = load("mutation")
CODE = '''
"""Doc."""
import math
LIMIT = 4
class Router(Base):
    """Doc."""
    def __init__(self, spec, *, rate: float | None = 0.5):
        super().__init__(spec)
        if rate < 0:
            raise ValueError(f"rate={rate + 1} must be >= 0.")
        self.rate = rate
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Doc."""
        share = x * self.rate / LIMIT
        if self.rate > 0.25 and not self.frozen:
            self.load.zero_()
        for part in self.parts:
            share = share + part
        return torch.stack(share.detach(), renormalise(x)[share], weight=share) if self.rate == 1 else share
'''


def classes() -> dict[str, type]:
    own = {f"{kind}/{name}": get_mechanism(kind, name) for kind in KINDS for name in mechanism_names(kind)}
    own = {key: cls for key, cls in own.items() if cls.__module__.startswith("hf_moe.")}
    return {**own, **{f"adapter_experts/{name}": cls for name, cls in EXPERT_KINDS.items()}}


def test_every_mechanism_has_an_entry_that_leads_to_its_file():
    known = mutation.mechanisms()
    for key, cls in classes().items():
        assert known[key].source == Path(inspect.getsourcefile(cls)), key
    assert all(mechanism.source.is_file() for mechanism in known.values())


def test_the_test_files_of_every_entry_exist():
    for mechanism in mutation.mechanisms().values():
        assert mechanism.tests, mechanism.key
        assert all((mutation.ROOT / test).is_file() for test in mechanism.tests), mechanism.key


@pytest.mark.parametrize("key", mutation.mechanisms())
def test_every_mechanism_has_enough_different_mutants(key):
    source = mutation.mechanisms()[key].source.read_text()
    drawn = [mutant for mutant, _ in zip(mutants.mutants_of(source, "0"), range(12), strict=False)]
    assert len(drawn) >= 5
    trees = {ast.dump(ast.parse(mutant.source)) for mutant in drawn}
    assert len(trees) == len(drawn) and ast.dump(ast.parse(source)) not in trees


def test_mutants_change_what_is_computed_and_nothing_else():
    changes = {(mutant.before, mutant.after) for mutant in mutants.mutants_of(CODE, "0")}
    for change in (
        ("x * self.rate", "((x) / (self.rate))"),  # operators, dropped factors and terms
        ("x * self.rate / LIMIT", "(x * self.rate)"),
        ("self.rate > 0.25", "((self.rate) <= (0.25))"),
        ("self.rate > 0.25", "((self.rate) >= (0.25))"),
        ("not self.frozen", "(self.frozen)"),
        ("0.25", "0.5"),
        ("4", "5"),
        ("self.load.zero_()", "pass"),
        ("share.detach()", "(share)"),  # calls without effect, swapped arguments, dropped ones
        ("renormalise(x)", "(x)"),
        ("renormalise(x)[share]", "(renormalise(x))[share * 0]"),
        (
            "torch.stack(share.detach(), renormalise(x)[share], weight=share)",
            "torch.stack(share.detach(), renormalise(x)[share])",
        ),
        ("self.parts", "list(self.parts)[:1]"),  # the first of several alone
        ("share = x * self.rate / LIMIT", "share = (x * self.rate / LIMIT) * 0 + 1"),
    ):
        assert change in changes, change
    touched = "".join(before for before, _ in changes)
    assert all(text not in touched for text in ("Doc.", "0.5", "must be", "rate + 1", "float", "< 0"))


def test_the_same_seed_draws_the_same_mutants_and_all_lines_before_one_twice():
    first, second = ([mutant.line for mutant in mutants.mutants_of(CODE, "3")] for _ in range(2))
    assert first == second != [mutant.line for mutant in mutants.mutants_of(CODE, "4")]
    lines = len(set(first))
    assert len(set(first[:lines])) == lines
