"""What the project aims at, as bounds of values that are read from the results of a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Sections = dict[str, dict[str, dict]]  # of a shape: rows of each section, by label
Value = Callable[[Sections], float | None]

HEADS = ("llama3-8b", "gemma2-2b", "qwen2.5-0.5b", "long")
SMALL = ("small", "few-tokens")


@dataclass(frozen=True)
class Target:
    """An upper bound by shape, or a lower one; ``digits`` are those shown."""

    name: str
    value: Value
    bounds: dict[str, float]
    digits: int = 3
    lower: bool = False

    def met(self, shape: str, value: float) -> bool:
        return value >= self.bounds[shape] if self.lower else value <= self.bounds[shape]


def row(section: str, label: str, name: str) -> Value:
    return lambda sections: sections.get(section, {}).get(label, {}).get(name)


def worst_quotient(*pairs: tuple[Value, Value]) -> Value:
    """The largest of several quotients, of which all must be there."""

    def value(sections: Sections) -> float | None:
        values = [(above(sections), below(sections)) for above, below in pairs]
        return max(a / b for a, b in values) if all(a is not None and b for a, b in values) else None

    return value


def error(label: str, data: str, name: str) -> Value:
    return lambda sections: sections.get("training", {}).get(label, {}).get(data, {}).get(name)


def each(bound: float, shapes: tuple[str, ...] = HEADS) -> dict[str, float]:
    return dict.fromkeys(shapes, bound)


def heads(*bounds: float) -> dict[str, float]:
    return dict(zip(HEADS, bounds, strict=True))


def step(label: str, name: str = "ratio") -> Value:
    return row("training", f"twinhead {label}", name)


def compiled(name: str) -> Value:
    return row("training", "torch compile", name)


EVALUATION = "evaluation", "twinhead torch, metrics"
MODES = ("speed", "lean")

TARGETS = (
    Target("speed: time / floor", step("torch, speed"), heads(1.01, 1.02, 1.08, 1.03)),
    Target("speed: extra MiB", step("torch, speed", "extra_mib"), heads(2200, 4100, 4900, 4400), 0),
    Target("speed in JAX: extra MiB", step("jax, speed", "extra_mib"), heads(2200, 4100, 4900, 4400), 0),
    Target("lean: time / floor", step("torch, lean"), heads(1.35, 1.35, 1.45, 1.35)),
    Target("lean: extra MiB", step("torch, lean", "extra_mib"), heads(256, 256, 320, 1024), 0),
    Target("evaluation with metrics: time / one projection", row(*EVALUATION, "ratio"), heads(1.03, 1.03, 1.05, 1.03)),
    Target("evaluation with metrics: extra MiB", row(*EVALUATION, "extra_mib"), heads(32, 32, 32, 64), 0),
    Target(
        "half of the tokens ignored, speed: time / floor",
        row("half ignored", "twinhead torch, speed", "ratio"),
        heads(0.58, 0.58, 0.62, 0.58),
    ),
    Target(
        "metrics: time with / without, the worse of speed and lean",
        worst_quotient(*((step(f"torch, {mode}, metrics"), step(f"torch, {mode}")) for mode in MODES)),
        each(1.01),
    ),
    *(
        Target(
            f"metrics, {section}: time with / without",
            worst_quotient((row(section, f"{ours}, metrics", "ratio"), row(section, ours, "ratio"))),
            each(1.01),
        )
        for section, ours in (("half ignored", "twinhead torch, speed"), ("evaluation", "twinhead torch"))
    ),
    Target(
        "time under jax.jit / in torch, the worse of speed and lean",
        worst_quotient(*((step(f"jax, {mode}"), step(f"torch, {mode}")) for mode in MODES)),
        each(1.02, (*HEADS, *SMALL)),
    ),
    *(
        Target(
            f"gradient error / that of torch eager, {data} data, the worst",
            worst_quotient(
                *(
                    (error(f"twinhead torch, {mode}", data, name), error("torch eager", data, name))
                    for mode in MODES
                    for name in ("dx_error", "dw_error")
                )
            ),
            each(1.1),
        )
        for data in ("random", "peaked")
    ),
    *(
        Target(
            f"{what} / torch compile's",
            worst_quotient((step("torch, speed", name), compiled(name))),
            each(1.0, SMALL),
        )
        for what, name in (
            ("time until a call returns", "host_us"),
            ("time of a call that is waited for", "waited_us"),
            ("time of a call among many", "pipelined_us"),
        )
    ),
)
LOGITS = tuple(
    Target(
        f"cross entropy of logits, {name} pass: share of a copy's bandwidth",
        row("rows", "twinhead torch", f"{name}_share"),
        {"logits": 0.9},
        2,
        lower=True,
    )
    for name in ("forward", "backward")
)
