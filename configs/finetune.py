"""LoRA on a trained model of your own or of Hugging Face, for another kind of text: docs/finetuning.md.

    jaxlm train --config finetune --config.checkpoint.resume=runs/base --config.data.path=FILE_OR_FOLDER

`checkpoint.resume` brings the model's keys and its tokenizer. For chats, set `data.source=jsonl` and
`data.messages_key`.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps, c.batch_size = 300, 8
    c.model.lora_rank, c.model.lora_alpha = 16, 32.0
    o = c.optim
    o.name, o.lr = "adamw", 1e-2  # for millions of parameters; 2e-4 for billions
    o.b1, o.b2, o.weight_decay = 0.9, 0.99, 0.0
    o.schedule, o.warmup_steps, o.decay_fraction = "wsd", 10, 0.5
    c.data.source = "text"
    c.eval.every_steps, c.checkpoint.every_steps = 100, 100
    return c
