"""The second warmup of a run that continues at a higher learning rate.

A finished run that is given more steps would otherwise jump from its lowest rate to the peak. Instead, the rate rises
from its last value to the new schedule's. The workdir's config.json records where the rise began and from which rates,
so that a run that is stopped and resumed follows the same schedule.
"""

from pathlib import Path
from typing import Any

from jaxlm.checkpoint import workdirs
from jaxlm.config import Config, OptimConfig, UserError, show
from jaxlm.config.files import from_saved
from jaxlm.config.own_values import PEAKS
from jaxlm.train.schedules import LEAST_WARMUP, Cut, LrHistory, Rewarm, make_schedule

RAISED = 1.01  # a smaller rise is not a jump: a longer cosine is slightly higher everywhere


def of_run(config: Config, workdir: Path, start: int, cuts: tuple[Cut, ...]) -> tuple[Rewarm | None, str | None]:
    """Returns the second warmup of a run that continues after `start` updates, and a line to print; None for none."""
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


def between(old: Config, before: Rewarm | None, new: Config, step: int, cuts: tuple[Cut, ...] = ()) -> Rewarm | None:
    """Returns the second warmup of a run that continues after `step` updates with another configuration.

    A new one begins if a rate is higher than the old schedule's, both in the last step and in the next one. Lower rates
    apply at once.

    Args:
      before: the second warmup of the run so far.
    """
    if not step:  # no update has been made; a run that went back to step 0 keeps the warmup that it has
        return before
    last, raised = {}, False
    for key in PEAKS[new.optim.name]:
        was, is_now = (make_schedule(c.optim, c.steps, key, LrHistory(before, cuts)) for c in (old, new))
        last[key] = float(was(step - 1))
        raised |= float(is_now(step)) > RAISED * max(last[key], float(was(step)))
    return Rewarm(step, max(new.optim.warmup_steps, LEAST_WARMUP), last) if raised else before


def _read(saved: dict[str, Any], c: OptimConfig, where: str) -> Rewarm | None:
    """Returns the second warmup in the content of a config.json. Raises UserError if no run can have written it."""
    found = saved.get("rewarm")
    if found is None:
        return None
    try:
        rewarm = Rewarm(found["step"], found["updates"], {key: found["rates"][key] for key in PEAKS[c.name]})
        numbers = (rewarm.step, rewarm.updates, *rewarm.rates.values())
        fits = type(rewarm.step) is type(rewarm.updates) is int and all(0 <= x <= 1e30 for x in numbers)
    except (KeyError, TypeError):
        fits = False
    if not fits or not rewarm.updates:
        raise UserError(f"{where}: rewarm is {show(found)}; allowed: what a run wrote there")
    return rewarm
