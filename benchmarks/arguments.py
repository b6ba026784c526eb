"""The arguments that benchmarks of steps have in common."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from measure import Clock
from shapes import SIZES


def parse(parser: ArgumentParser) -> Namespace:
    """Those of the command line; with ``clock``, how long steps take turns, and ``sizes``, of the device."""
    parser.add_argument("--out", type=Path, required=True, help="results file, JSON")
    parser.add_argument("--device", choices=SIZES, default="cuda", help="on a CPU sizes are toys")
    parser.add_argument("--skip", nargs="+", default=[], help="names of contenders to leave out")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long the steps of a size take turns")
    parser.add_argument("--rounds", type=int, default=30, help="how many turns they take at most")
    parser.add_argument("--commit", help="commit of the measured code, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no GPU that torch sees; with cpu it measures toys")
    arguments.skip = set(arguments.skip)
    arguments.clock = Clock(arguments.seconds, min(5, arguments.rounds), arguments.rounds)
    arguments.sizes = SIZES[arguments.device]
    return arguments
