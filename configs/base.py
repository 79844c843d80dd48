"""Every key with its default: a small model of Python source code that trains in minutes on a laptop's CPU.

`jaxlm/config/schema.py` says what each key means and which values it takes. Other configurations import this one and
change a few lines. docs/recipe.md says how this recipe was found.
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
        seed=0,
        deterministic=False,  # matters on GPUs only
        steps=1750,  # 1.1 epochs
        batch_size=8,
        seq_len=256,
        model=ModelConfig(
            num_layers=4,
            encoder_layers=0,  # a decoder alone
            encoder_len=0,
            d_model=192,
            num_heads=3,  # each of size 64
            num_kv_heads=0,  # as many as query heads
            head_dim=0,  # d_model / num_heads
            d_ff=0,  # 4 * d_model
            activation="relu2",  # the cheapest on CPU, and better than GELU here
            norm="rmsnorm",
            norm_eps=0.0,  # 1e-6
            post_norms=False,
            position="rope",
            rope_theta=10_000.0,
            rope_fraction=1.0,
            rope_scaling="none",
            rope_factor=1.0,
            rope_original=0,
            rope_short="",
            rope_long="",
            window=0,
            global_every=0,
            rope_local_theta=0.0,
            score_dim=0,
            attention_softcap=0.0,
            use_bias=False,
            qkv_bias=False,
            tie_embeddings=False,
            scale_embeddings=False,
            dropout=0.0,  # a small model and few epochs need no regularization
            logit_softcap=0.0,  # off
            qk_norm=True,
            key_offset=True,  # one layer can find what followed a token before: 1.42 -> 1.31 bits per byte at 800 steps
            vocab_multiple=1,  # on GPUs, 64 or 128 speeds up the output layer
            lora_rank=0,  # off
            lora_alpha=16.0,
            lora_targets="query|key|value|out|up|gate|down",
            lora_dropout=0.0,
            residual_init="zero",
            dtype="float32",  # use bfloat16 on GPUs; on CPU it is no faster
            param_dtype="float32",
            matmul_precision="default",
            attention="auto",
            remat="auto",
            scan_unroll=-1,  # small models' layers unrolled on CPUs, none on GPUs, where their compilation counts most
        ),
        loss=LossConfig(label_smoothing=0.0, z_loss=0.0, chunk=0),
        optim=OptimConfig(
            name="muon",
            lr=OWN,  # OWN, here and below, is the optimizer's own value in jaxlm/config/own_values.py
            adam_lr=0.004,
            embed_lr=0.1,  # high, because most tokens are rare: their rows get few updates
            schedule="wsd",  # warmup, stable, decay: constant, then linear to min_lr_ratio of the peak
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
            freeze="",
            ema_decay=0.0,  # off
            spike_factor=10.0,  # the guard: docs/reliability.md
            on_spike="scale",
            max_skipped=5,
            max_returns=3,
            return_lr=0.5,
        ),
        data=DataConfig(
            source="stdlib",  # the source code of the running Python's standard library
            path="",  # for your own text: source="text" and a file, folder or glob here
            val_path="",
            mixture="",  # for several sources at once: docs/data.md
            text_key="text",
            prompt_key="",
            response_key="",
            messages_key="",  # to train on conversations: docs/finetuning.md
            chat_template="<|{role}|>\n{content}\n",
            on_error="stop",
            tfds_name="",
            split="train",
            val_split="",
            val_fraction=0.05,  # of the files
            tokenizer="sentencepiece",
            tokenizer_path="",  # train one on the corpus
            sentencepiece="bpe",  # trains 20 times as fast as unigram, and encodes code in as few tokens
            vocab_size=2048,
            cache_dir="",  # ~/.cache/jaxlm
            packing="concat",  # documents follow each other; "document" keeps them apart
        ),
        parallel=ParallelConfig(
            devices=0,  # all
            reduce="pmean",  # an all-reduce, NCCL's on GPUs; docs/communication.md says when another is better
            overlap=False,
            bucket_mb=0.0,  # all at once
            zero=0,  # off
            tensor=1,  # off
            pipeline=1,  # off
            schedule="1f1b",
            chunks=1,
            context=1,  # off
            topk_density=0.1,
            powersgd_rank=16,
        ),
        checkpoint=CheckpointConfig(every_steps=1000, keep=2, keep_best=1, resume="auto", check_replicas=True),
        eval=EvalConfig(every_steps=1000, batches=0, sample_tokens=100, sample_prompt="def ", baselines=True),
        log=LogConfig(
            every_steps=10,
            tensorboard=True,
            wandb=False,
            layer_stats=False,
            profile_steps=0,
            hang_seconds=600.0,
            hang_abort=False,
        ),
    )
