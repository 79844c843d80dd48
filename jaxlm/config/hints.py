"""Suggestions for keys and options that do not exist, also for the names that other trainers use."""

import difflib

from jaxlm.config import UserError, key_types, sections

# {a key or option here, or words for what does the same: its names in nanoGPT, Hugging Face's Trainer and others}
NAMES_ELSEWHERE = {
    "seed": "random_seed manual_seed",
    "steps": "max_iters max_steps num_steps total_steps train_steps num_train_steps iterations iters num_iterations",
    "steps, counted in optimizer steps of batch_size * seq_len tokens": "epochs num_epochs num_train_epochs max_epochs",
    "batch_size": "global_batch_size train_batch_size total_batch_size bs",
    "batch_size, which counts all devices together, and optim.accum_steps": "micro_batch_size device_batch_size"
    " per_device_batch_size per_device_train_batch_size per_device_eval_batch_size",
    "seq_len": "block_size max_seq_len max_seq_length context_length context_size sequence_length seq_length max_length"
    " ctx_len n_ctx n_positions max_position_embeddings",
    "model.num_layers": "n_layer n_layers num_hidden_layers depth",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads",
    "model.d_model": "n_embd n_embed hidden_size dim embed_dim embedding_dim model_dim width",
    "model.d_ff": "intermediate_size ffn_dim mlp_dim n_inner hidden_dim d_mlp ffn_hidden_size",
    "model.activation": "hidden_act activation_function act",
    "model.position": "pos_emb position_embedding position_embedding_type",
    "model.rope_theta": "rope_base rotary_base",
    "model.use_bias": "bias",
    "model.tie_embeddings": "tie_word_embeddings weight_tying",
    "model.dropout": "dropout_rate attn_dropout attention_dropout resid_dropout resid_pdrop hidden_dropout_prob",
    "model.logit_softcap": "softcap final_logit_softcapping",
    "model.dtype": "bf16 fp16 amp precision mixed_precision torch_dtype compute_dtype",
    "model.attention": "flash_attention flash_attn flash attn_implementation",
    "model.remat": "gradient_checkpointing activation_checkpointing",
    "loss.label_smoothing": "label_smoothing_factor",
    "optim.name": "optimizer optimizer_name optim_name",
    "optim.lr": "learning_rate peak_lr base_lr max_lr",
    "optim.schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler decay_lr",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps",
    "optim.decay_fraction": "lr_decay_iters decay_steps cooldown_steps cooldown_fraction",
    "optim.min_lr_ratio": "min_lr final_lr end_lr lr_min",
    "optim.weight_decay": "wd",
    "optim.b1": "beta1 beta_1 adam_beta1",
    "optim.b2": "beta2 beta_2 adam_beta2",
    "optim.b1 and optim.b2": "betas adam_betas",
    "optim.eps": "epsilon adam_epsilon adam_eps",
    "optim.clip_norm": "grad_clip max_grad_norm gradient_clip_val gradient_clipping clip clip_grad clip_grad_norm",
    "optim.accum_steps": "gradient_accumulation_steps gradient_accumulation grad_accum_steps grad_accum"
    " accumulate_grad_batches accumulation_steps",
    "optim.ema_decay": "ema",
    "data.path": "data_path data_dir dataset dataset_path train_file train_data input input_file",
    "data.val_path": "validation_file val_file val_data eval_file",
    "data.val_fraction": "validation_split_percentage val_ratio val_size test_size",
    "data.text_key": "text_column text_field dataset_text_field",
    "data.tfds_name": "dataset_name",
    "data.tokenizer_path": "tokenizer_name tokenizer_name_or_path tokenizer_file",
    "parallel.devices": "n_gpu n_gpus num_gpus gpus num_devices n_devices world_size nproc_per_node",
    "parallel.zero": "zero_stage fsdp",
    "parallel.tensor": "tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size",
    "parallel.pipeline": "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size",
    "parallel.context": "cp cp_size context_parallel context_parallel_size sequence_parallel",
    "checkpoint.every_steps": "save_steps save_interval save_every save_freq ckpt_interval checkpoint_interval",
    "checkpoint.keep": "save_total_limit max_to_keep keep_last",
    "checkpoint.resume": "resume_from resume_from_checkpoint init_from load_checkpoint pretrained",
    "eval.every_steps": "eval_interval eval_steps eval_every eval_freq val_interval val_check_interval",
    "eval.batches": "eval_iters max_eval_batches num_eval_batches limit_val_batches",
    "log.every_steps": "log_interval logging_steps log_every log_freq",
    "log.wandb": "wandb_log use_wandb report_to",
    "log.profile_steps": "profile profiler",
    "--workdir": "out_dir output_dir save_dir run_dir checkpoint_dir ckpt_dir log_dir logdir logging_dir run_name"
    " wandb_run_name",
    "--max_minutes": "max_time time_limit max_hours",
    "--num_processes": "nnodes num_nodes",
    "--process_id": "rank node_rank",
    "--coordinator": "master_addr master_port dist_url",
    "the environment variable WANDB_PROJECT": "wandb_project",
    "the environment variable JAX_PLATFORMS, for instance cpu": "device accelerator platform no_cuda use_cpu",
}
ELSEWHERE = {name: meant for meant, names in NAMES_ELSEWHERE.items() for name in names.split()}


def meant_by(key: str, cutoff: float = 0.5) -> str:
    """The key that was probably meant, or words for what does the same; "" if no name is similar.

    Args:
      cutoff: the least similarity of a misspelt name, from 0 to 1 (difflib's ratio).
    """
    last = key.rsplit(".", 1)[-1].lower().replace("-", "_")
    if last in ELSEWHERE:
        return ELSEWHERE[last]
    known = [*key_types(), *(f.name for f in sections())]
    same = [k for k in known if k.rsplit(".", 1)[-1] == last]  # in another section
    near = difflib.get_close_matches(key, same, n=1, cutoff=0) or difflib.get_close_matches(key, known, 1, cutoff)
    return near[0] if near else ""


def unknown_key(key: str, where: str) -> UserError:
    """The error for a key that does not exist."""
    names = [f.name for f in sections()]
    if key in names:
        inside = ", ".join(k for k in key_types() if k.startswith(key + "."))
        return UserError(f"{where}: '{key}' is a section; its keys: {inside}")
    meant = meant_by(key)
    if meant in key_types() or meant in names:
        return UserError(f"{where}: unknown key '{key}'; did you mean '{meant}'?")
    instead = f"use {meant}" if meant else f"sections: {', '.join(names)}"
    return UserError(f"{where}: unknown key '{key}'; {instead}")


def unknown_option(option: str) -> UserError:
    """The error for an unknown option that does not start with `--config.`."""
    meant = meant_by(option.lstrip("-"), cutoff=0.8)
    if meant in key_types():
        return UserError(f"{option}: unknown option; did you mean --config.{meant}?")
    known = meant in NAMES_ELSEWHERE
    return UserError(f"{option}: unknown option; {f'use {meant}' if known else 'see --help'}")
