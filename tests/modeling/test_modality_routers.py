"""What the papers promise of the routers that tell modalities apart."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import (
    EXPERTS,
    HIDDEN,
    SLOTS,
    copy_experts,
    fit,
    make_context,
    make_experts,
    make_hidden,
    make_router,
    make_spec,
    moe,
    randomise,
)
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock

from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.expert_banks import ExpertBanks
from hf_moe.modeling.overrides import RoutingOverrides
from hf_moe.modeling.routing_context import RoutingContext


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ernie45_vl


def test_ernie45_vl_reproduces_the_block_of_transformers():
    config = Ernie4_5_VLMoeTextConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=[16, 8],
        moe_num_experts=4,
        moe_k=SLOTS,
        moe_num_shared_experts=0,
    )
    config._experts_implementation = "eager"
    block = randomise(Ernie4_5_VLMoeMoeBlock(config))
    router = make_router("ernie45_vl", spec=make_spec(banks=(("text", 4, 16), ("vision", 4, 8))))
    halves = (block.text_moe, block.vision_moe)
    router.weight.data = torch.cat([half.gate.weight.data for half in halves])
    router.e_score_correction_bias = torch.cat(
        [half.gate.moe_statics.e_score_correction_bias.data[0] for half in halves]
    )
    banks = {
        name: copy_experts(make_spec(num_experts=4, expert_intermediate_size=width), half.experts)
        for name, width, half in zip(("text", "vision"), (16, 8), halves, strict=True)
    }
    context = make_context()
    hidden = make_hidden(context)
    output = ExpertBanks(banks, [4, 4])(hidden, router(hidden, context))
    expected, _ = block(hidden.view(3, 10, HIDDEN), context.modality_ids)
    assert_near(output, expected.view(-1, HIDDEN), 1e-5)


@pytest.mark.parametrize("changed, kept", [(slice(4, 8), 0), (slice(0, 4), 1)])
def test_ernie45_vl_experts_of_one_modality_never_touch_the_other(changed, kept):
    router, experts, context = make_router("ernie45_vl"), make_experts(make_spec()), make_context()
    hidden = make_hidden(context)
    before = experts(hidden, router(hidden, context))
    experts.down_proj.data[changed] += 1.0
    router.weight.data[changed] += 1.0
    after = experts(hidden, router(hidden, context))
    same = context.modality_ids.reshape(-1) == kept
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


def test_ernie45_vl_boundary_tokens_count_as_vision():
    router = make_router("ernie45_vl", {"boundary_token_ids": [50, 51]})
    input_ids = torch.tensor([[1, 50, 9, 9, 51, 2]])
    modality = torch.tensor([[0, 0, 1, 2, 0, 0]])
    context = RoutingContext(modality, torch.ones_like(modality, dtype=torch.bool), input_ids=input_ids)
    assert router(make_hidden(context), context).gate_index.tolist() == [0, 1, 1, 1, 1, 0]
    context.input_ids = None
    with pytest.raises(ValueError, match="pass input_ids"):
        router(make_hidden(context), context)


@pytest.mark.parametrize(
    "facts",
    [
        {"banks": (("text", 8, 16),)},
        {"banks": (("text", 7, 16), ("vision", 1, 16))},
        {"num_experts": 3},
    ],
)
def test_ernie45_vl_refuses_banks_that_do_not_fit(facts):
    with pytest.raises(ValueError, match="two banks, text and vision"):
        make_router("ernie45_vl", spec=make_spec(**facts))


def test_ernie45_vl_balances_each_bank_by_its_own_mean():
    router, context = make_router("ernie45_vl", {"bias_update_rate": 1.0}), make_context(rows=1)
    context.token_mask[:] = True
    index = torch.tensor([0] * 3 + [4] * 4 + [1] * 3)[:, None]
    gate = context.modality_ids.reshape(-1)
    router.accumulate(ExpertAssignment(index, torch.ones(10, 1), EXPERTS, gate_index=gate), context)
    router.end_step()
    # Text loads 3, 3, 0, 0 with mean 1.5; vision loads 4, 0, 0, 0 with mean 1.
    assert router.e_score_correction_bias.tolist() == [-1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0]


def test_ernie45_vl_gives_empty_slots_where_no_expert_is_left():
    router = make_router("ernie45_vl")
    context = make_context(overrides=RoutingOverrides(disabled_experts={1: [4, 5, 6, 7]}))
    decision = router(make_hidden(context), context)
    vision = context.modality_ids.reshape(-1) == 1
    assert (decision.expert_index[vision] == EXPERTS).all() and (decision.expert_weight[vision] == 0).all()
    assert (decision.expert_index[~vision] < 4).all()


# ming_multi_router


@pytest.mark.parametrize(
    "gate, twin, options", [("softmax", "top_k", {}), ("sigmoid_bias", "deepseek_v3", {"n_group": 2})]
)
def test_ming_with_copied_gates_is_the_single_router_model(gate, twin, options):
    multi, single = make_router("ming_multi_router", {"gate": gate, **options}), make_router(twin, options)
    single.weight.data = multi.weight.data[0].clone()
    context = make_context()
    hidden = make_hidden(context)
    decision, expected = multi(hidden, context), single(hidden, context)
    assert torch.equal(decision.expert_index, expected.expert_index)
    torch.testing.assert_close(decision.expert_weight, expected.expert_weight)


def test_ming_video_shares_the_image_gate_and_unnamed_modalities_the_text_gate():
    modality = torch.tensor([[0, 1, 2, 3]])
    context = RoutingContext(modality, torch.ones_like(modality, dtype=torch.bool))
    hidden = make_hidden(context)
    assert make_router("ming_multi_router")(hidden, context).gate_index.tolist() == [0, 1, 1, 2]
    two = make_router("ming_multi_router", {"modalities": ["text", "image"]})
    assert two.weight.shape[0] == 2 and two(hidden, context).gate_index.tolist() == [0, 1, 1, 0]
    own = make_router("ming_multi_router", {"modalities": ["text", "image", "video"]})
    assert own(hidden, context).gate_index.tolist() == [0, 1, 2, 0]


def test_ming_balances_every_gate_by_itself():
    router = make_router("ming_multi_router", {"gate": "sigmoid_bias", "bias_update_rate": 1.0})
    context = make_context(rows=1)
    context.token_mask[:] = True
    gate = context.modality_ids.reshape(-1)
    index = torch.where(gate == 1, 2, 0)[:, None]
    router.accumulate(ExpertAssignment(index, torch.ones(10, 1), EXPERTS, gate_index=gate), context)
    router.end_step()
    bias = router.e_score_correction_bias
    assert bias[0].tolist() == [-1.0] + [1.0] * 7
    assert bias[1].tolist() == [1.0, 1.0, -1.0] + [1.0] * 5
    assert (bias[2] == 0).all()


def test_ming_with_softmax_gates_has_no_bias_that_moves():
    router, context = make_router("ming_multi_router", {"bias_update_rate": 1.0}), make_context()
    router.accumulate(router(make_hidden(context), context), context)
    router.end_step()
    assert (router.e_score_correction_bias == 0).all() and (router.load == 0).all()


def test_ming_gates_start_as_copies_of_one_unless_told_otherwise():
    router = make_router("ming_multi_router", spec=make_spec(hidden_size=256))
    assert (router.weight == router.weight[:1]).all() and abs(router.weight.mean()) < 0.02
    assert 0.18 < router.weight.std() < 0.22
    own = make_router("ming_multi_router", {"init_from_text_gate": False}).weight
    assert torch.cdist(own.flatten(1), own.flatten(1)).fill_diagonal_(9).min() > 1


@pytest.mark.parametrize("options", [{"modalities": ["image", "text"]}, {"modalities": ["text", "smell"]}])
def test_ming_refuses_modalities_it_does_not_know_or_that_do_not_begin_with_text(options):
    with pytest.raises(ValueError, match="modalities"):
        make_router("ming_multi_router", options)


def test_ming_tells_equal_tokens_of_two_modalities_apart_and_a_single_router_cannot():
    width, tokens = 8, 32
    modality = torch.arange(tokens)[None] % 2
    context = RoutingContext(modality, torch.ones_like(modality, dtype=torch.bool))
    spec = make_spec(hidden_size=width, num_experts=4)
    targets = torch.randn(2, width)
    # Without the modality the best answer is the mean of both targets.
    floor = ((targets[0] - targets[1]) / 2).square().mean().item()

    def batch():
        return 1 + 0.3 * torch.randn(tokens // 2, width).repeat_interleave(2, dim=0), targets[modality[0]]

    losses = {}
    for name in ("ming_multi_router", "top_k"):
        router, experts = make_router(name, spec=spec), make_experts(spec)
        losses[name] = fit(moe(router, experts, context), [*router.parameters(), *experts.parameters()], batch, 200)
    assert losses["ming_multi_router"] < 0.5 * floor
    assert losses["top_k"] > 0.95 * floor


# moiie


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_moiie_never_crosses_modalities_and_shares_the_inter_experts(scale):
    router = make_router("moiie")
    router.weight.data.mul_(scale)
    context = make_context(rows=8)
    index = router(make_hidden(context), context).expert_index
    vision = context.modality_ids.reshape(-1) == 1
    assert (index[vision] < 6).all() and (index[~vision] >= 2).all() and (index[~vision] < 8).all()
    shared = torch.arange(2, 6)
    assert torch.isin(shared, index[vision]).any() and torch.isin(shared, index[~vision]).any()


def test_moiie_with_inter_experts_only_and_tied_gates_is_top_k():
    router, single = make_router("moiie", {"group_fractions": [0, 1, 0]}), make_router("top_k")
    router.weight.data[:] = single.weight.data
    context = make_context()
    hidden = make_hidden(context)
    decision, expected = router(hidden, context), single(hidden, context)
    assert torch.equal(decision.expert_index, expected.expert_index)
    torch.testing.assert_close(decision.expert_weight, expected.expert_weight)


def test_moiie_boundary_rule_sends_the_last_patch_of_a_run_to_the_text_gate():
    modality = torch.tensor([[0, 1, 1, 0, 2, 2, 1], [1, 0, 0, 0, 0, 0, 3]])
    context = RoutingContext(modality, torch.ones_like(modality, dtype=torch.bool))
    hidden = make_hidden(context)
    plain = make_router("moiie")(hidden, context).gate_index.view(2, 7)
    assert plain.tolist() == [[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]]
    ahead = make_router("moiie", {"boundary_rule": "next_token"})(hidden, context).gate_index.view(2, 7)
    assert ahead.tolist() == [[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "fractions, experts", [([0.25, 0.5, 0.25], 6), ([0.5, 0.5], 8), ([0.5, 0.5, 0.5], 8), ([-0.25, 1.0, 0.25], 8)]
)
def test_moiie_refuses_fractions_that_do_not_split_the_experts(fractions, experts):
    with pytest.raises(ValueError, match="group_fractions"):
        make_router("moiie", {"group_fractions": fractions}, make_spec(num_experts=experts))


def test_moiie_refuses_more_slots_than_a_token_sees():
    with pytest.raises(ValueError, match=r"num_experts_per_tok=7 must lie in \[1, 6\]"):
        make_router("moiie", spec=make_spec(num_experts_per_tok=7))


@pytest.mark.parametrize(("share", "experts"), [(True, [0, 1, 1, 0]), (False, [0, 1, 2, 2])])
def test_modalities_without_an_expert_share_one_or_have_none(share, experts):
    router = make_router("modality", {"share": share}, make_spec(num_experts=2))
    context = RoutingContext(torch.arange(4)[None], torch.ones(1, 4).bool())
    decision = router(make_hidden(context), context)
    assert decision.expert_index[:, 0].tolist() == experts
    assert decision.expert_weight[:, 0].tolist() == [float(expert < 2) for expert in experts]
