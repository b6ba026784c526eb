"""What is measured, as (tokens, hidden, vocab): the loss heads of real models, and on a CPU toys."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """``small`` names the shapes that the host bounds, where what a call costs it is measured too."""

    shapes: dict[str, Size]
    small: frozenset[str]
    scaling: dict[str, list[Size]]
    logits: tuple[int, int]


SIZES = {
    "cuda": Sizes(
        shapes={
            "few-tokens": (64, 896, 32000),
            "small": (512, 896, 32000),
            "llama3-8b": (8192, 4096, 128256),
            "gemma2-2b": (8192, 2304, 256000),
            "qwen2.5-0.5b": (16384, 896, 151936),
            "long": (65536, 4096, 128256),
        },
        small=frozenset({"few-tokens", "small"}),
        scaling={  # beside the shapes above: llama3-8b and long are points of the first, gemma2-2b of the second
            "tokens": [(1024, 4096, 128256), (4096, 4096, 128256), (16384, 4096, 128256)],
            "vocab": [(8192, 2304, 32000), (8192, 2304, 64000), (8192, 2304, 128256)],
        },
        logits=(8192, 128256),
    ),
    "cpu": Sizes(
        shapes={"toy": (96, 32, 512)},
        small=frozenset({"toy"}),
        scaling={"tokens": [(48, 32, 512)], "vocab": [(96, 32, 256)]},
        logits=(64, 512),
    ),
}
