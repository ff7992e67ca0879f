"""What the papers promise of the routers that treat all tokens alike."""

import pytest
import torch
from helpers.near import assert_near
from helpers.router_cases import (
    EAGER,
    EXPERTS,
    HIDDEN,
    SLOTS,
    collapsed,
    copy_experts,
    fit,
    make_context,
    make_experts,
    make_hidden,
    make_router,
    make_spec,
    moe,
    randomise,
    text_context,
)
from torch.nn import functional as F
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hf_moe.configuration.configuration_hf_moe import MoeConfig
from hf_moe.modeling.configured_parts import build_block
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.gating import select_experts
from hf_moe.modeling.routing import Router


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# top_k


@pytest.mark.parametrize("options", [{}, {"bias": torch.arange(EXPERTS) % 3}, {"n_group": 2}])
def test_an_open_choice_is_the_one_among_finite_logits(options):
    spec, found = make_spec(), []
    for logits in (None, torch.zeros(6, EXPERTS)):
        scores = torch.linspace(-3, 3, 6 * EXPERTS).sin().view(6, EXPERTS).softmax(-1).requires_grad_()
        index, weight = select_experts(scores, logits, spec, **options)
        (weight * torch.arange(1, SLOTS + 1)).sum().backward()
        found.append((index, weight, scores.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_padding_of_a_mask_that_came_later_is_dropped():
    context = text_context(1, 4)
    assert context.all_real
    context.token_mask = torch.tensor([[True, True, False, True]])
    decision = ExpertAssignment(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), EXPERTS)
    assert context.drop_padding(decision).expert_index.flatten().tolist() == [0, 0, EXPERTS, 0]


@pytest.mark.parametrize("family, norm", [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_top_k_reproduces_the_blocks_of_transformers(family, norm):
    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": SLOTS}
    if family == "mixtral":
        config = MixtralConfig(intermediate_size=16, num_local_experts=EXPERTS, **sizes)
        block = MixtralSparseMoeBlock
    else:
        config = Qwen3MoeConfig(moe_intermediate_size=16, num_experts=EXPERTS, norm_topk_prob=norm, **sizes)
        block = Qwen3MoeSparseMoeBlock
    config._experts_implementation = "eager"
    block = randomise(block(config))
    router = make_router("top_k", {"norm_topk_prob": norm})
    router.load_state_dict(block.gate.state_dict())
    context = make_context()
    hidden = make_hidden(context)
    output = copy_experts(make_spec(), block.experts)(hidden, router(hidden, context))
    expected = block(hidden.view(3, 10, HIDDEN)).view(-1, HIDDEN)
    assert_near(output, expected, 1e-5)


def test_top_k_weights_sum_to_one_unless_told_otherwise():
    context = make_context()
    hidden = make_hidden(context)
    weight = make_router("top_k")(hidden, context).expert_weight
    torch.testing.assert_close(weight.sum(-1), torch.ones(30))
    plain = make_router("top_k", {"norm_topk_prob": False})(hidden, context)
    torch.testing.assert_close(plain.expert_weight, plain.router_probs.topk(SLOTS).values)


def test_top_k_of_one_slot_weighs_by_the_plain_probability():
    context = make_context()
    decision = make_router("top_k", spec=make_spec(num_experts_per_tok=1))(make_hidden(context), context)
    torch.testing.assert_close(decision.expert_weight, decision.router_probs.max(-1, keepdim=True).values)


def test_jitter_changes_training_only():
    router, context = make_router("top_k", {"jitter_noise": 0.1}), make_context()
    hidden = make_hidden(context)
    clean = F.linear(hidden, router.weight)
    torch.testing.assert_close(router(hidden, context).router_logits, clean)
    noisy = router.train()(hidden, context).router_logits
    assert (noisy - clean).abs().max() > 1e-3
    assert (noisy - clean).abs().max() <= 0.1 * (hidden.abs() @ router.weight.abs().T).max() + 1e-5


def test_unknown_score_function_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="score_function='tanh' must be one of 'softmax', 'sigmoid'"):
        make_router("top_k", {"score_function": "tanh"})


@pytest.mark.parametrize("name", ["top_k", "switch_transformer"])
def test_capacity_empties_the_last_positions_of_an_overfull_expert(name):
    spec = make_spec(num_experts=4, num_experts_per_tok=1)
    router = collapsed(make_router(name, {"capacity_factor": 1.0, "jitter_noise": 0.0}, spec)).train()
    context = text_context(2, 10)
    decision = router(make_hidden(context).abs() + 0.1, context)
    index = decision.expert_index.view(2, 10)
    assert (index[:, :3] == 0).all() and (index[:, 3:] == 4).all()  # ceil(10 / 4) = 3
    assert decision.signals["dropped"].sum() == 14
    assert (router.eval()(make_hidden(context).abs() + 0.1, context).expert_index == 0).all()


def test_a_capacity_by_score_admits_the_highest_first():
    spec = make_spec(num_experts_per_tok=1)
    router = make_router("top_k", {"capacity_factor": 2.0, "capacity_order": "score"}, spec).train()
    router.weight.data.zero_()[0, 0] = 1.0
    context = text_context(2, 8)
    hidden = torch.zeros(16, HIDDEN)
    hidden[:, 0] = torch.tensor([1.0, 5, 2, 6, 3, 7, 4, 8]).repeat(2)  # all want expert 0, which has two places
    context.token_mask[1, 7] = False
    admitted = (router(hidden, context).expert_index < EXPERTS).view(2, 8) & context.token_mask
    assert admitted.nonzero().tolist() == [[0, 5], [0, 7], [1, 3], [1, 5]]


def test_capacity_does_not_count_padding():
    spec = make_spec(num_experts=4, num_experts_per_tok=1)
    router = collapsed(make_router("top_k", {"capacity_factor": 1.0}, spec)).train()
    context = text_context(1, 12)
    context.token_mask[:, :4] = False
    index = router(make_hidden(context).abs() + 0.1, context).expert_index[4:, 0]
    assert index.tolist() == [0, 0, 4, 4, 4, 4, 4, 4]  # ceil(8 / 4) = 2


def test_load_statistics_count_choices_that_the_capacity_dropped():
    spec = make_spec(num_experts=4, num_experts_per_tok=1)
    router = collapsed(make_router("top_k", {"capacity_factor": 1.0}, spec)).train()
    context = text_context(1, 10)
    decision = router(make_hidden(context).abs() + 0.1, context)
    counts = decision.slot_counts(torch.zeros(10, dtype=torch.long), 1, context.token_mask.view(-1))
    assert counts.tolist() == [[10, 0, 0, 0]]


def test_top_k_beats_a_dense_ffn_of_equal_active_width_on_clusters():
    width, tokens = 8, 64
    centres, maps = 3 * torch.randn(4, width), torch.randn(4, width, width)
    context = text_context(1, tokens)

    def batch():
        cluster = torch.randint(4, (tokens,))
        noise = torch.randn(tokens, width)
        return centres[cluster] + noise, torch.einsum("td,tde->te", noise, maps[cluster])

    spec = make_spec(hidden_size=width, num_experts=4, num_experts_per_tok=1, expert_intermediate_size=16)
    router, experts = make_router("top_k", spec=spec), make_experts(spec)
    sparse = fit(moe(router, experts, context), [*router.parameters(), *experts.parameters()], batch, 200)
    one = make_experts(make_spec(hidden_size=width, num_experts=1, num_experts_per_tok=1))
    everyone = ExpertAssignment(torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1), 1)
    dense = fit(lambda hidden: one(hidden, everyone), list(one.parameters()), batch, 200)
    assert sparse < 0.9 * dense


# switch_transformer


def test_switch_starts_from_the_scaled_truncated_normal():
    router = make_router("switch_transformer", spec=make_spec(hidden_size=512, num_experts_per_tok=1))
    std = (0.1 / 512) ** 0.5
    assert router.weight.abs().max() <= 2 * std + 1e-6
    assert 0.8 * std < router.weight.std() < 0.95 * std


# deepseekmoe


def test_deepseekmoe_keeps_the_plain_probabilities():
    context = make_context()
    hidden = make_hidden(context)
    decision = make_router("deepseekmoe")(hidden, context)
    torch.testing.assert_close(decision.expert_weight, decision.router_probs.topk(SLOTS).values)
    later = make_router("deepseekmoe", {"norm_topk_prob": True})(hidden, context)
    torch.testing.assert_close(later.expert_weight.sum(-1), torch.ones(30))


def test_fine_grained_experts_cost_what_the_coarse_ones_do():
    coarse = make_experts(make_spec(num_experts=4, num_experts_per_tok=1, expert_intermediate_size=64))
    fine = make_experts(make_spec(num_experts=16, num_experts_per_tok=4, expert_intermediate_size=16))
    total = [sum(parameter.numel() for parameter in experts.parameters()) for experts in (coarse, fine)]
    assert total[0] == total[1]
    assert total[0] * 1 // 4 == total[1] * 4 // 16


def test_shared_branch_serves_every_token_also_those_the_capacity_dropped():
    moe_config = MoeConfig(
        num_experts=EXPERTS,
        num_experts_per_tok=SLOTS,
        num_shared_experts=2,
        router={"name": "top_k", "capacity_factor": 0.5},
    )
    layer = randomise(build_block(EAGER, moe_config, make_spec())).train()
    hidden = torch.randn(2, 10, HIDDEN)
    dropped = layer.gate(hidden.view(20, HIDDEN), text_context(2, 10)).signals["dropped"].view(2, 10) == 1
    assert dropped.any() and not dropped.all()
    shared = layer.shared_expert(hidden)
    torch.testing.assert_close(layer(hidden)[dropped], shared[dropped])
    layer.experts.down_proj.data.zero_()
    torch.testing.assert_close(layer(hidden), shared)


# deepseek_v3


@pytest.mark.parametrize("norm", [True, False])
def test_deepseek_v3_reproduces_the_block_of_transformers(norm):
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=16,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=SLOTS,
        n_group=4,
        topk_group=2,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = "eager"
    block = randomise(DeepseekV3MoE(config))
    block.gate.e_score_correction_bias.normal_(std=0.2)
    options = {"n_group": 4, "topk_group": 2, "norm_topk_prob": norm, "routed_scaling_factor": 2.5}
    router = make_router("deepseek_v3", options)
    missing, unexpected = router.load_state_dict(block.gate.state_dict(), strict=False)
    assert missing == ["load"] and not unexpected
    context = make_context()
    hidden = make_hidden(context)
    output = copy_experts(make_spec(), block.experts)(hidden, router(hidden, context))
    states = hidden.view(3, 10, HIDDEN)
    expected = block(states) - block.shared_experts(states)
    assert_near(output, expected.view(-1, HIDDEN), 1e-5)


@pytest.mark.parametrize("options", [{"n_group": 3}, {"n_group": 2, "topk_group": 3}, {"n_group": 8}])
def test_groups_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="n_group"):
        make_router("deepseek_v3", options)


@pytest.mark.parametrize("rate, balanced", [(0.001, True), (0.0, False)])
def test_bias_balances_a_collapsed_router(rate, balanced):
    router = make_router("deepseek_v3", {"bias_update_rate": rate}).train()
    router.weight.data[:, 0] = 0.0
    router.weight.data[0, 0] = 3.0
    context = text_context(1, 256)
    for _ in range(300):
        hidden = make_hidden(context)
        hidden[:, 0] = 1.0
        with torch.no_grad():
            decision = router(hidden, context)
        router.accumulate(decision, context)
        load = router.load[0].float()
        router.end_step()
    ratio = decision.slot_counts(torch.zeros(256, dtype=torch.long), 1, torch.ones(256, dtype=torch.bool))[0].float()
    ratio = (ratio.max() / ratio.mean()).item()
    assert (ratio < 1.5) if balanced else (ratio > 2.5)
    assert load.sum() == (256 * SLOTS if balanced else 0)
    assert not router.e_score_correction_bias.requires_grad


def test_bias_moves_by_the_sign_of_the_load_of_the_whole_step():
    router, context = make_router("deepseek_v3", {"bias_update_rate": 0.5}), text_context(1, 4)
    for experts in ([0, 1], [0, 2]):
        index = torch.tensor([experts]).expand(4, -1)
        router.accumulate(ExpertAssignment(index, torch.ones(4, 2), EXPERTS), context)
    router.end_step()
    # Loads 8, 4, 4, 0, ... with mean 2.
    assert router.e_score_correction_bias.tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    router.end_step()
    assert router.e_score_correction_bias.tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_bias_ignores_padding():
    router, context = make_router("deepseek_v3"), text_context(1, 4)
    context.token_mask[:, :3] = False
    router.accumulate(ExpertAssignment(torch.tensor([[0], [0], [0], [5]]), torch.ones(4, 1), EXPERTS), context)
    assert router.load[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_bias_moves_the_choice_and_not_the_weight():
    router, context = make_router("deepseek_v3", {"norm_topk_prob": False}), make_context()
    router.e_score_correction_bias[3] = 10.0
    decision = router(make_hidden(context), context)
    assert (decision.expert_index[:, 0] == 3).all()
    torch.testing.assert_close(decision.expert_weight[:, 0], decision.router_logits[:, 3].sigmoid())


def test_bias_stays_float32_in_a_bf16_module():
    router = make_router("deepseek_v3")
    router.e_score_correction_bias.fill_(0.3011)
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert (router.e_score_correction_bias == torch.tensor(0.3011)).all()


# adamoe


def adamoe(**options) -> Router:
    return make_router("adamoe", options, make_spec(num_experts_per_tok=4))


def test_adamoe_true_weights_sum_to_one_where_there_is_one():
    context = make_context()
    decision = adamoe(null_router_init="normal")(make_hidden(context), context)
    true_experts = (decision.expert_index < EXPERTS).sum(-1)
    assert true_experts.min() < true_experts.max()
    torch.testing.assert_close(decision.expert_weight.sum(-1), (true_experts > 0).float())
    assert decision.router_logits.shape == (30, 2 * EXPERTS)


def test_adamoe_token_with_null_picks_only_has_output_zero_and_a_finite_gradient():
    router, context = adamoe(num_null_experts=4), make_context()
    router.null_weight.data.zero_()
    router.null_weight.data[:, 0] = 100.0
    hidden = make_hidden(context)
    hidden[:, 0] = 1.0
    hidden[0, 0] = -1.0
    decision = router(hidden, context)
    output = make_experts(make_spec())(hidden, decision)
    assert (decision.expert_index[1:] == EXPERTS).all()
    assert (output[1:] == 0).all() and output[0].abs().sum() > 0
    output.square().sum().backward()
    assert router.weight.grad.isfinite().all()


def test_adamoe_null_rows_start_as_copies_of_the_true_ones_in_turn():
    router = adamoe(num_null_experts=10)
    assert torch.equal(router.null_weight[:8], router.weight) and torch.equal(
        router.null_weight[8:], router.weight[:2]
    )
    drawn = adamoe(num_null_experts=8, null_router_init="normal")
    assert not torch.equal(drawn.null_weight, drawn.weight)


def test_adamoe_without_null_experts_is_refused():
    with pytest.raises(ValueError, match="num_null_experts=0"):
        adamoe(num_null_experts=0)
