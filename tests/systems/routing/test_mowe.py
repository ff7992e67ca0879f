"""Mixture of word experts: very many small experts, found by the word alone, that remember facts."""

from types import SimpleNamespace

import torch
from helpers.router_cases import make_router, make_spec
from torch.nn import functional as F

from hf_moe import HfMoeConfig, from_system
from hf_moe.construction.token_tables import fit_token_tables
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing_context import RoutingContext


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", **SIZES, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
FACTS, VALUES, WIDTH = 512, 64, 16


def context_of(ids):
    return RoutingContext(torch.zeros_like(ids), torch.ones_like(ids).bool(), ids)


def test_a_word_has_the_same_expert_in_any_sentence_and_no_gate():
    model = from_system("mowe", host=LLAMA)
    fit_token_tables(model, [{"input_ids": torch.randint(1, 64, (4, 50))}])
    first, second = torch.tensor([[3, 4, 20, 21, 5]]), torch.tensor([[9, 8, 7, 20, 21]])
    found = [model(input_ids=ids, output_routing=True).routing.decisions[1].expert_index for ids in (first, second)]
    assert found[0][3] == found[1][4] and len(torch.cat(found).unique()) > 6
    block = model.moe_layers()[1]
    noisy = block.router(torch.randn(5, 16), context_of(first)).expert_index
    assert torch.equal(noisy, found[0]) and not list(block.gate.parameters())


def test_the_variant_of_the_paper_has_its_numbers():
    moe = HfMoeConfig.from_system("mowe", variant="paper").moe_config
    assert (moe.num_experts, moe.router["num_rows"], moe.expert_intermediate_size) == (8192, 2**20, 64)


def test_loads_are_even_on_a_corpus_like_language():
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, 5001) ** 1.1
    counts = torch.bincount(torch.multinomial(share, 50_000, True, generator=generator), minlength=5003).float()
    router = make_router("hash_layers", spec=make_spec(num_experts=64, num_experts_per_tok=1, vocab_size=5000))

    def loads():
        return torch.zeros(64).index_add(0, router.table[0].long(), counts)

    hashed = loads()
    router.fit(counts)
    assert loads().max() <= 4 / 3 * max(counts.max(), loads().mean()) and loads().var() < hashed.var()


def recall(name, steps=100):
    """Return the share of random facts, key -> value, that a layer of 512 small experts knows after training.

    What reaches the layer is a key and what its sentence has left in it.
    """
    torch.manual_seed(0)
    spec = make_spec(hidden_size=WIDTH, num_experts=FACTS, num_experts_per_tok=1, vocab_size=FACTS)
    router = make_router(name, spec=spec).train()
    config = SimpleNamespace(_experts_implementation="batched_mm")
    experts = build("experts", get_mechanism("experts", "ffn"), {}, config, spec)
    experts.initialize(0.2)
    if name == "hash_layers":
        router.fit(torch.ones(router.num_rows))
    keys, head = torch.randn(FACTS, WIDTH), torch.randn(WIDTH, VALUES)
    values, context = torch.randint(VALUES, (FACTS,)), context_of(torch.arange(FACTS)[None])
    optimizer = torch.optim.Adam([*router.parameters(), *experts.parameters()], lr=1e-2)
    for _ in range(steps):
        hidden = keys + torch.randn(FACTS, WIDTH)
        logits = experts(hidden, router(hidden, context)) @ head
        F.cross_entropy(logits, values).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (logits.argmax(-1) == values).float().mean().item()


def test_word_experts_recall_more_facts_than_learned_routing():
    found = recall("hash_layers"), recall("top_k")
    assert found[0] > found[1] + 0.3
