"""A page is one file without network, shows every number, and runs in a browser without an error."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxlm.config import UserError
from jaxlm.run.pages import Bar, Bars, Lines, Table, write_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PARTS = [
    Bars("Memory", [Bar("parameters", 2.0, "2 GB"), Bar("<b>", 1.0, "1 GB")], whole=4.0, note="of 4"),
    Table("Numbers", ("name", "value"), [("a & b", "1.5")]),
    Lines("Curves", "steps", "loss", {"one": ([1, 10, 100], [3.0, 2.0, 1.0]), "</script>": ([1, 5], [2.0, 1.0])}),
    Lines("Logarithms", "n", "rate", {"one": ([1, 10], [10.0, 1.0])}, log_x=True, log_y=True),
]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_page(tmp_path / "page.html", "A <title>", "what it says", PARTS)
    return tmp_path / "page.html"


def test_a_page_is_one_small_file_that_needs_no_network(page: Path):
    text = page.read_text()
    assert list(page.parent.iterdir()) == [page] and len(text) < 100_000
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//)|@import|url\(|fetch\(|XMLHttp""", text)


def test_text_is_escaped_and_bars_are_to_scale(page: Path):
    text = page.read_text()
    assert "A &lt;title&gt;" in text and "&lt;b&gt;" in text and "a &amp; b" in text
    assert text.count("</script>") == 2 and r"\u003c/script>" in text
    assert [float(w) for w in re.findall(r'class="bar" style="width: ([\d.]+)%', text)] == [30.0, 15.0]  # of 60


def test_a_page_in_no_folder_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot be written \(No such file"):
        write_page(tmp_path / "nowhere" / "page.html", "t", "s", PARTS)


@pytest.mark.skipif(not BROWSER, reason="there is no chromium")
def test_a_browser_draws_every_chart_without_an_error(page: Path, tmp_path: Path):
    assert BROWSER
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    logging = ["--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, *logging, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<canvas") == done.stdout.count('<table class="u-legend') == 2
    assert "CONSOLE" not in done.stderr
