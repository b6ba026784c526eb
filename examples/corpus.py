"""Text that every machine has: the source of Python's own standard library, as token ids of a frequency vocabulary."""

import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNKNOWN = 0  # the id of every token too rare for the vocabulary
IGNORED = -100  # the label of an unknown token: it adds nothing to the loss, the gradients or the accuracy

MAX_CHARACTERS = 4_000_000
HELD_OUT_SHARE = 0.05
SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip

# Line breaks with the indent that follows, words, underscores, digits and punctuation, each with one leading space.
TOKEN = re.compile(r"\s*\n *| ?(?:[A-Z]+(?![a-z])|[A-Z]?[a-z]+|_+|[0-9]|[^\w\s])|\s+|.")


@dataclass(frozen=True)
class Corpus:
    """Token ids for training and for evaluation; no file has a part in both."""

    vocabulary: list[str]  # the text of each id
    counts: np.ndarray  # (V,) how often each id occurs in `train`
    train: np.ndarray  # (tokens,) int32
    held_out: np.ndarray  # (tokens,) int32
    held_out_text: list[str]  # the text of each held-out token, unknown ones too

    @property
    def unigram_entropy(self) -> float:
        """Nats per known token for a model that knows the frequencies of the tokens and no context."""
        known = self.counts[UNKNOWN + 1 :]
        shares = known / known.sum()
        return float(-(shares * np.log(shares)).sum())


def standard_library() -> list[str]:
    """The standard library's source files, in a fixed shuffled order, up to `MAX_CHARACTERS` in all."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    sources: list[str] = []
    characters = 0
    for path in paths:
        source = path.read_text(encoding="utf-8", errors="replace")
        characters += len(source)
        if characters > MAX_CHARACTERS:
            break
        sources.append(source)
    if not sources:
        raise SystemExit(f"no source files of the standard library under {root}")
    return sources


def load_corpus(vocabulary_size: int) -> Corpus:
    """Tokenise the standard library with its `vocabulary_size - 1` most frequent tokens and one unknown token."""
    files = [TOKEN.findall(source) for source in standard_library()]
    held_out_files = max(1, round(HELD_OUT_SHARE * len(files)))
    held_out_text = [token for file in files[:held_out_files] for token in file]
    train_text = [token for file in files[held_out_files:] for token in file]

    by_frequency = sorted(Counter(train_text).items(), key=lambda item: (-item[1], item[0]))
    vocabulary = ["<unk>"] + [token for token, _ in by_frequency[: vocabulary_size - 1]]
    ids = {token: i for i, token in enumerate(vocabulary)}
    train = np.array([ids.get(token, UNKNOWN) for token in train_text], np.int32)
    held_out = np.array([ids.get(token, UNKNOWN) for token in held_out_text], np.int32)
    return Corpus(vocabulary, np.bincount(train, minlength=len(vocabulary)), train, held_out, held_out_text)


def next_token(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows `(batch, length + 1)` to inputs and labels `(batch, length)`: each label is the token that follows."""
    labels = windows[:, 1:]
    return windows[:, :-1], np.where(labels == UNKNOWN, np.int32(IGNORED), labels)


def training_batches(
    tokens: np.ndarray, steps: int, batch_size: int, length: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`steps` batches of windows at random places: the same ones for the same seed."""
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        starts = generator.integers(len(tokens) - length, size=batch_size)
        yield next_token(tokens[starts[:, None] + np.arange(length + 1)])


def held_out_batches(
    tokens: np.ndarray, batches: int, batch_size: int, length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows evenly spread over all of `tokens`."""
    starts = np.linspace(0, len(tokens) - length - 1, batches * batch_size).astype(int)
    windows = tokens[starts[:, None] + np.arange(length + 1)]
    return [next_token(part) for part in np.split(windows, batches)]


def passage_window(corpus: Corpus, length: int) -> slice:
    """The `length` held-out tokens of a passage to show, and the one before them.

    It begins with a function definition near the middle of the text.
    """
    text = corpus.held_out_text
    middle = len(text) // 2
    starts = range(middle, len(text) - length - 1)
    start = next((i for i in starts if "\n" in text[i] and text[i + 1] == "def"), middle)
    return slice(start, start + length + 1)
