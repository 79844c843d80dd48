"""New tokens become text as they arrive, up to the end of the answer."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.data.prompts import Continuation, Ending, encode_prompt, make_ending
from jaxlm.data.tokenizers.base import ByteTokenizer, to_bytes

BYTES = ByteTokenizer()
BOS = BYTES.bos_id
TEXTS = st.text("ab\n<é😀", max_size=12)


def shown(ids: list[int], sizes: list[int], ending: Ending) -> list[str]:
    """Returns the texts shown for ids that arrive in parts of these sizes; a last part holds the rest."""
    continuation = Continuation(BYTES, np.array([BOS]), ending)
    parts, at = [], 0
    for size in [*sizes, len(ids)]:
        parts.append(continuation.add(ids[at : at + size]))
        at += size
    return [*parts, continuation.finish()]


@given(TEXTS, st.lists(st.integers(1, 5), max_size=6), st.lists(TEXTS.filter(bool), max_size=2), st.booleans())
@example("a\n<b", [1, 1, 1], ["\n<"], False)
@example("a\n", [1], ["\n<"], True)
@settings(deadline=None)
def test_parts_of_any_size_give_the_same_text(text: str, sizes: list[int], stops: list[str], ends: bool):
    """The text does not depend on how the ids are cut, also within a character."""
    ids = [*to_bytes(text), *([BOS, *b"behind the end"] if ends else [])]
    # The text before the first stop text that is complete; if several end at once, before the longest.
    whole = next((text[: min(n - len(stop) for stop in stops if text[:n].endswith(stop))] for n in range(len(text) + 1)
                  if any(text[:n].endswith(stop) for stop in stops)), text)  # fmt: skip
    assert "".join(shown(ids, sizes, Ending(frozenset([BOS]), tuple(stops), ""))) == whole
    after = whole.removesuffix("\n") if whole == text else whole
    assert "".join(shown(ids, sizes, Ending(frozenset([BOS]), tuple(stops), "\n"))) == after


def test_a_text_is_shown_as_soon_as_it_is_certain():
    ids = list(to_bytes("é\nab"))
    assert shown(ids, [1, 1, 1, 1, 1], Ending(frozenset(), ("\nb",), "")) == ["", "é", "", "\na", "b", "", ""]
    assert shown(ids[:1], [1], Ending(frozenset(), (), ""))[-1] == "\ufffd"  # the ids end within a character


@pytest.mark.parametrize(
    "keys, prompt, ending",
    [
        ({}, "p", Ending(frozenset([BOS]), ("halt",), "")),
        ({"messages_key": "m"}, "<|user|>\np\n<|assistant|>\n",
         Ending(frozenset([BOS]), ("halt", "\n<|user|>\n"), "\n")),
        ({"response_key": "r", "chat_template": "[{role}]{content}"}, "[user]p[assistant]",
         Ending(frozenset([BOS]), ("halt", "[user]"), "")),
        ({"response_key": "r", "chat_template": ""}, "p", Ending(frozenset([BOS]), ("halt",), "")),
    ],
)  # fmt: skip
def test_prompts_and_endings_follow_the_template(keys: dict[str, str], prompt: str, ending: Ending):
    data = get_config().data
    for key, value in keys.items():
        setattr(data, key, value)
    ids = encode_prompt(BYTES, data, "p", bool(keys))
    assert ids.dtype == np.int32 and ids[0] == BOS and BYTES.decode(ids) == prompt
    assert make_ending(BYTES, data, ["halt"]) == ending
