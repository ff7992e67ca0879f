"""What the gate on a pooled sequence reads: directions, and with `centred` only what differs between the samples."""

import torch
from helpers.near import assert_near
from peft import PeftModel, get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.modeling.layer_spec import MoELayerSpec
from hf_moe.modeling.routers.sequence import SequenceRouter
from hf_moe.modeling.routing_context import RoutingContext


WIDTH, LENGTH = 16, 4


def make(**options):
    router = SequenceRouter(MoELayerSpec(0, WIDTH, 2, 1, 4), **options)
    torch.manual_seed(1)
    router.initialize(0.02)
    return router


def two_kinds(rows=8, seed=0):
    """Samples of two kinds, alternating: a large part in common, a small part of the kind, a little noise, (T, d)."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.Generator().manual_seed(7)
    common, difference = torch.randn(2, WIDTH, generator=kinds)
    sign = torch.tensor([1.0, -1.0]).repeat(rows // 2)[:, None, None]
    noise = torch.randn(rows, LENGTH, WIDTH, generator=generator)
    return (4 * common + 0.5 * sign * difference + 0.05 * noise).flatten(0, 1)


def run(router, states):
    context = RoutingContext.all_text(states.view(-1, LENGTH, WIDTH))
    decision = router(states, context)
    return decision, context


def test_a_long_hidden_state_weighs_no_more_than_a_short_one():
    router, states = make(), two_kinds()
    longer = states.view(-1, LENGTH, WIDTH).clone()
    longer[:, 0] *= 500  # the first token of pretrained decoders
    expected, found = run(router, states)[0], run(router, longer.flatten(0, 1))[0]
    assert_near(found.router_logits, expected.router_logits, 1e-4)


def test_a_centred_gate_parts_two_kinds_of_samples_that_another_gives_to_one_expert():
    chosen = {}
    for centred in (False, True):
        router = make(centred=centred).train()
        for step in range(3):
            decision, context = run(router, two_kinds(seed=step))
            router.accumulate(decision, context)
            router.end_step()
        decision, _ = run(router.eval(), two_kinds(seed=9))
        chosen[centred] = decision.expert_index.view(8, LENGTH)[:, -1].tolist()
    assert len(set(chosen[False])) == 1
    assert chosen[True] in ([0, 1] * 4, [1, 0] * 4)


def test_the_mean_is_that_of_the_samples_of_finished_steps_and_rests_at_inference():
    router = make(centred=True).train()
    states = [two_kinds(seed=seed) for seed in (0, 1)]
    for part in states:  # two micro-batches of one step
        router.accumulate(*run(router, part))
    assert not router.mean.any()
    router.end_step()
    directions = torch.nn.functional.rms_norm(torch.cat(states), (WIDTH,))
    torch.testing.assert_close(router.mean, directions.mean(0))
    run(router.eval(), two_kinds(seed=3))
    router.end_step()
    torch.testing.assert_close(router.mean, directions.mean(0))


def test_the_mean_is_saved_with_the_adapter(llama, text, tmp_path):
    config = MoeLoraConfig(
        num_experts=2, num_experts_per_tok=1, router={"name": "sequence", "centred": True}, target_modules=["q_proj"]
    )
    model = get_peft_model(llama(), config).train()
    for _ in range(2):
        model.zero_grad()
        model(**{**text, "labels": text["input_ids"]}).loss.backward()
    means = {name: value for name, value in model.state_dict().items() if name.endswith(".mean")}
    assert means and all(value.any() for value in means.values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in means.items())


def test_a_centred_gate_generates_in_training_mode_and_takes_no_note_of_it(llama, text):
    """As trainers generate that learn from rewards."""
    config = MoeLoraConfig(num_experts=2, router={"name": "sequence", "centred": True}, target_modules=["q_proj"])
    model = get_peft_model(llama(), config)
    prompt = {name: text[name] for name in ("input_ids", "attention_mask")}
    expected = model.eval().generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.train().generate(**prompt, max_new_tokens=4, do_sample=False), expected)
    routers = [module for module in model.modules() if isinstance(module, SequenceRouter)]
    assert not any(router.accumulated.any() for router in routers)
    model(**text).loss.backward()
    assert all(router.accumulated[-1] == len(text["input_ids"]) for router in routers)
