"""The harness's own `hf` model on an exported run, and `jaxlm` on the run: the same numbers, texts and scores."""

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxlm.interop.exporting import export_model
from jaxlm.interop.importing import import_model
from jaxlm.run.open_run import open_run
from tests.exit_codes import tool
from tests.interop.harness_tasks import CHATS, CONTEXT, MODELS, TASKS, write_model, write_tasks

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TEXT = "def f(x):\n    return x + 1  # 你好, naïve café\n\nfor i in range(10):\n    print(f(i))\n"
PAIRS = [
    ("", "def f(x):"),
    ("def f(x):", "\n    return x"),
    ("def f(x): ", "return"),  # the space moves to the continuation
    ("import os\n", "import sys\n" * 3),
    (TEXT * 4, "print(1)"),  # longer than the context
    ("a", TEXT[:90]),
    *((TEXT[:n], TEXT[n : n + 7]) for n in range(1, 60, 9)),
]


class Both(NamedTuple):
    hf: Any
    jaxlm: Any
    workdir: Path


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder / "hf")
    import_model(folder / "hf", folder / "run")
    export_model(open_run(folder / "run", None), folder / "back")
    HFLM = importlib.import_module("lm_eval.models.huggingface").HFLM
    JaxLM = importlib.import_module("jaxlm.interop.harness").JaxLM
    hf = HFLM(pretrained=str(folder / "back"), device="cpu", batch_size=1)
    return Both(hf, JaxLM(workdir=str(folder / "run"), batch_size=16), folder / "run")


def approx(numbers: dict[str, float]) -> dict[str, Any]:
    return {key: pytest.approx(number, rel=1e-5) for key, number in numbers.items()}


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    Instance = importlib.import_module("lm_eval.api.instance").Instance
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def test_log_likelihoods(both: Both):
    assert both.jaxlm.max_length == both.hf.max_length == CONTEXT
    greedy = [
        (c, both.hf.generate_until(instances("generate_until", [(c, {"max_gen_toks": 4})]))[0]) for c in ("A", TEXT)
    ]
    requests = instances("loglikelihood", PAIRS + [(c, text) for c, text in greedy if text])
    want, got = both.hf.loglikelihood(requests), both.jaxlm.loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in want], rtol=0, atol=1e-4)
    assert [g for _, g in got] == [g for _, g in want]
    assert np.std([x for x, _ in want]) > 1
    spaces, none = both.jaxlm.loglikelihood(instances("loglikelihood", [("  ", "x"), ("", "  x")]))  # `hf` fails
    assert spaces == none
    with pytest.raises(ValueError, match=r"continuation 'x x .* tokens; allowed: 1 to 64 \(max_length\)"):
        both.jaxlm.loglikelihood(instances("loglikelihood", [("a", "x " * 100)]))


def test_rolling_windows(both: Both):
    requests = instances("loglikelihood_rolling", [(TEXT * n,) for n in (1, 3, 2)] + [("x",), (TEXT[:20],)])
    want, got = both.hf.loglikelihood_rolling(requests), both.jaxlm.loglikelihood_rolling(requests)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4)
    assert got[1] < 2 * got[0] < 0


def test_continuations(both: Both):
    contexts = ["def", TEXT, "a", TEXT * 3, TEXT[:30], "import os\n"]  # of different lengths, two beyond the context
    free = [(context, {"max_gen_toks": 20}) for context in contexts]
    want = both.hf.generate_until(instances("generate_until", free))
    assert both.jaxlm.generate_until(instances("generate_until", free)) == want
    ended = [len(both.jaxlm.tok_encode(text, False)) < 10 for text in want]
    assert any(ended) or both.workdir.parent.name != "llama30"  # at the end token
    stop = next(text[3:5] for text in want if len(text) > 8)
    until = [(context, {"until": [stop, "\n\n"], "max_gen_toks": 20, "do_sample": False}) for context in contexts]
    stopped = both.jaxlm.generate_until(instances("generate_until", until))
    assert stopped == both.hf.generate_until(instances("generate_until", until)) != want


def test_texts_and_chats(both: Both):
    for text in (TEXT, " a  b ", "", "a<|im_end|>b<|eot_id|>\n", "<|begin_of_text|>x"):
        ids = both.hf.tok_encode(text)
        assert both.jaxlm.tok_encode(text) == ids
        assert both.jaxlm.tok_decode(ids) == both.hf.tok_decode(ids)
        assert both.jaxlm.tok_encode(text, False) == both.hf.tok_encode(text, False)
    assert (both.jaxlm.eot_token_id, both.jaxlm.prefix_token_id) == (both.hf.eot_token_id, both.hf.prefix_token_id)
    if both.workdir.parent.name.rstrip("0") not in CHATS:
        with pytest.raises(ValueError, match="no chat template"):
            both.jaxlm.apply_chat_template([{"role": "user", "content": "Hi"}])
        return
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
             {"role": "assistant", "content": " Two: "}]  # fmt: skip
    for messages, opening in ((turns[:2], True), (turns[1:2], True), (turns, False)):
        assert both.jaxlm.apply_chat_template(messages, opening) == both.hf.apply_chat_template(messages, opening)
    assert both.jaxlm.chat_template(True) == both.hf.chat_template(True)


@pytest.mark.parametrize("both", ["gpt2"], indirect=True)
def test_the_harness_s_own_program(
    both: Both, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tasks = write_tasks(tmp_path / "tasks")
    arguments = f"workdir={both.workdir},step=0,max_gen_toks=8"
    argv = ["run", "--model", "jaxlm", "--model_args", arguments, "--tasks", "local_choice", "--batch_size", "auto"]
    monkeypatch.setattr("sys.argv", ["lm_eval", *argv, "--include_path", str(tasks)])
    importlib.import_module("jaxlm.interop.harness").main()
    assert "|local_choice" in capsys.readouterr().out


@pytest.mark.parametrize("both", ["gpt2"], indirect=True)
def test_mistakes(both: Both, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "questions.jsonl").unlink()
    for argv, words in (
        (["local_choise"], ["no task is called 'local_choise'; did you mean 'local_choice'"]),
        (["local_choice"], ["cannot be read", "questions.jsonl"]),
        (["local_choice", "--max_length", 65], ["max_length is 65", "at most 64", "learned"]),
        (["local_choice", "--step", 3], ["--step 3"]),
    ):
        code = tool("evaluate", "--workdir", both.workdir, "--include_path", tasks, "--tasks", *argv)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxlm: ")]
        assert code == 2 and len(said) == 1 and all(word in said[0] for word in words), said
    JaxLM = importlib.import_module("jaxlm.interop.harness").JaxLM
    for key, value in (("batch_size", 0), ("max_length", "x"), ("prefix_token_id", 10**6), ("pretrained", "gpt2")):
        with pytest.raises(ValueError, match=key):
            JaxLM(workdir=str(both.workdir), **{key: value})
    with pytest.raises(ValueError, match=r"max_gen_toks is 64; allowed: at most 63"):
        both.jaxlm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 64})]))


def test_tasks(both: Both, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tasks, chat = write_tasks(tmp_path / "tasks"), both.workdir.parent.name.rstrip("0") in CHATS
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    for with_chat in (False, True) if chat else (False,):
        want = importlib.import_module("lm_eval").simple_evaluate(
            model=both.hf, tasks=[*TASKS], task_manager=manager, num_fewshot=1, apply_chat_template=with_chat,
            bootstrap_iters=0,
        )["results"]  # fmt: skip
        capsys.readouterr()
        flags = ["--apply_chat_template"] if with_chat else []
        code = tool(
            "evaluate", "--workdir", both.workdir, "--tasks", ",".join(TASKS), "--include_path", tasks,
            "--num_fewshot", 1, *flags,
        )  # fmt: skip
        out = capsys.readouterr().out.splitlines()
        assert code == 0 and any(line.startswith("|local_choice") for line in out)
        got = json.loads(out[-1])
        assert got["step"] == 0 and got["n-shot"] == dict.fromkeys(TASKS, 1)
        for task, scores in want.items():
            numbers = {k: v for k, v in scores.items() if isinstance(v, float) and "stderr" not in k}
            assert numbers and got["results"][task] == got["results"][task] | approx(numbers), task
