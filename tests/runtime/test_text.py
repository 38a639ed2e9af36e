"""Incremental decoding equals decoding at once, and stop strings cut where they should."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peqa_runtime import text as text_module
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.text import (
    REPLACEMENT,
    IncrementalDecoder,
    StopStrings,
    TokenTexts,
    apply_chat_template,
    decode,
    encode,
    token_bytes,
    token_text,
)


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    """One token per byte, so that every character outside ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> Any:
    """A SentencePiece-like one: decoding strips the space of the very first token, and bytes fall back."""
    vocab = {"<unk>": 0, "\u2581hello": 1, "\u2581world": 2, "s": 3, "\u2581": 4}
    vocab |= {f"<0x{b:02X}>": 10 + b for b in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pieces(tokenizer: Any, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, prompt or [])
    return [decoder.push(i) for i in ids] + [decoder.flush()]


@pytest.mark.parametrize(
    "text", ["plain", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family 👍🏽", "a\n\n  b\t"]
)
def test_pieces_make_the_text_and_no_half_character_is_shown(bytes_tokenizer: Any, text: str) -> None:
    ids = encode(bytes_tokenizer, text)
    parts = pieces(bytes_tokenizer, ids)
    assert "".join(parts) == text == decode(bytes_tokenizer, ids)
    assert not any(REPLACEMENT in p for p in parts)


def test_an_unfinished_character_comes_at_the_end_as_a_replacement(bytes_tokenizer: Any) -> None:
    ids = encode(bytes_tokenizer, "ok é")[:-1]
    assert pieces(bytes_tokenizer, ids)[-2:] == ["", REPLACEMENT]


def test_bytes_that_never_become_text_do_not_pile_up(bytes_tokenizer: Any) -> None:
    bad = encode(bytes_tokenizer, "é")[1]  # a continuation byte
    ids = [bad] * 40 + encode(bytes_tokenizer, "👍 fine")
    parts = pieces(bytes_tokenizer, ids)
    assert "".join(parts) == decode(bytes_tokenizer, ids) == REPLACEMENT * 40 + "👍 fine"
    assert any(parts[:20]), "let go before the end"


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(bytes_tokenizer: Any, seed: int) -> None:
    """Any bytes: nothing raises, and from the first whole character on the text is right."""
    rng = random.Random(seed)
    ids = [rng.randrange(256) for _ in range(60)] + encode(bytes_tokenizer, " end 日")
    assert "".join(pieces(bytes_tokenizer, ids)).endswith(" end 日")


def test_the_space_between_prompt_and_answer_is_kept(metaspace_tokenizer: Any) -> None:
    assert "".join(pieces(metaspace_tokenizer, [2, 3, 2])) == "worlds world"
    assert "".join(pieces(metaspace_tokenizer, [2, 3, 2], prompt=[1])) == " worlds world"
    smile = [10 + b for b in "🙂".encode()]
    assert pieces(metaspace_tokenizer, [1, *smile, 2]) == ["hello", "", "", "", "🙂", " world", ""]


def test_token_text_keeps_its_space(metaspace_tokenizer: Any, bytes_tokenizer: Any) -> None:
    assert token_text(metaspace_tokenizer, 2) == " world"
    assert token_text(bytes_tokenizer, encode(bytes_tokenizer, " ")[0]) == " "
    assert token_text(bytes_tokenizer, encode(bytes_tokenizer, "é")[0]) == REPLACEMENT


def test_texts_of_tokens_are_found_once(metaspace_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = TokenTexts(metaspace_tokenizer)
    ids = range(4, 200)
    want = [(token_text(metaspace_tokenizer, i), tuple(token_bytes(metaspace_tokenizer, i))) for i in ids]
    assert [(texts.text(i), texts.bytes(i)) for i in ids] == want
    monkeypatch.setattr(text_module, "_decode", None)
    assert [(texts.text(i), texts.bytes(i)) for i in ids] == want


def test_a_long_list_is_decoded_while_other_threads_run(bytes_tokenizer: Any) -> None:
    """`decode` of the tokenizers library keeps the interpreter to itself: half a second for a million tokens."""

    class Backend:
        def decode(self, ids: list[int], **options: bool) -> str:
            assert len(ids) < 10_000
            return str(bytes_tokenizer.backend_tokenizer.decode(ids, **options))

        def decode_batch(self, lists: list[list[int]], **options: bool) -> list[str]:
            return list(bytes_tokenizer.backend_tokenizer.decode_batch(lists, **options))

    class Tokenizer:
        backend_tokenizer = Backend()

        def __len__(self) -> int:
            return len(bytes_tokenizer)

    text = "naïve 日本 " * 1000
    ids = [*encode(bytes_tokenizer, text), bytes_tokenizer.eos_token_id]
    assert decode(Tokenizer(), ids) == text
    assert decode(Tokenizer(), ids, skip_special_tokens=False) == text + "<eos>"


def test_special_tokens_are_shown_only_on_request(bytes_tokenizer: Any) -> None:
    eos = bytes_tokenizer.eos_token_id
    ids = [*encode(bytes_tokenizer, "hi"), eos]
    assert decode(bytes_tokenizer, ids) == "hi"
    assert decode(bytes_tokenizer, ids, skip_special_tokens=False) == "hi<eos>"
    assert "".join(pieces(bytes_tokenizer, ids)) == "hi"
    assert token_text(bytes_tokenizer, eos) == "<eos>"


def test_decode_names_an_id_outside_the_vocabulary(bytes_tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="99999"):
        decode(bytes_tokenizer, [1, 99999])
    with pytest.raises(InvalidRequest, match="-1"):
        decode(bytes_tokenizer, [-1])


def feed(stop: StopStrings, chunks: list[str]) -> tuple[str, str | None]:
    shown = ""
    for chunk in chunks:
        text, hit = stop.push(chunk)
        shown += text
        if hit is not None:
            return shown, hit
    return shown + stop.flush(), None


@pytest.mark.parametrize(
    ("stop", "text", "shown", "hit"),
    [
        (("END",), "one END two", "one ", "END"),
        (("END",), "one EN", "one EN", None),
        (("\n\n",), "a\nb\n\nc", "a\nb", "\n\n"),
        (("aab",), "aaaab", "aa", "aab"),
        (
            ("op", "long stop"),
            "a long stop",
            "a ",
            "long stop",
        ),  # complete together: the one that starts first
        (("abc", "b"), "xabc", "xa", "b"),  # complete first
        (("日本",), "x日本y", "x", "日本"),
        ((), "anything", "anything", None),
    ],
)
def test_stop_strings_cut_the_same_however_the_text_is_cut(
    stop: tuple[str, ...], text: str, shown: str, hit: str | None
) -> None:
    for size in range(1, len(text) + 1):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert feed(StopStrings(stop), chunks) == (shown, hit), size
    if hit is not None:
        assert feed(StopStrings(stop, include=True), list(text)) == (shown + hit, hit)


def test_nothing_that_could_start_a_stop_string_is_shown() -> None:
    stop = StopStrings(("<|end|>",))
    assert stop.push("text <|e") == ("text ", None)
    assert stop.push("nd") == ("", None)
    assert stop.push("ing") == ("<|ending", None)
    assert stop.push(" <") == (" ", None)
    assert stop.flush() == "<"


@pytest.mark.parametrize("seed", range(30))
def test_random_stops_against_an_oracle(seed: int) -> None:
    rng = random.Random(seed)
    stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    text = "".join(rng.choices("abc", k=40))
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    want = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
    assert feed(StopStrings(stops), list(text)) == want


def test_chat_template(bytes_tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        apply_chat_template(bytes_tokenizer, [{"role": "user", "content": "hi"}])
    bytes_tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no tools') if m.role == 'tool' }}[{{ m.role }}] {{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        messages = [{"role": "user", "content": "hi"}]
        assert apply_chat_template(bytes_tokenizer, messages) == "[user] hi\n[assistant]"
        assert apply_chat_template(bytes_tokenizer, messages, add_generation_prompt=False) == "[user] hi\n"
        with pytest.raises(InvalidRequest, match="no tools"):
            apply_chat_template(bytes_tokenizer, [{"role": "tool", "content": "x"}])
    finally:
        bytes_tokenizer.chat_template = None
