"""Packing of whole documents loses nothing, leaves little space empty, and treats each document as if alone."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.config import Config, UserError
from jaxlm.data import Corpus, Share, TrainOrder, eval_batches, prepare
from jaxlm.data.order import Packed
from jaxlm.data.packing import best_fit, pack, pieces
from jaxlm.data.tokens import Tokens
from jaxlm.model import make_model
from tests.corpora import LINES, make_config, open_corpus, write
from tests.runs import numbers, run

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300)


def naive(lengths: list[int], T: int) -> list[int]:
    """Returns the free space of each row after best-fit decreasing, placing one piece after the other."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(T - length)
    return sorted(spaces)


@given(LENGTHS, st.integers(60, 200))
@settings(deadline=None)
def test_best_fit_equals_a_naive_implementation(lengths: list[int], T: int):
    rows = best_fit(np.array(lengths), T)
    assert sorted(T - np.bincount(rows, lengths)) == naive(lengths, T)


@given(LENGTHS, st.integers(1, 70))
@settings(deadline=None)
def test_pieces_cover_the_documents_in_order(lengths: list[int], T: int):
    ends = np.cumsum(lengths)
    starts, sizes = pieces(ends - lengths, int(ends[-1]), T)
    assert sizes.min() > 0 and sizes.max() <= T
    np.testing.assert_array_equal(
        np.concatenate([np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]), np.arange(ends[-1])
    )
    assert set(ends - lengths) <= set(starts)  # no piece holds parts of two documents
    full = sizes[~np.isin(starts + sizes, ends)]
    assert (full == T).all()  # all pieces of a document but the last are full


def test_many_documents_are_packed_fast_and_tightly():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1, 1_000_000).astype(np.int32) + 1, 1024)
    rows = best_fit(lengths, 1024)
    filled = np.bincount(rows, lengths)
    assert filled.max() <= 1024 and filled.mean() > 0.999 * 1024


BOS = 9


def tokens_of(documents: list[list[int]], shards: int = 1, learned: bool = False) -> Tokens:
    """Returns documents of BOS and their tokens, in several shards; with `learned`, only even tokens and BOS are
    trained on.
    """
    ids = np.array([i for document in documents for i in (BOS, *document)], np.uint16)
    starts = np.flatnonzero(ids == BOS)
    masks = np.array_split((ids % 2 == 0) | (ids == BOS), shards) if learned else None
    return Tokens(np.array_split(ids, shards), masks, lambda: starts, BOS)


DOCUMENTS = st.lists(st.lists(st.integers(10, 40), max_size=30), min_size=1, max_size=40)


@given(DOCUMENTS, st.integers(2, 20), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_rows_hold_each_document_once(documents: list[list[int]], T: int, shards: int, learned: bool):
    order = Packed(tokens_of(documents, shards, learned), T, seed=3)
    epoch = order.rows(np.arange(order.num_eval_rows, 2 * order.num_eval_rows))
    found: list[list[int]] = []
    for x_T, y_T, p_T in zip(epoch["inputs"], epoch["targets"], epoch["positions"], strict=True):
        used = T - int(np.argmax(x_T[::-1] != 0)) if x_T.any() else 0
        assert (y_T[used:] == -1).all() and not p_T[used:].any()  # padding
        begins = np.flatnonzero(p_T[:used] == 0)
        for a, b in zip(begins, [*begins[1:], used], strict=True):
            np.testing.assert_array_equal(p_T[a:b], np.arange(b - a))
            want = x_T[a + 1 : b]
            got = y_T[a : b - 1]
            np.testing.assert_array_equal(got, np.where((want % 2 == 0) | (not learned), want, -1))
            found.append([*x_T[a:b].tolist(), int(y_T[b - 1])])
    wanted = []
    for document in documents:
        ids = [BOS, *document, BOS]  # the BOS after a document is predicted too
        for start in range(0, len(ids) - 1, T):
            piece = ids[start : start + T + 1]
            last = piece[-1]
            wanted.append([*piece[:-1], last if not learned or last % 2 == 0 or last == BOS else -1])
    assert sorted(found) == sorted(wanted)


def test_each_epoch_is_shuffled_anew_and_batches_are_a_pure_function():
    documents = [[10 + i % 30] * (i % 17) for i in range(300)]
    config = get_config()
    config.seq_len, config.batch_size, config.data.packing = 32, 4, "document"
    tokens = tokens_of(documents)
    corpus = Corpus(train=tokens, val=tokens, vocab_size=50, tokenizer=None, bytes_per_token=None, fingerprint="",
                    folder=None, facts={})  # fmt: skip
    order = TrainOrder(corpus, config)
    block, rows = order.batches(5, 3), pack(tokens, 32).rows
    assert block["positions"].shape == (3, 4, 32)
    for n in range(3):
        for name, batch in TrainOrder(corpus, config).batches(5 + n, 1).items():
            np.testing.assert_array_equal(block[name][n], batch[0])
    packed = Packed(tokens, 32, 0)
    epochs = [
        packed.rows(np.arange(e * packed.num_eval_rows, (e + 1) * packed.num_eval_rows))["inputs"] for e in range(2)
    ]
    assert packed.num_eval_rows == len(rows) - 1 > 50 and (epochs[0] != epochs[1]).any()
    assert sorted(map(tuple, epochs[0])) == sorted(map(tuple, epochs[1]))


def test_standard_library_has_little_padding(tmp_path: Path):
    """Users are promised less than 2% at 1024 tokens. The test uses bytes, whose documents are the longest, and 4096
    bytes too, because the sentencepiece model of configs/base.py makes documents a quarter as long.
    """
    config = make_config(tmp_path)
    config.data.source = "stdlib"
    corpus = prepare(config, progress=False)
    for T in (1024, 4096):
        packing = pack(corpus.train, T)
        assert packing.lengths.sum() == len(corpus.train)
        assert 1 - len(corpus.train) / ((len(packing.rows) - 1) * T) < 0.005


@pytest.fixture
def model_config(tmp_path: Path) -> Config:
    config = make_config(tmp_path)
    config.model.num_layers, config.model.d_model, config.model.num_heads = 2, 32, 2
    config.seq_len, config.data.packing = 64, "document"
    return config


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_the_loss_of_a_packed_document_equals_its_loss_alone(model_config: Config, tmp_path: Path, position: str):
    config = model_config
    config.model = dataclasses.replace(config.model, **{"position": position})
    write(tmp_path, {f"d/{i:02}.txt": LINES[i : 2 * i + 7] for i in range(40)})
    corpus = open_corpus(config, tmp_path / "d", val_fraction=0.5)
    model = make_model(config.model, corpus.vocab_size, config.seq_len)
    fresh = model.init(jax.random.key(0))  # its branches add nothing
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), fresh)

    @jax.jit
    def losses(inputs: jax.Array, targets: jax.Array, positions: jax.Array | None) -> jax.Array:
        x_ND = model.hidden(params, inputs, positions_BT=positions)
        log_p_NV = jax.nn.log_softmax(model.unembed(params, x_ND))
        nll_N = -jnp.take_along_axis(log_p_NV, jnp.maximum(targets, 0).reshape(-1, 1), 1)[:, 0]
        return jnp.where(targets >= 0, nll_N.reshape(targets.shape), 0)

    packed, together = [], 0
    for _, _, batch in eval_batches(corpus, config, 4, share=Share(1)):
        x, y, p = (batch[k][0] for k in ("inputs", "targets", "positions"))
        together = max(together, int((p[:, 1:] == 0).sum(1).max()))
        nll = np.asarray(losses(x, y, p))
        for row in range(len(x)):
            begins = np.flatnonzero((p[row] == 0) & (y[row] >= 0))
            for a, b in zip(begins, [*begins[1:], len(x[row])], strict=True):
                n = int((y[row, a:b] >= 0).sum())
                packed.append((x[row, a : a + n].tolist(), nll[row, a : a + n]))
    assert together > 1  # rows with several documents
    assert sum(len(ids) for ids, _ in packed) == len(corpus.val)
    for ids, nll in packed:
        n = len(ids)
        x, y = np.zeros((1, 64), np.int32), np.full((1, 64), -1, np.int32)
        x[0, :n] = ids
        y[0, : n - 1] = ids[1:]
        alone = np.asarray(losses(x, y, None))[0, : n - 1]
        np.testing.assert_allclose(nll[: n - 1], alone, rtol=2e-5)


def test_packing_needs_the_starts_of_documents(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.arange(1000) % 50)
    config = make_config(tmp_path)
    config.data.source, config.data.vocab_size, config.data.packing = "tokens", 50, "document"
    with pytest.raises(UserError, match=r"data\.packing is 'document', but it is unknown where documents start"):
        open_corpus(config, tmp_path / "a.npy")


def test_packed_steps_do_not_depend_on_the_devices(tmp_path: Path):
    """Rows hold different numbers of targets, but every target weighs the same, however the rows are split."""
    write(tmp_path, {f"d/{i:02}.txt": LINES[i : 3 * i + 7] for i in range(60)})
    keys = {"data.source": "text", "data.path": tmp_path / "d", "data.tokenizer": "bytes", "data.packing": "document",
            "seq_len": 64, "steps": 3, "log.every_steps": 1, "eval.sample_tokens": 0}  # fmt: skip
    assert run(tmp_path / "one", **keys, **{"parallel.devices": 1}) == 0
    assert run(tmp_path / "four", **keys, **{"parallel.devices": 4, "optim.accum_steps": 2}) == 0
    one, four = numbers(tmp_path / "one"), numbers(tmp_path / "four")
    assert len(one) == len(four) == 4
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
