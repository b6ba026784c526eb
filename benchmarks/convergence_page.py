"""The README's section on convergence: held-out losses of both losses, and how far runs of one seed are apart."""

from __future__ import annotations

import numpy as np
from markup import DTYPES, markdown, prose, shown, versions

PEERS = {"torch": "`torch.nn.functional.cross_entropy`", "jax": "`optax.softmax_cross_entropy_with_integer_labels`"}


def curves(results: dict) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """By frontend and dtype the held-out losses (seeds, evaluations) of each loss."""
    return {
        (frontend, dtype): {
            loss: np.array([run[loss] for run in seeds.values()]) for loss in next(iter(seeds.values()))
        }
        for frontend, dtypes in results["curves"].items()
        for dtype, seeds in dtypes.items()
    }


def spread(losses: np.ndarray) -> np.ndarray:
    """The standard deviation over the seeds, at each evaluation."""
    return losses.std(axis=0, ddof=1)


def apart(found: dict[str, np.ndarray]) -> np.ndarray:
    """The greatest difference between the two losses at equal seed, at each evaluation."""
    return np.abs(found["twinhead"] - found["framework"]).max(axis=0)


def summary(results: dict) -> str:
    setup, evaluated = results["setup"], results["evaluated"]
    model = setup["model"]
    rows = curves(results)
    body = []
    for (frontend, dtype), found in rows.items():
        ends = [f"{losses[:, -1].mean():.4f} ± {spread(losses)[-1]:.4f}" for losses in found.values()]
        share = (apart(found) / spread(found["framework"])).max()
        body.append([f"{frontend}, {DTYPES[dtype]}", *ends, shown(apart(found).max()), shown(share)])
    frontends = dict.fromkeys(frontend for frontend, _ in rows)
    peers = ", ".join(PEERS[frontend] for frontend in frontends)
    where = "a CPU" if results["device"] == "cpu" else f"one {results['device']}"
    packages = versions(results, ("python", "torch", "triton", "jax", "optax"))
    parts = [
        prose(
            f"The demo's model ({model['layers']} layers of width {model['width']}, vocab {model['vocabulary']}) after"
            f" {setup['steps']} steps of {setup['batch_size']} x {model['context']} tokens of text, with our loss"
            f" and with the framework's own over full logits ({peers}). Each of {setup['seeds']} seeds gives both the"
            " same weights and batches. In bf16 the head and its loss are; the rest is float32. On"
            f" {where}, {packages}."
        ),
        prose(
            "Held-out loss in nats per token, mean ± standard deviation over seeds; then the greatest difference"
            f" between ours and the framework's at equal seed, at any of {len(evaluated)} evaluations, and that over"
            " the standard deviation between seeds at the same evaluation."
        ),
        markdown(["", "twinhead", "framework", "greatest difference", "over the spread"], body),
        "![Held-out loss of both, and the difference beside the spread between seeds](docs/convergence.png)",
    ]
    return "\n\n".join(parts)
