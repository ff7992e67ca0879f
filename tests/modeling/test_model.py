"""The model: padding, images, backends, precision, embeddings, initial weights, saving."""

import copy
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe import HfMoeForConditionalGeneration, RoutingOverrides
from hf_moe.modeling import stacked_experts
from hf_moe.modeling.block import Block
from hf_moe.modeling.routing_context import ACTIVE_CONTEXT, CALL_CONTEXT


OBJECTIVES = {"load_balance": 0.1, "router_z": 0.01}


def max_difference(a, b):
    return (a - b).abs().max().item()


def test_left_padded_batch_with_zero_to_three_images_equals_single_rows(tiny_model, rows, batch):
    model = tiny_model()
    with torch.no_grad():
        logits = model(**batch).logits
        for index, item in enumerate(rows):
            pixels = {"pixel_values": item["pixel_values"]} if len(item["pixel_values"]) else {}
            single = model(input_ids=item["input_ids"][None], **pixels).logits[0]
            assert max_difference(logits[index, -len(single) :], single) < 1e-5


def test_tokens_beside_placeholders_do_not_depend_on_another_row(tiny_model, batch):
    model = tiny_model()
    other = {**batch, "input_ids": batch["input_ids"].clone(), "pixel_values": batch["pixel_values"].clone()}
    other["input_ids"][1, -3:] = 11
    other["pixel_values"][1:] += 1.0
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[0], model(**other).logits[0])


@pytest.mark.parametrize("surplus", [-1, 1])
def test_image_count_mismatch_names_both_numbers(tiny_model, batch, surplus):
    pixels = batch["pixel_values"]
    batch["pixel_values"] = pixels[:-1] if surplus < 0 else torch.cat([pixels, pixels[:1]])
    message = rf"Image features and image tokens do not match: 24 placeholder tokens.*{24 + 4 * surplus} features"
    with pytest.raises(ValueError, match=message):
        tiny_model()(**batch)


def test_images_without_a_tower_are_refused(tiny_model, batch):
    with pytest.raises(ValueError, match="no vision tower"):
        tiny_model(tower=False)(**batch)


def test_modality_ids_come_from_the_placeholders_or_are_given(tiny_model, batch):
    model = tiny_model()
    derived = model(**batch, output_routing=True).routing.modality_ids
    assert torch.equal(derived, (batch["input_ids"] == 95).long())
    given = torch.full_like(derived, 2)
    assert torch.equal(model(**batch, mm_token_type_ids=given, output_routing=True).routing.modality_ids, given)
    with pytest.raises(ValueError, match="mm_token_type_ids must have the shape"):
        model(**batch, mm_token_type_ids=given[:, 1:])


def test_input_embeddings_with_placeholders_equal_input_ids(tiny_model, batch):
    model = tiny_model()
    ids = batch.pop("input_ids")
    with torch.no_grad():
        expected = model(input_ids=ids, **batch).logits
        embeds = model.get_input_embeddings()(ids)
        modality = (ids == 95).long()
        assert torch.equal(model(inputs_embeds=embeds, mm_token_type_ids=modality, **batch).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "ragged"])
@pytest.mark.parametrize("host", ["llama", "gpt_neox"])
def test_experts_backends_are_equal_and_really_run(tiny_model, training_batch, monkeypatch, implementation, host):
    model = tiny_model(host, moe_config={"objectives": OBJECTIVES, "num_shared_experts": 1}).train()
    model.set_experts_implementation("eager")
    expected = model(**training_batch)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    calls = []
    if implementation != "eager":
        backend = ALL_EXPERTS_FUNCTIONS[implementation]
        spy = lambda *args, **kwargs: (calls.append(implementation), backend(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, implementation, spy)
        if implementation == "ragged":  # which is not asked for by its name
            monkeypatch.setattr(stacked_experts, "ragged_experts_forward", spy)
    model.set_experts_implementation(implementation)
    for statistic in model.objectives.buffers():
        statistic.zero_()
    actual = model(**training_batch)
    actual.loss.backward()
    assert len(calls) == (0 if implementation == "eager" else 2)
    assert max_difference(actual.logits, expected.logits) < 1e-5
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert max_difference(parameter.grad, gradients[name]) < 1e-5, name


def test_ragged_is_the_default_backend_and_a_name_can_be_given(tiny_config, tmp_path):
    assert HfMoeForConditionalGeneration(tiny_config()).config._experts_implementation == "ragged"
    model = HfMoeForConditionalGeneration._from_config(tiny_config(), experts_implementation="grouped_mm")
    assert model.moe_layers()[1].experts.config._experts_implementation == "grouped_mm"
    model.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert loaded.moe_layers()[1].experts.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("host", ["llama", "gpt_neox"])
def test_attention_implementations_are_equal(tiny_model, batch, host):
    model = tiny_model(host)
    logits = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(**batch).logits[batch["attention_mask"].bool()]
    assert max_difference(logits["sdpa"], logits["eager"]) < 1e-5
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "eager"


def test_a_model_loaded_in_bf16_has_float32_gates(tiny_model, training_batch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gates = [p.dtype for layer in model.moe_layers().values() for p in layer.gate.parameters()]
    assert set(gates) == {torch.float32}
    assert model.moe_layers()[1].experts.down_proj.dtype == torch.bfloat16
    model.train()(**training_batch).loss.backward()
    assert model.moe_layers()[1].gate.weight.grad.dtype == torch.float32


def test_a_host_keeps_the_precision_of_its_own_moe_layers(tiny_model, training_batch, tmp_path):
    tiny_model("mixtral", {"num_local_experts": 4}, moe_config={"layers": [1]}).save_pretrained(tmp_path)
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gates = [layer.mlp.gate.weight.dtype for layer in model.model.language_model.layers]
    assert gates == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert torch.isfinite(model(**training_batch).loss)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("host", ["llama", "gpt_neox"])
def test_embeddings_can_be_resized(tiny_model, batch, tied, host, tmp_path):
    model = tiny_model(host, {"tie_word_embeddings": tied})
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(103, mean_resizing=False)
        after = model(**batch).logits
    assert after.shape[-1] == 103
    assert model.config.text_config.vocab_size == 103
    assert max_difference(after[..., :96], before) < 1e-6
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, after)


def test_text_only_batch_gives_every_trainable_parameter_a_gradient(tiny_model, text_batch):
    model = tiny_model(moe_config={"objectives": OBJECTIVES, "num_shared_experts": 1, "num_experts": 16}).train()
    model(**text_batch).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    vision = [
        p for name, p in model.named_parameters() if p.requires_grad and ("vision" in name or "connector" in name)
    ]
    assert len(vision) > 10
    assert all((p.grad == 0).all() for p in vision)


def test_text_only_batch_with_a_frozen_tower_does_not_run_it(tiny_model, text_batch, monkeypatch):
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    monkeypatch.setattr(model.model.vision_tower, "forward", None)
    model.train()(**text_batch).loss.backward()
    assert all((p.grad == 0).all() for p in model.model.connector.parameters())


def test_isolated_banks_and_unused_modalities_get_zero_gradients(tiny_model, text_batch):
    banks = {
        "text": {"num_experts": 2, "intermediate_size": 24},
        "vision": {"num_experts": 2, "intermediate_size": 16},
    }
    model = tiny_model(moe_config={"num_experts": None, "expert_banks": banks, "num_experts_per_tok": 1}).train()
    model(**text_batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_two_threads_can_call_one_model(tiny_model, make_batch):
    model = tiny_model()
    batches = [make_batch([(1, 6, 0), (0, 8, 1)]), make_batch([(2, 3, 2)])]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(25):
                if not torch.equal(model(**batches[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index % 2,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pickle_and_deepcopy_keep_the_routed_layers(tiny_model, batch):
    model = tiny_model()
    with torch.no_grad():
        expected = model(**batch).logits
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(twin(**batch).logits, expected)
            layer, original = twin.model.language_model.layers[1], model.model.language_model.layers[1]
            assert type(layer) is type(original)
            assert layer is not original
            decisions = twin(**batch, output_routing=True).routing.decisions
            assert sorted(decisions) == [1, 2]


def assert_fresh(model):
    """No parameter is constant (but norms and biases), NaN, or equal to another expert's."""
    for name, parameter in model.named_parameters():
        values = parameter.float()
        assert torch.isfinite(values).all(), name
        if parameter.dim() > 1:
            assert values.std() > 1e-3, name
    for layer in model.moe_layers().values():
        assert layer.gate.weight.std().item() == pytest.approx(0.15, rel=0.3)
        for stack in layer.experts.parameters():
            for expert in range(1, len(stack)):
                assert not torch.equal(stack[0], stack[expert])


def test_fresh_model_has_no_constant_nan_or_equal_expert(tiny_config):
    # Recycled memory full of NaN would show through an uninitialised parameter.
    for _ in range(8):
        torch.full((64, 96, 32), float("nan"))
    model = HfMoeForConditionalGeneration(tiny_config(moe_config={"num_shared_experts": 1}))
    assert_fresh(model)
    assert_fresh(HfMoeForConditionalGeneration._from_config(tiny_config(), dtype=torch.bfloat16))


def test_keys_missing_from_a_checkpoint_are_initialised(tiny_model, tmp_path):
    model = tiny_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = HfMoeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert any("experts.gate_up_proj" in key for key in info["missing_keys"])
    assert_fresh(loaded)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_initialisation_is_reproducible_and_spares_loaded_weights(tiny_model, tmp_path):
    first, second = tiny_model(seed=3), tiny_model(seed=3)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    first.save_pretrained(tmp_path)
    loaded = HfMoeForConditionalGeneration.from_pretrained(tmp_path)
    for (name, a), b in zip(first.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("host", "host_fields"),
    [
        ("llama", {}),
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("gemma3_text", {"head_dim": 8}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_saved_model_loads_with_equal_logits(tiny_model, batch, tmp_path, host, host_fields):
    model = tiny_model(host, host_fields, moe_config={"num_shared_experts": 1, "objectives": OBJECTIVES})
    with torch.no_grad():
        expected = model(**batch).logits
        model.save_pretrained(tmp_path / "one")
        loaded, info = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "one", output_loading_info=True)
        assert torch.equal(loaded(**batch).logits, expected)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        loaded.save_pretrained(tmp_path / "two", max_shard_size="60kB")
        again = HfMoeForConditionalGeneration.from_pretrained(tmp_path / "two")
        assert torch.equal(again(**batch).logits, expected)


def test_a_moe_host_is_saved_under_the_names_of_its_modules(tiny_model, tmp_path):
    model = tiny_model("mixtral", {"num_local_experts": 4}, moe_config={"num_shared_experts": 1})
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_the_model_without_its_head_routes_by_itself(tiny_model, batch):
    model = tiny_model()
    with torch.no_grad():
        output = model.base_model(**batch, output_router_logits=True)
        full = model(**batch, output_router_logits=True)
    assert torch.equal(model.lm_head(output.last_hidden_state), full.logits)
    assert all(torch.equal(a, b) for a, b in zip(output.router_logits, full.router_logits, strict=True))
    assert "router_logits" not in model.base_model(**batch)


def test_router_logits_are_none_where_widths_differ(tiny_model, batch):
    equal = tiny_model()(**batch, output_router_logits=True).router_logits
    assert [logits.shape for logits in equal] == [(batch["input_ids"].numel(), 4)] * 2
    model = tiny_model(moe_config={"num_experts": {"default": 4, "2": 6}, "objectives": OBJECTIVES})
    outputs = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    assert outputs.router_logits is None
    assert torch.isfinite(outputs.aux_loss) and outputs.aux_loss > 0, "objectives never read router_logits"


def test_logit_offsets_move_tokens_to_an_expert(tiny_model, batch):
    overrides = RoutingOverrides(logit_offset={2: torch.tensor([0.0, 0.0, 1e4, 0.0])})
    routing = tiny_model()(**batch, routing_overrides=overrides, output_routing=True).routing
    real = batch["attention_mask"].flatten().bool()
    assert (routing.decisions[2].expert_index[real] == 2).any(-1).all()


def test_a_wrapped_moe_block_still_sees_the_context(tiny_model, batch):
    model = tiny_model()

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.wrapped = module

        def forward(self, hidden_states):
            return self.wrapped(hidden_states)

    with torch.no_grad():
        expected = model(**batch).logits
        for layer in model.model.language_model.layers[1:]:
            layer.mlp = Wrapper(layer.mlp)
        outputs = model(**batch, output_routing=True)
    assert torch.equal(outputs.logits, expected)
    assert sorted(outputs.routing.decisions) == [1, 2]


def test_layers_outside_the_list_stay_dense(tiny_model):
    layers = tiny_model(moe_config={"layers": [1]}).model.language_model.layers
    assert [isinstance(layer.mlp, Block) for layer in layers] == [False, True, False]
    assert {type(layer).__name__ for layer in layers} == {"LlamaDecoderLayer"}


@pytest.mark.parametrize("called", [lambda model: model, lambda model: model.base_model], ids=["model", "backbone"])
def test_an_interrupted_call_leaves_no_context(called, tiny_model, text_batch):
    model = tiny_model(tower=False)
    inputs = {name: text_batch[name] for name in ("input_ids", "attention_mask")}

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.moe_layers()[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        called(model)(**inputs)
    handle.remove()
    assert CALL_CONTEXT.get() is None and ACTIVE_CONTEXT.get() is None
