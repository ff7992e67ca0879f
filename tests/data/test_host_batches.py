"""Batches of images, videos and sounds through the processors of hosts."""

import inspect

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.hosts.processors import HOSTS, RATE
from PIL import Image

from hf_moe import HfMoeConfig, HfMoeForConditionalGeneration
from hf_moe.data import VisionLanguageCollator, tokenize_rows
from hf_moe.data.placeholders import check_processor
from hf_moe.data.sounds import open_sound
from hf_moe.data.videos import open_video


KINDS = ("image", "video", "audio")
# Their videos come as images: of the frames, placeholders and types are those of images.
FRAMES_ARE_IMAGES = {"smolvlm", "internvl"}


@pytest.fixture(params=HOSTS)
def host(request):
    torch.manual_seed(0)
    return HOSTS[request.param]()


@pytest.fixture
def made():
    """Return how to make one of each kind."""
    rng = np.random.default_rng(0)

    def picture(side=16):
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))

    return {
        "image": picture,
        "video": lambda: {"frames": [picture() for _ in range(4)], "fps": 2},
        "audio": lambda: {"array": rng.standard_normal(6000).astype(np.float32) / 9, "sampling_rate": RATE},
    }


def turn(role, *parts):
    content = [{"type": part} if part in KINDS else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def row(made, *kinds, question="what is it?", answer="a thing"):
    messages = [turn("user", *kinds, question), turn("assistant", answer)]
    return {
        "messages": messages,
        **{f"{kind}s": [made[kind]() for _ in range(kinds.count(kind))] for kind in set(kinds)},
    }


def together(host):
    """Return the kinds of a host that a batch may hold together."""
    return host.kinds[:1] if host.name == "smolvlm" else host.kinds


def several(made, host):
    kinds = together(host)
    two_turns = [*row(made, *kinds)["messages"], turn("user", "and now?"), turn("assistant", "no, not now")]
    return [
        {**row(made, *kinds), "messages": two_turns},
        row(made, question="hello", answer="good day"),
        row(made, kinds[0], kinds[0], question="which?", answer="the second"),
    ]


def reference(host, row, **options):
    """Return what the processor itself makes of a row."""
    given = {}
    if row.get("images"):
        given["images"] = [row["images"]]
    if row.get("videos"):
        opened = [open_video(video, host.processor.video_processor) for video in row["videos"]]
        given["videos"] = [frames for frames, _ in opened]
        given["videos_kwargs"] = {"video_metadata": [known for _, known in opened], "do_sample_frames": False}
    if row.get("audios"):
        given["audio"] = [open_sound(sound, RATE) for sound in row["audios"]]
    messages = row["messages"][:-1] if options else row["messages"]
    text = host.processor.apply_chat_template(messages, **options)
    return host.processor(text=[text], return_tensors="pt", **given)


def test_a_prompt_is_what_the_processor_makes_of_it(host, made):
    for kind in host.kinds:
        asked = row(made, kind, kind)
        batch = VisionLanguageCollator(host.processor, train=False)([asked])
        expected = reference(host, asked, add_generation_prompt=True)
        assert batch.keys() - {"mm_token_type_ids"} == expected.keys() - {"mm_token_type_ids"}
        for name, value in expected.items():
            torch.testing.assert_close(batch[name], torch.as_tensor(value), rtol=0, atol=0)


def test_a_row_to_learn_has_the_ids_of_the_processor(host, made):
    learnt = row(made, *together(host))
    batch = VisionLanguageCollator(host.processor)([learnt])
    whole = reference(host, learnt)["input_ids"]
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], whole[:, :length])
    assert not host.processor.tokenizer.decode(whole[0, length:]).strip()


def test_answers_alone_are_learnt_behind_expanded_placeholders(host, made):
    batch = VisionLanguageCollator(host.processor)(several(made, host))
    learnt = [host.processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    end = "<|im_end|>"
    assert learnt == [f"a thing{end}no, not now{end}", f"good day{end}", f"the second{end}"]
    marked = batch["labels"] != -100
    assert torch.equal(batch["labels"][marked], batch["input_ids"][marked])


def test_the_native_model_takes_the_batch(host, made):
    model, rows = host.model(), several(made, host)
    takes = inspect.signature(model.forward).parameters
    collator = VisionLanguageCollator(host.processor, config=host.config())

    def losses(rows):
        batch = collator(rows)
        batch = {name: value for name, value in batch.items() if name in takes or name != "mm_token_type_ids"}
        outputs = model(**batch)
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2).float(), labels, reduction="none", ignore_index=-100
        )
        return losses.sum(-1)

    with torch.no_grad():
        expected = torch.cat([losses([row]) for row in rows])
        torch.testing.assert_close(losses(rows), expected, rtol=1e-4, atol=1e-4)


def test_the_hosted_model_routes_the_batch(host, made):
    moe_config = {"num_experts": 4, "num_experts_per_tok": 2, "router": "top_k"}
    model = HfMoeForConditionalGeneration(HfMoeConfig.on_host(host.config(), host.model_class, moe_config=moe_config))
    batch = VisionLanguageCollator(host.processor, config=model.config)(several(made, host))
    outputs = model(**batch, output_routing=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert torch.equal(outputs.routing.modality_ids.view(batch["input_ids"].shape), batch["mm_token_type_ids"])


def test_modality_ids_tell_the_kinds_apart(host, made):
    for kind in host.kinds:
        batch = VisionLanguageCollator(host.processor)([row(made, kind), row(made)])
        number = 1 if kind == "video" and host.name in FRAMES_ARE_IMAGES else KINDS.index(kind) + 1
        assert batch["mm_token_type_ids"][0].unique().tolist() == [0, number]
        assert not batch["mm_token_type_ids"][1].any()
        assert not batch["mm_token_type_ids"][batch["attention_mask"] == 0].any()


def test_no_span_is_cut(host, made):
    for kind in host.kinds:
        learnt = row(made, kind)
        whole = VisionLanguageCollator(host.processor)([learnt])
        last = whole["mm_token_type_ids"][0].nonzero().max().item()
        wanted = last + 1 + len(host.processor.tokenizer("what is it?")["input_ids"])
        with pytest.raises(ValueError, match=rf"^Row 0 of the batch has .*max_length={last} would cut"):
            VisionLanguageCollator(host.processor, max_length=last)([learnt])
        with pytest.raises(ValueError, match="^Row 0 of the batch has no assistant token to learn"):
            VisionLanguageCollator(host.processor, max_length=wanted)([learnt])
        cut = VisionLanguageCollator(host.processor, max_length=whole["input_ids"].shape[1] - 2)([learnt])
        assert torch.equal(cut["input_ids"], whole["input_ids"][:, :-2])


def test_a_kind_that_the_host_does_not_take_names_the_row(host, made):
    for kind in set(KINDS) - set(host.kinds):
        wrong = [row(made), row(made, kind)]
        with pytest.raises(ValueError, match=rf"Row 1 of the batch has 1 .*{type(host.processor).__name__} takes"):
            VisionLanguageCollator(host.processor)(wrong)
        with pytest.raises(ValueError, match=r"Row 0 of the batch has 1 .*takes"):
            VisionLanguageCollator(host.processor)([{"messages": wrong[1]["messages"]}])


def test_more_placeholders_than_items_name_row_and_numbers(host, made):
    for kind in host.kinds:
        wrong = {**row(made, kind, kind), f"{kind}s": [made[kind]()]}
        with pytest.raises(ValueError, match=rf"Row 1 of the batch has 2 \S+ placeholders and 1 {kind}s"):
            VisionLanguageCollator(host.processor)([row(made), wrong])


def test_an_answer_that_writes_a_placeholder_is_refused(host, made):
    token = getattr(host.processor, f"{host.kinds[0]}_token")
    with pytest.raises(ValueError, match="Row 0 of the batch has .*(placeholders and 0|stands for)"):
        VisionLanguageCollator(host.processor)([row(made, answer=f"so {token} there")])


def test_rows_of_a_dataset_are_checked_and_stay_conversations(host, made):
    rows = Dataset.from_list([row(made), row(made, question="two", answer="three")])
    kept = tokenize_rows(rows, host.processor)
    assert kept.column_names == rows.column_names
    with pytest.raises(ValueError, match=r"Row 1 of the dataset .*0 images|Row 1 of the dataset .*0 audios"):
        wrong = [row(made), {"messages": row(made, host.kinds[0])["messages"]}]
        tokenize_rows(Dataset.from_list(wrong), host.processor)


def test_a_processor_of_another_model_is_refused(host):
    config = host.config()
    check_processor(host.processor, config)
    field = f"{host.kinds[0]}_token_id"
    field = field if hasattr(config, field) else f"{host.kinds[0]}_token_index"
    setattr(config, field, 3)
    with pytest.raises(ValueError, match="does not fit the model: .* is 3 to the model"):
        VisionLanguageCollator(host.processor, config=config)
    config = host.config()
    config.get_text_config(decoder=True).vocab_size = 200
    with pytest.raises(ValueError, match="ids up to .*, and the model embeddings for 200"):
        check_processor(host.processor, config)


def test_an_unknown_placeholder_is_refused():
    processor = HOSTS["llava"]().processor
    processor.image_token = "<picture>"
    with pytest.raises(ValueError, match="has no token '<picture>', the placeholder of images"):
        VisionLanguageCollator(processor, config=HOSTS["llava"]().config())


def test_what_the_processor_refuses_names_the_row(made):
    thin = row(made, "image")
    thin["images"] = [Image.new("RGB", (400, 1))]
    with pytest.raises(
        ValueError, match="Row 1 of the batch is not taken by Qwen2_5_VLProcessor: ValueError: .*ratio"
    ):
        VisionLanguageCollator(HOSTS["qwen2_5_vl"]().processor)([row(made), thin, row(made, "image")])


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni"])
def test_a_sound_that_the_host_would_cut_names_the_row(name, made):
    long = row(made, "audio")
    long["audios"] = [{"array": np.ones(RATE * 3 // 2, np.float32), "sampling_rate": RATE}]
    with pytest.raises(ValueError, match=r"Row 1 of the batch has a sound 0 of 1.50 s, of which .* reads 1.00 s"):
        VisionLanguageCollator(HOSTS[name]().processor)([row(made, "audio"), long])


def test_images_and_videos_under_one_name_are_refused(made):
    processor = HOSTS["smolvlm"]().processor
    with pytest.raises(ValueError, match=r"Row 1 of the batch has videos in a batch with images, .*\(pixel_"):
        VisionLanguageCollator(processor)([row(made, "image"), row(made, "video")])


def test_rows_tokenised_elsewhere_are_refused(made):
    with pytest.raises(ValueError, match="Row 0 of the batch is tokenised, and LlavaProcessor expands"):
        VisionLanguageCollator(HOSTS["llava"]().processor)([{"input_ids": [1, 2], "labels": [1, 2]}])
