"""A second warmup: a finished run that is given more steps would jump from its lowest learning rate to the peak.

The rate rises instead, from the last one to that of the new schedule. Where it began, and from which rates, is kept in
the workdir's config.json, so that a run that is stopped after that goes on with the same schedule.
"""

from pathlib import Path
from typing import Any

from jaxlm.checkpoint import workdirs
from jaxlm.config import Config, OptimConfig, UserError, show
from jaxlm.config.files import from_saved
from jaxlm.train.schedules import LEAST_WARMUP, Cut, LrHistory, Peak, Rewarm, make_schedule

RAISED = 1.01  # a smaller rise is no jump: a longer cosine is a little higher everywhere


def of_run(config: Config, workdir: Path, start: int, cuts: tuple[Cut, ...]) -> tuple[Rewarm | None, str | None]:
    """How the learning rate rises again after `start` updates, and what there is to say about it."""
    path = workdir / "config.json"
    if not path.exists() or not workdirs.holds_checkpoints(workdir):
        return None, None
    saved = workdirs.read_facts(workdir)
    before = _read(saved, config.optim, str(path))
    rewarm = between(from_saved(saved["config"], str(path))[0], before, config, start, cuts)
    if rewarm is None or rewarm == before:
        return rewarm, None
    rate = float(make_schedule(config.optim, config.steps, "lr", LrHistory(None, cuts))(start))
    left = config.steps - start
    shown = f"over {rewarm.updates} updates" + f", of which {left} are left" * (left < rewarm.updates)
    return rewarm, (
        f"the learning rate rises from {rewarm.rates['lr']:.3g} to that of the new configuration, now"
        f" {rate:.3g}, {shown}"
    )


def _peaks(c: OptimConfig) -> tuple[Peak, ...]:
    """The keys of the rates that the optimizer uses."""
    return ("lr", "adam_lr", "embed_lr") if c.name == "muon" else ("lr",)


def between(old: Config, before: Rewarm | None, new: Config, step: int, cuts: tuple[Cut, ...] = ()) -> Rewarm | None:
    """The second warmup of a run that goes on after `step` updates with another configuration.

    There is a new one where a rate would be higher than the old schedule's was and would be. Lower rates hold at once.

    Args:
      before: that of the run so far.
    """
    if not step:  # it has had no rate yet; one that went back to the beginning keeps what it went on with
        return before
    last, raised = {}, False
    for key in _peaks(new.optim):
        was, is_now = (make_schedule(c.optim, c.steps, key, LrHistory(before, cuts)) for c in (old, new))
        last[key] = float(was(step - 1))
        raised |= float(is_now(step)) > RAISED * max(last[key], float(was(step)))
    return Rewarm(step, max(new.optim.warmup_steps, LEAST_WARMUP), last) if raised else before


def _read(saved: dict[str, Any], c: OptimConfig, where: str) -> Rewarm | None:
    """The second warmup in the content of a config.json; raises UserError if a run did not write it so."""
    found = saved.get("rewarm")
    if found is None:
        return None
    try:
        rewarm = Rewarm(found["step"], found["updates"], {key: found["rates"][key] for key in _peaks(c)})
        numbers = (rewarm.step, rewarm.updates, *rewarm.rates.values())
        fits = type(rewarm.step) is type(rewarm.updates) is int and all(0 <= x <= 1e30 for x in numbers)
    except (KeyError, TypeError):
        fits = False
    if not fits or not rewarm.updates:
        raise UserError(f"{where}: rewarm is {show(found)}; allowed: what a run wrote there")
    return rewarm
