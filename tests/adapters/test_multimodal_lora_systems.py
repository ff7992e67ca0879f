"""Published systems of adapters on MoE hosts, vision towers and modalities, and those made of existing adapters."""

import math

import pytest
import torch
from helpers.adapted import logits
from helpers.near import assert_near
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers
from hf_moe.adapters.low_rank import SharedAssignment
from hf_moe.construction.assembly import assemble_lora_experts
from hf_moe.construction.selection import score_adapters, select_adapters, select_data, update_similarities
from hf_moe.modeling.decisions import ExpertAssignment


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
HOSTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=24)
    ),
}


def moe_host(name):
    torch.manual_seed(0)
    return HOSTS[name]().eval()


def adapt(model, key, **fields):
    return get_peft_model(model, MoeLoraConfig.from_system(key, **fields)).eval()


def train(model, inputs, steps=1, learning_rate=0.05):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "variant, count", [("R", 8 * 2 * 16 * 32 + 8 * 32), ("E", 4 * 2 * 16 * 32), ("D", 8192), ("S", 1024)]
)
def test_perft_adapts_a_moe_host_in_four_compositions(text, host, variant, count):
    base = logits(moe_host(host), text)
    model = adapt(moe_host(host), "perft", variant=variant)
    assert torch.equal(logits(model, text), base)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == 2 * count
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model.train(), text, steps=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("moe_lora_" in name), name


def test_perft_embedded_follows_the_routing_of_its_host(text, randomise):
    model = adapt(moe_host("mixtral"), "perft", variant="E")
    randomise(model)
    layer = next(tuner_layers(model))
    x, weight = torch.randn(5, 32), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [1, 3]])  # never expert 2
    output = layer(x, index, weight)
    lora_a, lora_b = layer.moe_lora_A["default"], layer.moe_lora_B["default"]
    expected = layer.base_layer(x, index, weight)
    for slot in range(2):
        delta = torch.einsum("tor,tri,ti->to", lora_b[index[:, slot]], lora_a[index[:, slot]], x)
        expected = expected + 2.0 * weight[:, [slot]] * delta
    assert_near(output, expected, 1e-5)
    output.sum().backward()
    assert [bool(part.any()) for part in lora_b.grad] == [True, True, False, True]


def test_perft_routed_leaves_the_choice_of_the_host_alone(text, randomise):
    model = adapt(moe_host("mixtral"), "perft", variant="R")
    chosen = []
    gate = model.base_model.model.model.layers[0].mlp.get_base_layer().gate
    gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    for seed in range(2):
        logits(model, text)
        next(tuner_layers(model)).moe_lora_router["default"].weight.data.normal_(
            generator=torch.Generator().manual_seed(seed)
        )
    assert torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize(
    "seed, steps", [(0, 50), *(pytest.param(seed, 200, marks=pytest.mark.slow) for seed in range(3))]
)
def test_perft_routed_shifts_tasks_further_than_one_adapter_of_equal_active_rank(seed, steps):
    generator = torch.Generator().manual_seed(seed)
    words = torch.stack([torch.randperm(40, generator=generator) + 10 for _ in range(4)])
    losses = {}
    for variant, fields in (("R", {"num_experts": 4, "num_experts_per_tok": 1}), ("S", {})):
        model = adapt(moe_host("mixtral"), "perft", variant=variant, r=4, lora_alpha=8, lora_dropout=0.0, **fields)
        optimizer = torch.optim.Adam(trainable(model).values(), lr=0.02)
        draws = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            task, word = torch.randint(0, 4, (64,), generator=draws), torch.randint(0, 40, (64,), generator=draws)
            ids = torch.stack([task + 1, word + 10, words[task, word]], dim=1)
            labels = ids.clone()
            labels[:, :2] = -100
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[variant] = loss.item()
    assert losses["R"] < losses["S"]


def test_soft_adapters_mix_slots_in_a_vision_tower(vit, randomise):
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    base = logits(vit(), pixels)
    for variant in ("soft", "dense"):
        model = adapt(vit(), "soft_moa", variant=variant, num_experts=4, r=4, modules_to_save=["classifier"])
        assert_near(logits(model, pixels), base, 1e-6)
        mixtures = []
        router = next(tuner_layers(model)).moe_lora_router["default"]
        router.register_forward_hook(lambda module, args, output, mixtures=mixtures: mixtures.append(output))
        randomise(model)
        model(**pixels, labels=torch.tensor([0, 2])).loss.backward()
        layer = next(tuner_layers(model))
        for stack in (layer.moe_lora_A["default"], layer.moe_lora_B["default"]):
            assert all(part.any() for part in stack.grad)
        if variant == "soft":
            dispatch, combine = mixtures[0].dispatch, mixtures[0].combine
            assert dispatch.shape == (2, 5, 4)
            torch.testing.assert_close(dispatch.sum(1), torch.ones(2, 4))
            torch.testing.assert_close(combine.sum(-1), torch.ones(2, 5))
            alone = logits(model, {"pixel_values": pixels["pixel_values"][:1]})
            assert_near(alone, logits(model, pixels)[:1], 1e-5)


def test_soft_slots_leave_padding_out_and_let_an_early_token_see_a_late_one(text, randomise):
    """The second is why they are refused in a causal layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    host = BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, initializer_range=0.15)).eval()
    model = adapt(host, "soft_moa", num_experts=4, r=4, target_modules=[r"intermediate.dense"])
    randomise(model)
    ids = text["input_ids"][:1]
    padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    alone, beside = logits(model, {"input_ids": ids}), logits(model, {"input_ids": padded, "attention_mask": mask})
    assert_near(alone, beside, 1e-5)
    layer = next(tuner_layers(model))
    hidden = torch.randn(1, 6, 32)
    late = hidden.clone()
    late[:, -1] += 1.0
    assert (layer(hidden) - layer(late))[:, :-1].abs().max() > 1e-4


def test_padding_reaches_no_soft_slot():
    from hf_moe.modeling.layer_spec import MoELayerSpec
    from hf_moe.modeling.routers.soft_moe import SoftMoeRouter
    from hf_moe.modeling.routing_context import RoutingContext

    router = SoftMoeRouter(MoELayerSpec(0, 8, 4, 4, 2), slots_per_expert=2, normalize=True)
    router.initialize(0.02)
    x = torch.randn(1, 6, 8)
    context = RoutingContext.all_text(x)
    context.token_mask[:, 4:] = False
    mixture = router(x[0], context)
    assert not mixture.dispatch[:, 4:].any() and not mixture.combine[:, 4:].any()
    torch.testing.assert_close(mixture.dispatch.sum(1), torch.ones(1, 8))
    alone = router(x[0, :4], RoutingContext.all_text(x[:, :4]))
    torch.testing.assert_close(mixture.dispatch[:, :4], alone.dispatch)


@pytest.fixture
def pill(own_model):
    def build(**fields):
        return adapt(own_model(), "pill", r=4, **fields)

    return build


def test_pill_gates_the_values_of_images_and_routes_adapters_by_modality(own_model, pill, image_rows, text, randomise):
    model = pill()
    assert torch.equal(logits(model, text), logits(own_model(), text))
    values = []
    layers = {name.rsplit(".", 1)[-1]: layer for name, layer in model.named_modules() if hasattr(layer, "moe_lora_A")}
    layers["v_proj"].register_forward_hook(lambda module, args, output: values.append(output))
    model.train()(**image_rows).loss.backward()
    image = image_rows["input_ids"] == 60
    assert not values[0][image].any() and values[0][~image].any()
    assert layers["v_proj"].moe_lora_vector["default"].grad.abs().sum() > 0
    randomise(model)
    read = []
    norm = model.base_model.model.model.language_model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, output: read.append(output.detach()))
    for _ in range(2):
        logits(model.eval(), image_rows)
        with torch.no_grad():
            norm.moe_lora_A["default"][1] += 1.0  # the adapter of images
    real_text = ~image & image_rows["attention_mask"].bool()
    assert torch.equal(read[0][real_text], read[1][real_text]) and not torch.equal(read[0][image], read[1][image])


@pytest.mark.parametrize("steps", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_pill_opens_its_gate_and_learns_captions_with_it(pill, steps):
    ids = torch.tensor([[5, 60, 60, 60, 60, 6, 10 + image] for image in range(4)])  # what to write shows in the image
    labels = ids.masked_fill(torch.arange(7) < 6, -100)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    captions = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
    losses = {}
    for frozen in (False, True):
        torch.manual_seed(0)
        model = pill()
        gates = [p for name, p in model.named_parameters() if "moe_lora_vector" in name]
        for gate in gates:
            gate.requires_grad_(not frozen)
        losses[frozen] = train(model.train(), captions, steps=steps, learning_rate=0.01)
        assert all(bool(gate.any()) != frozen for gate in gates)
    assert losses[False] < 0.9 * losses[True]


def test_pill_goes_on_from_captions_with_the_image_adapters_that_they_trained(own_model, image_rows, text, tmp_path):
    captions = adapt(own_model(), "pill", variant="caption", r=4)
    train(captions.train(), image_rows, steps=3)
    assert torch.equal(logits(captions.eval(), text), logits(own_model(), text))
    captions.save_pretrained(tmp_path)
    config = MoeLoraConfig.from_system("pill", r=4)
    model = PeftModel.from_pretrained(own_model(), tmp_path, config=config, is_trainable=True).eval()
    assert torch.equal(logits(model, text), logits(own_model(), text))
    norm, x = "base_model.model.model.language_model.layers.0.post_attention_layernorm", torch.randn(2, 9, 32)
    trained, went_on = (item.get_submodule(norm) for item in (captions, model))
    assert trained.moe_lora_B["default"][1].any() and not trained.moe_lora_B["default"][0].any()
    for container in ("moe_lora_A", "moe_lora_B"):
        assert torch.equal(getattr(went_on, container)["default"], getattr(trained, container)["default"])
    images = SharedAssignment.of(ExpertAssignment(torch.ones(18, 1, dtype=torch.long), torch.ones(18, 1), 2))
    for layer in (trained, went_on):
        layer.decision = lambda *args: images
    assert torch.equal(trained(x), went_on(x)) and not torch.equal(trained(x), trained.get_base_layer()(x))
    assert trainable(model)


@pytest.fixture
def bank(llama, tmp_path):
    """Save LoRA adapters that write one token each, whatever they read."""

    def build(tokens, noise=0.0):
        folders = []
        for number, token in enumerate(tokens):
            model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
            ids = torch.randint(1, 60, (8, 5), generator=torch.Generator().manual_seed(0))
            torch.manual_seed(number)
            rows = {"input_ids": ids, "labels": torch.full_like(ids, token)}
            train(model, rows, steps=30, learning_rate=0.03)
            folders.append(str(tmp_path / f"bank-{number}"))
            model.save_pretrained(folders[-1])
        return folders

    return build


def test_x_lora_is_pefts_own_and_learns_to_choose(llama, bank):
    folders = bank([10, 20])
    config = MoeLoraConfig.from_system("x_lora", hidden_size=32, adapters=folders, task_type="CAUSAL_LM")
    assert isinstance(config, XLoraConfig)
    host = llama()
    host.config.use_cache = False
    model = get_peft_model(host, config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    ids = torch.randint(1, 60, (8, 5), generator=torch.Generator().manual_seed(0))
    first = ids[:, :1] % 2 == 0
    ids = torch.where(first, 5, 6).expand_as(ids).contiguous()  # tells which of the two is wanted
    labels = torch.where(first, 10, 20).expand_as(ids).contiguous()
    train(model, {"input_ids": ids, "labels": labels}, steps=60, learning_rate=0.1)
    for task, folder in enumerate(folders):
        wanted = (first[:, 0] if task == 0 else ~first[:, 0]).nonzero().squeeze(1)
        rows = {"input_ids": ids[wanted], "labels": labels[wanted]}
        single = PeftModel.from_pretrained(llama(), folder).eval()
        with torch.no_grad():
            assert model(**rows).loss <= 1.1 * single(**rows).loss
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    last = model.base_model.internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([60.0, 0.0]))
    single = PeftModel.from_pretrained(llama(), folders[0]).eval()
    found = logits(model.eval(), {"input_ids": ids})
    assert_near(found, logits(single, {"input_ids": ids}), 1e-4)


def test_kshot_picks_the_relevant_adapters_but_no_duplicates(llama, bank):
    # 0 and 3 write the wanted tokens, 4 is a copy of 3, the others write something else.
    folders = bank([10, 30, 40, 20, 20, 50])
    folders[4] = folders[3]
    ids = torch.randint(1, 60, (1, 5), generator=torch.Generator().manual_seed(0))
    shots = [{"input_ids": ids, "labels": torch.full_like(ids, token)} for token in (10, 20)]
    host = llama()
    before = logits(host, {"input_ids": ids})
    accuracies, perplexities = score_adapters(host, folders, shots)
    assert torch.equal(logits(host, {"input_ids": ids}), before)
    similarities = update_similarities(folders)
    torch.testing.assert_close(similarities[3, 4], torch.tensor(1.0))
    torch.testing.assert_close(similarities.diagonal(), torch.ones(6))
    relevant = sorted(range(6), key=lambda index: perplexities[index])[:3]
    assert set(relevant) == {0, 3, 4} and max(accuracies) == accuracies[0] == 0.5
    chosen = select_adapters(accuracies, perplexities, similarities, num_selected=2, shortlist=3)
    assert chosen in ([0, 3], [0, 4])

    model = assemble_lora_experts(llama(), [folders[index] for index in chosen], system="kshot_lora_moe")
    bank_config = model.peft_config["default"]
    assert (bank_config.num_experts, bank_config.num_experts_per_tok, bank_config.router_input) == (2, None, "target")
    assert train(model, {"input_ids": ids, "labels": shots[1]["labels"]}, steps=5) < math.inf
    assert any("moe_lora_A" in name for name in trainable(model))


def test_selected_data_is_near_the_shots_and_holds_no_duplicates():
    generator = torch.Generator().manual_seed(0)
    shots = F.normalize(torch.randn(3, 8, generator=generator), dim=-1)
    pool = torch.cat([shots + 0.02 * torch.randn(3, 8, generator=generator) for _ in range(3)] + [-shots])
    taken = select_data(shots, pool, num_selected=5, dedup_threshold=0.9)
    assert set(index % 3 for index in taken[:3]) == {0, 1, 2} and all(index < 9 for index in taken[:3])
    cosine = F.cosine_similarity(pool[taken][:, None], pool[taken][None], dim=-1).fill_diagonal_(0.0)
    assert cosine.max() <= 0.9
