"""The resolved facts of one place where experts are mixed, and the site by which its decisions are found."""

from dataclasses import dataclass


# The index of a decoder layer, or "<place>.<layer>.<part>" elsewhere: "vision.3", "1.attention", "2.step1".
Site = int | str


@dataclass(frozen=True)
class MoELayerSpec:
    """The resolved facts of one MoE layer, handed to every mechanism that is built for it.

    Attributes:
        layer_idx: index of the layer in its decoder or tower.
        hidden_size: d.
        num_experts: E, over all banks.
        num_experts_per_tok: K.
        first_expert: the first of the experts that the router may choose; it makes the logits of those before -inf.
        expert_intermediate_size: f of a single bank.
        hidden_act: name of the activation, as in Transformers' `ACT2FN`.
        gated: whether an expert is `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        bias: whether an expert's projections have biases.
        banks: (name, number of experts, width) of every isolated bank; empty for the usual single bank.
        returns_tuple: whether the host's layer unpacks what its feed-forward returns, as Llama 4's does.
        output_size: the width of what the experts return, where it is not `hidden_size`.
        part: which of several decisions in the layer, such as `"attention"` or `"step1"`.
        place: the part of the model outside of the decoder, such as `"vision"` or `"connector"`.
        causal: whether a token may depend on earlier tokens alone; patches of a tower see each other.
        vocab_size: how many token ids there are; `None` where tokens have none, as in towers.
    """

    layer_idx: int
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    expert_intermediate_size: int
    hidden_act: str = "silu"
    gated: bool = True
    bias: bool = False
    banks: tuple[tuple[str, int, int], ...] = ()
    returns_tuple: bool = False
    output_size: int | None = None
    part: str = ""
    place: str = ""
    causal: bool = True
    vocab_size: int | None = None
    first_expert: int = 0

    @property
    def site(self) -> Site:
        """The key of the decisions, overrides and statistics of this place."""
        if not self.place and not self.part:
            return self.layer_idx
        return ".".join(name for name in (self.place, str(self.layer_idx), self.part) if name)

    @property
    def expert_widths(self) -> list[int]:
        """The inner width of every routed expert."""
        banks = self.banks or (("", self.num_experts, self.expert_intermediate_size),)
        return [width for _, number, width in banks for _ in range(number)]


def check_plain_gate(spec: MoELayerSpec, name: str) -> None:
    """Refuse a host whose feed-forward has no gate, or has biases.

    Raises:
        ValueError: with the experts `name` that need a gate and know no biases.
    """
    if not spec.gated or spec.bias:
        raise ValueError(
            f"Layer {spec.layer_idx}: experts of the kind {name!r} have a gate and no biases, and the feed-forward of "
            "this host has not: choose the experts 'ffn'."
        )


def buffer_name(name: str, site: Site) -> str:
    """Return the name of a buffer that is kept for a site; names of buffers hold no dots."""
    return f"{name}_{site}".replace(".", "_")
