"""The configuration: every key with its type and meaning. `--help` shows the comments beside the keys.

The default values are in `configs/base.py`. `validate.py` checks values and how they fit together; `files.py` reads
files, and `overrides.py` reads command lines. Nothing here imports jax or another room, so a wrong configuration is
refused in milliseconds.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from jaxlm.config.sources import SourceName


class UserError(ValueError):
    """A mistake that the user can fix: one line that names the key or file, the value found and what is allowed.

    Command lines print the line without a traceback and end with exit code 2.
    """


Dtype = Literal["float32", "bfloat16", "float16"]

STACKS = ("layers", "encoder")  # a model's parameters of layers, stacked [layers, ...]: the decoder's, the encoder's

# A number for which each optimizer has its own default (own_values.py). Files write OWN, command lines `none`;
# `validate` replaces it by the number, so config.json holds the number.
OwnFloat = Annotated[float, "or OWN"]
OWN: Any = None


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm Transformer decoder, with an encoder or without."""

    num_layers: int  # number of Transformer blocks, of the decoder
    # Blocks of an encoder, which reads prompts in both directions; the decoder, which writes the answers, attends to
    # what it makes of them. 0 = no encoder: the decoder reads prompt and answer as one text
    encoder_layers: int
    encoder_len: int  # encoder_layers: tokens of a row of prompts; longer prompts lose their ends
    d_model: int  # width of the residual stream
    num_heads: int  # query heads; must divide d_model unless head_dim is set
    num_kv_heads: int  # key/value heads; must divide num_heads; 0 = num_heads
    head_dim: int  # size of a head; 0 = d_model / num_heads
    d_ff: int  # hidden width of the MLP; 0 = 4 * d_model
    activation: Literal["gelu", "relu", "swiglu", "geglu", "relu2"]  # MLP activation; relu2 = squared ReLU
    norm: Literal["layernorm", "rmsnorm"]  # norm before attention, before the MLP and before the output layer
    norm_eps: float  # what norms add to the variance; 0 = 1e-5 with layernorm, 1e-6 with rmsnorm
    post_norms: bool  # also norm what attention and MLP add to the residual stream (Gemma 2)
    position: Literal["rope", "learned", "sinusoidal"]  # position encoding; only rope extends beyond seq_len
    rope_theta: float  # rope: base of the wavelengths
    rope_fraction: float  # rope: share of a head's channels that are rotated; more than 0, at most 1
    # How rope's wavelengths are stretched for longer texts. `linear`: all by rope_factor; `llama3`: only the long ones;
    # `longrope`: each by a number of rope_short or, in texts of more than rope_original tokens, rope_long.
    rope_scaling: Literal["none", "linear", "llama3", "longrope"]
    rope_factor: float  # rope_scaling: the stretched context / rope_original
    rope_original: int  # llama3, longrope: tokens of the context before it was stretched
    rope_short: str  # longrope: a number for each pair of channels, with spaces between
    rope_long: str  # longrope: the same
    window: int  # attention to the last tokens only, this many with the token itself; 0 = to all
    global_every: int  # with window: every n-th layer attends to all tokens; 0 = no layer does
    rope_local_theta: float  # base of layers with a window, without scaling; 0 = as in the others (Gemma 3)
    score_dim: int  # attention scores are divided by its square root; 0 = the size of a head (Gemma)
    attention_softcap: float  # replace attention scores by cap * tanh(scores / cap); 0 = off
    use_bias: bool  # add biases to linear layers and LayerNorms
    qkv_bias: bool  # add biases to queries, keys and values, with use_bias or without
    tie_embeddings: bool  # use the transposed token embedding as the output layer
    scale_embeddings: bool  # multiply token embeddings by sqrt(d_model)
    dropout: float  # dropout rate of embeddings and residual branches, in training only; in [0, 1)
    logit_softcap: float  # replace logits by cap * tanh(logits / cap); 0 = off
    qk_norm: bool  # apply RMSNorm to the queries and keys of each head
    key_offset: bool  # take half of each key's channels from the previous token's key, in all attentions
    vocab_multiple: int  # round the rows of token tables up to a multiple of this; the extra rows are never used
    # LoRA (Hu et al., 2021): beside each matrix of a linear layer, two of rank `lora_rank`, whose product times
    # lora_alpha / lora_rank is added to it. They alone are trained, unless optim.freeze says otherwise. 0 = no LoRA
    lora_rank: int
    lora_alpha: float  # lora_rank: see there
    lora_targets: str  # lora_rank: regular expression of linear layers: query, key, value, out, up, gate, down
    lora_dropout: float  # lora_rank: dropout rate of what the two matrices read, in training only; in [0, 1)
    residual_init: Literal["scaled", "zero"]  # last layers of attention and MLP: std / sqrt(their number), or zero
    dtype: Dtype  # dtype of the computation
    param_dtype: Literal["float32", "bfloat16"]  # dtype of the master weights
    # Precision of float32 matrix products. `highest` is float32; `default` is JAX's default: float32 on CPU, TF32 on
    # GPUs; `fastest` is the default, but rounds operands to bfloat16 on CPUs with Intel AMX, with an experimental part
    # of XLA (docs/performance.md).
    matmul_precision: Literal["default", "highest", "fastest"]
    # Attention kernel. `auto`: on GPUs in 16 bits cudnn, and triton for packed documents; else xla.
    attention: Literal["auto", "xla", "cudnn", "triton"]
    # What the backward pass recomputes to save memory. `none`: nothing; `elementwise`: norms, activation functions,
    # rotary positions and XLA's attention scores; `dots`: everything in a layer but its products with weights; `full`:
    # whole layers; `auto`: elementwise on GPUs, with ZeRO-3, and on CPUs if d_model is 768 or more, else none.
    remat: Literal["auto", "none", "elementwise", "dots", "full"]
    # Layers per iteration of the loop over layers. 0 = all: fastest steps, longest compilation; -1 = all on CPUs where
    # nothing is recomputed, else 1.
    scan_unroll: int

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """The names of a block's linear layers."""
        gate = ("gate",) if self.activation in ("swiglu", "geglu") else ()
        return ("query", "key", "value", "out", "up", *gate, "down")

    @property
    def encoder(self) -> "ModelConfig":
        """The encoder as a model of its own."""
        return dataclasses.replace(self, num_layers=self.encoder_layers, encoder_layers=0)

    @property
    def residual_branches(self) -> int:
        """How many times the layers add to the residual stream."""
        return (3 if self.encoder_layers else 2) * self.num_layers

    def has_lora(self, layer: str) -> bool:
        """Whether a linear layer of this name has LoRA's matrices."""
        return self.lora_rank > 0 and re.fullmatch(self.lora_targets, layer) is not None

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_width(self) -> int:
        return self.d_ff or 4 * self.d_model

    @property
    def rotated(self) -> int:
        """Number of a head's channels that RoPE rotates."""
        return round(self.head_size * self.rope_fraction)


@dataclasses.dataclass(kw_only=True, slots=True)
class LossConfig:
    label_smoothing: float  # weight of the uniform distribution in the target; in [0, 1)
    z_loss: float  # weight of the penalty log(Z)^2 (PaLM, section 5); 0 = off
    chunk: int  # tokens per chunk of the output layer, which bounds the memory of the logits; 0 = no chunks


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"]  # muon: for hidden matrices, with AdamW for the rest
    lr: OwnFloat  # peak learning rate; muon: of the hidden matrices
    adam_lr: float  # muon: AdamW's peak learning rate for the output layer, positions, norms and biases
    embed_lr: float  # muon: AdamW's peak learning rate for a token table that is not the output layer too; 0 = adam_lr
    schedule: Literal["constant", "cosine", "linear", "rsqrt", "wsd"]  # learning rate after the warmup
    warmup_steps: int  # steps of linear warmup; repeated after a return, and where a resumed run's rate would jump up
    decay_fraction: float  # wsd: share of all steps, at the end, in which the learning rate falls linearly; 0 to 1
    min_lr_ratio: float  # lowest learning rate of the schedule / peak; 0 to 1
    weight_decay: OwnFloat  # decoupled, times the learning rate; of matrices only, with muon of the layers' only
    b1: OwnFloat  # adamw, lion, muon's AdamW: decay of the first moment; in [0, 1)
    b2: OwnFloat  # adamw, lion, muon's AdamW: decay of the second moment; in [0, 1)
    eps: float  # adamw, muon's AdamW: epsilon in the denominator
    momentum: OwnFloat  # muon, sgd: Nesterov momentum; in [0, 1)
    clip_norm: float  # scale gradients down to at most this global norm; 0 = off
    accum_steps: int  # micro-batches per optimizer step; must divide batch_size
    # Regular expression of parameters that stay as they are, such as embed|norm; `jaxlm show` lists their names. They
    # get no gradient and no optimizer state. "" = none, with model.lora_rank all but LoRA's.
    freeze: str
    ema_decay: float  # decay of the parameters' moving average, used to evaluate and sample; in [0, 1); 0 = off
    spike_factor: float  # a spike is a gradient norm above this many times the recent root mean square; 0 = no limit
    on_spike: Literal["scale", "skip"]  # scale a spike down to that limit, or skip its step
    max_skipped: int  # skipped steps in a row after which the run returns to the last good checkpoint
    max_returns: int  # returns allowed within 1000 steps; when one more is needed, training ends with exit code 3
    return_lr: float  # factor on all learning rates after a return within 1000 steps of another; at most 1 = no change


OF_TOKENIZER = "tokenizer"  # value of data.chat_template: the template that the tokenizer came with


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    source: SourceName  # kind of data
    path: str  # file, folder or glob; tokens: prepared store, nanoGPT's folder, .bin, .npy; tfds: its data_dir
    val_path: str  # sources with files: validation data; "" = a part of `path`, or nanoGPT's val.bin
    mixture: str  # several sources instead of one: "WEIGHT SOURCE [PATH]; ..."; tfds: PATH is tfds_name; "" = none
    text_key: str  # jsonl, parquet, tfds: key of a record's text; in jsonl and parquet a.b is key b of object a
    prompt_key: str  # jsonl, parquet, functions: with response_key, key of a prompt, which is not trained on; "" = none
    response_key: str  # jsonl, parquet, functions: key of a response, which is trained on; replaces text_key; "" = none
    # jsonl, parquet: key of a list of {role, content} or ShareGPT's {from, value}; trains on the assistant's messages;
    # replaces text_key.
    messages_key: str
    # Text of a message, with {role} and {content}; or Jinja; or tokenizer = the Jinja template that came with it;
    # "" = prompt and response without a template.
    chat_template: str
    on_error: Literal["stop", "skip"]  # text, jsonl, parquet: stop at a bad file or record, or skip and count it
    tfds_name: str  # tfds: dataset builder, `name[/config][:version]`
    split: str  # tfds: split to train on
    val_split: str  # tfds: validation split; "" = a part of `split`
    val_fraction: float  # share of the data to hold out where no validation data is named; in (0, 1)
    tokenizer: Literal["sentencepiece", "bytes", "chars", "hf"]  # hf = the tokenizer.json of a pretrained model
    tokenizer_path: str  # sentencepiece .model, a run's tokenizer folder, or hf's tokenizer.json; "" = from the corpus
    sentencepiece: Literal["bpe", "unigram"]  # algorithm of a sentencepiece model that is trained on the corpus
    vocab_size: int  # size of a trained sentencepiece model, of `synthetic`, and of ids without a tokenizer
    cache_dir: str  # folder of token stores; "" = $XDG_CACHE_HOME/jaxlm or ~/.cache/jaxlm
    # How documents fill rows of seq_len tokens. `concat`: one after the other, across rows; `document`: whole documents
    # side by side, each attending only to itself.
    packing: Literal["concat", "document"]

    @property
    def jinja(self) -> bool:
        """Whether the chat template is in Jinja."""
        return self.chat_template == OF_TOKENIZER or "{%" in self.chat_template or "{{" in self.chat_template


# Values of parallel.reduce that are refused with parallel.zero: they save bytes on gradients, which gathering whole
# parameters would cost again.
WITHOUT_PARTS = ("topk", "powersgd")
# Further ones that are refused with parallel.zero=2 and 3: each device keeps its rounding errors of the whole gradient.
OF_WHOLE_GRADIENTS = ("int8",)


def refused_reductions(zero: int) -> tuple[str, ...]:
    """The values of parallel.reduce that are refused with this parallel.zero."""
    return (WITHOUT_PARTS if zero else ()) + (OF_WHOLE_GRADIENTS if zero > 1 else ())


@dataclasses.dataclass(kw_only=True, slots=True)
class ParallelConfig:
    devices: int  # devices to use on each host; 0 = all; on CPU one per core, or fewer so that the batch divides evenly
    reduce: Literal["pmean", "ring", "bf16", "fp16", "int8", "topk", "powersgd"]  # how gradients are averaged
    overlap: bool  # average gradients layer by layer during the backward pass, instead of at its end
    bucket_mb: float  # largest part to average at once, MiB of float32 gradients; 0 = all (overlap: a whole layer)
    # What each of N devices holds 1/N of (ZeRO): 0 = nothing; 1 = the optimizer state, which it updates; 2 = gradients,
    # too; 3 = parameters, too, of which it gathers one layer at a time (FSDP). 2 and 3 average as `overlap` does, in
    # each micro-batch.
    zero: int
    tensor: int  # devices that compute one model together, each some of its heads and hidden units; neighbours
    pipeline: int  # stages of a pipeline, each a group of devices with some of the layers
    # When stages work on which of the optim.accum_steps micro-batches. `gpipe`: all forward, then all backward; `1f1b`:
    # backward as soon as possible.
    schedule: Literal["gpipe", "1f1b"]
    chunks: int  # pipeline: pieces of the model that a stage has; with more than 1, schedules are interleaved
    context: int  # devices that share each sequence, for long ones; each has 1/context of its tokens
    topk_density: float  # topk: share of the numbers of layers' matrices that a device sends; 1/1024 to 1
    powersgd_rank: int  # powersgd: rank of the approximation of each layer's matrices

    @property
    def of_a_replica(self) -> int:
        """Devices that work on the same rows of the batch."""
        return self.pipeline * self.context * self.tensor

    @property
    def splits_model(self) -> bool:
        """Whether devices hold different parts of the model, without ZeRO."""
        return self.pipeline * self.tensor > 1

    def layers_of_chunk(self, num_layers: int) -> int:
        """Layers of a chunk of a pipeline's stage. The last chunks of the model may have fewer, or none."""
        return -(-num_layers // (self.pipeline * self.chunks))

    @property
    def by_layer(self) -> bool:
        """Whether gradients are averaged layer by layer during the backward pass."""
        return self.overlap or self.zero > 1


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int  # steps between checkpoints; 0 = only at the end
    keep: int  # number of newest checkpoints to keep
    keep_best: int  # number of checkpoints with the lowest validation loss to keep as well
    # `auto`: resume from the workdir's newest checkpoint, if any; `never`: refuse a workdir with checkpoints;
    # WORKDIR, WORKDIR@STEP or WORKDIR@best: `auto`, but a new run takes weights, model keys and tokenizer from there.
    resume: str
    check_replicas: bool  # before each save, compare the bits of the state on all devices


@dataclasses.dataclass(kw_only=True, slots=True)
class EvalConfig:
    every_steps: int  # steps between evaluations; 0 = only at the end
    batches: int  # approximate number of batches, spread evenly over the validation set and its sources; 0 = all of it
    sample_tokens: int  # length of the sample shown after an evaluation; 0 = no sample
    sample_prompt: str  # prompt of the sample
    baselines: bool  # at the end, compare with gzip, xz and a unigram model on the same held-out bytes; if batches = 0


@dataclasses.dataclass(kw_only=True, slots=True)
class LogConfig:
    every_steps: int  # steps between training lines of metrics.jsonl
    tensorboard: bool  # write event files to WORKDIR/tensorboard
    wandb: bool  # log to Weights & Biases; its own environment variables set project and API key
    layer_stats: bool  # gradient, update and activations of each layer in the metrics, where others are logged
    profile_steps: int  # steps to trace with jax.profiler into WORKDIR/profile; 0 = off
    hang_seconds: float  # seconds without progress after which each process prints where every host is; 0 = never
    hang_abort: bool  # end a run that hangs with exit code 5, so that a launcher starts it again


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    seed: int  # seed of initial weights, data order, dropout and samples
    deterministic: bool  # bit-identical results on GPUs, at some cost in speed; CPUs are always deterministic
    steps: int  # optimizer steps of the whole run
    batch_size: int  # sequences per optimizer step, over ALL devices, hosts and accumulation steps
    seq_len: int  # tokens per sequence
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    data: DataConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    log: LogConfig


# Values of newer keys in runs that were saved without them, where the value of configs/base.py would change the run.
BEFORE = {"model.key_offset": False}

MAX_INT = 2**31 - 1  # the largest int32, JAX's default integer
MAX_FLOAT, MIN_FLOAT = 3.4e38, 1.2e-38  # float32's range: a larger number becomes infinite, a smaller one 0


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a (nested) configuration with its value: {'model.d_model': 128, ...}."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def key_types(cls: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every key with its type: {'model.d_model': int, ...}."""
    types = {}
    for field in dataclasses.fields(cls):
        kind: Any = field.type
        if dataclasses.is_dataclass(kind):
            types |= key_types(kind, f"{prefix}{field.name}.")
        else:
            types[prefix + field.name] = float if kind is OwnFloat else kind
    return types


def sections() -> list[Any]:
    """The fields of `Config` that hold further keys."""
    return [f for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]


def describe(kind: Any) -> str:
    """The values that a type allows, in words for a message."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]


def show(value: Any) -> str:
    """The value's repr for a message; a long one is shortened in the middle."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print a number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:60]}...{text[-20:]}"
