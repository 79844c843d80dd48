"""Models of Hugging Face, in and out: `families` translates their configurations (`config_json`), `tensors` says which
tensor is which parameter, `shards` reads and writes their files, `own_tokenizers` writes the tokenizers that jaxlm
trains, `own_model` describes a model that `transformers` does not have, which hub/modeling_jaxlm.py computes there,
`importing` and `exporting` do the work.

And a model for lm-evaluation-harness: `harness` answers its requests with `scoring` and `continuing`, which put rows
into `batches` over all devices; `shipped_texts` reads texts as `transformers` does, `generation_kwargs` what a request
asks for.

Nothing here imports torch or transformers, apart from that file, which nothing imports here, and only `harness` imports
the harness.

May import: config, host, model, data, train, checkpoint, run.
"""
