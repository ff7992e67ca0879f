"""GE, LE and a gate: a local expert for a user's data, which leaves all other data to the frozen model."""

import copy

import pytest
import torch
from helpers.near import assert_near
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters import fit_gate
from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling.routing_context import RoutingContext


END, HALF, PROMPT, ANSWER = 30, 8, 4, 8
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def rows(user, size, seed):
    """Return counting rows: generic ones by 1 after a prompt of words 0 to 7, a user's by 3 after one of 8 to 15."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(HALF, (size, PROMPT), generator=generator) + HALF * user
    start = torch.randint(12, (size, 1), generator=generator)
    answer = 16 + (start + torch.arange(ANSWER) * (3 if user else 1)) % 12
    ids = torch.cat([prompt, torch.full((size, 1), END), answer], 1)
    labels = ids.clone()
    labels[:, : PROMPT + 2] = -100  # the start is drawn
    return {"input_ids": ids, "labels": labels}


def fit(model, user, steps, learning_rate):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for step in range(steps):
        model(**rows(user, 32, 100 + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def loss(model, user):
    with torch.no_grad():
        return model(**rows(user, 128, 1)).loss.item()


def adapt(base, **fields):
    router = {"name": "ge_le_gate", "end_token_id": END}
    config = MoeLoraConfig.from_system("ge_le_gate", **{"router": router, "layers_to_transform": [1], **fields})
    return get_peft_model(base, config)


def gate_of(model):
    return next(layer.deciding_router("default") for layer in tuner_layers(model))


def decided(model, batch):
    """Return where the local expert has its whole weight, (B, S) bool, none elsewhere; and the logits."""
    found = []
    hook = gate_of(model).register_forward_hook(lambda module, args, decision: found.append(decision.expert_weight))
    with torch.no_grad():
        logits = model(**batch).logits
    hook.remove()
    assert torch.isin(found[0], torch.tensor([0.0, 1.0])).all()
    return found[0].view(batch["input_ids"].shape).bool(), logits


@pytest.fixture(scope="module")
def trained():
    """The model with its gate, and losses on generic and user rows: the base's, and the local expert's alone."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=32, initializer_range=0.1)
    base = fit(LlamaForCausalLM(config), 0, 150, 1e-2)
    alone = [loss(base, user) for user in (0, 1)]
    model = fit(adapt(base), 1, 100, 1e-2)
    local = [loss(model, user) for user in (0, 1)]
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    report = fit_gate(model, [rows(user, 128, 2) for user in (0, 1)])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
    return model, alone, local, report, moved


def test_user_rows_gain_and_generic_ones_stay(trained):
    model, alone, local, report, moved = trained
    assert local[1] < 0.7 * alone[1] and local[0] > 1.01 * alone[0], "the local expert alone costs generic rows"
    gated = [loss(model, user) for user in (0, 1)]
    assert gated[1] < 0.7 * alone[1] and abs(gated[0] - alone[0]) < 0.01 * alone[0]
    assert report.rows == 256 and report.better == [0.5] and report.agreement == [1.0]
    assert {name.rsplit(".", 1)[1] for name in moved} == {"weight", "bias"} and len(moved) == 2


def test_a_closed_row_is_the_base_and_an_open_one_the_expert(trained):
    model = trained[0]
    batch = {name: torch.cat([rows(user, 4, 3)[name] for user in (0, 1)]) for name in ("input_ids", "labels")}
    opened, logits = decided(model, batch)
    expected = torch.zeros_like(opened)
    expected[4:, PROMPT:] = True  # one decision for all that follows the instruction
    assert torch.equal(opened, expected)
    with torch.no_grad():
        local = model.train()(**batch).logits
        with model.eval().disable_adapter():
            base = model(**batch).logits
    assert torch.equal(logits[~opened], base[~opened]) and torch.equal(logits[opened], local[opened])
    assert not torch.isclose(local, base)[:, PROMPT:].all(-1).any()


def test_open_while_training_and_until_it_is_fitted(trained):
    model, batch = trained[0], rows(0, 4, 3)
    model.train()
    learning = decided(model, batch)[0]
    model.eval()
    fresh = adapt(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32))).eval()
    for opened in (learning, decided(fresh, batch)[0]):
        assert opened[:, PROMPT:].all() and not opened[:, :PROMPT].any()


def test_an_answer_is_decoded_as_in_the_whole_and_alone(trained):
    model, ids = trained[0], torch.cat([rows(user, 2, 4)["input_ids"] for user in (0, 1)])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        prompt = model(input_ids=ids[:, :7], use_cache=True)
        rest = model(input_ids=ids[:, 7:], past_key_values=prompt.past_key_values).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    assert_near(torch.cat([prompt.logits, rest], 1), whole, 1e-5)
    assert_near(alone, whole, 1e-5)


def test_the_gate_is_saved_with_the_local_expert(trained, tmp_path):
    model, batch = trained[0], rows(1, 4, 5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path).eval()
    assert gate_of(loaded).weight.any()
    opened, _ = decided(loaded, batch)
    assert opened[:, PROMPT:].all()


def test_a_gate_is_one_for_the_model():
    model = adapt(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32)), router_input="target")
    with pytest.raises(ValueError, match="'default' has 7 routers, .*router_input='model'"):
        fit_gate(model, [rows(0, 2, 0)])


def test_the_gate_reads_the_last_instruction_of_a_row():
    router = gate_of(adapt(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32))))
    ids = torch.tensor([[1, END, 2, END, 3], [1, 2, 3, 4, 5], [0, 0, 1, END, 2]])
    hidden = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    found, known = router.read(hidden.flatten(0, 1), RoutingContext(torch.zeros_like(ids), ids != 0, ids))
    directions = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    assert known.tolist() == [True, False, True]
    assert_near(found[known], torch.stack([directions[0, :4].mean(0), directions[2, 2:4].mean(0)]), 1e-5)


def test_every_expert_is_compared_with_the_base_by_itself():
    torch.manual_seed(0)
    model = adapt(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32)), num_experts=2, num_experts_per_tok=2)
    for layer in tuner_layers(model):
        layer.moe_lora_B["default"][1].data.normal_()
    report = fit_gate(model, [rows(0, 32, 0)])
    assert report.better[0] == 0.0 and 0.0 < report.better[1] < 1.0
