"""Download a tokenizer from the Hugging Face hub and print its keys for a config.

    uv run python setup/download_tokenizer.py llama3 tokenizers/llama3 --api_key hf_...

llama and gemma files are gated: accept their license on the hub first; the key may also come from HF_TOKEN.
"""

from __future__ import annotations

import lingua.config.interrupt  # noqa: F401 # isort: skip (first of all: Ctrl-C while the rest is loaded)
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from lingua.config.command_line import run_main
from lingua.data.prepare.hub import asking_the_hub, must_reach_hub


class Place(NamedTuple):
    """The repository and file of a tokenizer, and its name in lingua."""

    repo: str
    file: str
    name: str


TOKENIZERS = {
    "llama2": Place("meta-llama/Llama-2-7b", "tokenizer.model", "sp"),
    "llama3": Place("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model", "tiktoken"),
    "gemma": Place("google/gemma-2b", "tokenizer.model", "sp"),
    "gpt2": Place("openai-community/gpt2", "tokenizer.json", "hf"),
}


def fetch(name: str, folder: Path, api_key: str | None = None) -> Path:
    """Download a tokenizer to `folder` and return its path; an unknown name means a repository with tokenizer.json."""
    from huggingface_hub import hf_hub_download

    place = TOKENIZERS.get(name) or (Place(name, "tokenizer.json", "hf") if "/" in name else None)
    if place is None:
        raise ValueError(f"no tokenizer {name!r}; there are {', '.join(sorted(TOKENIZERS))}, or give owner/repository")
    with asking_the_hub(f"fetching {place.file} of {place.repo}"):
        must_reach_hub()
        return Path(hf_hub_download(place.repo, place.file, local_dir=folder, token=api_key))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(sorted(TOKENIZERS))}, or owner/repository")
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--api_key", help="access token of the hub (else HF_TOKEN or `hf auth login`)")
    args = parser.parse_args(words)
    path = fetch(args.name, args.folder, args.api_key)
    kind = TOKENIZERS[args.name].name if args.name in TOKENIZERS else "hf"
    print(f"data.tokenizer.name={kind} data.tokenizer.path={path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
