"""A call that is interrupted, wherever that happens, leaves nothing behind for the next one."""

import copy
import pickle
from contextlib import suppress

import pytest
import torch
from helpers.hosts.families import HOSTS, words
from peft import get_peft_model

from hf_moe import MoeLoraConfig
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT, CALL_CONTEXT


class Stop(BaseException):
    """As Ctrl-C, which hooks do not hear of."""


PLACES = {
    "embedding": "model.embed_tokens",
    "layer": "model.layers.1",
    "target": "model.layers.0.self_attn.q_proj",
    "router": "model.layers.0.self_attn.q_proj.moe_lora_router.default",
    "norm": "model.norm",
    "head": "lm_head",
    "backbone": "model",
    "root": "",
}
CALLS = {"root": lambda model: model, "backbone": lambda model: model.model}


def adapted(randomise, **fields):
    torch.manual_seed(0)
    host = HOSTS["llama"].build().eval()
    fields = {"target_modules": ["q_proj", "down_proj"], "num_experts": 2, "num_experts_per_tok": 1, **fields}
    model = get_peft_model(host, MoeLoraConfig(**fields))
    randomise(model)
    return model.get_base_model()


def interrupt(model, place, error, called, inputs, hook):
    """Call a part of the model, with an error where a module is entered or left."""

    def fail(*_):
        raise error

    module = model.get_submodule(place)
    handle = (module.register_forward_pre_hook if hook == "enters" else module.register_forward_hook)(fail)
    with suppress(BaseException):
        called(model)(**inputs)
    handle.remove()


@pytest.mark.parametrize("hook", ["enters", "leaves"])
@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), ValueError()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_no_interrupted_call_leaves_its_context_behind(place, error, hook, randomise):
    model, text = adapted(randomise, router="condition", router_input="model"), words()
    tasks = torch.tensor([[0, 1], [1, 0]])
    inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
    wanted = {name: call(model)(**inputs, task_ids=tasks[1])[0].detach() for name, call in CALLS.items()}
    for interrupted in CALLS.values():
        for name, call in CALLS.items():
            interrupt(model, PLACES[place], error, interrupted, {**inputs, "task_ids": tasks[0]}, hook)
            assert CALL_CONTEXT.get() is None and ACTIVE_CONTEXT.get() is None
            assert torch.equal(call(model)(**inputs, task_ids=tasks[1])[0], wanted[name])


@pytest.mark.parametrize("place", PLACES)
def test_objectives_count_after_an_interrupt(place, randomise):
    model, text = adapted(randomise, objectives={"load_balance": 1.0}).train(), words()
    interrupt(model, PLACES[place], KeyboardInterrupt(), CALLS["root"], text, "enters")
    with_objectives = model(**text).loss
    model.eval()
    fresh = adapted(randomise).train()
    assert with_objectives > fresh(**text).loss + 0.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_adapted_model_has_calls_of_its_own(copied, randomise):
    model, text = adapted(randomise, router="sequence"), words()
    model(**text)
    other = copied(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    interrupt(model, "model.norm", KeyboardInterrupt(), CALLS["root"], text, "enters")
    assert not other(**text).logits.any() and model(**text).logits.any()
    assert type(other) is type(model) and type(model).__name__ == "LlamaForCausalLM"


def test_unloading_gives_root_and_backbone_their_classes_back(randomise):
    host = HOSTS["llama"].build()
    classes = type(host), type(host.model)
    model = get_peft_model(host, MoeLoraConfig(target_modules=["q_proj"]))
    assert (type(host), type(host.model)) != classes
    model.unload()
    assert (type(host), type(host.model)) == classes
