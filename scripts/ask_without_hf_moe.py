"""Open a checkpoint as somebody without hf_moe would, and ask three questions about a test image of easy-VQA.

python scripts/ask_without_hf_moe.py runs/demo/checkpoint
"""

import sys


class Blocked:
    """Makes `import hf_moe` fail, as on a machine without it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ImportError(f"{name} is not installed (blocked for this check)")
        return None


def main(folder: str) -> None:
    sys.meta_path.insert(0, Blocked())
    from easy_vqa import get_test_image_paths, get_test_questions
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    questions, answers, image_ids = get_test_questions()
    image = Image.open(get_test_image_paths()[image_ids[0]]).convert("RGB")
    asked = [(q, a) for q, a, i in zip(questions, answers, image_ids, strict=True) if i == image_ids[0]][:3]
    for question, answer in asked:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        reply = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {question}  ->  {reply.strip()}   (expected: {answer})")

    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    messages = [{"role": "user", "content": content}]
    options = {"max_new_tokens": 4, "do_sample": False}
    reply = ask(text=messages, return_full_text=False, generate_kwargs=options)
    print(f"  pipeline: {asked[-1][0]}  ->  {reply[0]['generated_text'].strip()}")
    assert "hf_moe" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1])
