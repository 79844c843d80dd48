"""Makes the token store that a configuration names, without training.

    jaxlm prepare --config base [--config.data.vocab_size=4096 ...]

The last line on stdout is one JSON object.
"""

import json
from pathlib import Path

from jaxlm.config import cli, files
from jaxlm.config.paths import user_path
from jaxlm.data import Corpus, open_store, prepare


def summary(corpus: Corpus) -> dict:
    """Returns the facts about a corpus, as JSON."""
    result = {
        "folders": [str(corpus.folder)] if corpus.folder else [],
        "fingerprint": corpus.fingerprint,
        "vocab_size": corpus.vocab_size,
        **corpus.facts,  # for a mixture, also the folders of its sources
    }
    if not corpus.shares:
        result["folder"] = str(corpus.folder) if corpus.folder else None
    for split in ("train", "val"):
        facts = corpus.facts[split]
        if facts.get("bytes"):
            result[f"{split}_bytes_per_token"] = round(facts["bytes"] / (facts["tokens"] - facts["documents"]), 4)
    return result


def main(argv: list[str]) -> int:
    parser = cli.config_parser("jaxlm prepare", "Makes the token store that a configuration names, without training.")
    args, overrides = parser.parse_known_args(argv)
    corpus = prepare(files.load(user_path("--config", args.config), overrides))
    facts = summary(corpus)
    for folder in facts["folders"]:
        open_store(Path(folder), verify=True)
    for split in ("train", "val"):
        print(f"{split:5} " + "  ".join(f"{k} {v:,}" for k, v in facts[split].items() if isinstance(v, int)))
    print(f"vocabulary {facts['vocab_size']:,}")
    for folder in facts["folders"]:
        print(f"store {folder}")
    if not facts["folders"]:
        print(f"no store: {facts['source']} consists of token ids already")
    print(json.dumps(facts))
    return 0
