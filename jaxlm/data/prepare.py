"""Makes or opens the corpus that `data.*` names: one source, or a mixture of several with one tokenizer."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from jaxlm.config import SOURCES, Config, DataConfig, UserError, mixture
from jaxlm.data.corpus import Corpus, MixtureSource, check_lengths, fingerprint
from jaxlm.data.pairs import lengths_of, pack_pairs
from jaxlm.data.progress import say_once
from jaxlm.data.sources.documents import Source
from jaxlm.data.sources.files import name_of, named
from jaxlm.data.sources.opening import open_ids, open_source
from jaxlm.data.store import stored, stored_tokenizer
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.tokens import chain


def prepare(config: Config, *, progress: bool = True) -> Corpus:
    """Returns the corpus that `config.data` names: opens its token store, and makes the store first if needed.

    Any number of processes may call this at once; one of them makes the store, the others wait. With `progress`, shows
    notes and progress on stderr.

    Raises:
      UserError: the data is missing, unreadable, too short or does not fit the configuration.
    """
    data = config.data
    if data.mixture:
        return _mixed(config, progress)
    if SOURCES[data.source].ids:
        return _checked(open_ids(config, progress), config, progress)
    source = _opened(data, progress)
    tokenizer, name = stored_tokenizer(data, [source], progress)
    return _checked(stored(data, source, tokenizer, name, config.seq_len, progress), config, progress)


def _opened(data: DataConfig, progress: bool) -> Source:
    """Returns the source of documents that `data` names; prints its notes if `progress`."""
    source = open_source(data)
    for note in source.notes if progress else ():
        say_once(note)
    return source


def _mixed(config: Config, progress: bool) -> Corpus:
    """Returns the corpus of a mixture."""
    weights, parts = zip(*((weight, part) for weight, part in mixture(config.data)), strict=True)
    sources = {i: _opened(part, progress) for i, part in enumerate(parts) if not SOURCES[part.source].ids}
    _check_distinct(list(sources.values()))
    ids = {i: _with_text(config, part, progress) for i, part in enumerate(parts) if SOURCES[part.source].ids}
    if sources or config.data.tokenizer_path:
        tokenizer, name = stored_tokenizer(config.data, list(sources.values()), progress)
    else:
        tokenizer, name = ids[0][1], ""
    for i, (_, own) in ids.items():
        if own.pieces != tokenizer.pieces:
            raise UserError(
                f"data.mixture: {parts[i].path} has token ids of another tokenizer; allowed: the same tokenizer "
                "for all sources (data.tokenizer_path)"
            )
    corpora = [
        ids[i][0] if i in ids else stored(part, sources[i], tokenizer, name, config.seq_len, progress)
        for i, part in enumerate(parts)
    ]
    names = [f"{part.source} {name_of(part)}".rstrip() for part in parts]
    names = [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    for part, corpus in zip(parts, corpora, strict=True):
        check_lengths(part, config.seq_len, len(corpus.train), len(corpus.val))
        _check_pairs(part, config, corpus, progress)
    shares = [
        MixtureSource(name, weight / sum(weights), corpus.train, corpus.val)
        for name, weight, corpus in zip(names, weights, corpora, strict=True)
    ]
    facts = {s: _totals([corpus.facts[s] for corpus in corpora]) for s in ("train", "val")}
    return Corpus(
        train=chain([c.train for c in corpora]),
        val=chain([c.val for c in corpora]),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        bytes_per_token=tokenizer.bytes_per_token(),
        fingerprint=fingerprint(tokenizer.vocab_size, *(c.fingerprint for c in corpora)),
        folder=None,
        facts={
            "source": "mixture",
            "folders": list(dict.fromkeys(str(c.folder) for c in corpora if c.folder)),
            "skipped": sum(c.facts.get("skipped", 0) for c in corpora),
        }
        | facts,
        shares=tuple(shares),
    )


def _with_text(config: Config, part: DataConfig, progress: bool) -> tuple[Corpus, Tokenizer]:
    """Returns the corpus of a mixture's part that is token ids, and the tokenizer of these ids."""
    own = dataclasses.replace(config, data=part)
    corpus = _checked(open_ids(own, progress), own, False)
    if corpus.tokenizer is None:  # the tokenizer of the other parts need not have made these ids
        raise UserError(
            f"data.mixture: {part.path} is token ids without a tokenizer; allowed: data.tokenizer_path, "
            "or a token store"
        )
    return corpus, corpus.tokenizer


def _check_distinct(sources: list[Source]) -> None:
    """Raises UserError if a file is in two sources with different splits: one would train on documents that the other
    validates on.
    """
    for a, b in itertools.combinations(sources, 2):
        both = a.files & b.files
        if both and a.key != b.key:
            raise UserError(
                f"data.mixture: {min(map(str, both))} is in '{a.name}' and in '{b.name}'; allowed: in one of them"
            )


def _totals(facts: list[dict[str, Any]]) -> dict[str, int]:
    """Returns the sums of the counts that all facts have."""
    known = [k for k in ("documents", "bytes", "tokens") if all(k in found for found in facts)]
    return {k: sum(found[k] for found in facts) for k in known}


def _checked(corpus: Corpus, config: Config, progress: bool) -> Corpus:
    """Returns the corpus; raises UserError if it does not fit the configuration. With `progress`, prints notes."""
    check_lengths(config.data, config.seq_len, len(corpus.train), len(corpus.val))
    if config.data.packing == "document" and (corpus.train.starts is None or corpus.val.starts is None):
        raise UserError(
            f"data.packing is 'document', but it is unknown where documents start in {named(config.data)};"
            " allowed with files of token ids: data.packing=concat, or data.tokenizer_path, whose bos opens"
            " documents"
        )
    _check_pairs(config.data, config, corpus, progress)
    return corpus


def _check_pairs(data: DataConfig, config: Config, corpus: Corpus, progress: bool) -> None:
    """Raises UserError if there is an encoder, and the data has no prompts. With `progress`, says what is cut off."""
    if not config.model.encoder_layers:
        return
    if corpus.train.masks is None or corpus.val.masks is None:
        raise UserError(
            f"model.encoder_layers is {config.model.encoder_layers}, but {named(data)} has no prompts and answers;"
            " allowed: data with data.prompt_key and data.response_key, or a store that was prepared with them"
        )
    S, T = config.model.encoder_len, config.seq_len
    lengths = [lengths_of(pack_pairs(tokens, S, T)) for tokens in (corpus.train, corpus.val)]
    prompts, answers = (np.concatenate(both) for both in zip(*lengths, strict=True))
    limits = (("prompts", prompts, "model.encoder_len", S), ("answers", answers, "seq_len", T))
    for what, lengths, key, limit in limits if progress else ():
        if long := int((lengths > limit).sum()):
            say_once(
                f"{named(data)}: {long:,} of {len(lengths):,} {what} have more than {key} = {limit} tokens and lose"
                f" their ends; the longest has {lengths.max():,}"
            )
