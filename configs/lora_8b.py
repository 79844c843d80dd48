"""LoRA of a model of 8 billion parameters on one GPU of 24 GB: Llama 3 8B on your chats.

    jaxlm import-hf Meta-Llama-3-8B-Instruct runs/llama3 --dtype bfloat16
    jaxlm train --config lora_8b --config.checkpoint.resume=runs/llama3 --config.data.path=chats.jsonl

`checkpoint.resume` brings the model's keys and its tokenizer. Those here are Llama 3's, for `jaxlm plan`. The weights
stay as they are, in bfloat16 (16 GB); LoRA is trained in float32.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps, c.batch_size, c.seq_len = 1000, 16, 2048
    m = c.model
    m.num_layers, m.d_model, m.num_heads, m.num_kv_heads, m.d_ff = 32, 4096, 32, 8, 14336
    m.activation, m.norm, m.norm_eps, m.position, m.rope_theta = "swiglu", "rmsnorm", 1e-5, "rope", 500_000.0
    m.qk_norm = m.key_offset = False
    m.dtype = m.param_dtype = "bfloat16"
    m.remat = "full"
    m.lora_rank, m.lora_alpha = 16, 32.0
    o = c.optim
    o.name, o.lr, o.b1, o.b2, o.weight_decay = "adamw", 2e-4, 0.9, 0.999, 0.0
    o.schedule, o.warmup_steps, o.min_lr_ratio = "cosine", 30, 0.1
    o.accum_steps = 16  # one sequence at a time
    c.loss.chunk = 1024
    c.data.source, c.data.messages_key, c.data.chat_template = "jsonl", "messages", "tokenizer"
    c.data.vocab_size = 128_256
    c.data.packing = "document"
    c.eval.every_steps, c.eval.batches, c.eval.baselines = 100, 20, False
    c.checkpoint.every_steps, c.checkpoint.keep = 100, 1  # a checkpoint has all weights: 16 GB
    return c
