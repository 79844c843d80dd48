"""Metrics as charts: TensorBoard and Weights & Biases, with short names for the sources of a mixture."""

import html
import importlib
import io
import os
import re
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.metrics_file import Metrics
from jaxlm.config import Config, flatten
from jaxlm.host.durable import append
from jaxlm.run.metrics import Writer

OF_LAYERS = ("/grad_norm", "/update_ratio", "/activation_rms")  # endings of log.layer_stats' metrics
ENDINGS = r"(\.(txt|md|jsonl?|parquet|npy|bin|gz|bz2|xz|zst))+$"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns a short name for each source of a mixture: "text books/*.txt" becomes "books".

    The short name is the last word of the path without a wildcard. If two are equal, all names get more words; if that
    does not help, they get numbers.
    """

    def words(name: str) -> list[str]:
        found = [w for w in re.split(r"[/\s]+", re.sub(r" \(\d+\)$", "", name)) if not re.search(r"[*?\[\]]", w)]
        plain = [re.sub(r"[^\w.-]+", "-", re.sub(ENDINGS, "", w)).strip(".-") for w in found]
        return [w for w in plain if w]

    parts = {name: words(name) for name in names}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {name: "-".join(found[-depth:]) for name, found in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    last = [found[-1] for found in parts.values()]
    return {n: f"{s}-{i}" if last.count(s) > 1 else s for i, (n, s) in enumerate(zip(parts, last, strict=True), 1)}


def shortened(writer: Writer, names: Sequence[str]) -> Writer:
    """Returns a writer that renames the metrics of sources: `epochs/text /home/me/books/*.txt` to `epochs/books`."""
    short = short_names(names)

    def rename(key: str) -> str:
        number, _, name = key.partition("/")
        return f"{number}/{short[name]}" if name in short else key

    return lambda metrics: writer({rename(key): value for key, value in metrics.items()})


def by_layer(writer: Writer) -> Writer:
    """Returns a writer that gets a number for each layer: `layers/grad_norm: [1.0, 2.0]` becomes `layer_0/grad_norm`
    and `layer_1/grad_norm`.
    """

    def split(metrics: Metrics) -> Metrics:
        found = {}
        for key, value in metrics.items():
            if isinstance(value, list):
                stack, _, name = key.partition("/")
                found |= {f"{stack.removesuffix('s')}_{i}/{name}": x for i, x in enumerate(value)}
            else:
                found[key] = value
        return found

    return lambda metrics: writer(split(metrics))


def tensorboard(folder: Path, config: Config, resume_step: int) -> Writer:
    """Writes event files in `folder`. TensorBoard hides what an earlier run wrote after the resumed step."""
    # Only the messages and records: TensorBoard's own EventFileWriter imports TensorFlow. protobuf creates the message
    # classes at import, so no type checker sees them.
    from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.record_writer import RecordWriter

    events: Any = event_pb2
    summaries: Any = summary_pb2
    tensors: Any = tensor_pb2
    types: Any = types_pb2
    Event, SessionLog, Summary = events.Event, events.SessionLog, summaries.Summary

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"

    def add(wall_time: float, **fields: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=wall_time, **fields).SerializeToString())
        append(path, record.getvalue())

    def text(tag: str, markdown: str) -> Any:
        tensor = tensors.TensorProto(dtype=types.DT_STRING, string_val=[markdown.encode(errors="replace")])
        return Summary.Value(tag=tag, metadata=create_summary_metadata(None, None), tensor=tensor)

    add(time.time(), file_version="brain.Event:2")
    if resume_step:
        add(time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
    add(time.time(), step=resume_step, summary=Summary(value=[text("configuration", _table(config))]))

    def write(metrics: Metrics) -> None:
        group = "eval" if "eval_loss" in metrics else "train"
        values = []
        for key, value in metrics.items():
            # A layer's numbers have a section of their own.
            tag = key if key.endswith(OF_LAYERS) else f"{group}/{key.removeprefix('eval_')}"
            if isinstance(value, str):  # indented, because Markdown shows indented text verbatim
                values.append(text(tag, "\n".join("    " + line for line in value.split("\n"))))
            elif isinstance(value, (int, float)) and key not in ("step", "time"):
                values.append(Summary.Value(tag=tag, simple_value=value))
        add(metrics["time"], step=metrics["step"], summary=Summary(value=values))

    return write


def _table(config: Config) -> str:
    """Returns the configuration as a Markdown table."""
    rows = [f"| {key} | `{value!r}` |".replace("\n", "\\n") for key, value in flatten(config).items()]
    return "\n".join(["| key | value |", "| --- | --- |", *rows])


def wandb_writer(config: Config, workdir: Path) -> Writer:
    """Writes to Weights & Biases. The workdir keeps the id, so that a resumed run continues the same charts."""
    wandb = importlib.import_module("wandb")  # optional, so no type checker sees it

    id_file = workdir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "jaxlm"),
        name=workdir.name,
        id=id_file.read_text(),
        resume="allow",
        dir=workdir,
        config=flatten(config),
        allow_val_change=True,  # a run may continue with other values
    )

    def write(metrics: Metrics) -> None:
        shown = {k: v for k, v in metrics.items() if k not in ("step", "time")}
        if "sample" in shown:
            shown["sample"] = wandb.Html(f"<pre>{html.escape(shown['sample'])}</pre>")
        run.log(shown, step=metrics["step"])

    return write
