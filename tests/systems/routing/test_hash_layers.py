"""Hash layers: experts by the id of a token, in a table that data balance."""

import torch
from helpers.router_cases import make_router, make_spec

from hf_moe.modeling.routing_context import RoutingContext


WORDS, EXPERTS = 2000, 8
SPEC = {"num_experts": EXPERTS, "num_experts_per_tok": 1, "vocab_size": WORDS}


def router_of(**options):
    return make_router("hash_layers", options, make_spec(**SPEC))


def of_ids(ids, mask=None, **inputs):
    mask = torch.ones_like(ids).bool() if mask is None else mask
    return RoutingContext(torch.zeros_like(ids), mask, ids, inputs=inputs)


def test_a_token_has_the_same_expert_everywhere_and_no_parameters():
    router, ids = router_of(), torch.tensor([[5, 9, 5, 7], [7, 5, 9, 5]])
    chosen = [router(torch.randn(8, 32), of_ids(ids)).expert_index.view(2, 4) for _ in range(2)]
    assert torch.equal(*chosen) and len(set(chosen[0][ids == 5].tolist())) == 1 and not list(router.parameters())
    assert len(router.table.unique()) == EXPERTS and (router(torch.randn(8, 32), of_ids(ids)).expert_weight == 1).all()


def test_a_fitted_table_is_balanced_and_a_random_one_is_not():
    counts = (1e6 / torch.arange(1, WORDS + 4) ** 0.9).floor()
    router = router_of()

    def imbalance():
        load = torch.zeros(EXPERTS).index_add(0, router.table[0].long(), counts)
        return load.max() / load.mean()

    assert imbalance() > 1.2
    router.fit(counts)
    assert imbalance() < 1.05
    rare = counts.masked_fill(torch.arange(WORDS + 3) >= 1000, 0)
    router.fit(rare)
    assert router.table[0, 1000:].bincount(minlength=EXPERTS).min() > 50, "rows that were not seen are spread as well"


def test_several_hashes_choose_in_groups_and_apart():
    router = make_router("hash_layers", spec=make_spec(**{**SPEC, "num_experts_per_tok": 2}))
    router.fit(torch.ones(WORDS + 3))
    first, second = router.table
    assert first.max() < 4 <= second.min() and len((first * 8 + second).unique()) == 16


def test_previous_ids_stop_at_padding_and_documents():
    ids, mask = torch.tensor([[0, 4, 4, 6], [1, 2, 3, 4]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    rows = router_of(hash_of="previous").text_rows(of_ids(ids, mask))
    assert rows.tolist() == [[1999, 1999, 4, 4], [1999, 1, 2, 3]]
    packed = of_ids(ids[1:], position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert router_of(hash_of="previous").text_rows(packed).tolist() == [[1999, 1, 1999, 3]]
    pairs = router_of(hash_of="bigram").text_rows(of_ids(torch.tensor([[4, 6, 4, 6, 5, 6, 4]])))[0].tolist()
    assert pairs[1] == pairs[3] != pairs[5] and pairs[2] == pairs[6] != pairs[4]
