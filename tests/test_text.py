from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

import families
from smoothquant_plus.errors import InputError
from smoothquant_plus.text import encode, read_documents, take_samples

TOKENIZER = families.make_tokenizer()
END = TOKENIZER.eos_token_id


def test_documents_are_packed_and_none_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("x" * 10, "y", "z" * 4)) + "\n")
    texts = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    ids = encode(texts, TOKENIZER)
    assert len(ids) == 3 + 10 + 1 + 4 + 4 and (ids == END).sum() == 4
    samples = take_samples(texts, TOKENIZER, samples=6, seq_len=4)
    assert [batch.shape[1] for batch in samples.batches] == [4, 4, 4, 4, 4, 2] and samples.tokens == len(ids) == 22
    assert [token for batch in samples.batches for token in batch[0].tolist()] == ids.tolist()


def test_samples_are_spread_over_the_whole_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(ord("a") + i) * 4 for i in range(10)))
    samples = take_samples([str(tmp_path / "a.txt")], TOKENIZER, samples=3, seq_len=4)
    assert [TOKENIZER.decode(batch[0]) for batch in samples.batches] == ["aaaa", "dddd", "hhhh"]
    assert samples.available == 11


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijk")
    with pytest.raises(InputError, match=r"gives 3 samples of 4 tokens, and 5 were asked for.*--samples 3"):
        take_samples([str(tmp_path / "a.txt")], TOKENIZER, samples=5, seq_len=4)


def test_chat_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = families.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    )
    assert list(read_documents([str(tmp_path / "chat.jsonl")], tokenizer)) == ["<user>hi<assistant>ho"]


def test_the_beginning_of_sequence_is_not_there_twice(tmp_path: Path) -> None:
    class Tokenizer:
        bos_token, eos_token_id = "<s>", None

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [1 if text.startswith("<s>") else 7]}

    for text, expected in (("<s>user", [1]), ("plain", [1, 7])):
        (tmp_path / "a.txt").write_text(text)
        assert encode([str(tmp_path / "a.txt")], Tokenizer()).tolist() == expected


def test_blank_documents_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "ab", "  ", "c")))
    assert len(encode([str(tmp_path / "rows.jsonl")], TOKENIZER)) == 2 + 1 + 1 + 1


def test_a_long_text_is_tokenized_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is lost, and it begins once."""

    class Tokenizer:
        bos_token, eos_token_id = "<s>", None
        pieces: ClassVar[list[str]] = []

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            self.pieces.append(text)
            return {"input_ids": [1] * add_special_tokens + list(text.encode())}

    monkeypatch.setattr("smoothquant_plus.text.PIECE", 8)
    for text in ("ab\ncd\nefghij\n", "without any end of line", "12345678", "1234567\n", "a"):
        (tmp_path / "a.txt").write_text(text)
        assert encode([str(tmp_path / "a.txt")], Tokenizer()).tolist() == [1, *text.encode()]
    assert Tokenizer.pieces[:3] == ["ab\ncd\n", "efghij\n", "withou" + "t "]
