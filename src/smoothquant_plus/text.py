"""Text in, token windows out: for calibration and for perplexity."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jinja2
import torch
from torch import Tensor

from smoothquant_plus.errors import InputError

# A Hugging Face data set: hf:NAME?config=...&split=train&column=text (NAME may be a local directory).
DATASET_PREFIX = "hf:"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory. Raises InputError when there is none that can be read."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{directory} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json): copy it from the model's source.")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise InputError(f"the tokenizer in {directory} needs a package that is not installed: {error}") from error
    except Exception as error:  # the tokenizers library, written in Rust, raises nothing more precise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the tokenizer in {directory} brings its own code (auto_map in tokenizer_config.json), which is not run. Use a version of the "
                "model with a tokenizer.json."
            ) from error
        raise InputError(f"the tokenizer in {directory} cannot be read ({error!r}): copy it again from the model's source.") from error


def as_texts(text: str | Path | Sequence[str | Path]) -> list[str]:
    """One text or several, as they were named."""
    return [str(text)] if isinstance(text, (str, Path)) else [str(name) for name in text]


def check_texts(texts: Sequence[str]) -> None:
    """Raises InputError for a text file that does not exist or has a kind that is not read."""
    for text in texts:
        if text.startswith(DATASET_PREFIX):
            continue
        path = Path(text)
        if not path.is_file():
            raise InputError(f"no such text file: {text}. For a Hugging Face data set write {DATASET_PREFIX}NAME?split=train&column=text.")
        if path.suffix not in (".txt", ".jsonl"):
            raise InputError(
                f"{text}: text is read from .txt (one document) and .jsonl (one document a line) files, not from '{path.suffix}'."
            )


def read_documents(texts: Sequence[str], tokenizer: Any) -> Iterator[str]:
    """Every document: a .txt file is one; a .jsonl line has `text`, or chat `messages` that go through the tokenizer's chat template."""
    for text in texts:
        if text.startswith(DATASET_PREFIX):
            yield from _dataset_documents(text, tokenizer)
        elif text.endswith(".jsonl"):
            yield from _jsonl_documents(Path(text), tokenizer)
        else:
            yield _decode(Path(text))


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def _jsonl_documents(path: Path, tokenizer: Any) -> Iterator[str]:
    # Not splitlines(): it also breaks at characters that may stand inside a JSON string, such as U+2028.
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        yield _document(record, "text", f"{path}, line {number}", tokenizer)


def _document(record: Any, column: str, where: str, tokenizer: Any) -> str:
    if isinstance(record, dict) and isinstance(record.get(column), str):
        return record[column]
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{where} has chat messages, but the model's tokenizer has no chat template: give plain text instead.")
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # a template computes
            raise InputError(f"{where} has messages that the tokenizer's chat template refuses: {error}") from error
    raise InputError(f"{where} has neither a string '{column}' nor a list of chat 'messages' with role and content.")


def _dataset_documents(text: str, tokenizer: Any) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{text}: reading a data set needs the extra 'datasets': pip install '.[datasets]' in a clone of this package."
        ) from error
    address = urlsplit(text.removeprefix(DATASET_PREFIX))
    if not address.path:
        raise InputError(f"{text} names no data set: write {DATASET_PREFIX}NAME?split=train&column=text.")
    options = dict(parse_qsl(address.query.replace("+", "%2B")))  # split=train+test is the sum of two
    unknown = set(options) - {"config", "split", "column"}
    if unknown:
        raise InputError(f"{text}: unknown option '{min(unknown)}': a data set takes config, split and column.")
    try:
        rows = datasets.load_dataset(address.path, options.get("config"), split=options.get("split", "train"))
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"the data set {text} cannot be read: {error}") from error
    for number, record in enumerate(rows, 1):
        yield _document(record, options.get("column", "text"), f"{text}, row {number}", tokenizer)


PIECE = 1 << 20  # characters that are tokenized at once


def tokenize(text: str, tokenizer: Any) -> list[int]:
    """The token ids of one text, with the tokenizer's special tokens; one that a chat template has written already is not added again.

    A long text is cut after the ends of lines: tokenizers take 170 bytes of memory for each of text. Raises InputError for half a character.
    """
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = []
    start = 0
    while start < len(text) or start == 0:
        end = start + PIECE
        end = len(text) if end >= len(text) else text.rfind("\n", start, end) + 1 or end
        piece = text[start:end]
        try:
            piece.encode()
        except UnicodeEncodeError as error:
            at = start + error.start
            raise InputError(
                f"the text has half of a character, a lone surrogate, after {text[max(0, at - 20) : at]!r}: remove it."
            ) from error
        ids += tokenizer(piece, add_special_tokens=start == 0 and not begins, verbose=False)["input_ids"]
        start = max(end, 1)
    return ids


def encode(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """All documents that are not blank as one stream of token ids, int64 (tokens,), each ended by the end-of-sequence token where there is
    one."""
    ids = array("q")
    for document in read_documents(texts, tokenizer):
        if document.strip():
            ids.extend(tokenize(document, tokenizer))
            if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
    if not ids:
        raise InputError(f"the text is empty: {', '.join(texts)}.")
    return torch.frombuffer(ids, dtype=torch.int64).clone()


def check_ids(ids: Tensor, vocabulary: int, directory: Path) -> None:
    """Raises InputError for a token id that the model in `directory`, of this `vocabulary`, has no embedding for."""
    largest = int(ids.max())
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer in {directory} gives token id {largest}, but config.json has vocab_size {vocabulary}: copy the model's own "
            "tokenizer there."
        )


@dataclass(frozen=True)
class Samples:
    """Calibration text as batches of token ids, int64 (1, tokens). They are cut from one packed stream and never padded: there is no
    padding whose activations would have to be left out."""

    batches: list[Tensor]
    available: int

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)


def take_samples(texts: Sequence[str], tokenizer: Any, samples: int, seq_len: int) -> Samples:
    """`samples` windows of `seq_len` tokens from the packed text, evenly spread over all of it; only the text's last window may be shorter.

    Raises InputError when the text has fewer.
    """
    windows = list(encode(texts, tokenizer).split(seq_len))
    if len(windows) < samples:
        raise InputError(
            f"the text is too short: {', '.join(texts)} gives {len(windows)} samples of {seq_len} tokens, and {samples} were asked for. "
            f"Give more text, --samples {len(windows)} or a smaller --seq-len."
        )
    if windows[0].numel() < 2:
        raise InputError(f"the text is too short: {', '.join(texts)} gives one token, and nothing follows it. Give more text.")
    chosen = [windows[index * len(windows) // samples] for index in range(samples)]
    return Samples([window[None] for window in chosen], len(windows))


def synthetic_samples(vocabulary: int, tokens: int = 64, batches: int = 2, seed: int = 0) -> Samples:
    """Random token ids, to prove equivalence on when activation statistics were given instead of text."""
    generator = torch.Generator().manual_seed(seed)
    return Samples([torch.randint(vocabulary, (1, tokens), generator=generator) for _ in range(batches)], batches)
