"""Multimodal models of Transformers that cannot become a MoE: why, and which of their kind can.

Most of it shows in their code too. Here it is said in the terms of a user, before anything is loaded.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a type of model is no host: "it cannot become a MoE, because `reason`", and which types can `instead`."""

    reason: str
    instead: str

    def message(self, model_type: str) -> str:
        return f"{model_type} cannot become a MoE: {self.reason}. Take {self.instead}."


ENCODER_DECODER = "it is an encoder-decoder, and MoE layers are those of a decoder that reads words and features alike"
IN_THE_LAYER = "its decoder (OPT) keeps the projections of its feed-forward in the layer, where no module holds both"
NORM_INSIDE = "its feed-forward has a norm between its projections, for which experts have no place"
MIXERS = "the layers of its decoder (Nemotron-H) are each one mixer, and none holds a feed-forward beside it"
INKLING = "its gate weighs routed and shared experts in one sum, which no router here does"

REFUSED: dict[str, Refusal] = {
    "apertus1p5": Refusal(
        "the activation of its feed-forward is learned, and experts take one by its name", "qwen2_5_omni_thinker"
    ),
    "blip": Refusal("its decoder is a BERT that sees images by cross-attention", "paligemma or llava"),
    "blip-2": Refusal(IN_THE_LAYER, "llava or paligemma"),
    "diffusion_gemma": Refusal("it writes by diffusion, not one token after another", "gemma3 or gemma4"),
    "evolla": Refusal("it reads proteins, which are none of the modalities that routers know", "llama, its decoder"),
    "florence2": Refusal(ENCODER_DECODER, "paligemma or qwen2_5_vl"),
    "git": Refusal("its decoder is a BERT that keeps its layers in an encoder of its own", "paligemma or llava"),
    "inkling2": Refusal(INKLING, "qwen3_vl_moe or qwen3_5_moe"),
    "inkling2_loop": Refusal(INKLING, "qwen3_vl_moe or qwen3_5_moe"),
    "inkling_mm_model": Refusal(INKLING, "qwen3_omni_moe_thinker"),
    "instructblip": Refusal(IN_THE_LAYER, "llava or paligemma"),
    "instructblipvideo": Refusal(IN_THE_LAYER, "llava_next_video or qwen2_5_vl"),
    "kosmos-2": Refusal(NORM_INSIDE, "qwen2_5_vl"),
    "kosmos-2.5": Refusal(NORM_INSIDE, "paddleocr_vl or got_ocr2"),
    "kyutai_speech_to_text": Refusal(
        "its feed-forward splits one projection in halves without saying so", "voxtral or qwen2_audio"
    ),
    "muse_spark": Refusal("projections and a norm stand around its experts", "muse_glimmer or qwen3_vl_moe"),
    "nemo_speechlm": Refusal(MIXERS, "qwen3_asr or voxtral"),
    "nemotron_h_omni": Refusal(MIXERS, "qwen2_5_omni_thinker"),
    "phi4_multimodal": Refusal(
        "the ids of its placeholders stand in the configs of its towers, where routers do not look",
        "qwen2_5_omni_thinker, or phi3 as the decoder of a composed model",
    ),
    "pi0": Refusal("it moves robots and writes no text", "paligemma, which it is built on"),
    "pix2struct": Refusal(ENCODER_DECODER, "paddleocr_vl or qwen2_5_vl"),
    "pp_formulanet": Refusal(ENCODER_DECODER, "paddleocr_vl or got_ocr2"),
    "qwen2_5_omni": Refusal(
        "as a whole it answers in speech with a second decoder",
        "its thinker: from_host(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(...))",
    ),
    "qwen3_omni_moe": Refusal(
        "as a whole it answers in speech with a second decoder",
        "its thinker: from_host(Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(...))",
    ),
    "t5gemma2": Refusal(ENCODER_DECODER, "gemma3"),
    "udop": Refusal(ENCODER_DECODER, "paddleocr_vl or qwen2_5_vl"),
    "vision-encoder-decoder": Refusal(ENCODER_DECODER, "llava, or a composed model of the same tower"),
}
