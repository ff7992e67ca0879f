"""The model of a Space: what it answers, and how question and answer were routed."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps
from transformers import AutoConfig, TextIteratorStreamer
from transformers.audio_utils import load_audio

from .host_facts import MODALITIES, auto_model, auto_processor, modalities, placeholders


TEXT, IMAGE, VIDEO, AUDIO = range(len(MODALITIES))
# Outputs of a processor with a value per token of the question, and the value for a token of the answer.
PER_TOKEN = {"attention_mask": 1, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0, "token_type_ids": 0}
MAX_NEW_TOKENS = 64


@dataclass
class Trace:
    """The routing of one question and its answer as plain data; S tokens, E experts."""

    words: list[str]  # the tokens as text
    modality: list[int]  # of every token, an index of `MODALITIES`
    answer: int  # position of the answer's first token
    weights: dict[int, torch.Tensor]  # by layer (S, E) float32, of every expert in every token; 0 where it is not used
    picture: Image.Image | None  # as the vision tower saw it; `None` for a question without one
    grid: tuple[int, int] | None  # rows and columns of its patches; `None` where its tokens form no grid
    # Modality to how many moments its tokens are at, one after the other.
    moments: dict[int, int] = field(default_factory=dict)

    def rows(self, modality: int) -> list[int]:
        """Return the positions of a modality's tokens."""
        return [position for position, found in enumerate(self.modality) if found == modality]

    def experts_per_token(self, modality: int) -> float | None:
        """Return the mean number of experts that worked on a token, over the layers; `None` without such tokens."""
        rows = self.rows(modality)
        if not rows:
            return None
        return sum((weight[rows] > 0).sum().item() / len(rows) for weight in self.weights.values()) / len(self.weights)

    def busiest_expert(self, layer: int) -> int:
        """Return the expert with the largest weight on what was shown or played, or else on the words."""
        shown = [position for position, found in enumerate(self.modality) if found != TEXT]
        return int(self.weights[layer][shown or self.rows(TEXT)].sum(0).argmax())


class Checkpoint:
    """Model and processor, by folder or by id on the Hub."""

    def __init__(self, name: str, revision: str | None = None):
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": True}
        config = AutoConfig.from_pretrained(name, **options)
        self.modalities = modalities(config)
        self.multimodal = len(self.modalities) > 1
        self.processor = getattr(transformers, auto_processor(config)).from_pretrained(name, **options)
        self.tokenizer = self.processor.tokenizer if self.multimodal else self.processor
        models = getattr(transformers, auto_model(config))
        self.model = models.from_pretrained(name, dtype="auto", **options).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        # A placeholder in an answer would refer to an image that is not there.
        generation = self.model.generation_config
        generation.suppress_tokens = [*(generation.suppress_tokens or []), *placeholders(config).values()] or None
        self.worker = ThreadPoolExecutor(1)
        self.layers = {index: layer.spec.num_experts for index, layer in self.model.moe_layers().items()}

    def budgets(self) -> tuple[float, float, float] | None:
        """Return the smallest, the largest and the trained number of experts per token; `None` if it is fixed."""
        layers = self.model.moe_layers().values()
        routers = [layer.router for layer in layers if layer.router.target_slots is not None]
        if not routers:
            return None
        low, high = max(router.min_slots for router in routers), min(router.max_slots for router in routers)
        return low, high, routers[0].target_slots

    def open_picture(self, path: Path) -> Image.Image:
        """Open a file as the processor does."""
        if hasattr(self.processor, "open_image"):
            return self.processor.open_image(path)
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")

    def encode(self, question: str, media: dict[str, Any]) -> Any:
        """Return the model's inputs for a question about `media`, modality to an opened picture or else a path."""
        if self.processor.chat_template is None:
            inputs = self._encode_plain(question, media)
        else:
            shown = [{"type": name, name: value} for name, value in media.items()]
            content = [*shown, {"type": "text", "text": question}] if self.multimodal else question
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        for name, value in inputs.items():
            if name.startswith(("pixel_values", "input_features", "input_values")):
                inputs[name] = value.to(self.model.dtype)
        return inputs.to(self.model.device)

    def _encode_plain(self, question: str, media: dict[str, Any]) -> Any:
        """Return the inputs for a processor without a template: the placeholders come before the text."""
        arguments: dict[str, Any] = {}
        for name, value in media.items():
            if name == "audio":
                rate = self.processor.feature_extractor.sampling_rate
                arguments |= {"audio": [load_audio(value, sampling_rate=rate)], "sampling_rate": rate}
            else:
                arguments[f"{name}s"] = [value]
        text = " ".join([*(getattr(self.processor, f"{name}_token") for name in media), question])
        return self.processor(text=[text], return_tensors="pt", **arguments)

    def start(self, inputs: Any) -> "tuple[TextIteratorStreamer, Future[torch.Tensor]]":
        """Begin to answer; return the text as it comes and, for later, all tokens (1, S)."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate() -> torch.Tensor:
            try:
                return self.model.generate(**inputs, streamer=streamer, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            finally:
                # Otherwise an error of the model would leave the reader waiting.
                streamer.end()

        return streamer, self.worker.submit(generate)

    @torch.inference_mode()
    def trace(self, inputs: Any, tokens: torch.Tensor, picture: Image.Image | None) -> Trace:
        """Return how the question and the answer were routed; the last token never went through the model."""
        tokens = tokens[:, :-1]
        answer = inputs["input_ids"].shape[1]
        given = {name: value for name, value in inputs.items() if name != "input_ids"}
        for name, value in PER_TOKEN.items():
            if name in given:
                new = given[name].new_full((1, tokens.shape[1] - answer), value)
                given[name] = torch.cat([given[name], new], dim=1)
        routing = self.model(input_ids=tokens, **given, output_routing=True, use_cache=False).routing
        modality = routing.modality_ids[0].tolist()
        return Trace(
            words=[self.tokenizer.decode([token]) for token in tokens[0].tolist()],
            modality=modality,
            answer=answer,
            weights={layer: expert_weights(decision).cpu() for layer, decision in routing.decisions.items()},
            picture=None if picture is None else self.seen(inputs, picture),
            grid=patch_grid(modality.count(IMAGE), inputs),
            moments=moments(modality, inputs),
        )

    def seen(self, inputs: Any, picture: Image.Image) -> Image.Image:
        """Return the picture as resized and cropped for the tower: what the patches lie on."""
        pixels = inputs["pixel_values"][0].float().cpu()  # (3, H, W), or (P, C) of packed patches
        if pixels.dim() != 3:
            return picture
        images = self.processor.image_processor
        if images.do_normalize:
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.image_mean, images.image_std))
            pixels = pixels * std + mean
        return Image.fromarray((pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def expert_weights(decision: Any) -> torch.Tensor:
    """Return the weight of every expert in every token, (S, E), of any kind of decision."""
    experts = decision.num_experts
    if hasattr(decision, "expert_index"):
        weight = decision.expert_weight.float()
        # An empty slot has the index E.
        table = torch.zeros(len(weight), experts + 1, device=weight.device)
        return table.scatter_add(1, decision.expert_index, weight)[:, :experts]
    if hasattr(decision, "combine"):
        return decision.combine[0].float().unflatten(-1, (experts, -1)).sum(-1)
    return decision.expert_weight[decision.group_index].float()


def patch_grid(patches: int, inputs: Any) -> tuple[int, int] | None:
    """Return the rows and columns of an image's tokens; `None` where they form no grid."""
    side = isqrt(patches)
    rows, columns = side, side
    if "spatial_shapes" in inputs:
        rows, columns = inputs["spatial_shapes"][0].tolist()
    elif "image_grid_thw" in inputs:
        _, height, width = inputs["image_grid_thw"][0].tolist()
        # Squares of patches become one token.
        merged = isqrt(height * width // patches) if patches else 1
        rows, columns = height // max(merged, 1), width // max(merged, 1)
    elif "pixel_values" in inputs and inputs["pixel_values"].shape[:-3].numel() != 1:
        # A picture cut into tiles.
        return None
    return (rows, columns) if patches and rows * columns == patches else None


def moments(modality: list[int], inputs: Any) -> dict[int, int]:
    """Return on how many moments the tokens of a video and of a sound lie."""
    found = {kind: modality.count(kind) for kind in (VIDEO, AUDIO) if kind in modality}
    if VIDEO in found and "video_grid_thw" in inputs:
        steps = int(inputs["video_grid_thw"][:, 0].sum())
        found[VIDEO] = steps if found[VIDEO] % steps == 0 else found[VIDEO]
    return found
