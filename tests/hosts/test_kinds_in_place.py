"""What changes attention or whole layers of a host keeps its positions and its cache: every kind on four hosts."""

import json
from functools import cache

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.hosts.native import SPECIAL
from helpers.hosts.open_hosts import EXACT, REFERENCE
from helpers.hosts.small import fields_of, small_host
from helpers.mechanisms import CASES, name_of
from helpers.near import assert_near
from helpers.programs import last_line, start

from hf_moe import HfMoeForConditionalGeneration
from hf_moe.modeling.replacement import Replacement


NAMES = ("llama", "qwen3", "gemma3", "qwen3_vl")
# Kinds that compute something else than their host from the start, and are made from its config here.
CHANGE = {
    "mae_attentive_experts": "a fresh gate weighs the heads",
    "mixture_of_depths": "tokens skip layers",
    "moa_attention_heads": "the heads are fresh",
    "parallel_block": "the feed-forward reads something else",
    "uoe": "a token uses some of the heads",
}
# Kinds of other hosts, such as those with a Mamba, have tests of their own.
KINDS = [(kind, key) for kind in ("attention", "layer") for key, case in CASES[kind].items() if case.host == "llama"]
# One variant of every kind in the fast tests.
FIRST = {name_of(key): key for _, key in reversed(KINDS)}
WAYS = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
}
PAIRS = [
    pytest.param(host, kind, key, id=f"{key} {host}", marks=[] if FIRST[name_of(key)] == key else pytest.mark.slow)
    for kind, key in KINDS
    for host in NAMES
]


def sizes_of(kind, key) -> dict:
    """Return what a kind needs of the decoder's config."""
    needed = {name: value for name, value in CASES[kind][key].text.items() if name == "num_key_value_heads"}
    return {"num_hidden_layers": 2, **needed}


def build(host, kind, key) -> HfMoeForConditionalGeneration:
    case, sizes = CASES[kind][key], sizes_of(kind, key)
    moe = {"layers": [], "num_experts": 4, **case.moe, kind: {"name": name_of(key), **case.options}}
    source = fields_of(host, **sizes) if name_of(key) in CHANGE else small_host(host, **sizes)
    return HfMoeForConditionalGeneration.from_host(source, moe_config=moe).eval()


@cache
def drifted(host, kind, key) -> HfMoeForConditionalGeneration:
    """Return a model in which what a token uses shows in the logits, as after training."""
    model, generator = build(host, kind, key), torch.Generator().manual_seed(1)
    parts = [model] if name_of(key) in CHANGE else [part for part in model.modules() if isinstance(part, Replacement)]
    for parameter in dict.fromkeys(parameter for part in parts for parameter in part.parameters()):
        with torch.no_grad():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.15
    return model


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def answer(model, inputs, **way):
    # A host refuses placeholders that it has generated itself when it reads them again, without a cache.
    options = {**EXACT, "suppress_tokens": SPECIAL, "return_dict_in_generate": True}
    return model.generate(**inputs, **options, output_logits=True, output_scores=True, **way)


@pytest.mark.parametrize("host, kind, key", [pair for pair in PAIRS if name_of(pair.values[2]) not in CHANGE])
def test_it_starts_as_its_host(host, kind, key):
    inputs = HOSTS[host].inputs()
    expected = logits_of(small_host(host, **sizes_of(kind, key)), inputs)
    assert_near(logits_of(build(host, kind, key), inputs), expected, 1e-5)
    assert (logits_of(drifted(host, kind, key), inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host, kind, key", PAIRS)
def test_cached_decoding_equals_uncached(host, kind, key, way):
    model, inputs = drifted(host, kind, key), HOSTS[host].inputs()
    uncached = {name: value for name, value in WAYS[way].items() if name == "num_beams"}
    expected, found = answer(model, inputs, use_cache=False, **uncached), answer(model, inputs, **WAYS[way])
    assert torch.equal(found.sequences, expected.sequences)
    if uncached:
        assert_near(found.sequences_scores, expected.sequences_scores, 1e-4)
    else:
        assert_near(found.logits, expected.logits, 1e-4)


@pytest.mark.parametrize(
    "shift", [0, *(pytest.param(shift, marks=pytest.mark.slow) for shift in range(1, len(NAMES)))]
)
def test_it_opens_where_the_package_is_not(shift, tmp_path):
    """Every kind on one host, and in slow tests on the others."""
    for number, key in enumerate(FIRST.values()):
        kind, host = next(kind for kind, own in KINDS if own == key), NAMES[(number + shift) % len(NAMES)]
        model, inputs, folder = drifted(host, kind, key), HOSTS[host].inputs(), tmp_path / key
        model.save_pretrained(folder)
        with torch.no_grad():
            logits = model(**inputs).logits
        reference = {"inputs": inputs, "logits": logits, "ids": model.generate(**inputs, **EXACT)}
        torch.save(reference, folder / REFERENCE)
    folders = [tmp_path / key for key in FIRST.values()]
    found = json.loads(last_line(start("hosts.open_hosts", "remote", *folders, HF_MODULES_CACHE=str(tmp_path / "m"))))
    assert len(found) == len(FIRST)
    for key, item in found.items():
        assert max(item["differences"].values()) < 1e-5 and item["ids_equal"] and item["again"] < 1e-5, key
