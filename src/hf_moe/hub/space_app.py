"""Ask a mixture-of-experts model about a picture, and see which experts every patch and every word used.

This file is the whole application, on a Space and on your own machine. It needs the checkpoint, torch, transformers,
gradio and pillow; the checkpoint brings its own code.
"""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from math import isqrt
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TextIteratorStreamer,
)


CHECKPOINT = "user/name"
REVISION = None

# In the order of the model's modality ids.
MODALITIES = ("text", "image", "video", "audio")
TEXT, IMAGE = 0, 1
COLORS = ("#3b6ea5", "#d98032", "#6a9f58", "#9b6a9e")
# What the processor returns for every token of the question; the model derives it again for question and answer.
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
MAX_NEW_TOKENS = 64
RUNS_SHOWN = 8

CSS = """
.routing { color: var(--body-text-color); font-size: 0.9rem; }
.routing h4 { margin: 0 0 8px; }
.routing svg { width: 100%; max-width: 420px; display: block; border-radius: 6px; }
.routing .words { line-height: 3.2; }
.routing .word { padding: 3px 6px; margin-right: 4px; border-radius: 5px; position: relative; white-space: pre; }
.routing .word small { position: absolute; left: 0; right: 0; top: 2.2em; line-height: 1; text-align: center;
  font-size: 0.65rem; opacity: 0.75; }
.routing .answer { outline: 1.5px solid var(--body-text-color); }
.routing .bar { display: grid; grid-template-columns: 5.5rem 1fr 3rem; gap: 8px; align-items: center; }
.routing .bar i { display: block; height: 9px; border-radius: 3px; }
.routing .expert { margin-bottom: 7px; padding: 2px 6px; }
.routing .chosen { background: var(--background-fill-secondary); border-radius: 6px; font-weight: 600; }
.routing table { border-collapse: collapse; }
.routing th, .routing td { padding: 3px 12px 3px 0; text-align: right; border: none; }
.routing .scale { display: inline-block; width: 90px; height: 9px; vertical-align: middle; border-radius: 3px;
  background: linear-gradient(90deg, rgba(217, 128, 50, 0), rgba(217, 128, 50, 1)); border: 1px solid #9aa7b3; }
"""
# Fonts of the visitor's machine: nothing is fetched from elsewhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


@dataclass
class Trace:
    """The routing of one question and its answer as plain data; S tokens, E experts.

    Attributes:
        words: the tokens as text.
        modality: of every token, an index of `MODALITIES`.
        answer: position of the answer's first token.
        weights: layer -> (S, E) float32, the weight of every expert in every token; 0 where it was not used.
        picture: the image as the vision tower saw it; `None` for a question without one.
        grid: rows and columns of its patches; `None` where the tokens of an image form no grid.
    """

    words: list[str]
    modality: list[int]
    answer: int
    weights: dict[int, torch.Tensor]
    picture: Image.Image | None
    grid: tuple[int, int] | None

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
        """Return the expert with the largest weight on the picture, or on the words where there is none."""
        return int(self.weights[layer][self.rows(IMAGE) or self.rows(TEXT)].sum(0).argmax())


class Checkpoint:
    """Model and processor, by folder or by id on the Hub."""

    def __init__(self, name: str, revision: str | None = None):
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": True}
        self.multimodal = AutoConfig.from_pretrained(name, **options).vision_config is not None
        processors, models = (
            (AutoProcessor, AutoModelForImageTextToText) if self.multimodal else (AutoTokenizer, AutoModelForCausalLM)
        )
        self.processor = processors.from_pretrained(name, **options)
        self.tokenizer = self.processor.tokenizer if self.multimodal else self.processor
        self.model = models.from_pretrained(name, dtype="auto", **options).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        if self.multimodal:
            # In an answer the placeholder would stand for an image that is not there.
            generation = self.model.generation_config
            generation.suppress_tokens = [*(generation.suppress_tokens or []), self.model.config.image_token_id]
        self.worker = ThreadPoolExecutor(1)
        self.layers = {index: layer.spec.num_experts for index, layer in self.model.moe_layers().items()}

    def budgets(self) -> tuple[float, float, float] | None:
        """Return the smallest, the largest and the trained number of experts per token; `None` if it is fixed."""
        layers = self.model.moe_layers().values()
        routers = [layer.router for layer in layers if hasattr(layer.router, "target_slots")]
        if not routers:
            return None
        low, high = max(router.min_slots for router in routers), min(router.max_slots for router in routers)
        return low, high, routers[0].target_slots

    def encode(self, question: str, picture: Image.Image | None) -> Any:
        """Return the model's inputs for a question, about a picture or about none."""
        if self.processor.chat_template is None:
            if picture is None:
                reader = self.processor if self.multimodal else self.tokenizer
                inputs = reader(text=[question], return_tensors="pt")
            else:
                text = f"{self.processor.image_token} {question}"
                inputs = self.processor(images=[picture], text=[text], return_tensors="pt")
        else:
            shown = [] if picture is None else [{"type": "image", "image": picture}]
            content = [*shown, {"type": "text", "text": question}] if self.multimodal else question
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs.to(self.model.device)

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
        images = {name: value for name, value in inputs.items() if name not in PER_TOKEN}
        routing = self.model(input_ids=tokens, **images, output_routing=True, use_cache=False).routing
        modality = routing.modality_ids[0].tolist()
        return Trace(
            words=[self.tokenizer.decode([token]) for token in tokens[0].tolist()],
            modality=modality,
            answer=inputs["input_ids"].shape[1],
            weights={layer: expert_weights(decision).cpu() for layer, decision in routing.decisions.items()},
            picture=None if picture is None else self.seen(inputs, picture),
            grid=patch_grid(modality.count(IMAGE), inputs.get("spatial_shapes")),
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


def patch_grid(patches: int, spatial_shapes: torch.Tensor | None) -> tuple[int, int] | None:
    """Return the rows and columns of an image's patches."""
    side = isqrt(patches)
    rows, columns = (side, side) if spatial_shapes is None else spatial_shapes[0].tolist()
    return (rows, columns) if patches and rows * columns == patches else None


def described(weights: torch.Tensor) -> str:
    """Return the experts of one token and their weights in words, the heaviest first."""
    used = [(weight, expert) for expert, weight in enumerate(weights.tolist()) if weight > 0]
    return ", ".join(f"expert {expert}: {weight:.2f}" for weight, expert in sorted(used, reverse=True)) or "no expert"


def draw_patches(trace: Trace, layer: int, expert: int) -> str:
    """Draw one expert's weight over the picture, one cell per patch."""
    if trace.picture is None:
        return "<p>The question came without a picture.</p>"
    if trace.grid is None:
        return f"<p>The {len(trace.rows(IMAGE))} image tokens of this model form no grid over the picture.</p>"
    rows, columns = trace.grid
    weights = trace.weights[layer][trace.rows(IMAGE)]  # (P, E)
    strongest = max(trace.weights[layer].max().item(), 1e-6)
    cells = [
        f'<rect x="{place % columns}" y="{place // columns}" width="1" height="1" fill="{COLORS[IMAGE]}" '
        f'fill-opacity="{0.9 * patch[expert].item() / strongest:.3f}" stroke="white" stroke-width="0.01">'
        f"<title>row {place // columns + 1}, column {place % columns + 1}: {described(patch)}</title></rect>"
        for place, patch in enumerate(weights)
    ]
    buffer = io.BytesIO()
    trace.picture.convert("L").save(buffer, "JPEG", quality=90)
    picture = base64.b64encode(buffer.getvalue()).decode()
    label = f"Weight of expert {expert} in layer {layer} over the picture"
    used = (weights[:, expert] > 0).float().mean().item()
    return (
        f'<h4>Patches</h4><svg viewBox="0 0 {columns} {rows}" role="img" aria-label="{label}">'
        f'<image href="data:image/jpeg;base64,{picture}" width="{columns}" height="{rows}" '
        f'preserveAspectRatio="none"/>{"".join(cells)}</svg>'
        f'<p>Weight: 0&nbsp;<span class="scale"></span>&nbsp;{strongest:.2f}. Expert {expert} works on {used:.0%} of '
        f"the {len(weights)} patches. The picture is as the model saw it, without its colours.</p>"
    )


def draw_words(trace: Trace, layer: int, expert: int) -> str:
    """Draw the words, tinted by one expert's weight, with the numbers of all their experts below."""
    weights = trace.weights[layer]
    strongest = max(weights.max().item(), 1e-6)
    items = []
    for position in trace.rows(TEXT):
        share = weights[position, expert].item() / strongest
        used = ", ".join(str(index) for index in weights[position].nonzero().flatten().tolist())
        word = trace.words[position].strip() or "·"
        kind = "word answer" if position >= trace.answer else "word"
        items.append(
            f'<span class="{kind}" style="background: rgba(59, 110, 165, {0.08 + 0.6 * share:.3f})" '
            f'title="{described(weights[position])}">{escape(word)}<small>{used or "–"}</small></span>'
        )
    return (
        f'<h4>Words and their experts</h4><div class="words">{" ".join(items)}</div>'
        f"<p>Tinted: the weight of expert {expert}. Framed: the answer.</p>"
    )


def draw_shares(trace: Trace, layer: int, expert: int) -> str:
    """Draw how the slots of each modality spread over the experts of a layer."""
    used = trace.weights[layer] > 0
    seen = [modality for modality in range(len(MODALITIES)) if modality in trace.modality]
    counts = {modality: used[trace.rows(modality)].sum(0) for modality in seen}
    blocks = []
    for index in range(used.shape[1]):
        bars = ""
        for modality in seen:
            share = counts[modality][index].item() / max(counts[modality].sum().item(), 1)
            bars += (
                f'<div class="bar"><span>{MODALITIES[modality]}</span><i style="width: {share:.1%}; '
                f'background: {COLORS[modality]}"></i><span>{share:.0%}</span></div>'
            )
        blocks.append(f'<div class="expert{" chosen" if index == expert else ""}">expert {index}{bars}</div>')
    return f"<h4>Share of the slots, by modality</h4>{''.join(blocks)}"


def draw_runs(runs: list[dict[str, float | None]]) -> str:
    """Draw what the last questions cost."""
    names = [name for name in runs[-1] if any(run[name] is not None for run in runs)]
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join('<td>–</td>' if run[name] is None else f'<td>{run[name]:,.1f}</td>' for name in names)}</tr>"
        for run in reversed(runs)
    )
    return f'<div class="routing"><table><tr>{head}</tr>{body}</table></div>'


def draw(trace: Trace | None, layer: int, expert: int) -> tuple[str, str, str]:
    """Draw patches, words and shares of one layer, with one expert in the foreground."""
    if trace is None:
        return "", "", ""
    drawings = (draw_patches, draw_words, draw_shares)
    patches, words, shares = (f'<div class="routing">{drawn(trace, layer, expert)}</div>' for drawn in drawings)
    return patches, words, shares


def open_picture(checkpoint: Checkpoint, upload: dict[str, Any] | None) -> Image.Image | None:
    """Open what was uploaded as the processor does; say in the page where that cannot be read."""
    if upload is None:
        return None
    try:
        # As a path it is a file of this machine, whatever a visitor writes into the request.
        return checkpoint.processor.open_image(Path(upload["path"]))
    except ValueError as error:
        message = "This file cannot be read as a picture. Take a PNG, JPEG or WebP file."
        raise gr.Error(message, duration=None, print_exception=False) from error


def build_page(checkpoint: Checkpoint, title: str, examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """Return the page: question and answer above, routing below."""
    budgets = checkpoint.budgets()
    first = min(checkpoint.layers)

    def ask(upload: dict | None, question: str, budget: float | None, runs: list) -> Iterator[tuple]:
        picture = open_picture(checkpoint, upload)
        if not question.strip():
            raise gr.Error("Write a question first.", duration=None, print_exception=False)
        if budget is not None:
            checkpoint.model.set_expert_budget(budget)
        try:
            inputs = checkpoint.encode(question.strip(), picture)
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        start, text = time.perf_counter(), ""
        streamer, future = checkpoint.start(inputs)
        for piece in streamer:
            text += piece
            yield text, gr.skip(), gr.skip(), gr.skip()
        tokens = future.result()
        milliseconds = 1000 * (time.perf_counter() - start)
        trace = checkpoint.trace(inputs, tokens, picture)
        run = {
            "Budget": budget,
            "Experts per patch": trace.experts_per_token(IMAGE),
            "Experts per word": trace.experts_per_token(TEXT),
            "Milliseconds": milliseconds,
            "Milliseconds per new token": milliseconds / (tokens.shape[1] - trace.answer),
        }
        runs = [*runs, run][-RUNS_SHOWN:]
        yield text, trace, runs, draw_runs(runs)

    def show_layer(trace: Trace | None, layer: int) -> tuple:
        expert = 0 if trace is None else trace.busiest_expert(layer)
        experts = gr.Dropdown(list(range(checkpoint.layers[layer])), value=expert)
        return experts, *draw(trace, layer, expert)

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        tokens = "every patch of the picture and every word" if checkpoint.multimodal else "every word"
        gr.Markdown(f"# {title}\nAsk, and see which experts {tokens} used.")
        trace, runs = gr.State(), gr.State([])
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", height=300) if checkpoint.multimodal else gr.State()
                if checkpoint.multimodal and examples:
                    gr.Examples([[str(path)] for path in examples], [picture], label="Example pictures")
            with gr.Column():
                question = gr.Textbox(label="Question", max_length=2000)
                budget = gr.Slider(*budgets, step=0.25, label="Experts per token") if budgets else gr.State()
                button = gr.Button("Ask", variant="primary")
                answer = gr.Textbox(label="Answer", interactive=False)
                cost = gr.HTML()
        with gr.Row():
            layer = gr.Dropdown(list(checkpoint.layers), value=first, label="Layer", filterable=False)
            expert = gr.Dropdown(list(range(checkpoint.layers[first])), value=0, label="Expert", filterable=False)
        with gr.Row():
            with gr.Column():
                patches = gr.HTML()
            with gr.Column():
                words, shares = gr.HTML(), gr.HTML()
        panels = [patches, words, shares]
        asked = gr.on(
            [button.click, question.submit],
            ask,
            [picture, question, budget, runs],
            [answer, trace, runs, cost],
            # gradio's own reading of an image fails without a word to the visitor.
            preprocess=False,
            api_name="ask",
        )
        asked.success(show_layer, [trace, layer], [expert, *panels], api_name=False)
        layer.input(show_layer, [trace, layer], [expert, *panels], api_name="layer")
        expert.input(draw, [trace, layer, expert], panels, api_name="expert")
    return page


def serve(name: str, revision: str | None = None, examples: Sequence[str | Path] = (), **options: Any) -> None:
    """Load a checkpoint and open its page; `options` are those of gradio's `launch`."""
    page = build_page(Checkpoint(name, revision), name, examples)
    page.launch(theme=THEME, css=CSS, **options)


if __name__ == "__main__":
    serve(CHECKPOINT, REVISION, sorted(Path("examples").glob("*")) if Path("examples").is_dir() else ())
