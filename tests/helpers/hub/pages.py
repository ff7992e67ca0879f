"""What the tests of a page share: a port, a checkpoint on disk, and the table of costs read back."""

import re
import socket
from pathlib import Path

from helpers.hub.checkpoints import tiny_model


REPO = "owner/tiny"
QUESTION = "what is this"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %} <s>"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def save(folder: Path, config, processor) -> Path:
    tiny_model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def numbers(cost: str) -> dict[str, float]:
    """Return the newest line of the table of costs."""
    names, values = re.findall(r"<th>(.*?)</th>", cost), re.findall(r"<td>(.*?)</td>", cost)
    return {name: float(value) for name, value in zip(names, values, strict=False) if value != "–"}
