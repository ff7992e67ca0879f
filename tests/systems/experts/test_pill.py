"""PILL: gated adapters behind the norms of a frozen decoder, by modality, and a gate on the values of images."""

import torch
from peft import get_peft_model
from torch.nn import functional as F

from hf_moe import MoeLoraConfig
from hf_moe.adapters.layer import tuner_layers


def adapt(model, **fields):
    return get_peft_model(model, MoeLoraConfig.from_system("pill", r=4, lora_alpha=4, **fields)).eval()


def glu(layer, expert, x):
    """Return W_up(silu(W_g x) * (W_d x)) of one adapter."""
    gate, down = layer.moe_lora_A["default"][expert].chunk(2)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, down), layer.moe_lora_B["default"][expert])


def test_a_block_computes_what_the_formulas_say(own_model, image_rows, randomise):
    model = adapt(own_model())
    randomise(model)
    block = model.base_model.model.model.language_model.layers[0]
    norm, value, second = block.input_layernorm, block.self_attn.v_proj, block.post_attention_layernorm
    seen = {}
    for name, module in {"norm": norm, "value": value, "second": second}.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    with torch.no_grad():
        model(**{name: tensor for name, tensor in image_rows.items() if name != "labels"})
        image = image_rows["input_ids"] == 60
        real = image_rows["attention_mask"].bool()
        # One adapter that both modalities share, behind the first norm.
        x, found = seen["norm"]
        plain = norm.base_layer(x)
        torch.testing.assert_close(found[real], (plain + glu(norm, 0, plain))[real])
        assert len(norm.moe_lora_A["default"]) == 1
        # Values of images by head, those of text as they are.
        x, found = seen["value"]
        assert torch.equal(x[real], seen["norm"][1][real])
        heads = value.base_layer(x).unflatten(-1, (-1, 8))
        gate = torch.tanh(x @ value.moe_lora_vector["default"][0].T)  # (B, S, heads)
        assert torch.equal(found[~image], heads.flatten(-2)[~image])
        torch.testing.assert_close(found[image], (heads * gate[..., None]).flatten(-2)[image])
        # In front of the feed-forward an adapter for each modality.
        x, found = seen["second"]
        plain = second.base_layer(x)
        for expert, tokens in enumerate((~image & real, image)):
            torch.testing.assert_close(found[tokens], (plain + glu(second, expert, plain))[tokens])


def test_training_on_captions_moves_the_adapters_of_images_alone(own_model, image_rows, text):
    model = adapt(own_model(), variant="caption")
    with torch.no_grad():
        before = model(**text).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model.train()(**image_rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in tuner_layers(model):
        moved = [bool(part.any()) for part in layer.moe_lora_B["default"]]
        assert layer.experts["default"].target.name == "post_attention_layernorm" and moved == [False, True]
    with torch.no_grad():
        assert torch.equal(model.eval()(**text).logits, before)
