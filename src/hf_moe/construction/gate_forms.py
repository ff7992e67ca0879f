"""What a gate computes, and the options with which a router computes the same.

A router that takes the place of a trained one starts from its gate. Whether the outputs stay as they are depends on
what the old gate does and on what the new router can do:

| from \\ to | `top_k` | `ming_multi_router` | `anyexperts` |
|---|---|---|---|
| softmax or sigmoid, plain or renormalised, with a scale | = | = if renormalised | = if 1 < K < E |
| with a bias on sigmoids | = | = if renormalised | = if 1 < K < E |
| with a bias on a softmax | = | = if renormalised | = if 1 < K < E |
| groups by their two best | = | = if renormalised | = if 1 < K < E |
| groups by their best | = | – | = if 1 < K < E |
| a capacity while training | = | – | – |
| a bank for text, one for vision | – | – | = if 1 < K < E |
| a gate per modality | – | – | – |
| the input scaled (Llama 4) | – | – | – |

`=` keeps the outputs, `–` is refused; E counts the experts that a token may choose from. To its own kind a router is
always converted. The other routers of this library choose by rules of their own (`moiie`, `adamoe`, `ernie45_vl`,
`dynamic_moe_top_p`, `evomoe_dtr`): they take over the rows of a gate with softmax scores, and
the outputs change. So does a user's own router. Shared branches are no part of a gate, and stay.
"""

from dataclasses import dataclass
from typing import Any

from ..modeling.bias_balancing import BiasBalancedRouter
from ..modeling.layer_spec import MoELayerSpec
from ..modeling.routers.ernie45_vl import Ernie45VLRouter
from ..modeling.routers.llama4 import Llama4Router
from ..modeling.routers.top_k import TopKRouter
from ..modeling.routing import Router


@dataclass(frozen=True)
class GateForm:
    """What a top-k gate computes at inference.

    Attributes:
        scores: `"softmax"` or `"sigmoid"`.
        normalised: whether the K weights are divided by their sum.
        scale: multiplies the weights.
        biased: whether a bias moves the choice.
        groups: n_group, topk_group and group_score.
        banks: whether text and vision tokens have experts of their own.
        capacity: of an expert while training, see [`TopKRouter`].
    """

    scores: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    biased: bool = False
    groups: tuple[int, int, str] = (1, 1, "best_two")
    banks: bool = False
    capacity: float | None = None


def gate_form(router: Router) -> GateForm | None:
    """Return what a router computes; `None` for one that is more, or other, than one top-k gate."""
    if isinstance(router, TopKRouter):
        return GateForm(
            router.score_function,
            router.norm_topk_prob,
            router.routed_scaling_factor,
            biased=_is_biased(router),
            groups=router.groups,
            capacity=router.capacity_factor,
        )
    # What boundary tokens are, ERNIE's router can be told and no other; a large divisor does more than renormalise.
    if isinstance(router, Ernie45VLRouter) and not router.boundary_token_ids and router.norm_min < 1e-6:
        return GateForm(biased=_is_biased(router), banks=True)
    return None


def _is_biased(router: BiasBalancedRouter) -> bool:
    bias = router.e_score_correction_bias
    return bias is not None and bool(bias.any())


def needs(form: GateForm, spec: MoELayerSpec) -> dict[str, str]:
    """Return what a router must be able to do to compute the same, with words for it."""
    slots, choice = spec.num_experts_per_tok, _open_experts(form, spec)
    found = {
        "sigmoid": ("sigmoid scores", form.scores == "sigmoid"),
        "plain": ("weights that are not renormalised", not form.normalised),
        "scale": (f"weights scaled by {form.scale}", form.scale != 1.0),
        "bias": ("a bias on the choice", form.biased),
        "groups": ("expert groups", form.groups[0] > 1),
        "best": ("groups scored by their best expert", form.groups[0] > 1 and form.groups[2] == "best"),
        "banks": ("a bank of experts for text and one for vision", form.banks),
        "capacity": ("a capacity while training (capacity_factor)", form.capacity is not None),
        "fixed": (
            f"a fixed number of slots (AnyExperts moves between slots, and num_experts_per_tok={slots} of {choice} "
            "experts that a token may choose from leaves none: it needs 1 < num_experts_per_tok < num_experts)",
            not 1 < slots < choice,
        ),
    }
    return {name: words for name, (words, needed) in found.items() if needed}


# What each router can do of these.
EXPRESSES = {
    "top_k": {"sigmoid", "plain", "scale", "bias", "groups", "best", "capacity", "fixed"},
    "ming_multi_router": {"sigmoid", "scale", "bias", "groups", "fixed"},
    "anyexperts": {"sigmoid", "plain", "scale", "bias", "groups", "best", "banks"},
}


def starting_options(name: str, router: Router, spec: MoELayerSpec) -> dict[str, Any]:
    """Return the options with which the router `name` computes what `router` does; none where it has rules of its own.

    Raises:
        ValueError: if it cannot, with the reason and the routers that can.
    """
    form = gate_form(router)
    own_kind = router.mechanism_name == name
    place = f"Layer {spec.layer_idx}: {name!r} cannot start as this {type(router).__name__}"
    if name not in EXPRESSES:
        scores = getattr(router, "score_function", "softmax")
        softmax_rows = scores != "sigmoid" and not isinstance(router, Llama4Router | Ernie45VLRouter)
        if not own_kind and name in OWN_RULES and not softmax_rows:
            raise ValueError(f"{place}: it takes over the rows of a gate with softmax scores. {_remedy(form, spec)}")
        return {}
    if form is None:
        if own_kind:
            return {}
        scaled = isinstance(router, Llama4Router)
        reason = "whose weight scales what an expert sees" if scaled else "which is more than one top-k gate"
        raise ValueError(f"{place}, {reason}. {_remedy(form, spec)}")
    missing = [words for need, words in needs(form, spec).items() if need not in EXPRESSES[name]]
    if missing:
        raise ValueError(f"{place}, which has {' and '.join(missing)}. {_remedy(form, spec)}")
    return OPTIONS[name](form, spec)


def _remedy(form: GateForm | None, spec: MoELayerSpec) -> str:
    able = [] if form is None else [name for name, can in EXPRESSES.items() if needs(form, spec).keys() <= can]
    return (
        f"Convert to {' or '.join(map(repr, able))}, which can." if able else "Keep the router, or train another one."
    )


def top_k_options(form: GateForm, spec: MoELayerSpec) -> dict[str, Any]:
    options = {
        "score_function": form.scores,
        "norm_topk_prob": form.normalised,
        "routed_scaling_factor": form.scale,
        **_group_options(form),
    }
    if form.capacity is not None:
        options["capacity_factor"] = form.capacity
    return options | {"bias_update_rate": 0.001} if form.biased else options


def ming_options(form: GateForm, spec: MoELayerSpec) -> dict[str, Any]:
    n_group, topk_group, _ = form.groups
    return {
        "gate": "softmax" if form.scores == "softmax" else "sigmoid_bias",
        "routed_scaling_factor": form.scale,
        "n_group": n_group,
        "topk_group": topk_group,
    }


def anyexperts_options(form: GateForm, spec: MoELayerSpec) -> dict[str, Any]:
    """Return the options with which AnyExperts gives every token the K slots of the gate."""
    slots = spec.num_experts_per_tok
    low = min(2, slots - 1)
    plain = form.scores == "softmax" and not form.biased and form.groups[0] == 1
    options: dict[str, Any] = {
        "min_slots": low,
        "max_slots": min(_open_experts(form, spec), max(slots + 1, slots * 3 // 2)),
        "fusion_alpha": 0.0,
        "normalise": "filled" if form.normalised else "none",
        # A lone slot weighs 1 whatever the importance; the probe gives it a gradient.
        "probe_slot": low == 1 and form.normalised,
    }
    if not plain:
        options |= {"score_function": form.scores, **_group_options(form)}
    if form.scale != 1.0:
        options["routed_scaling_factor"] = form.scale
    if form.banks:
        options["isolated_banks"] = True
    return options


def _group_options(form: GateForm) -> dict[str, Any]:
    return dict(zip(("n_group", "topk_group", "group_score"), form.groups, strict=True)) if form.groups[0] > 1 else {}


def _open_experts(form: GateForm, spec: MoELayerSpec) -> int:
    """Return how many experts a token may choose from: those of its groups, or of the smallest bank."""
    n_group, topk_group, _ = form.groups
    smallest = min((size for _, size, _ in spec.banks), default=spec.num_experts // 2)
    return smallest if form.banks else spec.num_experts // n_group * topk_group


OPTIONS = {"top_k": top_k_options, "ming_multi_router": ming_options, "anyexperts": anyexperts_options}
OWN_RULES = ("moiie", "adamoe", "ernie45_vl", "dynamic_moe_top_p", "evomoe_dtr", "llama4")
