"""What every mechanism promises, at the level of a model: one suite over the registry, see `helpers/mechanisms.py`."""

import copy
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import pytest
import torch
from helpers.caches import cache_of
from helpers.mechanisms import (
    CASES,
    IMAGE,
    PICTURE,
    POSITIONS,
    build,
    config_of,
    make_rows,
    name_of,
    padded,
    take,
    until,
)
from helpers.near import assert_near
from transformers import AutoModelForCausalLM

from hf_moe import HfMoeForConditionalGeneration, RoutingOverrides, list_mechanisms
from hf_moe.configuration.checks import in_words, option_hints
from hf_moe.modeling.context import routers_of
from hf_moe.modeling.decisions import ExpertAssignment
from hf_moe.modeling.mechanisms import get_mechanism
from hf_moe.modeling.registry import KINDS


# Checks of the logits alone, which an objective does not touch.
OF_LOGITS = ("alone", "causality", "decoding", "backends", "disabled")
OF_ROUTERS = ("disabled",)


@dataclass
class Subject:
    """A model that the checks of its case share: they leave it as it is, and change copies of it."""

    kind: str
    key: str

    @cached_property
    def model(self) -> HfMoeForConditionalGeneration:
        return build(self.kind, self.key)

    @cached_property
    def rows(self) -> dict[str, Any]:
        return make_rows(self.model)

    @cached_property
    def output(self):
        with torch.no_grad():
            return self.model(**self.rows, output_routing=True)

    def copy(self) -> HfMoeForConditionalGeneration:
        return copy.deepcopy(self.model)

    @cached_property
    def trained(self) -> HfMoeForConditionalGeneration:
        """A model whose objectives have the population of a step."""
        model = self.copy().train()
        backward(model, self.rows)
        model.zero_grad()
        model(**self.rows)
        return model


def backward(model, *batches, **extra) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss summed over batches."""
    model.zero_grad()
    for batch in batches:
        torch.manual_seed(3)
        model(**batch, **extra).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def decisions(output) -> dict:
    """Return the decisions of all MoE layers by site, those of towers and of sub-tokens too."""
    return {site: decision for context in output.routing.contexts() for site, decision in context.decisions.items()}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(found[name], gradient, 1e-4)


def pytest_generate_tests(metafunc):
    if "subject" not in metafunc.fixturenames:
        return
    check = metafunc.function.__name__.removeprefix("test_")
    parameters = []
    for kind, cases in CASES.items():
        if (kind == "objective" and check in OF_LOGITS) or (kind in ("connector", "host") and check in OF_ROUTERS):
            continue
        for key, case in list(cases.items())[: 1 if check == "bundle" else None]:
            if case.place and check in OF_ROUTERS:
                continue
            reason = case.exempt.get(check)
            marks = [pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)] if reason else []
            parameters.append(pytest.param((kind, key), id=f"{kind} {key}", marks=marks))
    metafunc.parametrize("subject", parameters, indirect=True, scope="module")


@pytest.fixture(scope="module")
def subject(request):
    return Subject(*request.param)


def test_every_mechanism_has_a_case():
    assert CASES.keys() == set(KINDS)
    for kind, cases in CASES.items():
        assert {name_of(key) for key in cases} == set(list_mechanisms(kind)), kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_declares_its_type(kind):
    for name in list_mechanisms(kind):
        cls = get_mechanism(kind, name)
        hints = option_hints(cls, 0)
        options = [item.name for item in signature(cls).parameters.values() if item.kind is item.KEYWORD_ONLY]
        assert not [option for option in options if in_words(hints[option]) in ("Any", "_empty")], name


def test_every_exemption_is_of_a_check():
    checks = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {check for cases in CASES.values() for case in cases.values() for check in case.exempt} <= checks


def test_shapes(subject):
    output, rows = subject.output, subject.rows
    assert output.logits.shape == (*rows["input_ids"].shape, 64) and output.logits.isfinite().all()
    assert output.loss.isfinite() and (output.aux_loss is None or output.aux_loss.isfinite())
    assert decisions(output).keys() == routers_of(subject.model).keys()
    for part in output.routing.contexts():
        for decision in part.decisions.values():
            if isinstance(decision, ExpertAssignment):
                check_assignment(decision, part.token_mask.numel())


def check_assignment(decision: ExpertAssignment, tokens: int) -> None:
    index, weight, experts = decision.expert_index, decision.expert_weight, decision.num_experts
    assert index.shape == weight.shape and len(index) == tokens and index.dtype == torch.int64
    assert index.min() >= 0 and index.max() <= experts
    assert weight.isfinite().all() and (weight >= 0).all() and (weight[index == experts] == 0).all()
    chosen = [row[row < experts].tolist() for row in index]
    assert all(len(set(row)) == len(row) for row in chosen), "an expert twice in the slots of one token"
    if decision.router_probs is not None:
        torch.testing.assert_close(decision.router_probs.sum(-1), torch.ones(tokens))


def test_gradients(subject):
    """Every parameter learns, and has a gradient where a batch has no image."""
    model = subject.copy().train()
    found = backward(model, subject.rows, make_rows(model, rows=6, seed=2))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == learning
    assert [name for name, gradient in found.items() if not (gradient.isfinite().all() and gradient.any())] == []
    text = {**subject.rows, "mm_token_type_ids": torch.zeros_like(subject.rows["input_ids"])}
    if text.pop("pixel_values", None) is not None:
        text["input_ids"] = text["labels"] = text["input_ids"].clamp(max=IMAGE - 1)
    assert backward(model, text).keys() == learning


def test_padding(subject):
    """Padding, whatever is written there, moves no logit, no loss, no gradient and no statistic, and has no expert."""
    model, other = copy.deepcopy(subject.trained), copy.deepcopy(subject.trained)
    expected, seven = backward(model, subject.rows), padded(subject.rows, 3, filler=7)
    assert_same_gradients(backward(other, seven), expected)
    assert_near(list(other.buffers()), list(model.buffers()), 1e-5)
    with torch.no_grad():
        plain = model.eval()(**subject.rows)
        for batch in (padded(subject.rows, 3), seven):
            found = model(**batch, output_routing=True)
            assert_near((found.logits[:, 3:], found.loss), (plain.logits, plain.loss), 1e-5)
            for name, value in (plain.objective_values or {}).items():
                assert_near(found.objective_values[name], value, 1e-5)
    assert not found.routing.token_mask[:, :3].any()
    for part in found.routing.contexts():
        for decision in part.decisions.values():
            if isinstance(decision, ExpertAssignment):
                assert (decision.expert_index[~part.token_mask.flatten()] == decision.num_experts).all()


def test_alone(subject):
    with torch.no_grad():
        rows = [subject.model(**take(subject.rows, slice(row, row + 1))).logits for row in range(3)]
    assert_near(torch.cat(rows), subject.output.logits, 1e-5)


def test_causality(subject):
    ids = subject.rows["input_ids"].clone()
    ids[:, -1] = ids[:, -1] % 60 + 3
    with torch.no_grad():
        found = subject.model(**{**subject.rows, "input_ids": ids}).logits
    assert_near(found[:, :-1], subject.output.logits[:, :-1], 1e-5)
    assert (found[:, -1] - subject.output.logits[:, -1]).abs().max() > 1e-3


def test_decoding(subject):
    """Prompts are cut after the image, and within it where the model has no tower that wants it whole."""
    cuts = (PICTURE.stop + 1,) if "pixel_values" in subject.rows else (PICTURE.stop + 1, PICTURE.stop - 2)
    with torch.no_grad():
        for cut in cuts:
            output = subject.model(**until(subject.rows, cut), use_cache=True)
            found = [output.logits]
            for end in range(cut + 1, POSITIONS + 1):
                step = until(subject.rows, end)
                step |= {name: step[name][:, -1:] for name in ("input_ids", "mm_token_type_ids")}
                step = {name: value for name, value in step.items() if name not in ("pixel_values", "labels")}
                output = subject.model(**step, past_key_values=cache_of(output))
                found.append(output.logits)
            assert_near(torch.cat(found, 1), subject.output.logits, 1e-5)


def test_float32(subject):
    """Autocast changes no logit of a router for the same hidden states, and no loss is of low precision."""
    model, calls = subject.copy(), []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda router, arguments, decision: calls.append((router, arguments, decision)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**subject.rows)
    assert output.aux_loss is None or output.aux_loss.dtype == torch.float32
    for router, arguments, decision in list(calls):
        logits = getattr(decision, "router_logits", None)
        if logits is not None:
            assert logits.dtype == torch.float32
            assert_near(router(*arguments).router_logits, logits)


def test_bfloat16(subject):
    model = build(subject.kind, subject.key, dtype=torch.bfloat16).train()
    output = model(**subject.rows)
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_casts(subject):
    """Buffers count or accumulate: they keep their type, and so what they hold, whatever the model is cast to."""
    for cast in (
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.double().float(),
    ):
        model = subject.copy()
        ours = {
            name: buffer
            for name, buffer in model.named_buffers()
            if ".gate." in name or name.startswith("objectives.")
        }
        # Exact in float32 and in int64, and in nothing shorter.
        expected = {name: buffer.fill_(70_001).clone() for name, buffer in ours.items()}
        cast(model)
        for name, buffer in expected.items():
            assert model.get_buffer(name).dtype is buffer.dtype and torch.equal(model.get_buffer(name), buffer), name


def test_backends(subject):
    model = subject.copy()
    for name in ("eager", "ragged", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            assert_near(model(**subject.rows).logits, subject.output.logits, 1e-5)


def test_checkpointing(subject):
    model, other = copy.deepcopy(subject.trained), copy.deepcopy(subject.trained)
    other.gradient_checkpointing_enable()
    runs = []
    next(iter(other.moe_blocks().values())).register_forward_pre_hook(lambda *_: runs.append(1))
    expected = backward(model, subject.rows, use_cache=False)
    assert_same_gradients(backward(other, subject.rows, use_cache=False), expected)
    assert len(runs) == 2, "the layer ran again in the backward pass"


def test_micro_batches(subject):
    total = (subject.rows["labels"][:, 1:] != -100).sum()
    model, other = copy.deepcopy(subject.trained), copy.deepcopy(subject.trained)
    parts = [take(subject.rows, rows) for rows in (slice(0, 1), slice(1, 3))]
    expected = backward(model, subject.rows, num_items_in_batch=total)
    assert_same_gradients(backward(other, *parts, num_items_in_batch=total), expected)
    assert_near(list(other.buffers()), list(model.buffers()), 1e-5)


def test_meta(subject, tmp_path):
    """A model is built without memory, filled by `initialize`, saved with its code and loaded with what it learnt."""
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in build(subject.kind, subject.key).state_dict().values())
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has initialised with NaN
    try:
        config = config_of(subject.kind, subject.key)
        fresh = HfMoeForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, tensor in fresh.state_dict().items() if not tensor.isfinite().all()] == []
    subject.trained.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path).eval()
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in subject.trained.state_dict().items())
    with torch.no_grad():
        expected = copy.deepcopy(subject.trained).eval()(**subject.rows)
        found = loaded(**subject.rows)
    assert_near((found.logits, found.loss), (expected.logits, expected.loss))


def test_disabled(subject):
    overrides = RoutingOverrides(disabled_experts={1: [0, 3]})
    with torch.no_grad():
        found = decisions(subject.model(**subject.rows, routing_overrides=overrides, output_routing=True))
    if isinstance(found[1], ExpertAssignment):
        assert not torch.isin(found[1].expert_index, torch.tensor([0, 3])).any()
        assert torch.isin(found[2].expert_index, torch.tensor([0, 3])).any()


def test_bundle(subject, tmp_path):
    subject.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(loaded).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        assert_near(loaded(**subject.rows).logits, subject.output.logits)
