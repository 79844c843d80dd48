"""How a request of the evaluation harness wants its continuation: `generation_kwargs` of a task."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlm.config import MAX_FLOAT, MAX_INT, UserError, show
from jaxlm.model.generate import Sampling

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
KEYS = ("until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS)


class Generation(NamedTuple):
    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling


def generation(asked: dict[str, Any], max_new_tokens: int) -> Generation:
    """Returns what a request asks for, by default `max_new_tokens` tokens of greatest probability.

    A text is sampled if `do_sample` is true, or if it is not given and `temperature` is more than 0, as in the harness.

    Raises:
      UserError: it asks for what jaxlm cannot do.
    """
    if unknown := [key for key in asked if key not in KEYS]:
        raise UserError(f"generation_kwargs has {show(unknown[0])}; allowed: {', '.join(KEYS)}")
    until = asked.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    length = next((asked[key] for key in LENGTHS if asked.get(key) is not None), max_new_tokens)
    temperature = asked.get("temperature")
    samples = asked.get("do_sample")
    if samples is None:
        samples = bool(temperature)
    sampling = Sampling(
        (1.0 if temperature is None else float(temperature)) if samples else 0.0,
        int(asked.get("top_k") or 0) if samples else 0,
        float(1.0 if asked.get("top_p") is None else asked["top_p"]) if samples else 1.0,
    )
    for name, value, ok, allowed in (
        ("until", until, all(isinstance(stop, str) for stop in stops), "texts"),
        ("max_gen_toks", length, 1 <= int(length) <= MAX_INT, f"1 to {MAX_INT}"),
        ("temperature", temperature, 0 <= sampling.temperature <= MAX_FLOAT, f"0 to {MAX_FLOAT}"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "more than 0, at most 1"),
    ):
        if not ok:
            raise UserError(f"generation_kwargs: {name} is {show(value)}; allowed: {allowed}")
    return Generation(int(length), stops, sampling)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
