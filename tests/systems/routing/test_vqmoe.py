"""VQMoE: a code names the expert, whatever the router does, and a code that nobody uses is revived."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.layers import make_layer, run
from helpers.near import assert_near
from torch.nn import functional as F

from hf_moe import HfMoeForConditionalGeneration, RoutingOverrides
from hf_moe.construction.block_conversion import convert_block
from hf_moe.construction.conversion import convert_router
from hf_moe.construction.in_place import from_host
from hf_moe.modeling.routing_context import RoutingContext


def make_block(**options):
    layer = make_layer(num_shared_experts=1, block={"name": "vqmoe", "num_codes": 20, "contrib_rate": 0.3, **options})
    torch.nn.init.normal_(layer.gate["codes"].codes)
    torch.nn.init.normal_(layer.norm.weight)
    return layer


@pytest.mark.parametrize("distance", ["l2", "cos"])
@pytest.mark.parametrize("discrete_only", [False, True])
def test_the_block_is_its_definition(distance, discrete_only):
    layer, hidden = make_block(distance=distance, discrete_only=discrete_only), torch.randn(1, 60, 16)
    output, context = run(layer, hidden)
    decision = context.decisions[1 if discrete_only else "1.codes"]
    for token, x in enumerate(hidden[0]):
        codes = layer.gate["codes"].codes
        near = -(codes - x).norm(dim=-1) if distance == "l2" else F.cosine_similarity(codes, x[None])
        code = near.argmax()
        gate, up = (layer.experts.gate_up_proj[code % 8] @ layer.norm(0.7 * x + 0.3 * (codes[code] - x))).chunk(2)
        expected = layer.norm(layer.experts.down_proj[code % 8] @ (F.silu(gate) * up))
        if not discrete_only:
            weight, index = (layer.gate["router"].weight @ x).softmax(-1).topk(2)
            units = [(layer.experts.gate_up_proj[i] @ x).chunk(2) for i in index]
            mixed = [layer.experts.down_proj[i] @ (F.silu(g) * u) for i, (g, u) in zip(index, units, strict=True)]
            share = layer.mixing(x).softmax(-1)
            chosen = (weight / weight.sum()) @ torch.stack(mixed)
            expected = share[0] * chosen + share[1] * expected
        assert decision.signals["code"][token] == code and decision.expert_index[token] == code % 8
        torch.testing.assert_close(output[0, token], expected + layer.shared_expert(x), atol=1e-5, rtol=1e-5)
    difference = (layer.gate["codes"].codes[decision.signals["code"]] - hidden[0]).square().mean(-1)
    torch.testing.assert_close(decision.signals["vq_loss"], 1.25 * difference)


def test_gradients_pass_to_the_token_and_not_to_its_code():
    layer, hidden = make_block(discrete_only=True), torch.randn(1, 30, 16, requires_grad=True)
    run(layer, hidden)[0].square().sum().backward()
    assert hidden.grad.any() and layer.gate["codes"].codes.grad is None
    _, context = run(layer, hidden)
    loss, code = (context.decisions[1].signals[name] for name in ("vq_loss", "code"))
    hidden.grad = None
    loss.sum().backward()
    codes = layer.gate["codes"].codes
    step = 2 / 16 * (codes[code] - hidden[0]).detach()
    torch.testing.assert_close(hidden.grad[0], -0.25 * step)
    torch.testing.assert_close(codes.grad, torch.zeros_like(codes).index_add(0, code, step))


@torch.no_grad()
def test_noise_within_the_margin_changes_no_expert_of_a_code():
    layer, hidden = make_block(), torch.randn(1, 400, 16)
    near = torch.cdist(hidden[0], layer.gate["codes"].codes).topk(2, largest=False).values
    noise = F.normalize(torch.randn(400, 16), dim=-1) * 0.49 * (near[:, 1] - near[:, :1].squeeze(1))[:, None]
    before = run(layer, hidden)[1].decisions
    after = run(layer, hidden + noise)[1].decisions
    assert torch.equal(before["1.codes"].expert_index, after["1.codes"].expert_index)
    assert not torch.equal(before[1].expert_index, after[1].expert_index)
    layer.gate["router"].weight.normal_()
    again = run(layer, hidden)[1].decisions
    assert torch.equal(before["1.codes"].expert_index, again["1.codes"].expert_index)
    assert not torch.equal(before[1].expert_index, again[1].expert_index)


def codes_in_use(revive: bool) -> tuple[int, float]:
    """Train 16 codes on 4 clusters; return how many of 2,000 tokens' codes there are, and their purity."""
    layer = make_layer(experts=4, block={"name": "vqmoe", "num_codes": 16, "discrete_only": True, "revive": revive})
    router, centres = layer.gate["codes"], 2 * torch.randn(4, 16)
    optimizer = torch.optim.Adam([router.codes], 1e-2)
    for step in range(301):
        cluster = torch.randint(4, (2000 if step == 300 else 128,))
        hidden = centres[cluster] + 0.5 * torch.randn(len(cluster), 16)
        context = RoutingContext.all_text(hidden[None])
        decision = router(hidden, context)
        optimizer.zero_grad()
        decision.signals["vq_loss"].mean().backward()
        optimizer.step()
        router.accumulate(decision, context)
        router.end_step()
    table = torch.zeros(16, 4).index_put((decision.signals["code"], cluster), torch.ones(()), True)
    return int((table.sum(-1) > 0).sum()), float(table.amax(-1).sum() / 2000)


def test_revival_brings_most_codes_into_use():
    """With this seed 15 of 16 codes, and 4 without; each is of one cluster. Others give 12 to 16."""
    (dead, _), (revived, purity) = codes_in_use(False), codes_in_use(True)
    assert dead <= 6 and revived >= 12 and purity > 0.95


def test_an_unused_code_moves_to_its_nearest_token():
    layer = make_block(discrete_only=True, revive=True, num_codes=8, modalities=["text", "image"]).train()
    router, hidden = layer.gate["codes"], torch.randn(2, 30, 16)
    router.codes.data[3] += 50.0
    before, context = router.codes.detach().clone(), RoutingContext.all_text(hidden)
    context.token_mask[:, :5] = False
    decision = router(hidden.flatten(0, 1), context)
    router.accumulate(decision, context)
    router.end_step()
    real = hidden[:, 5:].flatten(0, 1)
    share = torch.bincount(decision.signals["code"][context.token_mask.flatten()], minlength=16) / 50
    moved = torch.exp(-10 * 8 * share - 1e-3)[:, None]  # after one step of 0.01 share / (1 - 0.99)
    expected = before + moved * (real[torch.cdist(before, real).argmin(-1)] - before)
    torch.testing.assert_close(router.codes[:8].detach(), expected[:8], atol=1e-5, rtol=1e-5)
    assert torch.equal(router.codes[8:].detach(), before[8:]), "no token of this step was an image"
    assert moved[3] > 0.99 and moved.min() < 0.1


@torch.no_grad()
def test_every_modality_reads_its_own_codebook():
    layer = make_block(modalities=["text", "image"])
    hidden = torch.randn(1, 2, 16).expand(2, 2, 16)
    context = RoutingContext.all_text(hidden)
    context.modality_ids = torch.tensor([[0, 0], [1, 2]])
    assert layer.gate["codes"].reads == {"hidden_states", "modality"}
    code = layer.gate["codes"](hidden.flatten(0, 1), context).signals["code"].view(2, 2)
    near = torch.cdist(hidden[0], layer.gate["codes"].codes)
    assert torch.equal(code[0], near[:, :20].argmin(-1)) and torch.equal(code[1], 20 + near[:, 20:].argmin(-1))


@torch.no_grad()
def test_the_discrete_form_keeps_the_weights_and_has_no_gate(tmp_path):
    block = {"name": "vqmoe", "num_codes": 12}
    model = from_host(small_host("llama"), moe_config={"num_experts": 4, "block": block})
    convert_router(model, "top_k", score_function="sigmoid")
    ids = torch.arange(5, 25)[None]
    overrides = RoutingOverrides(disabled_experts={"0.codes": [0, 1]})
    routing = model(input_ids=ids, routing_overrides=overrides, output_routing=True).routing
    assert set(routing.decisions["0.codes"].expert_index.flatten().tolist()) == {2, 3}
    for layer in model.moe_layers().values():  # g_c = 0
        layer.mixing.weight.zero_()
        layer.mixing.bias.copy_(torch.tensor([-100.0, 0.0]))
    expected = model(input_ids=ids).logits
    convert_block(model, {}, discrete_only=True)
    assert [list(layer.gate) for layer in model.moe_layers().values()] == [["codes"]] * 3
    assert_near(model(input_ids=ids).logits, expected, 1e-5)
    model.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert_near(loaded(input_ids=ids).logits, expected, 1e-5)
    with pytest.raises(ValueError, match="no weights that fit gate.router.weight, mixing.bias, mixing.weight of such"):
        convert_block(model, discrete_only=False)
    assert model.config.moe_config.block["discrete_only"]


def test_fewer_codes_than_experts_are_refused():
    with pytest.raises(ValueError, match="num_codes=7 for 8 experts"):
        make_block(num_codes=7)
