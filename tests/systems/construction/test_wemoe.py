"""WEMoE: a pretrained model and its fine-tuned copies, merged anew for every sequence."""

import copy

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.near import assert_near
from helpers.router_cases import make_experts, make_router, make_spec, text_context
from torch.distributions import Categorical
from transformers import Trainer, TrainingArguments

from hf_moe.analysis.routing_statistics import RoutingStatistics
from hf_moe.construction.weight_ensembles import from_fine_tuned
from hf_moe.modeling.decisions import ParameterMixture
from hf_moe.training.entropy import prediction_entropy
from hf_moe.training.parts import train_only


IDS = torch.arange(4, 28).view(2, 12)


@torch.no_grad()
def models(copies=2):
    """Return a base, copies of it that have moved apart, and task arithmetic of them by scale."""
    base, tuned = small_host("llama"), [small_host("llama") for _ in range(copies)]
    for number, one in enumerate(tuned):
        torch.manual_seed(number)
        for parameter in one.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    def merged(scale):
        model = copy.deepcopy(base)
        for weight, *others in zip(model.parameters(), *(one.parameters() for one in tuned), strict=True):
            weight += scale * sum(other - weight for other in others)
        return model

    return base, tuned, merged


@torch.no_grad()
def test_it_starts_as_task_arithmetic():
    base, tuned, merged = models()
    for layers in ("all", [1]):
        model = from_fine_tuned(base, tuned, layers=layers, router={"init_lambda": 0.3})
        for layer in model.moe_layers().values():
            layer.router.output.weight.zero_()
        assert_near(model(input_ids=IDS).logits, merged(0.3)(input_ids=IDS).logits, 1e-5)


@torch.no_grad()
def test_a_gate_of_one_copy_is_that_copys_feed_forward():
    base, tuned, _ = models()
    model, hidden = from_fine_tuned(base, tuned, router={"router_hidden_layers": 0}), torch.randn(2, 6, 32)
    layer = model.moe_layers()[1]
    for number, one in enumerate(tuned):
        layer.router.constant.copy_(torch.eye(2)[number])
        assert_near(layer(hidden), one.get_submodule("model.layers.1.mlp")(hidden), 1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_the_weights_are_the_mean_of_the_gate(layers):
    router = make_router(
        "wemoe", {"router_hidden_layers": layers, "block_size": None}, make_spec(num_experts_per_tok=8)
    )
    assert (router.output.weight.std() < 0.02) and (router.output.bias == 0.2).all()
    for parameter in router.parameters():
        parameter.normal_()
    hidden, order = torch.randn(12, 32), torch.randperm(6)
    made = router(hidden, text_context(2, 6))
    inner = hidden if layers == 1 else router.hidden(hidden).relu()
    expected = router.output(inner).view(2, 6, 7).mean(1)
    assert_near(made.expert_weight, torch.cat([1 - expected.sum(-1, keepdim=True), expected], -1), 1e-5)
    assert (made.expert_weight < 0).any() and (made.expert_weight > 1).any()
    permuted = router(hidden.view(2, 6, 32)[:, order].flatten(0, 1), text_context(2, 6))
    assert_near(permuted.expert_weight, made.expert_weight, 1e-5)


@torch.no_grad()
def test_the_largest_weights_are_kept():
    router = make_router("wemoe", {"router_hidden_layers": 0}, make_spec(num_experts=4, num_experts_per_tok=3))
    router.constant.copy_(torch.tensor([0.3, -0.9, 0.1]))
    made = router(torch.randn(5, 32), text_context(1, 5))
    assert_near(made.expert_weight, torch.tensor([[1.6, 0.3, -0.9, 0.0]]))
    context, statistics = text_context(1, 5), RoutingStatistics()
    context.decisions[0] = made
    statistics.update(context)
    assert_near(statistics.shares(0)[0], torch.tensor([1.6, 0.3, 0.9, 0.0]) / 2.8)
    assert_near(statistics.active_experts(0)[0], torch.tensor(1.0))


def test_entropy_trains_the_gates_alone_and_reads_no_label(tmp_path):
    base, tuned, _ = models()
    model = from_fine_tuned(base, tuned)
    train_only(model, ["routers"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": torch.full_like(row, 3)} for row in IDS]

    def entropy():
        output = model(input_ids=IDS)
        found = prediction_entropy(output, torch.full_like(IDS, 3).index_fill(1, torch.arange(5), -100))
        assert_near(found, Categorical(logits=output.logits[:, 4:-1]).entropy().mean(), 1e-5)
        return float(found)

    first = entropy()
    options = {"max_steps": 20, "learning_rate": 0.01, "report_to": [], "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=2, **options)
    Trainer(model, arguments, train_dataset=rows, compute_loss_func=prediction_entropy).train()
    assert entropy() < 0.99 * first
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".gate." in name}


def test_what_does_not_fit_is_refused():
    base, tuned, _ = models(1)
    with pytest.raises(ValueError, match="at least one fine-tuned copy"):
        from_fine_tuned(base, [])
    with pytest.raises(ValueError, match="has the router TopKRouter: a weight ensemble needs"):
        from_fine_tuned(base, tuned, router="top_k")
    with pytest.raises(ValueError, match="num_experts must be >= 2"):
        make_router("wemoe", {}, make_spec(num_experts=1, num_experts_per_tok=1))


def test_right_gates_tell_tasks_apart_where_no_scale_does():
    """With the right copy for every row a merged layer is as good as the copies; no task arithmetic is."""
    torch.manual_seed(0)
    spec = make_spec(hidden_size=8, num_experts=3)
    layer, maps, head = make_experts(spec), torch.randn(2, 8, 4), torch.randn(8, 4)
    base = [parameter[0].detach().clone() for parameter in layer.parameters()]

    def accuracy(weights):
        tokens = torch.randn(2, 256, 8, generator=torch.Generator().manual_seed(1))
        answers = [(tokens[task] @ maps[task]).argmax(-1) for task in (0, 1)]
        groups = torch.arange(2).repeat_interleave(256)
        found = (layer(tokens.flatten(0, 1), ParameterMixture(weights, groups, 3)) @ head).argmax(-1)
        return float((found == torch.cat(answers)).float().mean())

    for task in (0, 1):
        stacks = list(layer.parameters())
        optimizer = torch.optim.Adam(stacks, lr=1e-2)
        for stack, first in zip(stacks, base, strict=True):
            stack.data[1 + task] = first
        for _ in range(150):
            tokens, weights = torch.randn(128, 8), torch.eye(3)[1 + task][None]
            output = layer(tokens, ParameterMixture(weights, torch.zeros(128, dtype=torch.long), 3)) @ head
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(output, (tokens @ maps[task]).argmax(-1)).backward()
            optimizer.step()
    with torch.no_grad():
        arithmetic = [torch.tensor([1 - 2 * scale, scale, scale]).expand(2, 3) for scale in torch.arange(11) / 10]
        assert accuracy(torch.eye(3)[1:]) > max(map(accuracy, arithmetic)) + 0.1
