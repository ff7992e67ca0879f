"""Expert evolution: experts that follow the training of one feed-forward, each at its own distance.

The dense model is trained; the feed-forward of every layer that will be a MoE layer is expert 1. Experts 2..N start
equal to it and are rewritten after every optimizer step, with D the change of expert 1 in that step and beta drawn
anew for every step and expert, uniformly from the expert's range:

    delta     theta_n <- theta_n + (1 - beta) D                       keeps a fraction of every update
    ema       theta_n <- beta theta_n + (1 - beta) theta_1            ends at expert 1 as the learning rate falls
    literal   theta_n <- beta theta_1 + (1 - beta) grad theta_1       the equation as printed

The printed equation contradicts the paper's prose and its table of constant betas (beta = 0 equals expert 1), which
`delta` agrees with. The experts are tensors of the callback, not of the model: no optimizer touches them, and the
optimizer's state is that of one expert.

Source: EvoMoE: Expert Evolution in Mixture of Experts for Multimodal Large Language Models, arXiv:2505.23830.
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration import HfMoeConfig
from ..modeling.block import Block
from ..modeling.gating import check_choice
from ..modeling.host_layers import decoder_layers, ffn_name, read_ffn
from ..modeling.modeling_hf_moe import HfMoeForConditionalGeneration
from ..modeling.parts import text_decoder
from .expert_sources import State, build_source, feed_forward_state, ffn_state, fill_layer
from .in_place import paths_of


BETA_RANGES = ((0.9, 0.99), (0.8, 0.89), (0.7, 0.79))
EVOLUTION_FILE = "expert_evolution.safetensors"
GENERATOR_KEY = "generator"
# In the file's metadata: the digest of expert 1. In the trainer's state: where its checkpoints are written.
FIRST_EXPERT = "first_expert"
STATE_KEY = "expert_evolution"


class ExpertEvolution(TrainerCallback):
    """Evolves experts 2..N beside the training of a dense model, once per optimizer step.

    The experts are float32 tensors on the CPU, saved in every checkpoint of the trainer and restored from there when
    it resumes, or when it ends with the best of them (`load_best_model_at_end`). Trainer does not say which checkpoint
    it resumes from: it is looked for where it was written, then in `output_dir`, and has to hold the expert 1 that
    Trainer has loaded.

    Args:
        layers: decoder layers whose feed-forward is an expert 1.
        rule: `"delta"`, `"ema"` or `"literal"`, see above.
        beta_ranges: a range within [0, 1], or a number that fixes beta, for each of the experts 2..N.
        beta_granularity: `"step"`: one beta per step and expert; `"tensor"`: one for each of an expert's tensors;
            `"row"`: one for every row of every tensor, drawn once and kept, which leaves the experts of one line.
        seed: of the draws.
        resume_from: the checkpoint that is given to `Trainer.train`, where it has been moved.

    Raises:
        ValueError: if a range or a choice is not allowed.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        rule: str = "delta",
        beta_ranges: Sequence[Sequence[float] | float] = BETA_RANGES,
        beta_granularity: str = "step",
        seed: int = 0,
        resume_from: str | Path | None = None,
    ):
        check_choice("rule", rule, ("delta", "ema", "literal"))
        check_choice("beta_granularity", beta_granularity, ("step", "tensor", "row"))
        self.layers = sorted(layers)
        self.rule = rule
        self.beta_ranges = [(item, item) if isinstance(item, int | float) else tuple(item) for item in beta_ranges]
        for pair in self.beta_ranges:
            if len(pair) != 2 or not 0.0 <= pair[0] <= pair[1] <= 1.0:
                raise ValueError(
                    f"beta_ranges={list(beta_ranges)}: each must be a number in [0, 1] or a range [low, high] in it."
                )
        self.beta_granularity = beta_granularity
        self.seed = seed
        self.resume_from = resume_from
        self.generator = torch.Generator().manual_seed(seed)
        # One per evolved expert: "<layer>.<parameter>" -> tensor, named as the host names its feed-forward.
        self.experts: list[dict[str, torch.Tensor]] = []
        self._before: dict[str, torch.Tensor] = {}
        self._gradient: dict[str, torch.Tensor] = {}
        self._saved_step = 0

    def first_expert(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of expert 1 in a dense model, by `"<layer>.<parameter>"`.

        Raises:
            ValueError: if one of the layers is a MoE layer, or the decoder does not have it.
        """
        found: dict[str, nn.Parameter] = {}
        hosts = decoder_layers(text_decoder(model))
        for layer in self.layers:
            if layer >= len(hosts):
                raise ValueError(f"Evolution of layer {layer}: the decoder has the layers 0 to {len(hosts) - 1}.")
            ffn = getattr(hosts[layer], ffn_name(hosts[layer]))
            if isinstance(ffn, Block):
                raise ValueError(
                    f"Evolution of layer {layer}, which is a MoE layer already: train the dense model "
                    "(moe_config.layers = []) and assemble the MoE afterwards."
                )
            found |= {f"{layer}.{name}": parameter for name, parameter in ffn.named_parameters()}
        return dict(sorted(found.items()))

    def first_names(self, model: nn.Module) -> set[str]:
        """Return the names that expert 1's parameters have in the model."""
        own = {id(parameter) for parameter in self.first_expert(model).values()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in own}

    def snapshot(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return a float32 copy of expert 1 on the CPU."""
        return {name: _copy(parameter) for name, parameter in self.first_expert(model).items()}

    def start(self, model: nn.Module) -> None:
        """Make experts 2..N copies of expert 1."""
        self.generator.manual_seed(self.seed)
        self.experts = [self.snapshot(model) for _ in self.beta_ranges]

    def evolve(
        self,
        before: dict[str, torch.Tensor],
        after: dict[str, torch.Tensor],
        gradient: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Apply one step, in which expert 1 went from `before` to `after`; `gradient` is for the rule `literal`."""
        for expert, betas in zip(self.experts, self._betas(), strict=True):
            for (name, theta), beta in zip(expert.items(), betas, strict=True):
                # In float64, so that beta = 0 gives expert 1 to the bit, and beta = 1 leaves the expert as it is.
                first = after[name].double()
                if self.rule == "delta":
                    theta.copy_(theta + (1.0 - beta) * (first - before[name]))
                elif self.rule == "ema":
                    theta.copy_(beta * theta.double() + (1.0 - beta) * first)
                elif gradient is not None:
                    theta.copy_(beta * first + (1.0 - beta) * gradient[name].double())

    def _betas(self) -> Iterator[list[torch.Tensor]]:
        """Yield the betas of every expert's tensors, float64: () or (rows, 1, ...)."""
        # Rows keep theirs: drawn anew in every step they would all have the same mean.
        rows = torch.Generator().manual_seed(self.seed)
        for expert, (low, high) in zip(self.experts, self.beta_ranges, strict=True):
            if self.beta_granularity == "row":
                shapes = [(theta.shape[0], *[1] * (theta.dim() - 1)) for theta in expert.values()]
                draws = [torch.rand(shape, generator=rows, dtype=torch.float64) for shape in shapes]
            elif self.beta_granularity == "tensor":
                draws = list(torch.rand(len(expert), generator=self.generator, dtype=torch.float64))
            else:
                draws = [torch.rand((), generator=self.generator, dtype=torch.float64)] * len(expert)
            yield [low + (high - low) * draw for draw in draws]

    def states(self, layer: int, ffn: nn.Module) -> list[State]:
        """Return experts 2..N of a layer in the form of experts; `ffn` is expert 1."""
        layout, prefix = read_ffn(ffn).layout, f"{layer}."
        assert layout is not None, "of a dense feed-forward"
        own = (
            {name.removeprefix(prefix): theta for name, theta in held.items() if name.startswith(prefix)}
            for held in self.experts
        )
        return [ffn_state(weights, layout) for weights in own]

    def save(self, folder: str | Path, model: nn.Module | None = None) -> None:
        """Write the experts and the state of the draws; the digest of the `model`'s expert 1 tells whose they are."""
        tensors = {
            f"{expert}.{name}": theta for expert, held in enumerate(self.experts) for name, theta in held.items()
        }
        metadata = None if model is None else {FIRST_EXPERT: self._digest(model)}
        path = Path(folder) / EVOLUTION_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**tensors, GENERATOR_KEY: self.generator.get_state()}, path, metadata)

    def _digest(self, model: nn.Module) -> str:
        digest = blake2b(digest_size=16)
        for name, tensor in self.snapshot(model).items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def load(self, folder: str | Path) -> None:
        """Read what [`~ExpertEvolution.save`] wrote.

        Raises:
            FileNotFoundError: if the folder has no such file.
            ValueError: if it holds other layers, or another number of experts.
        """
        path = Path(folder) / EVOLUTION_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {EVOLUTION_FILE}: it was not saved by an ExpertEvolution.")
        tensors = load_file(path)
        self.generator.set_state(tensors.pop(GENERATOR_KEY))
        experts: list[dict[str, torch.Tensor]] = [{} for _ in self.beta_ranges]
        found = {(int(name.split(".")[0]), int(name.split(".")[1])) for name in tensors}
        if found != {(expert, layer) for expert in range(len(experts)) for layer in self.layers}:
            raise ValueError(
                f"{path} holds {len({expert for expert, _ in found})} experts of the layers "
                f"{sorted({layer for _, layer in found})}, expected {len(experts)} of {self.layers}."
            )
        for name in sorted(tensors):
            expert, _, parameter = name.partition(".")
            experts[int(expert)][parameter] = tensors[name]
        self.experts = experts

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any) -> None:
        # The state is that of the checkpoint by now, and travels with it.
        written = state.stateful_callbacks.get(STATE_KEY, {}).get("output_dir")
        if state.global_step > 0:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            places = [Path(place) / name for place in (written, args.output_dir) if place is not None]
            self._resume([Path(self.resume_from)] if self.resume_from is not None else places, model)
        else:
            self.start(model)
        state.stateful_callbacks[STATE_KEY] = {"output_dir": str(Path(args.output_dir).absolute())}

    def _resume(self, places: list[Path], model: nn.Module) -> None:
        """Load the experts that evolved beside this expert 1, from the first of the places that has them."""
        found = [place for place in places if (place / EVOLUTION_FILE).is_file()]
        own = self._digest(model)
        for place in found:
            with safe_open(place / EVOLUTION_FILE, "pt") as file:
                if (file.metadata() or {}).get(FIRST_EXPERT, own) == own:
                    return self.load(place)
        listed = ", ".join(dict.fromkeys(map(str, places)))
        advice = "pass ExpertEvolution(resume_from=...) the checkpoint that Trainer.train resumes from."
        if found:
            raise ValueError(f"The experts in {listed} evolved beside another expert 1: {advice}")
        raise FileNotFoundError(f"No {EVOLUTION_FILE} in {listed}: {advice}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._before = self.snapshot(model)
        if self.rule == "literal":
            parameters = self.first_expert(model)
            self._gradient = {name: _copy(item.grad) for name, item in parameters.items() if item.grad is not None}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.evolve(self._before, self.snapshot(model), self._gradient)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # The trainer has put the best checkpoint's weights back by now: the experts go back with expert 1.
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(state.best_model_checkpoint)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any) -> None:
        # Before the trainer writes the rest, and removes older checkpoints: no whole one would be left where it ends
        # between that and on_save.
        if control.should_save:
            self._save_checkpoint(args, state, model)

    def on_save(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self._saved_step != state.global_step:
            self._save_checkpoint(args, state, model)

    def _save_checkpoint(self, args: Any, state: TrainerState, model: nn.Module) -> None:
        if state.is_world_process_zero:
            self.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", model)
            self._saved_step = state.global_step


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # A model on the CPU in float32 must not be handed out itself.
    return tensor.detach().to("cpu", torch.float32, copy=True)


@torch.no_grad()
def assemble(
    dense: HfMoeForConditionalGeneration,
    config: HfMoeConfig,
    evolution: ExpertEvolution | None = None,
    *,
    source: str | Mapping[str, Any] = "copies",
    noise_std: float = 0.0,
    seed: int = 0,
) -> HfMoeForConditionalGeneration:
    """Return a MoE from a dense model of this library (`moe_config.layers = []`), in all places that `config` names.

    Args:
        dense: its feed-forwards become expert 1.
        config: of the MoE; the same but for `moe_config`.
        evolution: holds experts 2..N; without it they are made of expert 1.
        source: how the experts are made of these, see [`build_source`].
        noise_std: noise on the experts, relative to the standard deviation of each matrix.
        seed: of the new routers, of the source and of the noise.

    Raises:
        ValueError: if the models differ in more than their MoE layers, or the evolution's experts do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HfMoeForConditionalGeneration._from_config(config, dtype=dense.dtype)
    model.generation_config = dense.generation_config
    moe_layers = model.moe_layers()
    if evolution is not None and evolution.layers != sorted(moe_layers):
        raise ValueError(f"Experts evolved in the layers {evolution.layers}, the MoE has {sorted(moe_layers)}.")
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    blocks = paths_of(model, Block)
    replaced = tuple(f"{path}." for path in blocks)
    differing = [*loaded.missing_keys, *loaded.unexpected_keys]
    differing = [name for name in differing if not name.startswith((*replaced, "objectives."))]
    if differing:
        raise ValueError(f"The MoE's config does not fit the dense model: they differ in {', '.join(differing[:3])}.")
    method = build_source(source, seed, noise_std)
    for path, moe_layer in blocks.items():
        ffn = dense.get_submodule(path)
        parents = [feed_forward_state(ffn)]
        if evolution is not None and not moe_layer.spec.place:
            parents += evolution.states(moe_layer.layer_idx, ffn)
            widths = [state["down_proj"].shape[-1] for state in parents]
            if moe_layer.experts.widths != widths or moe_layer.shared_expert is not None:
                raise ValueError(
                    f"Evolved experts are {len(parents)} whole feed-forwards a layer; layer {moe_layer.layer_idx} of "
                    f"the MoE is not: set num_experts={len(parents)}, num_shared_experts=0, granularity=1 and no "
                    "expert_banks."
                )
        fill_layer(moe_layer, parents, method)
    return model.eval()
