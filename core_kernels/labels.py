"""Labels that are no class: found and named where reading the labels back costs nothing, or was asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(labels: Tensor, vocab: int, ignore_index: int, name: str) -> None:
    """Raise on the first label that is neither in ``[0, vocab)`` nor ``ignore_index``; reads the labels' values.

    Raises:
        IndexError: with the label's position and value.
    """
    labels = labels.long()
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bool(bad.any()):
        position = torch.nonzero(bad)[0].tolist()
        value = int(labels[tuple(position)])
        where = f"{name}[{', '.join(map(str, position))}]" if position else name
        raise IndexError(
            f"{where} = {value} is out of range: a label must be in [0, {vocab}) or equal ignore_index={ignore_index}"
        )
