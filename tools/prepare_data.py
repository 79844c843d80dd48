"""Makes the token store that a configuration names, without training.

    python tools/prepare_data.py --config configs/base.py [--config.data.vocab_size=4096 ...]

The last line on stdout is one JSON object.
"""

import json
import sys

from jaxlm import cli
from jaxlm.data import Corpus, open_store, prepare
from jaxlm.main import exit_code
from jaxlm.paths import user_path


def summary(corpus: Corpus) -> dict:
    """What there is to know about a corpus, as JSON."""
    result = {
        "folder": str(corpus.folder) if corpus.folder else None,
        "fingerprint": corpus.fingerprint,
        "vocab_size": corpus.vocab_size,
        **corpus.facts,
    }
    for split in ("train", "val"):
        facts = corpus.facts[split]
        if facts.get("bytes"):
            result[f"{split}_bytes_per_token"] = round(facts["bytes"] / (facts["tokens"] - facts["documents"]), 4)
    return result


def main() -> int:
    parser = cli.Parser(
        prog="prepare_data.py", description="Tokenize a corpus once into the token store.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a file of configs/")
    parser.epilog = "Any key can be set: --config.data.vocab_size=4096"
    args, overrides = parser.parse_known_args()
    corpus = prepare(cli.load(user_path("--config", args.config), overrides))
    if corpus.folder:
        open_store(corpus.folder, verify=True)
    facts = summary(corpus)
    for split in ("train", "val"):
        print(f"{split:5} " + "  ".join(f"{k} {v:,}" for k, v in facts[split].items() if isinstance(v, int)))
    print(f"vocabulary {facts['vocab_size']:,}  store {facts['folder']}")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, "prepare_data.py"))
