"""Every router as LoRA experts and in place of a host's feed-forwards, or refused by its name; blocks on hosts."""

import pytest
import torch
from helpers.hosts.small import small_host
from helpers.mechanisms import CASES, name_of
from helpers.near import assert_near
from peft import get_peft_model

from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig
from hf_moe.adapters import routing_inputs
from hf_moe.adapters.layer import tuner_layers
from hf_moe.modeling.context import routers_of
from hf_moe.modeling.inputs import conditions_read


ROUTERS = CASES["router"]
# The fields that a model and an adapter both have; the banks of a model are of unequal width.
FIELDS = ("num_experts", "num_experts_per_tok", "router", "objectives")
ADAPTED = [key for key, case in ROUTERS.items() if "expert_banks" not in case.moe]
# Routers that LoRA experts, or the decoder of a hosted model, cannot have, and what their refusal tells to choose.
NO_ADAPTER = {
    "aoe": "choose another, such as 'top_k'",
    "hash_layers-previous": "set codebook_size=1",
    "meo": "choose another, such as 'top_k'",
    "omni_router": "choose one .* such as 'top_k'",
    "omni_smola-sequence": "adapt a vision tower or an encoder",
    "rmoe_layerwise": "choose one .* such as 'top_k'",
    "soft_moe": "adapt a vision tower or an encoder",
    "speechmoe": "choose one .* such as 'top_k'",
    "uoe-data": "adapt a vision tower or an encoder",
    "uniperceiver_moe": "choose another, such as 'top_k'",
    "uniperceiver_moe-mixed": None,
    "wemoe": "choose another, such as 'top_k'",
}
NO_HOST = {
    "aoe": "build a fresh model",
    "hash_layers-previous": "set codebook_size=1",
    "omni_smola-sequence": "put it into vision_moe_config",
    "soft_moe": "put it into vision_moe_config",
    "uoe-data": "put it into vision_moe_config",
}
GENERATE = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}


@torch.no_grad()
def moved(model, names):
    """Move parameters a little, so that no two are equal."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def fields_of(key: str, kind: str = "router") -> dict:
    case = CASES[kind][key]
    named = {"name": name_of(key), **case.options}
    return {"num_experts": 4, "num_experts_per_tok": 2, "objectives": {}, **case.moe, kind: named}


def adapted(key: str):
    fields = {name: value for name, value in fields_of(key).items() if name in FIELDS}
    torch.manual_seed(0)
    config = MoeLoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], **fields)
    model = get_peft_model(small_host("qwen3"), config)
    routers = [router for layer in tuner_layers(model) for router in layer.moe_lora_router.values()]
    return moved(model, ["moe_lora_"]), routers


def hosted(key: str, kind: str = "router"):
    torch.manual_seed(0)
    fields = {"layers": "from_1", **fields_of(key, kind)}
    model = HfMoeForConditionalGeneration.from_host(small_host("qwen3"), moe_config=fields)
    return moved(model, [".experts.", ".gate.", "shared_routing."]), routers_of(model).values()


def rows_for(routers) -> tuple[dict, dict]:
    """Return two rows of text, the second one shorter, and the conditions that the routers read."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 60, (2, 8), generator=generator)
    ids[:, 4] = 7  # the end of an instruction
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    conditions = {
        name: torch.tensor([1, 0]) if count else torch.rand(2, 3, generator=generator)
        for name, count in conditions_read(routers).items()
    }
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, conditions


def check(model, routers, as_argument: bool) -> None:
    """Train on two rows, run one of them alone, and generate."""
    rows, conditions = rows_for(routers)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"].cumsum(-1) < 2, -100)
    loss = model.train()(**rows, labels=labels, condition_ids=conditions).loss
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and loss.isfinite()
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())

    model.eval()
    with torch.no_grad():
        whole = model(**rows, condition_ids=conditions).logits
        second = {name: value[1:] for name, value in conditions.items()}
        alone = model(input_ids=rows["input_ids"][1:, 3:], condition_ids=second).logits
    assert_near(alone, whole[1:, 3:], 1e-4)
    given = {"condition_ids": conditions} if as_argument and conditions else {}
    with routing_inputs(**({} if as_argument else conditions)):
        tokens = [model.generate(**rows, **given, **GENERATE, use_cache=cached).sequences for cached in (True, False)]
    assert tokens[0].shape == (2, 11) and torch.equal(*tokens)


def refusal(key: str, reasons: dict[str, str | None]) -> str | None:
    """Return what the refusal of a case says, or `None` where it must work."""
    reason = reasons.get(key, reasons.get(name_of(key)))
    return None if reason is None else rf"(?s)'{name_of(key)}'.*{reason}"


@pytest.mark.parametrize("key", ADAPTED)
def test_a_router_works_as_lora_experts_or_refuses_by_name(key):
    message = refusal(key, NO_ADAPTER)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            adapted(key)
        return
    check(*adapted(key), as_argument=False)


@pytest.mark.parametrize("key", ROUTERS)
def test_a_router_works_in_a_hosted_model_or_refuses_by_name(key):
    message = refusal(key, NO_HOST)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            hosted(key)
        return
    check(*hosted(key), as_argument=True)


# Their experts are narrower than any feed-forward that they could start from.
NARROWER = ("mh_moe", "t2mir")


@pytest.mark.parametrize("key", [key for key in CASES["block"] if name_of(key) not in NARROWER])
def test_a_block_works_in_a_hosted_model(key):
    check(*hosted(key, "block"), as_argument=True)
