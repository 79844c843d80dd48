"""What a person reads."""

from typing import Any

from jaxlm.cli import load
from jaxlm.console import Reporter
from tests.runs import CONFIG


def test_samples_are_shown_as_they_are(capsys: Any):
    """Text that looks like rich's markup or its names of emoji is text."""
    sample = "a[i:x:2] = b[:o:] [bold]c[/bold] \x1b[31m"
    scores = {"step": 1, "eval_loss": 1.0, "eval_perplexity": 2.7, "eval_bits_per_byte": None, "eval_accuracy": 0.5}
    Reporter(load(CONFIG)).evaluation(scores | {"sample": sample})
    assert "    │ a[i:x:2] = b[:o:] [bold]c[/bold] �[31m\n" in capsys.readouterr().out
