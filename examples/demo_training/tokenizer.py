"""The tokenizer of the demo model: CLIP's byte-pair encoding with the words of its captions."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

MAX_TOKENS = 32
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def write_tokenizer(folder: Path, captions: list[str]) -> CLIPTokenizer:
    """Write a CLIP tokenizer whose vocabulary holds every word of the captions whole.

    Args:
        folder: Where the files go. They are those that transformers 4 and 5 read.
        captions: ASCII captions. All bytes are tokens too, for any other text.

    Returns:
        The tokenizer, loaded from the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(captions)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + WORD_END for symbol in alphabet)]
    tokens += [left + right for left, right in merges] + [BEGIN, END]
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_TOKENS,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
            **special,
        },
    )
    return CLIPTokenizer.from_pretrained(folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files over what `save_pretrained` wrote, which transformers 4 cannot read."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)


def learn_merges(captions: list[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, the most frequent pair first, until every word is a single token."""
    counts = Counter(word for text in captions for word in re.findall(r"[a-z]+|\d|[^\sa-z\d]+", text.lower()))
    words = [([*word[:-1], word[-1] + WORD_END], count) for word, count in sorted(counts.items())]
    merges = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words:
            for pair in itertools.pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [(_merge(symbols, best), count) for symbols, count in words]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
