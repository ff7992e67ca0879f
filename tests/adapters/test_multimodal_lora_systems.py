"""Published systems of adapters on MoE hosts, vision towers and modalities, and those made of existing adapters."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from hf_moe import MoeLoraConfig
from hf_moe.adapters import (
    TestTimeAdapter,
    assemble_lora_experts,
    score_adapters,
    select_adapters,
    select_data,
    update_similarities,
)
from hf_moe.adapters.objectives import tuner_layers
from hf_moe.analysis.experts import expert_redundancy


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
}


def moe_host(name):
    torch.manual_seed(0)
    return HOSTS[name]().eval()


def adapt(model, key, **fields):
    return get_peft_model(model, MoeLoraConfig.from_system(key, **fields)).eval()


def logits(model, inputs, **extra):
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}, **extra).logits


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
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_perft_routed_shifts_tasks_further_than_one_adapter_of_equal_active_rank(seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.stack([torch.randperm(40, generator=generator) + 10 for _ in range(4)])
    losses = {}
    for variant, fields in (("R", {"num_experts": 4, "num_experts_per_tok": 1}), ("S", {})):
        model = adapt(moe_host("mixtral"), "perft", variant=variant, r=4, lora_alpha=8, lora_dropout=0.0, **fields)
        optimizer = torch.optim.Adam(trainable(model).values(), lr=0.02)
        draws = torch.Generator().manual_seed(seed)
        for _ in range(50):
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
        torch.testing.assert_close(logits(model, pixels), base, atol=1e-6, rtol=0)
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
            torch.testing.assert_close(alone, logits(model, pixels)[:1], atol=1e-5, rtol=1e-5)


def test_padding_reaches_no_soft_slot():
    from hf_moe.adapters.routers import ADAPTER_ROUTERS
    from hf_moe.modeling.routing import MoELayerSpec, RoutingContext

    router = ADAPTER_ROUTERS["soft_moa"](MoELayerSpec(0, 8, 4, 4, 2), slots_per_expert=2, normalize=True)
    router.initialize(0.02)
    x = torch.randn(1, 6, 8)
    context = RoutingContext.all_text(x)
    context.token_mask[:, 4:] = False
    mixture = router(x[0], context)
    assert not mixture.dispatch[:, 4:].any() and not mixture.combine[:, 4:].any()
    torch.testing.assert_close(mixture.dispatch.sum(1), torch.ones(1, 8))
    alone = router(x[0, :4], RoutingContext.all_text(x[:, :4]))
    torch.testing.assert_close(mixture.dispatch[:, :4], alone.dispatch)


def test_partial_lora_leaves_text_bit_identical(own_model, image_rows, text):
    targets = r".*language_model.*(q_proj|v_proj)"
    base = own_model()
    before, before_images = logits(base, text), logits(base, image_rows)
    model = adapt(own_model(), "moe_redundancy_plora", target_modules=targets)
    assert any("experts" in name for name in trainable(model)) and not any(
        "router" in name for name in trainable(model)
    )
    train(model.train(), image_rows, steps=3)
    assert torch.equal(logits(model.eval(), text), before)
    assert (logits(model, image_rows) - before_images).abs().max() > 0.01


def test_partial_lora_takes_up_redundant_experts_for_images_alone(own_model, image_rows, text):
    base = own_model()
    with torch.no_grad():
        for stack in base.moe_layers()[1].experts.parameters():
            stack.copy_(stack[:1] + 0.02 * torch.randn(stack.shape, generator=torch.Generator().manual_seed(0)))
    model = adapt(base, "moe_redundancy_plora", target_modules=r".*language_model.*(q_proj|v_proj)")
    image, real = image_rows["input_ids"] == 60, text["attention_mask"].bool()

    def redundancy():
        return expert_redundancy(model, image_rows, image)[1], expert_redundancy(model, text, real)[1]

    before = redundancy()
    train(model.train(), image_rows, steps=10, learning_rate=0.02)
    after = redundancy()
    assert before[0] > 0.9 and after[0] < before[0] - 0.1
    assert after[1] == before[1]


@pytest.fixture
def pill(own_model):
    def build(**fields):
        names = ("input_layernorm", "post_attention_layernorm", "v_proj")
        overrides = {
            "input_layernorm": {"router": "constant", "num_experts": 1},
            "v_proj": {
                "experts": {"name": "value_gate", "head_dim": 8},
                "router": {"name": "modality", "modalities": ["image"]},
                "num_experts": 1,
            },
        }
        targets = rf".*language_model.*({'|'.join(names)})"
        return adapt(own_model(), "pill", target_modules=targets, target_overrides=overrides, r=4, **fields)

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


def test_pill_opens_its_gate_and_learns_more_with_it(pill, image_rows):
    image_rows["labels"][image_rows["input_ids"] == 60] = -100
    losses = {}
    for frozen in (False, True):
        torch.manual_seed(0)
        model = pill()
        gates = [p for name, p in model.named_parameters() if "moe_lora_vector" in name]
        for gate in gates:
            gate.requires_grad_(not frozen)
        losses[frozen] = train(model.train(), image_rows, steps=25, learning_rate=0.01)
        assert all(bool(gate.any()) != frozen for gate in gates)
    assert losses[False] < losses[True]


def test_pill_trains_image_adapters_alone_on_captions(own_model):
    targets = r".*language_model.*(input_layernorm|post_attention_layernorm)"
    model = adapt(own_model(), "pill", variant="caption", target_modules=targets)
    assert {len(layer.moe_lora_A["default"]) for layer in tuner_layers(model)} == {1}


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
    start = model(input_ids=ids, labels=labels).loss.item()
    end = train(model, {"input_ids": ids, "labels": labels}, steps=25, learning_rate=0.05)
    assert end < 0.5 * start
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    last = model.base_model.internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([60.0, 0.0]))
    single = PeftModel.from_pretrained(llama(), folders[0]).eval()
    found = logits(model.eval(), {"input_ids": ids})
    torch.testing.assert_close(found, logits(single, {"input_ids": ids}), atol=1e-4, rtol=1e-4)


def test_becotta_learns_domain_experts_and_adapts_adapters_alone(llama):
    generator = torch.Generator().manual_seed(0)
    domain = torch.arange(16) % 4
    rows = {"input_ids": torch.randint(1, 60, (16, 5), generator=generator), "domain_ids": domain}
    # The task is the same everywhere: what ties experts to domains is the objective alone.
    rows["labels"] = torch.full_like(rows["input_ids"], 10)
    found = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        objective = {"condition_information": {"coef": weight, "condition": "domain", "num_conditions": 4}}
        model = adapt(llama(), "becotta", num_experts=4, objectives=objective)
        base = logits(llama(), {"input_ids": rows["input_ids"]})
        torch.testing.assert_close(logits(model, rows), base, atol=1e-6, rtol=0)
        train(model.train(), rows, steps=30, learning_rate=0.02)
        made = []
        for layer in tuner_layers(model):
            layer.moe_lora_router["default"].register_forward_hook(lambda m, a, output, made=made: made.append(output))
        logits(model.eval(), rows)
        found[weight] = sum(information(decision.router_probs.view(16, 5, 4)[:, -1], domain) for decision in made)
    assert found[10.0] > 2 * found[0.0] and found[10.0] > 0.3

    source = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stream = {name: value for name, value in rows.items() if name != "labels"}
    accuracy = (logits(model, stream).argmax(-1) == rows["labels"]).float().mean()
    adapter = TestTimeAdapter(model, learning_rate=1e-3, confidence=0.1, restore_prob=0.01)
    for start in (0, 8, 0, 8):
        adapter.step(**{name: value[start : start + 8] for name, value in stream.items()})
    assert (logits(model, stream).argmax(-1) == rows["labels"]).float().mean() >= accuracy - 0.05
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, source[name])}
    assert changed and all("moe_lora_" in name for name in changed)
    adapter.restore_prob = 1.0
    adapter.step(**stream)
    assert not [name for name in adapter.trained if not torch.equal(adapter.trained[name], adapter.source[name])]


def information(probs, condition):
    """Return the mutual information of a condition and the experts, in nats, from rows of probabilities."""
    joint = torch.zeros(4, probs.shape[-1]).index_add(0, condition, probs) / len(probs)
    return float((joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True))).log()).sum())


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

    config = MoeLoraConfig.from_system("kshot_lora_moe", target_modules=["q_proj"])
    fields = {"router": config.router, "router_input": config.router_input, "num_experts_per_tok": None}
    model = assemble_lora_experts(llama(), [folders[index] for index in chosen], freeze_experts=False, **fields)
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
