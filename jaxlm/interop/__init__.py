"""Models of Hugging Face, in and out: `families` translates their configurations, `tensors` says which tensor is which
parameter, `shards` reads and writes their files, `own_tokenizers` writes the tokenizers that jaxlm trains, `importing`
and `exporting` do the work.

Nothing here imports torch or transformers.

May import: config, host, model, data, checkpoint, run.
"""
