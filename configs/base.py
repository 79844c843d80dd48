"""Every key with its default: a small model of Python source that trains in minutes on a laptop's CPU.

`jaxlm/config/schema.py` says what each key may be. Other configurations import this one and change a few lines.
How this recipe was found: docs/recipe.md.
"""

from jaxlm.config import (
    OWN,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)


def get_config() -> Config:
    return Config(
        seed=0,  # of initial weights, data order and dropout
        deterministic=False,  # CPU is always deterministic
        steps=1750,  # 1.1 epochs; four and a half minutes on two cores
        batch_size=8,
        seq_len=256,
        model=ModelConfig(
            num_layers=4,
            d_model=192,
            num_heads=3,  # heads of 64
            num_kv_heads=0,  # as many as query heads
            d_ff=0,  # 4 * d_model
            activation="relu2",  # cheapest on CPU, and better than GELU here
            norm="rmsnorm",
            position="rope",
            rope_theta=10_000.0,
            use_bias=False,
            tie_embeddings=False,
            dropout=0.0,  # a small model and few epochs: nothing to regularize
            logit_softcap=0.0,
            qk_norm=True,
            key_offset=True,  # a layer alone finds what followed the last time: 1.42 -> 1.31 bits per byte at 800 steps
            vocab_multiple=1,  # on GPUs, 64 or 128 makes products with the output layer faster
            residual_init="zero",
            dtype="float32",  # bfloat16 is for GPUs; on CPU it is no faster
            param_dtype="float32",
            matmul_precision="default",
            attention="auto",  # cudnn where it can, else xla
            remat="none",
            scan_unroll=0,  # unrolled runs fastest, a rolled loop (1) compiles fastest
        ),
        loss=LossConfig(label_smoothing=0.0, z_loss=0.0, chunk=0),
        optim=OptimConfig(
            name="muon",
            lr=OWN,  # like every OWN below, the optimizer's own value: jaxlm/config/own_values.py
            adam_lr=0.004,  # muon's, of all but the hidden matrices
            embed_lr=0.1,  # muon's, of token embeddings; most tokens are rare, so their rows have few updates
            schedule="wsd",  # flat, then linear to min_lr_ratio
            warmup_steps=20,
            decay_fraction=0.4,
            min_lr_ratio=0.0,
            weight_decay=OWN,
            b1=OWN,
            b2=OWN,
            eps=1e-8,
            momentum=OWN,
            clip_norm=1.0,
            accum_steps=1,
            ema_decay=0.0,
            spike_factor=10.0,
            on_spike="scale",
            max_skipped=5,
            max_returns=3,
            return_lr=0.5,
        ),
        data=DataConfig(
            source="stdlib",  # the source of the running Python's standard library
            path="",
            val_path="",
            mixture="",
            text_key="text",
            prompt_key="",
            response_key="",
            messages_key="",
            chat_template="<|{role}|>\n{content}\n",
            on_error="stop",
            tfds_name="",
            split="train",
            val_split="",
            val_fraction=0.05,  # of the files
            tokenizer="sentencepiece",
            tokenizer_path="",  # trained on the corpus
            sentencepiece="bpe",  # trains 20 times as fast as unigram; code gets as short
            vocab_size=2048,
            cache_dir="",  # ~/.cache/jaxlm
            packing="concat",
        ),
        parallel=ParallelConfig(
            devices=0,  # all
            reduce="pmean",  # an all-reduce, NCCL's on GPUs; which of the others when: docs/communication.md
            overlap=False,
            bucket_mb=0.0,
            zero=0,
            topk_density=0.1,
            powersgd_rank=16,
        ),
        checkpoint=CheckpointConfig(every_steps=1000, keep=2, keep_best=1, resume="auto", check_replicas=True),
        eval=EvalConfig(every_steps=1000, batches=0, sample_tokens=100, sample_prompt="def ", baselines=True),
        log=LogConfig(
            every_steps=10, tensorboard=True, wandb=False, profile_steps=0, hang_seconds=600.0, hang_abort=False
        ),
    )
