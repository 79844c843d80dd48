"""The model `jaxlm` of EleutherAI's lm-evaluation-harness, which the extra `harness` installs.

It scores and continues the same token ids as the harness's own `hf` model does with the exported run.

    python -m jaxlm.interop.harness --model jaxlm --model_args workdir=runs/base,step=best --tasks ...

is the program `lm_eval` with this model added, because the harness looks for models in its own package alone.
"""

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from jaxlm.config import MAX_INT, UserError, files, show
from jaxlm.config.paths import user_path
from jaxlm.config.pretrained import read_step
from jaxlm.config.validate import MAX_SEED
from jaxlm.host import runtime
from jaxlm.interop.generation_kwargs import Generation, cut, generation

# Optional, so no type checker sees them.
Base: Any = importlib.import_module("lm_eval.api.model").TemplateLM
registry: Any = importlib.import_module("lm_eval.api.registry")
windows: Any = importlib.import_module("lm_eval.utils")

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation)


@registry.register_model("jaxlm")
class JaxLM(Base):
    """A run as a model of the harness.

    Args:
      workdir: the run.
      step: a number, best by validation loss, or None for the newest checkpoint.
      batch_size: rows of a batch over all devices, or auto.
      max_length: most tokens that the model sees; None = seq_len. Learned and sinusoidal positions end there.
      max_gen_toks: most new tokens of requests that do not say how many.
      add_bos_token: whether bos precedes texts; None = as the tokenizer was shipped.
      prefix_token_id: precedes a text without a context; None = bos, or else the token that ends texts.
      seed: of sampled continuations.
      device, max_batch_size: given by the harness, and not used: all of JAX's devices share a batch.

    Raises:
      UserError: there is no such run or step, or an argument is impossible.
      CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        workdir: str,
        step: int | str | None = None,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise UserError(
                f"{', '.join(unknown)} is not an argument of this model; allowed: workdir, step, batch_size,"
                " max_length, max_gen_toks, add_bos_token, prefix_token_id, seed (JAX_PLATFORMS chooses the devices)"
            )
        self.batch_size = read_rows(batch_size) or "auto"
        for name, value, least, most in (
            ("max_length", max_length, 2, MAX_INT),
            ("max_gen_toks", max_gen_toks, 1, MAX_INT),
            ("seed", seed, 0, MAX_SEED),
        ):
            if value is not None and not (type(value) is int and least <= value <= most):
                raise UserError(f"{name} is {show(value)}; allowed: {least} to {most}")
        # The harness would fork processes for standard errors; a process that runs JAX may hang then.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        path = user_path("workdir", str(workdir))
        _configure(path)

        from jaxlm.interop.batches import Devices
        from jaxlm.interop.continuing import Continuer
        from jaxlm.interop.scoring import Scorer
        from jaxlm.interop.shipped_texts import ShippedTexts
        from jaxlm.run.open_run import open_run

        self.run = run = open_run(path, read_step("step", None if step is None else str(step)))
        files.check_decoder(str(path), run.config, "the harness scores continuations, which decoders read as one text")
        self.max_length, self.max_gen_toks = max_length or run.config.seq_len, max_gen_toks
        if self.max_length > (run.model.max_positions or self.max_length):
            raise UserError(
                f"max_length is {max_length}; allowed: at most {run.model.max_positions}, because the model's positions"
                f" are {run.config.model.position}"
            )
        self._texts = ShippedTexts(run, add_bos_token, prefix_token_id)
        devices, rows = Devices(run.params), read_rows(batch_size)
        self._score = Scorer(run, devices, self.max_length, rows)
        self._continue = Continuer(run, devices, self.max_length, rows, seed)

    @property
    def eot_token_id(self) -> int:
        return self._texts.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._texts.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.run.folder.absolute()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return self._texts.encode(string, add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._texts.decode(tokens, not skip_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        from jaxlm.interop.scoring import Pair

        for texts, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"continuation {show(texts and texts[1])}: {len(continuation)} tokens; allowed: 1 to"
                    f" {self.max_length} (max_length)"
                )
        pairs = [Pair(context or [self.prefix_token_id], answer) for _, context, answer in requests]
        with tqdm(total=len(pairs), desc="jaxlm: log-likelihoods", disable=disable_tqdm) as bar:
            scores = [(score.log_likelihood, score.is_greedy) for score in self._score(pairs, bar.update)]
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if texts is not None:  # windows of a rolling request are no requests
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        parts: list[Encoded] = []
        counts: list[int] = []
        for (text,) in (request.args for request in requests):
            found = windows.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *windows.make_disjoint_window(window)) for window in found]
            parts += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(parts, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[Generation, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(generation(request.args[1], self.max_gen_toks), []).append(i)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="jaxlm: continuations", disable=disable_tqdm) as bar:
            for how, group in groups.items():
                texts |= zip(group, self._generate(how, [requests[i].args[0] for i in group], group, bar), strict=True)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _generate(self, how: Generation, contexts: list[str], numbers: list[int], bar: Any) -> list[str]:
        """The continuations of contexts, each up to the first text or token that ends it."""
        longest = self.max_length - how.max_new_tokens
        if longest < 1:
            raise UserError(
                f"max_gen_toks is {how.max_new_tokens}; allowed: at most {self.max_length - 1}, so that the context has"
                f" a place in the {self.max_length} tokens that the model sees (max_length)"
            )
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[-longest:] for text in contexts]
        ends, decode = self._texts.ends(how.stops), self._texts.decode

        def ended(ids: list[int]) -> bool:
            return not ends.isdisjoint(ids) or any(stop in decode(ids) for stop in how.stops)

        new = self._continue(prompts, numbers, how.max_new_tokens, how.sampling, ended, bar.update)
        return [cut(decode(ids[: next((n for n, i in enumerate(ids) if i in ends), None)]), how.stops) for ids in new]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return self._texts.chat(chat_history, add_generation_prompt)
        except UserError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            logging.getLogger(__name__).warning("%s; tried again without the messages of the system", error)
            return self._texts.chat(others, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template; None if none is asked for. A run has a single one, so a name is refused."""
        if chat_template in (False, None):
            return None
        if chat_template is not True:
            raise UserError(f"chat template {show(chat_template)}: a run has one without a name; allowed: no name")
        return self._texts.chat_template()

    def get_model_info(self) -> dict[str, Any]:
        from jaxlm.model.decoder import num_params

        return {
            "model_num_parameters": num_params(self.run.params),
            "model_dtype": str(self.run.config.model.dtype),
            "model_step": self.run.step,
        }


def read_rows(batch_size: int | str | None) -> int | None:
    """The number of rows that an argument asks for; None = auto. Raises UserError if it asks for none."""
    text = str(batch_size)
    if batch_size is None or text == "auto" or text.startswith("auto:"):
        return None
    if not text.isdecimal() or not 1 <= int(text[:10]) <= MAX_INT:
        raise UserError(f"batch_size is {show(batch_size)}; allowed: 1 to {MAX_INT}, auto")
    return int(text)


def _configure(workdir: Any) -> None:
    """Configures JAX for the run, unless this process uses JAX already."""
    config = files.load_workdir(workdir)
    try:
        runtime.configure_jax(config, 1)
    except RuntimeError:  # the devices exist
        runtime.check_environment()


def main() -> None:
    """Runs the program `lm_eval`, to which this file has added the model."""
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    from jaxlm.host.exit_codes import exit_code

    raise SystemExit(exit_code(lambda: main() or 0))
