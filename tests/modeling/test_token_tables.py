"""Which row of a table a token has, and how tables are fitted to data."""

import pytest
import torch
from helpers.hosts.catalogue import HOSTS
from helpers.router_cases import make_context, make_hidden, make_router, make_spec
from peft import get_peft_model

from hf_moe import HfMoeForConditionalGeneration, MoeLoraConfig
from hf_moe.construction.token_tables import fit_token_tables
from hf_moe.modeling.routing_context import RoutingContext


ROUTERS = ["hash_layers", "maskmoe"]
VOCAB = 96
by_router = pytest.mark.parametrize("name", ROUTERS)


def fitted(model, batch, *, routers):
    assert fit_token_tables(model, [batch]) == routers
    return model


@by_router
def test_images_have_the_row_of_the_nearest_centroid(name, tiny_model, batch, tmp_path):
    model = tiny_model(moe_config={"router": {"name": name, "codebook_size": 3}})
    fitted(model, batch, routers=2).save_pretrained(tmp_path)
    model = HfMoeForConditionalGeneration.from_pretrained(tmp_path).eval()
    context = model(**batch, output_routing=True).routing
    router, image = model.moe_layers()[1].router, context.modality_ids.flatten() == 1
    rows = router.rows(context, torch.device("cpu"))
    similar = torch.cosine_similarity(context.embeddings.flatten(0, 1)[:, None], router.centroids, dim=-1)
    assert torch.equal(rows[image] - VOCAB, similar[image].argmax(-1)) and len(rows[image].unique()) == 3
    assert torch.equal(rows[~image], context.input_ids.flatten()[~image])


@by_router
def test_the_same_batches_give_the_same_table(name, tiny_model, batch):
    options = {"name": name, "codebook_size": 2}
    models = [fitted(tiny_model(moe_config={"router": options}, seed=0), batch, routers=2) for _ in range(2)]
    first, second = (list(model.buffers()) for model in models)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@by_router
def test_a_modality_without_centroids_shares_a_row(name):
    router = make_router(name, spec=make_spec(vocab_size=9))
    modality = torch.tensor([[0, 1, 2, 3, 1]])
    context = RoutingContext(modality, modality >= 0, torch.tensor([[8, 1, 2, 3, 10]]))
    assert router.rows(context, torch.device("cpu")).tolist() == [8, 9, 10, 11, 9]
    context.modality_ids = torch.zeros_like(modality)
    assert router.rows(context, torch.device("cpu")).tolist() == [8, 1, 2, 3, 1], "an id of after the build"


@by_router
def test_hosts_and_lora_experts_look_tokens_up(name):
    host = HOSTS["llava"]
    model = HfMoeForConditionalGeneration.from_host(host.build(), moe_config={"router": name})
    fitted(model, host.inputs(), routers=len(model.moe_layers()))
    context = model(**host.inputs(), output_routing=True).routing
    assert (context.modality_ids == 1).any() and len(context.decisions) == len(model.moe_layers())
    lora = MoeLoraConfig(target_modules=["q_proj"], model_part="language_model", num_experts=4, router=name)
    model = get_peft_model(host.build(), lora)
    fitted(model, host.inputs(), routers=len(model.base_model.model.model.language_model.layers))


@by_router
def test_what_has_no_ids_is_refused(name):
    with pytest.raises(ValueError, match="looks tokens up by their ids, and here they have none"):
        make_router(name, spec=make_spec(place="vision"))
    with pytest.raises(ValueError, match="looks tokens up by their ids"):
        get_peft_model(HOSTS["llava"].build(), MoeLoraConfig(target_modules=["q_proj"], num_experts=4, router=name))
    router, context = make_router(name, spec=make_spec(vocab_size=9)), make_context()
    with pytest.raises(ValueError, match="call the model with input_ids"):
        router(make_hidden(context), context)
    router = make_router(name, {"codebook_size": 2}, make_spec(vocab_size=9))
    with pytest.raises(ValueError, match="set codebook_size=1"):
        router(make_hidden(context), make_context(input_ids=torch.zeros(3, 10).long()))
