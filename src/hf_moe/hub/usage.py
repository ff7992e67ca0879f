"""The programs of a card that ask a checkpoint something, with the classes, the media and the form that it takes."""

from pathlib import Path
from typing import Any

from ..configuration.reading import read_object
from .host_facts import auto_model, auto_processor, modalities, pipeline_tag


FILES = {"image": "picture.png", "video": "video.mp4", "audio": "sound.wav"}
# Tasks that Transformers has a pipeline for.
PIPELINES = ("image-text-to-text", "any-to-any")

TEXT = """\
from transformers import {auto_model}, {auto_processor}

checkpoint = "{folder}"  # this folder, or the id of its repository
tokenizer = {auto_processor}.from_pretrained(checkpoint)
model = {auto_model}.from_pretrained(checkpoint, trust_remote_code=True)
output = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=16)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
MULTIMODAL = """\
from transformers import {auto_model}, {auto_processor}{more}

checkpoint = "{folder}"  # this folder, or the id of its repository
processor = {auto_processor}.from_pretrained(checkpoint, trust_remote_code=True)
model = {auto_model}.from_pretrained(checkpoint, trust_remote_code=True)

{inputs}
output = model.generate(**inputs, max_new_tokens=16)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
CHAT = """\
content = {content}
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)"""
PIPELINE = """\
from transformers import pipeline

ask = pipeline("{task}", model="{folder}", trust_remote_code=True)
content = {content}
answer = ask(text=[{{"role": "user", "content": content}}], max_new_tokens=16, return_full_text=False)
print(answer[0]["generated_text"])
"""


def usage(folder: Path, config: Any) -> list[str]:
    """Return the programs: of the model's own classes and, where there is one for it, of a pipeline."""
    taken = modalities(config)
    classes = {"auto_model": auto_model(config), "auto_processor": auto_processor(config)}
    names = {"folder": folder.resolve().name, **classes}
    if taken == ("text",):
        return [TEXT.format(**names)]
    if not _has_chat_template(folder):
        return [_without_template(names, taken)]
    content = _content(taken)
    programs = [MULTIMODAL.format(**names, more="", inputs=CHAT.format(content=content))]
    if (task := pipeline_tag(config)) in PIPELINES:
        programs.append(PIPELINE.format(**names, task=task, content=content))
    return programs


def _question(taken: tuple[str, ...]) -> str:
    if taken == ("text", "image"):
        return "What is in the picture?"
    if "audio" not in taken:
        return "What is to be seen?"
    return "What is said?" if taken == ("text", "audio") else "What is to be seen and heard?"


def _content(taken: tuple[str, ...]) -> str:
    """Return the code of a message with one medium of each kind."""
    shown = [f'{{"type": "{name}", "url": "{FILES[name]}"}}' for name in taken if name in FILES]
    parts = [*shown, f'{{"type": "text", "text": "{_question(taken)}"}}']
    if len(parts) == 2:
        return f"[{', '.join(parts)}]"
    return "[\n" + "".join(f"    {part},\n" for part in parts) + "]"


def _without_template(names: dict[str, str], taken: tuple[str, ...]) -> str:
    """Return the program for a processor that has no template: the placeholders come before the question."""
    places = " ".join(f"{{processor.{name}_token}}" for name in taken if name in FILES)
    arguments = [f'{name}s=["{FILES[name]}"]' for name in ("image", "video") if name in taken]
    before = ""
    if "audio" in taken:
        before = f'rate = processor.feature_extractor.sampling_rate\nsound = load_audio("{FILES["audio"]}", rate)\n'
        arguments += ["audio=[sound]", "sampling_rate=rate"]
    text = f'text = f"{places} {_question(taken)}"\n'
    call = f'inputs = processor(text=[text], {", ".join(arguments)}, return_tensors="pt")'
    more = "\nfrom transformers.audio_utils import load_audio" if "audio" in taken else ""
    return MULTIMODAL.format(**names, more=more, inputs=before + text + call)


def _has_chat_template(folder: Path) -> bool:
    """Return whether the processor has a chat template; `True` where none has been saved yet."""
    configs = [folder / name for name in ("processor_config.json", "tokenizer_config.json")]
    saved = [read_object(path) for path in configs if path.is_file()]
    files = any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json"))
    return files or not saved or any("chat_template" in content for content in saved)
