"""The segment of every token of a dialogue: an image, a caption, the turn of a user, ..., for routers by segment.

Source: PaCE: Unified Multi-modal Dialogue Pre-training with Progressive and Compositional Experts, arXiv:2305.14839.
"""

from collections.abc import Mapping

import torch


def segment_ids(
    input_ids: torch.Tensor,
    markers: Mapping[int, int],
    *,
    first: int,
    modality_ids: torch.Tensor | None = None,
    image: int | None = None,
) -> torch.Tensor:
    """Return the segment (B, S) of every token, that of the last marker up to it.

    Args:
        input_ids (`torch.Tensor` of shape `(B, S)`): the tokens.
        markers (`Mapping[int, int]`): id of a token at which a segment begins -> the segment, such as that of
            `<|user|>`.
        first (`int`): the segment before any marker.
        modality_ids (`torch.Tensor` of shape `(B, S)`, *optional*): by which tokens of images and videos are
            found.
        image (`int`, *optional*): their segment, which does not end the one around them.
    """
    segment = torch.full_like(input_ids, -1)
    for token, number in markers.items():
        segment = segment.masked_fill(input_ids == token, number)
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    last = place.masked_fill(segment < 0, -1).cummax(1).values  # (B, S)
    found = torch.where(last < 0, first, segment.gather(1, last.clamp(min=0)))
    if modality_ids is None or image is None:
        return found
    return found.masked_fill((modality_ids == 1) | (modality_ids == 2), image)
