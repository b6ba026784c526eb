"""Train a small Llama of Hugging Face's transformers with its Trainer, with the fused loss and no logits.

    python examples/finetune_hf.py                  # a minute or two on two CPU cores
    python examples/finetune_hf.py --layers 8 --hidden 1024 --batch-size 32     # on a GPU

The text is Python's standard library. One call, `enable(model)`, gives the model the fused loss, and its outputs the
predicted tokens, of which the evaluation makes its accuracy. At the end a held-out passage is shown with the prediction
for each of its tokens, in the terminal and as a picture.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # there is nothing to download

import numpy as np
import torch
from corpus import IGNORED, UNKNOWN, Corpus, load_corpus, passage_window
from report import Run, console, print_passage, save_passage
from rich.table import Table
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from torch_api.transformers import disable, enable

VOCABULARY = 4096
CONTEXT = 128
HELD_OUT = 64  # windows
PASSAGE = 96  # tokens to show


def make_model(vocabulary: int, hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def examples(tokens: np.ndarray, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Windows at random places. The labels are the tokens themselves: a model of transformers shifts them."""
    starts = np.random.default_rng(seed).integers(len(tokens) - CONTEXT, size=count)
    return [example(tokens[start : start + CONTEXT]) for start in starts]


def example(tokens: np.ndarray) -> dict[str, np.ndarray]:
    ids = tokens.astype(np.int64)
    return {"input_ids": ids, "labels": np.where(ids == UNKNOWN, IGNORED, ids)}


def predicted_tokens(outputs: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """What the evaluation keeps of the outputs: the last of them, and none of the logits."""
    return outputs[-1]


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    asked = evaluated.predictions >= 0
    return {"accuracy": float((evaluated.predictions == evaluated.label_ids)[asked].mean())}


def print_peaks(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    """The memory at the highest point of a forward and a backward pass, with the logits and without."""
    table = Table(title="Peak memory of forward and backward", title_justify="left", title_style="bold")
    table.add_column("loss")
    table.add_column("MiB", justify="right")
    for name, prepare in (("as it comes", disable), ("fused", enable)):
        prepare(model)
        for _ in range(2):  # the first compiles kernels
            torch.cuda.reset_peak_memory_stats()
            model(**batch).loss.backward()
            model.zero_grad()
        table.add_row(name, f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}")
    console.print(table)


def show_passage(model: LlamaForCausalLM, corpus: Corpus, picture: Path) -> None:
    """A held-out passage and the prediction for each of its tokens."""
    window = passage_window(corpus, PASSAGE)
    batch = {name: torch.tensor(row)[None] for name, row in example(corpus.held_out[window]).items()}
    with torch.no_grad():
        outputs = model.eval()(**{name: rows.to(model.device) for name, rows in batch.items()})
    run = Run("Llama", str(model.device), passage=outputs.predicted_tokens[0, 1:].cpu().numpy())
    labels = batch["labels"][0, 1:].numpy()
    print_passage([run], corpus.held_out_text[window], labels, corpus.vocabulary)
    save_passage(run, corpus.held_out_text[window], labels, corpus.vocabulary, picture)
    console.print(
        f"{outputs.num_correct} of {outputs.num_valid} tokens of the passage predicted right "
        f"({outputs.token_accuracy:.1%}). Picture: {picture}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Llama with transformers' Trainer and the fused loss.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help=f"windows of {CONTEXT} tokens per step")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model, a multiple of 8")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights and the batches")
    parser.add_argument("--plot", type=Path, default=Path("finetune_hf.png"), help="where the picture goes")
    args = parser.parse_args()
    if args.steps < 1 or args.batch_size < 1:
        parser.error("--steps and --batch-size must be at least 1")

    corpus = load_corpus(VOCABULARY)
    torch.manual_seed(args.seed)
    model = enable(make_model(len(corpus.vocabulary), args.hidden, args.layers))
    console.print(
        f"Text: Python's standard library, {len(corpus.train):,} tokens, and {len(corpus.held_out):,} held out\n"
        f"Model: {model.num_parameters():,} parameters, a vocabulary of {len(corpus.vocabulary):,}\n"
    )
    train = examples(corpus.train, args.steps * args.batch_size, args.seed)
    if torch.cuda.is_available():
        model.cuda()
        rows = [{name: torch.tensor(row).cuda() for name, row in e.items()} for e in train[: args.batch_size]]
        print_peaks(model, {name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    enable(model, return_predicted_tokens=True, return_token_accuracy=True)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            logging_steps=max(1, args.steps // 10),
            report_to=[],
            save_strategy="no",
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=examples(corpus.held_out, HELD_OUT, args.seed + 1),
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=predicted_tokens,
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()

    show_passage(model, corpus, args.plot)
    for name in ("loss", "accuracy"):
        first, last = before[f"eval_{name}"], after[f"eval_{name}"]
        console.print(f"held-out {name} {first:.4f} before training, {last:.4f} after")


if __name__ == "__main__":
    main()
