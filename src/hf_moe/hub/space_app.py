"""Ask a mixture-of-experts model about what it sees and hears, and see which experts every token of it used.

With the files beside it this is the whole application, on a Space and on your own machine. It needs the checkpoint,
torch, transformers, gradio and what the model's processor reads pictures, videos and sounds with; the checkpoint
brings its own code.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .host_facts import EXAMPLES, MODALITIES, described_tokens, files_of
from .space_checkpoint import IMAGE, TEXT, Checkpoint, Trace
from .space_drawings import CSS, draw, draw_runs


CHECKPOINT = "user/name"
REVISION = None

RUNS_SHOWN = 8
# The label of each on the page, the files it takes, and the component.
MEDIA = {
    "image": ("Picture", "a picture. Take a PNG, JPEG or WebP file", gr.Image),
    "video": ("Video", "a video. Take an MP4 or WebM file", gr.Video),
    "audio": ("Sound", "a sound. Take a WAV, FLAC or MP3 file", gr.Audio),
}
# Fonts of the visitor's machine: nothing is fetched from elsewhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])


def open_uploads(checkpoint: Checkpoint, uploads: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Return what was uploaded: a picture opened, the path of a video or a sound, always a file of this machine."""
    media: dict[str, Any] = {}
    for name, upload in uploads.items():
        if upload is None:
            continue
        path = Path(upload["path"])
        try:
            if name == "image":
                media[name] = checkpoint.open_picture(path)
            elif path.is_file():
                media[name] = str(path)
            else:
                raise ValueError(f"There is no file {path}.")
        except (OSError, ValueError) as error:
            raise said(f"This file cannot be read as {MEDIA[name][1]}.") from error
    return media


def said(message: str) -> gr.Error:
    """Return an error that the page shows."""
    return gr.Error(message, duration=None, print_exception=False)


def read(checkpoint: Checkpoint, question: str, media: dict[str, Any]) -> Any:
    """Return the model's inputs; say in the page what cannot be read."""
    try:
        return checkpoint.encode(question, media)
    except ImportError as error:
        raise said(f"This machine lacks what videos and sounds are read with: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        decoded = " or ".join(MEDIA[name][1] for name in media if name != "image")
        raise said(f"The file cannot be read as {decoded}. ({error})" if decoded else str(error)) from error


def build_page(checkpoint: Checkpoint, title: str, examples: Path = Path(EXAMPLES)) -> gr.Blocks:
    """Return the page: question and answer above, routing below; `examples` is a folder with what can be clicked."""
    budgets = checkpoint.budgets()
    first = min(checkpoint.layers)
    shown = [name for name in checkpoint.modalities if name in MEDIA]

    def ask(*given: Any) -> Iterator[tuple]:
        *uploads, question, budget, runs = given
        media = open_uploads(checkpoint, dict(zip(shown, uploads, strict=True)))
        if not question.strip():
            raise said("Write a question first.")
        if budget is not None:
            checkpoint.model.set_expert_budget(budget)
        inputs = read(checkpoint, question.strip(), media)
        start, text = time.perf_counter(), ""
        streamer, future = checkpoint.start(inputs)
        for piece in streamer:
            text += piece
            yield text, gr.skip(), gr.skip(), gr.skip()
        tokens = future.result()
        milliseconds = 1000 * (time.perf_counter() - start)
        trace = checkpoint.trace(inputs, tokens, media.get("image"))
        runs = [*runs, _run(trace, budget, milliseconds, tokens.shape[1])][-RUNS_SHOWN:]
        yield text, trace, runs, draw_runs(runs)

    def show_layer(trace: Trace | None, layer: int) -> tuple:
        expert = 0 if trace is None else trace.busiest_expert(layer)
        experts = gr.Dropdown(list(range(checkpoint.layers[layer])), value=expert)
        return experts, *draw(trace, layer, expert)

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        tokens = described_tokens(checkpoint.modalities)
        gr.Markdown(f"# {title}\nAsk, and see which experts {tokens} used.")
        trace, runs = gr.State(), gr.State([])
        with gr.Row():
            with gr.Column():
                media = [_medium(name, examples) for name in shown]
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
                drawn = gr.HTML()
            with gr.Column():
                words, shares = gr.HTML(), gr.HTML()
        panels = [drawn, words, shares]
        asked = gr.on(
            [button.click, question.submit],
            ask,
            [*media, question, budget, runs],
            [answer, trace, runs, cost],
            # gradio's own reading of a file fails without telling the visitor.
            preprocess=False,
            api_name="ask",
        )
        asked.success(show_layer, [trace, layer], [expert, *panels], api_name=False)
        layer.input(show_layer, [trace, layer], [expert, *panels], api_name="layer")
        expert.input(draw, [trace, layer, expert], panels, api_name="expert")
    return page


def _medium(name: str, examples: Path) -> Any:
    """Return the component through which a picture, a video or a sound comes, with examples below it."""
    label, _, component = MEDIA[name]
    medium = component(label=label, **({"height": 300} if name != "audio" else {}))
    if files := files_of(examples, name):
        gr.Examples([[str(path)] for path in files], [medium], label=f"Example {label.lower()}s")
    return medium


def _run(trace: Trace, budget: float | None, milliseconds: float, length: int) -> dict[str, float | None]:
    """Return what a question cost, as one line of the table."""
    by_modality = {
        f"Experts per {MODALITIES[kind]} token": trace.experts_per_token(kind)
        for kind in range(len(MODALITIES))
        if kind not in (TEXT, IMAGE)
    }
    return {
        "Budget": budget,
        "Experts per patch": trace.experts_per_token(IMAGE),
        **by_modality,
        "Experts per word": trace.experts_per_token(TEXT),
        "Milliseconds": milliseconds,
        "Milliseconds per new token": milliseconds / (length - trace.answer),
    }


def serve(name: str, revision: str | None = None, examples: Path = Path(EXAMPLES), **options: Any) -> None:
    """Load a checkpoint and open its page; `options` are those of gradio's `launch`."""
    page = build_page(Checkpoint(name, revision), name, examples)
    page.launch(theme=THEME, css=CSS, **options)


if __name__ == "__main__":
    serve(CHECKPOINT, REVISION)
