"""Mixture of depths: layers that run on the tokens their router chooses."""

import time

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.mechanisms import TEXT, TOWER
from helpers.near import assert_near
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, Trainer, TrainingArguments

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, RoutingOverrides, from_system
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.layers.mixture_of_depths import DepthRouter
from hf_moe.modeling.routing_context import RoutingContext


KEY = "mixture_of_depths"


def make_model(text=None, **options) -> HfMoeForConditionalGeneration:
    torch.manual_seed(0)
    layer = {"name": KEY, "capacity": 0.25, **options}
    config = from_system(KEY, text_config=LlamaConfig(**{**TEXT, **(text or {})}), moe_config={"layer": layer})
    return HfMoeForConditionalGeneration(config).eval()


def layers_of(model):
    return model.model.language_model.layers


def watch(model) -> dict[str, torch.Tensor]:
    """Keep what goes into the second layer and its feed-forward, and what comes out of the layer."""
    seen, layer = {}, layers_of(model)[1]
    layer.register_forward_hook(lambda _, given, output: seen.update(before=given[0], after=output))
    layer.mlp.register_forward_pre_hook(lambda _, given: seen.update(run=given[0]))
    return seen


def chosen_in(model, rows, **extra) -> torch.Tensor:
    with torch.no_grad():
        decision = model(**rows, **extra, output_routing=True).routing.decisions["1.layer"]
    return (decision.expert_index == 0).view(rows["input_ids"].shape)


def make_ids(rows=2, length=16, seed=0):
    return {"input_ids": torch.randint(3, 63, (rows, length), generator=torch.Generator().manual_seed(seed))}


def test_training_runs_the_best_and_leaves_the_others():
    """The chosen are the host's layer on themselves, where they are, times r; the others are what they were."""
    model, dense, rows = make_model().train(), LlamaModel(LlamaConfig(**TEXT)), make_ids()
    seen, chosen = watch(model), chosen_in(model, rows)
    before, after = seen["before"].detach(), seen["after"].detach()
    assert seen["run"].shape == (2, 4, 32)
    assert torch.equal(after[~chosen], before[~chosen])
    r = (before @ layers_of(model)[1].depth.gate.weight.detach().T).squeeze(-1)
    assert torch.equal(chosen, r >= r.topk(4).values[:, -1:])
    layer = dense.layers[1]
    layer.load_state_dict(layers_of(model)[1].state_dict(), strict=False)
    for row in range(2):
        own = chosen[row].nonzero().T
        x = before[row, own]
        out = layer(x.clone(), position_ids=own, position_embeddings=dense.rotary_emb(x, own))
        assert_near(after[row, own], x + r[row, own][..., None] * (out.detach() - x), 1e-6)


def test_padding_and_documents_have_contests_of_their_own():
    model = make_model().train()
    rows = make_ids(1)
    assert_near(chosen_in(model, padded_ids(rows, 5))[:, 5:], chosen_in(model, rows))
    parts = [make_ids(1, 10), make_ids(1, 6, 1)]
    packed = {"input_ids": torch.cat([part["input_ids"] for part in parts], 1)}
    packed |= {"position_ids": torch.cat([torch.arange(10), torch.arange(6)])[None], "use_cache": False}
    seen = watch(model)
    assert chosen_in(model, packed).sum() == 3 + 2  # one sequence of 16 would have 4
    whole = seen["after"]
    for part, own in zip(parts, whole.split([10, 6], 1), strict=True):
        chosen_in(model, part)
        assert_near(own, seen["after"], 1e-6)


def padded_ids(rows, width):
    ids = torch.nn.functional.pad(rows["input_ids"], (width, 0), value=7)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= width).long()[None]}


def test_images_have_a_capacity_of_their_own():
    model = make_model(per_modality_capacity={"image": 0.5}).train()
    types = torch.zeros(2, 16, dtype=torch.long)
    types[:, 2:8] = 1
    chosen = chosen_in(model, {**make_ids(), "mm_token_type_ids": types})
    assert (chosen[:, 2:8].sum(-1) == 3).all() and (chosen.sum(-1) == 3 + 3).all()  # ceil(0.25 * 10)


@pytest.mark.parametrize("inference", ["aux_loss", "predictor"])
def test_the_rule_of_inference_learns_the_choice(inference):
    torch.manual_seed(3)
    router = DepthRouter(MoELayerSpec(1, 16, 1, 1, 16), 0.125, inference, {})
    router.initialize(0.3)
    context, optimizer = RoutingContext.all_text(torch.zeros(8, 64, 16)), torch.optim.Adam(router.parameters(), 0.02)
    weight = router.weight.detach().clone()

    def agreement() -> torch.Tensor:
        hidden = torch.randn(512, 16) + 1.0
        true, rule = (router.train(training)(hidden, context).expert_index for training in (True, False))
        return (rule == true).float().mean()

    before = agreement()
    for _ in range(300):
        optimizer.zero_grad()
        hidden = (torch.randn(512, 16) + 1.0).requires_grad_()
        router.train()(hidden, context).signals["choice_loss"].mean().backward()
        optimizer.step()
    assert agreement() > 0.92 > 0.875 > before  # the guess that no token is chosen
    assert torch.equal(router.weight, weight) == (hidden.grad is None) == (inference == "predictor")


def test_a_skipped_token_costs_nothing():
    """A training step at capacity 0.125 against 1: FLOPs, and the least time of three."""
    wide = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
    models = {capacity: make_model(wide, capacity=capacity, every=1).train().model for capacity in (0.125, 1.0)}
    flops, seconds = {}, dict.fromkeys(models, float("inf"))
    for capacity, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model(**make_ids(2, 512))
        flops[capacity] = counter.get_total_flops()
        for _ in range(3):
            start = time.perf_counter()
            model(**make_ids(2, 512), use_cache=False).last_hidden_state.sum().backward()
            seconds[capacity] = min(seconds[capacity], time.perf_counter() - start)
    assert flops[0.125] < 0.13 * flops[1.0] and seconds[0.125] < 0.35 * seconds[1.0]


@torch.no_grad()
def test_a_step_that_no_row_chooses_runs_nothing():
    model, rows = make_model(), make_ids()
    cache = model(**rows, use_cache=True).past_key_values
    runs = []
    layers_of(model)[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    step = {"input_ids": torch.full((2, 1), 9), "past_key_values": cache, "attention_mask": torch.ones(2, 17)}
    model(**step, routing_overrides=RoutingOverrides(logit_offset={"1.layer": [-100.0]}))
    assert [layer.keys.shape[2] for layer in cache.layers] == [17] * 3 and not runs


def test_it_learns_under_the_trainer(tmp_path):
    model, rows = make_model(), make_ids(8, 12)["input_ids"]
    options = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), num_train_epochs=20, logging_steps=10, use_cpu=True, **options)
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    gate = layers_of(model)[1].depth.gate.weight.detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0] and not torch.equal(layers_of(model)[1].depth.gate.weight, gate)


def test_a_trained_host_keeps_its_weights_and_learns_to_skip():
    host = LlamaForCausalLM(LlamaConfig(**TEXT))
    checks = []
    model = from_system(KEY, host=host, on_check=checks.append)
    state = {name.replace("language_model.", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in host.state_dict().items())
    assert not checks[0].exact and "model.layers.1.depth.gate.weight" in state


def test_towers_are_refused():
    with pytest.raises(ValueError, match="is for decoders, in moe_config"):
        HfMoeForConditionalGeneration(
            HfMoeConfig(
                text_config=LlamaConfig(**TEXT),
                vision_config=CLIPVisionConfig(**TOWER),
                image_token_id=63,
                vision_moe_config={"layers": [], "layer": {"name": KEY, "every": 1}},
            )
        )


def test_recurrent_layers_of_a_hybrid_run_on_all_tokens():
    host, inputs = HOSTS["qwen3_5"], HOSTS["qwen3_5"].inputs()
    model = from_system(KEY, host=host.build(), moe_config={"layer": {"name": KEY, "every": 1}})
    layers = model.model.language_model.layers
    assert [hasattr(layer, "depth") for layer in layers] == [hasattr(layer, "self_attn") for layer in layers]
    expected = model.generate(**inputs, max_new_tokens=3, use_cache=False, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_drafts_that_are_taken_back_leave_no_trace():
    model = make_model(every=1)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), expected)
