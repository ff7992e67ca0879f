"""The benchmark of claims about modalities: its arms, its measures, and that it runs and reads what is finished."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    folder = REPOSITORY / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("modality_claims_benchmark", folder / "modality_claims.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_every_claim_compares_arms_that_exist(benchmark):
    named = {arm for claim in benchmark.CLAIMS for arm in claim.needs()}
    bases = {arm.base for arm in benchmark.ARMS.values()} - {None}
    assert named | bases == set(benchmark.ARMS)
    assert all(benchmark.ARMS[base].base is None for base in bases)


def test_the_two_arms_of_a_term_differ_in_it_alone(benchmark):
    for key in ("limoe", "smar"):
        with_it, without = (benchmark.ARMS[name] for name in next(c.arms for c in benchmark.CLAIMS if c.system == key))
        assert (with_it.rows, with_it.base, with_it.parts) == (without.rows, without.base, without.parts)
        terms = with_it.moe["objectives"].keys() - without.moe["objectives"].keys()
        assert terms == ({"local_entropy", "global_entropy"} if key == "limoe" else {"smar"})
        assert {**with_it.moe, "objectives": {}} == {**without.moe, "objectives": {}}


def test_measures_of_a_decision(benchmark):
    shares = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    assert benchmark.effective(shares).tolist() == pytest.approx([4.0, 1.0])
    # 1/2 sum (p - q) log(p / q) = 0.8 log 9 of (0.9, 0.1) and (0.1, 0.9).
    assert benchmark.divergence(torch.tensor([[9.0, 1.0], [2.0, 18.0]])) == pytest.approx(0.8 * 2.19722458, abs=1e-4)


def test_a_claim_is_judged_seed_by_seed(benchmark):
    claim = benchmark.Claim("smar", "less", "loss", ("a", "b"), benchmark.figure("x", "y"), False)
    seeds = [{"a": {"x": {"y": own}}, "b": {"x": {"y": 1.0}}} for own in (0.5, 1.0, 1.005)]
    judged = benchmark.judge(claim, seeds)
    assert (judged["with"], judged["without"], judged["holds"]) == ([0.5, 1.0, 1.005], [1.0] * 3, 1)
    harmless = benchmark.Claim("smar", "no more", "loss", ("a", "b"), benchmark.figure("x", "y"), False, margin=0.01)
    assert benchmark.judge(harmless, seeds)["holds"] == 3
    assert "| `smar` | less | loss | 0.835 (0.500 to 1.005) | 1.000 (1.000 to 1.000) | b | 1 of 3 |" in (
        benchmark.table([judged])
    )


def test_the_band_and_what_is_forgotten(benchmark):
    results = {
        "prose, top_k": {"text_loss": 4.0},
        "smar": {"text_loss": 4.25, "divergence": {"0": 1.0, "1": 1.75, "2": 2.25}},
    }
    assert benchmark.outside(results, "smar") == pytest.approx(0.25)
    assert benchmark.forgotten(results, "smar") == pytest.approx(0.25)


def test_interference_is_what_the_other_rows_cost(benchmark):
    results = {
        "dense": {"image_accuracy": 0.5, "text_loss": 5.0},
        "dense, images alone": {"image_accuracy": 0.75, "text_loss": 9.0},
        "dense, prose alone": {"image_accuracy": 0.0, "text_loss": 4.5},
    }
    assert benchmark.image_interference(results, "dense") == 0.25
    assert benchmark.text_interference(results, "dense") == 0.5


@pytest.mark.slow  # two trainings and their base; the parts have tests of their own
def test_the_benchmark_runs_and_a_second_run_reads_what_is_finished(tmp_path):
    target, runs = tmp_path / "claims.json", tmp_path / "runs"
    command = [sys.executable, "benchmarks/modality_claims.py", "--quick", "--only", "vlmo", "--json", target]
    printed = subprocess.run([*command, "--runs", runs], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    result = json.loads(target.read_text())
    assert set(result["arms"][0]) == {"vlmo, before", "vlmo", "vlmo, all trained"}
    untouched = result["claims"]["vlmo"][0]
    assert untouched["with"] == [0.0] and "| `vlmo` |" in printed.stdout
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("result.json")}
    assert len(before) == 3
    subprocess.run([*command, "--runs", runs], cwd=REPOSITORY, capture_output=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
