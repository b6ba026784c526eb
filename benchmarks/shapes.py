"""Loss heads of real models, as (tokens, hidden, vocab)."""

SHAPES = {
    "small": (512, 896, 32000),
    "llama3-8b": (8192, 4096, 128256),
    "gemma2-2b": (8192, 2304, 256000),
    "qwen2.5-0.5b": (16384, 896, 151936),
}
