"""Mixture-of-Mamba: projections of a mixer per modality, and one scan for all tokens."""

import pytest
import torch
from helpers.caches import decode_one_by_one
from helpers.hosts.recurrent import HOSTS
from helpers.mechanisms import IMAGE, JAMBA, TEXT, TOWER
from helpers.near import assert_near
from transformers import CLIPVisionConfig, JambaConfig, LlamaConfig, MambaConfig

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration, from_system
from hf_moe.modeling.per_modality import PerModality


NOTHING = {"split": [], "split_norm": False}
KINDS = ("jamba", "bamba", "falcon_h1")
PICTURE = slice(3, 7)


def split_model(name="jamba", **fields) -> HfMoeForConditionalGeneration:
    moe_config = {"layer": {"name": "mixture_of_mamba", **fields}}
    return from_system("mixture_of_mamba", host=HOSTS[name].build(), moe_config=moe_config)


@torch.no_grad()
def drifted(model):
    """Move the copies apart, as training does."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, PerModality):
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def copies_of(model, modality):
    return [p for m in model.modules() if isinstance(m, PerModality) for p in getattr(m, modality).parameters()]


def make_rows(length=14):
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(0))
    types = torch.zeros_like(ids)
    types[:, PICTURE] = 1
    return {"input_ids": ids, "moe_mm_token_type_ids": types}


@pytest.mark.parametrize(
    "options", [{}, {"split": [], "split_norm": False}, {"modalities": ["text", "image", "audio"]}]
)
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_copies_compute_what_the_host_does(name, options):
    rows, model = make_rows(), split_model(name, **options)
    expected = HOSTS[name].build()(input_ids=rows["input_ids"]).logits
    assert_near(model(**rows).logits, expected, 1e-6)
    if options != NOTHING:
        assert (drifted(model)(**rows).logits - expected).abs().max() > 1e-2


def test_every_projection_and_norm_of_a_mixer_is_split():
    layers = split_model().model.layers
    found = {path for path, module in layers[0].named_modules() if isinstance(module, PerModality)}
    mixer = ("in_proj", "x_proj", "dt_proj", "out_proj", "dt_layernorm", "b_layernorm", "c_layernorm")
    assert found == {"input_layernorm", *(f"mamba.{name}" for name in mixer)}
    assert not [module for module in layers[1].modules() if isinstance(module, PerModality)], "the layer attends"
    alone = split_model(split=["dt_proj"], split_norm=False).model.layers[0]
    assert [path for path, module in alone.named_modules() if isinstance(module, PerModality)] == ["mamba.dt_proj"]


@pytest.mark.parametrize("part", ["in_proj", "x_proj", "dt_proj", "out_proj"])
@torch.no_grad()
def test_a_token_uses_the_projection_of_its_modality(part):
    """A row of text is the dense model with the projection of text, a row of images that with the other."""
    model, rows = drifted(split_model(split=[part], split_norm=False)), make_rows()
    mixer, dense = model.model.layers[0].mamba, HOSTS["jamba"].build()
    for modality, name in enumerate(("text", "image")):
        own = getattr(getattr(mixer, part), name)
        getattr(dense.model.layers[0].mamba, part).load_state_dict(own.state_dict())
        types = torch.full_like(rows["input_ids"], modality)
        found = model(input_ids=rows["input_ids"], moe_mm_token_type_ids=types).logits
        assert_near(found, dense(input_ids=rows["input_ids"]).logits, 1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_weights_learn_from_tokens_of_their_modality_alone(name):
    model, rows = drifted(split_model(name)).train(), make_rows()
    for modality, (own, other) in enumerate((("text", "image"), ("image", "text"))):
        model.zero_grad()
        types = torch.full_like(rows["input_ids"], modality)
        model(input_ids=rows["input_ids"], moe_mm_token_type_ids=types, labels=rows["input_ids"]).loss.backward()
        assert all(parameter.grad.any() for parameter in copies_of(model, own))
        assert not any(parameter.grad.any() for parameter in copies_of(model, other))


@torch.no_grad()
def test_modalities_meet_in_the_state():
    model, rows = drifted(split_model()), make_rows()
    seen = []
    model.model.layers[0].mamba.register_forward_hook(lambda _, args, output: seen.append(output))
    model(**rows)
    ids = rows["input_ids"].clone()
    ids[:, 1] = ids[:, 1] % 90 + 5
    model(**{**rows, "input_ids": ids})
    moved = (seen[0] - seen[1]).abs().amax((0, 2))
    assert (moved[PICTURE] > 1e-6).all() and not moved[:1].any()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_decoding_with_states_is_the_whole_forward(name):
    model, rows = drifted(split_model(name)), make_rows()
    for start in (5, 9):  # within the image and after it
        found, _ = decode_one_by_one(model, start, **rows)
        assert_near(found, model(**rows).logits, 1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@torch.no_grad()
def test_an_answer_about_an_image_is_the_same_with_a_cache(options):
    torch.manual_seed(0)
    config = HfMoeConfig(
        text_config=JambaConfig(**{**TEXT, **JAMBA}),
        vision_config=CLIPVisionConfig(**TOWER),
        image_token_id=IMAGE,
        moe_config={"layers": [], "layer": "mixture_of_mamba"},
    )
    model = drifted(HfMoeForConditionalGeneration(config)).eval()
    ids = torch.tensor([[0, 0, 5, *[IMAGE] * 4, 7, 8], [3, 4, 5, *[IMAGE] * 4, 9, 8]])
    rows = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    found = model.generate(**rows, max_new_tokens=6, do_sample=False, **options)
    beams = {"num_beams": options.get("num_beams", 1)}
    assert torch.equal(found, model.generate(**rows, max_new_tokens=6, do_sample=False, use_cache=False, **beams))


def test_a_mixer_in_training_does_not_reach_for_the_fused_kernel():
    layer = split_model("bamba").train().model.layers[0]
    assert layer.training and layer.mamba.in_proj.training and not layer.mamba.training


@pytest.mark.parametrize(
    "host, reason", [(LlamaConfig, "has no Mamba mixer"), (MambaConfig, "no feed-forward under mlp")]
)
def test_a_host_without_mixers_beside_feed_forwards_is_refused(host, reason):
    text = host(hidden_size=32, num_hidden_layers=2, vocab_size=64)
    moe_config = {"layers": [], "layer": "mixture_of_mamba"}
    with pytest.raises(ValueError, match=reason), torch.device("meta"):
        HfMoeForConditionalGeneration(HfMoeConfig(text_config=text, moe_config=moe_config, vision_config=None))


def task_loss(split: bool, seed: int, steps: int = 300) -> float:
    """Return the loss on what follows a pair of tokens, which is another for every modality."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_experts": 1}
    text = JambaConfig(**sizes, mamba_d_state=2, mamba_expand=1, initializer_range=0.2, use_cache=False)
    layer = {"name": "mixture_of_mamba", **({} if split else NOTHING)}
    config = HfMoeConfig(text_config=text, moe_config={"layers": [], "layer": layer}, vision_config=None)
    model = HfMoeForConditionalGeneration(config).train()
    facts = torch.randint(16, (2, 16, 16))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        ids, types = torch.randint(16, (32, 12)), torch.randint(2, (32, 12))
        labels = torch.full_like(ids, -100)
        labels[:, 2:] = facts[types[:, 1:-1], ids[:, :-2], ids[:, 1:-1]]
        loss = model(input_ids=ids, mm_token_type_ids=types, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-30:]) / 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_modalities_learn_more_than_in_one_mixer(seed):
    assert task_loss(True, seed) < 0.5 * task_loss(False, seed)
