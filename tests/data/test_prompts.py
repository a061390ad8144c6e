"""What a text to go on with begins with, and does not end with."""

from __future__ import annotations

from pathlib import Path

from autofunc.data import ByteTokenizer, load_tokenizer
from tests.data.tokenizers import write_tokenizer


def test_special_tokens_come_before_a_prompt_only(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    write_tokenizer(tmp_path)
    plain = load_tokenizer(str(tmp_path))
    assert list(plain.prompt("the answer")) == list(plain.encode("the answer"))

    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ends = [(token, made.token_to_id(token)) for token in ("<|start|>", "<eos>")]
    made.post_processor = processors.TemplateProcessing(single="<|start|> $A <eos>", special_tokens=ends)
    made.save(str(tmp_path / "tokenizer.json"))
    with_ends = load_tokenizer(str(tmp_path))
    assert list(with_ends.prompt("the answer")) == [ends[0][1], *with_ends.encode("the answer")]
    assert list(ByteTokenizer().prompt("ab")) == [97, 98]
