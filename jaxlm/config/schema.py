"""The configuration: what each key means. `--help` shows the comments beside the keys.

Types and meanings are declared here. The default values are in `configs/base.py`. `validate.py` checks values and how
they fit together; `files.py` reads files, and `overrides.py` command lines. Nothing here imports jax or another room,
so a wrong configuration is refused in milliseconds.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from jaxlm.config.sources import SOURCES, SourceName


class UserError(ValueError):
    """Something a user can mend: one line that names the key or file, the value found and what is allowed.

    Command lines print it and leave with exit code 2, without a traceback.
    """


Dtype = Literal["float32", "bfloat16", "float16"]

# A number for which each optimizer has its own default (own_values.py). Files say OWN, command lines `none`; `validate`
# puts the number in its place, so config.json holds that.
OwnFloat = Annotated[float, "or OWN"]
OWN: Any = None


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm Transformer decoder."""

    num_layers: int  # Transformer blocks
    d_model: int  # width of the residual stream
    num_heads: int  # query heads; must divide d_model
    num_kv_heads: int  # key/value heads; must divide num_heads; 0 = num_heads
    d_ff: int  # hidden width of the MLP; 0 = 4 * d_model
    activation: Literal["gelu", "relu", "swiglu", "geglu", "relu2"]  # relu2 = squared ReLU
    norm: Literal["layernorm", "rmsnorm"]  # before attention and MLP, and before the output layer
    position: Literal["rope", "learned", "sinusoidal"]  # how positions are encoded; rope goes beyond seq_len
    rope_theta: float  # base of RoPE's wavelengths
    use_bias: bool  # biases in linear layers and layernorms
    tie_embeddings: bool  # output layer = transposed token embedding
    dropout: float  # of embeddings and residual branches, in training only
    logit_softcap: float  # logits -> cap * tanh(logits / cap); 0 = off
    qk_norm: bool  # RMS-normalize queries and keys of each head
    key_offset: bool  # half of each key's channels are those of the token before
    vocab_multiple: int  # the token tables' rows are rounded up to a multiple of it; the additional ones are never used
    residual_init: Literal["scaled", "zero"]  # of what adds to the residual stream: / sqrt(2 num_layers), or nothing
    dtype: Dtype  # of the computation
    param_dtype: Literal["float32", "bfloat16"]  # of the master weights
    # Of float32 matrices: `highest` is float32; `default` is JAX's, float32 on CPU, TF32 on GPUs; `fastest` also rounds
    # operands to bfloat16 on CPUs with Intel's AMX, in a part of XLA that is experimental (docs/performance.md).
    matmul_precision: Literal["default", "highest", "fastest"]
    attention: Literal["auto", "xla", "cudnn"]  # implementation; auto = cudnn where it can, else xla
    remat: Literal["none", "dots", "full"]  # what the backward pass recomputes
    scan_unroll: int  # layers per iteration of the scan over layers; 0 = all


@dataclasses.dataclass(kw_only=True, slots=True)
class LossConfig:
    label_smoothing: float  # weight of the uniform distribution in the target, in [0, 1)
    z_loss: float  # weight of log(Z)^2 (PaLM, section 5); 0 = off
    chunk: int  # tokens per chunk of the output layer, to bound the logits' memory; 0 = no chunks


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimConfig:
    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"]  # muon = for hidden matrices, with AdamW for the rest
    lr: OwnFloat  # peak learning rate; with muon that of the hidden matrices
    adam_lr: float  # with muon: peak learning rate of AdamW for the output layer, positions, norms and biases
    embed_lr: float  # with muon: the same for a token table that is not the output layer too; 0 = adam_lr
    schedule: Literal["constant", "cosine", "linear", "rsqrt", "wsd"]  # of the learning rate after warmup_steps
    warmup_steps: int  # linear from 0 to the peak; also where a run goes on at a higher rate than it had
    decay_fraction: float  # wsd: the last share of all steps, in which the rate falls linearly
    min_lr_ratio: float  # final learning rate / peak
    weight_decay: OwnFloat  # decoupled, times the learning rate, on matrices only; with muon, on those of the layers
    b1: OwnFloat  # first-moment decay of adamw and lion
    b2: OwnFloat  # second-moment decay of adamw and lion
    eps: float  # of adamw (with muon, of its AdamW)
    momentum: OwnFloat  # of muon and sgd (Nesterov)
    clip_norm: float  # largest global gradient norm; 0 = off
    accum_steps: int  # micro-batches per optimizer step
    ema_decay: float  # moving average of the parameters, used to evaluate and sample; 0 = off
    spike_factor: float  # a spike is a gradient norm above this many times the recent root mean square; 0 = no limit
    on_spike: Literal["scale", "skip"]  # scale a spike down to that limit, or leave its batch out
    max_skipped: int  # steps skipped in a row after which the run goes back to its last good checkpoint
    max_returns: int  # returns to earlier checkpoints within 1000 steps, after which training ends: exit code 3
    return_lr: float  # factor on all learning rates from a return on that soon follows another; 1 = leave them


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    source: SourceName  # kind of data
    path: str  # file, folder or glob; tokens: prepared store, nanoGPT's folder, .bin, .npy; tfds: its data_dir
    val_path: str  # held-out data of files and `tokens`; "" = a part of `path`, or nanoGPT's val.bin
    mixture: str  # instead of one source: "WEIGHT SOURCE [PATH]; ..." (PATH is tfds_name for tfds); "" = none
    text_key: str  # jsonl, parquet, tfds: where a record has its text; in jsonl and parquet dots lead into objects
    prompt_key: str  # jsonl, parquet: with response_key, a text that is read and not learned; "" = none
    response_key: str  # jsonl, parquet: a text that is learned; instead of text_key
    messages_key: str  # jsonl, parquet: a list of {role, content}, the assistant's learned; instead of text_key
    chat_template: str  # how a message is written, with {role} and {content}; "" with prompts = texts as they are
    on_error: Literal["stop", "skip"]  # text, jsonl, parquet: what to do at a bad file or record; skipped are counted
    tfds_name: str  # tfds: builder, `name[/config][:version]`
    split: str  # tfds: the split to train on
    val_split: str  # tfds: the held-out split; "" = a part of `split`
    val_fraction: float  # share that is held out where no validation data is named
    tokenizer: Literal["sentencepiece", "bytes", "chars", "hf"]  # hf = the tokenizer.json of a pretrained model
    tokenizer_path: str  # a sentencepiece .model, a run's tokenizer folder, hf: tokenizer.json; "" = made of the corpus
    sentencepiece: Literal["bpe", "unigram"]  # kind of the model that is trained
    vocab_size: int  # of a trained sentencepiece model, `synthetic`, and ids without a tokenizer; others have their own
    cache_dir: str  # folder of token stores; "" = $XDG_CACHE_HOME/jaxlm or ~/.cache/jaxlm
    packing: Literal["concat", "document"]  # documents run on, or: whole ones side by side, each seeing itself alone


@dataclasses.dataclass(kw_only=True, slots=True)
class ParallelConfig:
    devices: int  # of each host that are used; 0 = all; on CPU one per core, as many as the batch divides over
    reduce: Literal["pmean", "ring", "bf16", "fp16", "int8", "topk", "powersgd"]  # how gradients are averaged
    overlap: bool  # gradients are averaged layer by layer while the backward pass still runs, instead of at its end
    bucket_mb: float  # the most that is reduced at once, MiB of float32 gradients; 0 = all (with overlap, of a layer)
    zero: int  # 1 = each device keeps and updates 1/N of the optimizer's state (ZeRO-1); 0 = all of it
    topk_density: float  # topk: the share of the gradient's numbers that a device sends
    powersgd_rank: int  # powersgd: of the approximation of each matrix


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int  # steps from one checkpoint to the next; 0 = only at the end
    keep: int  # newest checkpoints kept
    keep_best: int  # besides those, the best by validation loss
    resume: str  # auto | never | WORKDIR, WORKDIR@STEP, WORKDIR@best: weights, model's keys and tokenizer of that run
    check_replicas: bool  # before each save, compare the bits of the state on all devices


@dataclasses.dataclass(kw_only=True, slots=True)
class EvalConfig:
    every_steps: int  # steps from one evaluation to the next; 0 = only at the end
    batches: int  # about so many, spread evenly over the validation set and its sources; 0 = all of it
    sample_tokens: int  # length of the sample shown after an evaluation; 0 = none
    sample_prompt: str  # what the sample starts from
    baselines: bool  # print what gzip, xz and a unigram model reach on the same held-out bytes


@dataclasses.dataclass(kw_only=True, slots=True)
class LogConfig:
    every_steps: int  # steps from one line of metrics.jsonl to the next
    tensorboard: bool  # event files in WORKDIR/tensorboard
    wandb: bool  # Weights & Biases; project and key come from its own environment variables
    profile_steps: int  # steps traced with jax.profiler into WORKDIR/profile; 0 = off
    hang_seconds: float  # without the end of a step, after which it is said where each host is; 0 = never
    hang_abort: bool  # whether the run ends then, with exit code 5, for a launcher to start it again


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    seed: int  # of initial weights, data order, dropout and samples
    deterministic: bool  # bit-identical reductions on GPU, at some cost in speed
    steps: int  # optimizer steps of the whole run
    batch_size: int  # sequences per optimizer step over ALL devices and hosts, accumulation included
    seq_len: int  # tokens per sequence
    model: ModelConfig
    loss: LossConfig
    optim: OptimConfig
    data: DataConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    log: LogConfig


# Keys that a run may go on with although they changed: they do not change what the steps so far meant.
CHANGEABLE = (
    r"steps|deterministic|optim\.(?!name$).*|loss\..*|parallel\..*|eval\..*|checkpoint\..*|log\..*"
    r"|model\.(dtype|dropout|remat|attention|matmul_precision|scan_unroll)|data\.cache_dir"
)

# Keys that say where the data is. A run may go on with other values if the data's fingerprint is the same; of a mixture
# only the paths may change.
PLACES = r"data\.(path|val_path|tokenizer_path|mixture)"

BEFORE = {"model.key_offset": False}  # what a run did before there was the key, where configs/base.py does otherwise

MAX_INT = 2**31 - 1  # of JAX's integers
MAX_FLOAT, MIN_FLOAT = 3.4e38, 1.2e-38  # of float32: what is larger is infinite there, what is smaller is 0


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'model.d_model': 128, ...} of a (nested) configuration."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def key_types(cls: Any = Config, prefix: str = "") -> dict[str, Any]:
    """{'model.d_model': int, ...}: every key with its type."""
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
    """What values of a type are, in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]


def show(value: Any) -> str:
    """A value in a message; a long one is cut."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out a number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:60]}...{text[-20:]}"


def mixture(data: DataConfig) -> list[tuple[float, DataConfig]]:
    """The weight of each source of `data.mixture`, and `data` with that source (and still the mixture it is of).

    Raises:
      UserError: names the part of it that is wrong.
    """
    found, names = [], [name for name, kind in SOURCES.items() if kind.mixed]
    for part in data.mixture.rstrip("; ").split(";"):
        weight, source, path = ([*part.split(maxsplit=2), "", "", ""])[:3]
        allowed = (
            "WEIGHT SOURCE [PATH]; ... with weights that are numbers of more than 0, without %, and sources "
            + ", ".join(names)
        )
        kind = SOURCES[source] if source in names else None
        number = re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight)
        if not number or not MIN_FLOAT <= float(weight) <= MAX_FLOAT or kind is None:
            raise UserError(f"data.mixture has {show(part.strip())}; allowed: {allowed}")
        needs_path = kind.named_by != "source"
        if bool(path) != needs_path:
            what = "a path (tfds: a name) after it" if needs_path else "no path after it"
            raise UserError(f"data.mixture has {show(part.strip())}; allowed with {source}: {what}")
        keys: dict[str, Any] = {kind.named_by: path} if path else {}
        own = dataclasses.replace(data, source=source, val_path="", **keys)
        found.append((float(weight), own))
    return found


def changes(old: Config, new: Config) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """Keys whose value differs, as {key: (old, new)}: those a run may go on with (with PLACES, where the data is the
    same), and those it may not.
    """
    a, b = flatten(old), flatten(new)
    differ = {k: (a[k], b[k]) for k in a if a[k] != b[k]}
    allowed = CHANGEABLE if _kinds(old.data) != _kinds(new.data) else f"{CHANGEABLE}|{PLACES}"
    free = {k: v for k, v in differ.items() if re.fullmatch(allowed, k)}
    return free, {k: v for k, v in differ.items() if k not in free}


def _kinds(data: DataConfig) -> list[tuple[float, str, str]]:
    """What a mixture says beside the paths of files."""
    return [(weight, part.source, part.tfds_name) for weight, part in mixture(data)] if data.mixture else []
