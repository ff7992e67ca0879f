"""One suite over all routers, then the properties that each paper promises."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hf_moe.configuration.configuration_hf_moe import MoeConfig
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.moe_layer import ExpertBanks, MoELayer
from hf_moe.modeling.registry import build
from hf_moe.modeling.routing import ExpertAssignment, MoELayerSpec, Router, RoutingContext, RoutingOverrides


HIDDEN, EXPERTS, SLOTS = 32, 8, 2
EAGER = SimpleNamespace(_experts_implementation="eager")

CASES = {
    "top_k": ("top_k", {}, {}),
    "top_k-sigmoid": ("top_k", {"score_function": "sigmoid", "routed_scaling_factor": 2.0}, {}),
    "top_k-one_slot": ("top_k", {}, {"num_experts_per_tok": 1}),
    "top_k-capacity-jitter": ("top_k", {"capacity_factor": 1.0, "jitter_noise": 0.1}, {}),
    "switch_transformer": ("switch_transformer", {}, {"num_experts_per_tok": 1}),
    "deepseekmoe": ("deepseekmoe", {}, {}),
    "deepseek_v3": ("deepseek_v3", {}, {}),
    "deepseek_v3-groups": ("deepseek_v3", {"n_group": 4, "topk_group": 2}, {}),
    "adamoe": ("adamoe", {"num_null_experts": 4}, {"num_experts_per_tok": 4}),
    "ernie45_vl": ("ernie45_vl", {}, {}),
    "ernie45_vl-banks": ("ernie45_vl", {}, {"banks": (("text", 5, 16), ("vision", 3, 8))}),
    "ming_multi_router": ("ming_multi_router", {"init_from_text_gate": False}, {}),
    "ming_multi_router-v2": ("ming_multi_router", {"gate": "sigmoid_bias", "init_from_text_gate": False}, {}),
    "moiie": ("moiie", {}, {}),
    "moiie-next_token": ("moiie", {"boundary_rule": "next_token"}, {}),
}


def make_spec(**kwargs) -> MoELayerSpec:
    fields = {
        "layer_idx": 1,
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": SLOTS,
        "expert_intermediate_size": 16,
    }
    return MoELayerSpec(**{**fields, **kwargs})


def make_router(name: str, options: dict | None = None, spec: MoELayerSpec | None = None) -> Router:
    router = build("router", get_mechanism("router", name), options or {}, spec or make_spec())
    router.initialize(0.2)
    return router.eval()


def make_case(case: str) -> Router:
    name, options, facts = CASES[case]
    return make_router(name, options, make_spec(**facts))


def make_context(rows: int = 3, positions: int = 10, **kwargs) -> RoutingContext:
    """Rows of text with an image in the middle, the first row left-padded."""
    modality = torch.zeros(rows, positions, dtype=torch.long)
    modality[:, 3:7] = 1
    mask = torch.ones(rows, positions, dtype=torch.bool)
    mask[0, :2] = False
    return RoutingContext(**{"modality_ids": modality, "token_mask": mask, **kwargs})


def make_hidden(context: RoutingContext, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(context.token_mask.numel(), width)


def text_context(rows: int, positions: int) -> RoutingContext:
    return RoutingContext.all_text(torch.empty(rows, positions, 1))


def make_experts(spec: MoELayerSpec, std: float = 0.2):
    experts = build("experts", get_mechanism("experts", "ffn"), {}, EAGER, spec)
    experts.initialize(std)
    return experts


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_assignment_has_the_promised_shapes_and_ranges(case, training):
    router, context = make_case(case).train(training), make_context()
    decision = router(make_hidden(context), context)
    tokens, slots = context.token_mask.numel(), router.spec.num_experts_per_tok
    assert isinstance(decision, ExpertAssignment) and decision.num_experts == EXPERTS
    assert decision.expert_index.shape == decision.expert_weight.shape == (tokens, slots)
    assert decision.expert_index.dtype == torch.int64
    assert decision.expert_index.min() >= 0 and decision.expert_index.max() <= EXPERTS
    assert decision.expert_weight.isfinite().all() and (decision.expert_weight >= 0).all()
    assert (decision.expert_weight[decision.expert_index == EXPERTS] == 0).all()
    filled = [row[row < EXPERTS].tolist() for row in decision.expert_index]
    assert all(len(set(row)) == len(row) for row in filled)
    assert decision.router_logits.shape == decision.router_probs.shape
    assert decision.router_logits.shape[0] == tokens and decision.router_logits.shape[1] >= EXPERTS
    torch.testing.assert_close(decision.router_probs.sum(-1), torch.ones(tokens))
    chosen = decision.expert_index.clamp(max=EXPERTS - 1)
    assert decision.router_logits.gather(1, chosen)[decision.expert_index < EXPERTS].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_at_inference_a_row_does_not_depend_on_the_others(case):
    router, context = make_case(case), make_context()
    hidden = make_hidden(context)
    together = router(hidden, context)
    for row in range(3):
        alone = RoutingContext(context.modality_ids[row, None], context.token_mask[row, None])
        decision = router(hidden.view(3, 10, -1)[row], alone)
        assert torch.equal(decision.expert_index, together.expert_index.view(3, 10, -1)[row])
        torch.testing.assert_close(decision.expert_weight, together.expert_weight.view(3, 10, -1)[row])


@pytest.mark.parametrize("case", CASES)
def test_task_loss_reaches_every_gate_parameter_with_finite_gradients(case):
    router, context = make_case(case).train(), make_context()
    experts, hidden = make_experts(make_spec()), make_hidden(context)
    experts(hidden, router(hidden, context)).square().mean().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("case", CASES)
def test_text_only_batch_still_gives_every_gate_a_gradient_tensor(case):
    router, context = make_case(case), text_context(2, 5)
    hidden = make_hidden(context)
    make_experts(make_spec())(hidden, router(hidden, context)).sum().backward()
    assert all(parameter.grad is not None for parameter in router.parameters())


@pytest.mark.parametrize("case", CASES)
def test_logits_stay_float32_and_unchanged_under_bf16_autocast(case):
    router, context = make_case(case), make_context()
    hidden = make_hidden(context)
    expected = router(hidden, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decision = router(hidden, context)
    assert decision.router_logits.dtype == decision.router_probs.dtype == torch.float32
    torch.testing.assert_close(decision.router_logits, expected.router_logits, atol=1e-6, rtol=0)
    assert torch.equal(decision.expert_index, expected.expert_index)


@pytest.mark.parametrize("case", CASES)
def test_bf16_hidden_states_give_float32_logits(case):
    router, context = make_case(case), make_context()
    assert router(make_hidden(context).bfloat16(), context).router_logits.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_fresh_parameters_are_finite_and_not_constant(case):
    name, options, facts = CASES[case]
    router = build("router", get_mechanism("router", name), options, make_spec(**facts))
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 10**9)
    router.initialize(0.02)
    for parameter_name, parameter in router.named_parameters():
        assert parameter.isfinite().all() and parameter.std() > 1e-3, parameter_name
    assert all((buffer == 0).all() for buffer in router.buffers())


@pytest.mark.parametrize("case", CASES)
def test_disabled_experts_are_never_chosen(case):
    router = make_case(case)
    context = make_context(overrides=RoutingOverrides(disabled_experts={1: [0, 5], 0: [1]}))
    decision = router(make_hidden(context), context)
    assert not torch.isin(decision.expert_index, torch.tensor([0, 5])).any()
    assert (decision.expert_index == 1).any()
    assert decision.expert_weight.isfinite().all()


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES.values()}))
def test_more_slots_than_candidates_are_refused(name):
    with pytest.raises(ValueError, match="num_experts_per_tok=17"):
        make_router(name, spec=make_spec(num_experts_per_tok=17))


def test_a_token_with_no_expert_left_gets_empty_slots():
    router = make_router("ernie45_vl")
    context = make_context(overrides=RoutingOverrides(disabled_experts={1: [4, 5, 6, 7]}))
    decision = router(make_hidden(context), context)
    vision = context.modality_ids.reshape(-1) == 1
    assert (decision.expert_index[vision] == EXPERTS).all() and (decision.expert_weight[vision] == 0).all()
    assert (decision.expert_index[~vision] < 4).all()


# top_k


def copy_experts(spec: MoELayerSpec, source: nn.Module):
    experts = build("experts", get_mechanism("experts", "ffn"), {}, EAGER, spec)
    experts.load_state_dict(source.state_dict())
    return experts


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
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_top_k_weights_sum_to_one_unless_told_otherwise():
    context = make_context()
    hidden = make_hidden(context)
    weight = make_router("top_k")(hidden, context).expert_weight
    torch.testing.assert_close(weight.sum(-1), torch.ones(30))
    plain = make_router("top_k", {"norm_topk_prob": False})(hidden, context)
    torch.testing.assert_close(plain.expert_weight, plain.router_probs.topk(SLOTS).values)


def test_top_k_of_one_slot_weighs_by_the_plain_probability():
    context = make_context()
    decision = make_case("top_k-one_slot")(make_hidden(context), context)
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
    with pytest.raises(ValueError, match="score_function='tanh': allowed are 'softmax', 'sigmoid'"):
        make_router("top_k", {"score_function": "tanh"})


def collapsed(router: Router, expert: int = 0) -> Router:
    """Send every token whose first feature is positive to one expert."""
    router.weight.data.zero_()
    router.weight.data[..., expert, 0] = 100.0
    return router


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


def fit(forward, parameters, batch, steps: int, lr: float = 1e-2) -> float:
    """Train with Adam and return the mean loss of the last 20 steps."""
    optimizer, losses = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(steps):
        inputs, targets = batch()
        loss = F.mse_loss(forward(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def moe(router: Router, experts, context: RoutingContext):
    return lambda hidden: experts(hidden, router(hidden, context))


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


def test_switch_refuses_more_than_one_slot():
    with pytest.raises(ValueError, match="num_experts_per_tok=2"):
        make_router("switch_transformer")


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
    layer = randomise(MoELayer(SimpleNamespace(moe_config=moe_config, **vars(EAGER)), make_spec())).train()
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
    torch.testing.assert_close(output, expected.view(-1, HIDDEN), atol=1e-5, rtol=0)


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
    torch.testing.assert_close(output, expected.view(-1, HIDDEN), atol=1e-5, rtol=0)


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
