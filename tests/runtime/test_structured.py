"""Answers in a form: always in it, whatever the model would rather say, and the same alone as among others."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from peqa_runtime import Completion, Constraint, Engine, EngineConfig, InvalidRequest, SamplingParams
from peqa_runtime.core import Request
from peqa_runtime.engine.async_engine import AsyncEngine
from peqa_runtime.engine.grammar import new_matcher
from peqa_runtime.engine.guidance import Guidance, Guide, NoTokenLeft
from peqa_runtime.engine.token_masks import TokenMasks, _add_on_device

CONFIG = EngineConfig(num_blocks=256, max_sequences=32, task_rows=2)
PROMPT = "the cat and the dog"


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A random JSON schema whose texts are short."""
    kind = rng.choice(
        ["integer", "number", "string", "enum", "const", "boolean", "null", "pattern", "any_of", "one_of"]
    )
    if depth and rng.random() < 0.6:
        kind = rng.choice(["object", "array"])
    if kind == "object":
        names = rng.sample(["a", "b", "count", "x y", 'q"uote', "é"], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": schema(rng, depth - 1), "minItems": low, "maxItems": low + 1}
    if kind == "any_of":
        return {"anyOf": [schema(rng, 0), {"type": "boolean"}]}
    if kind == "one_of":
        kinds = [{"properties": {"kind": {"const": k}, "of": schema(rng, 0)}} for k in "ab"]
        shared = {"type": "object", "required": ["kind", "of"], "additionalProperties": False}
        return {"oneOf": [{"const": 1}, {"enum": [2, None]}, *(kind | shared for kind in kinds)]}
    low = rng.randint(-50, 50)
    return {
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)},
        "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.25},
        "string": {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)},
        "enum": {"enum": rng.sample(["red", "dark green", 1, None, True], 3)},
        "const": {"const": rng.choice(["fixed", 7, [1, "a"], {"k": None}])},
        "pattern": {
            "type": "string",
            "pattern": rng.choice(["^[a-c]{2,4}$", r"^\d{2}-\d{2}$", "^(on|off)$"]),
        },
    }.get(kind, {"type": kind})


def check(completion: Completion, wanted: dict[str, Any]) -> None:
    assert completion.finish_reason == "stop", (wanted, completion)
    jsonschema.validate(json.loads(completion.text), wanted, jsonschema.Draft202012Validator)


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[Engine]:
    with Engine(tiny_base, config=CONFIG, device="cpu") as engine:
        yield engine


def asked(structured: Constraint | None, seed: int = 0, **params: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 60, "seed": seed, "structured": structured, **params})


def one(engine: Engine, structured: Constraint, **params: Any) -> Completion:
    return engine.generate([PROMPT], asked(structured, **params))[0]


def test_two_hundred_random_schemas_give_valid_json_only(engine: Engine) -> None:
    rng = random.Random(5)
    different: dict[str, dict[str, Any]] = {}
    while len(different) < 200:
        found = schema(rng)
        different[json.dumps(found)] = found
    schemas = list(different.values())
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 20, "temperature": 2.0},
    )
    params = [
        asked(Constraint.json_schema(s), seed=i, max_tokens=400, **ways[i % 4]) for i, s in enumerate(schemas)
    ]
    for completion, wanted in zip(engine.generate([PROMPT] * 200, params), schemas, strict=True):
        check(completion, wanted)


def test_keys_come_in_the_order_of_the_schema(engine: Engine) -> None:
    properties = {name: {"enum": [1]} for name in "zebra"}
    wanted = {
        "type": "object",
        "properties": properties,
        "required": list("zebra"),
        "additionalProperties": False,
    }
    assert list(json.loads(one(engine, Constraint.json_schema(wanted), max_tokens=300).text)) == list("zebra")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (Constraint.regex(r"[A-Z][a-z]{2,5}( \d+){1,2}\."), r"[A-Z][a-z]{2,5}( \d+){1,2}\."),
        (Constraint.regex("(yes|no)/[é😀]{2}"), "(yes|no)/[é😀]{2}"),
        (
            Constraint.choice(["a b", "a/b", "x\ny", '"q"', "é€😀", "|", "\\d"]),
            'a b|a/b|x\ny|"q"|é€😀|\\||\\\\d',
        ),
        (Constraint.choice(["do", "done"]), "do|done"),
        (Constraint.grammar('start: "<" n ">" | "-"\nn: /[0-9]/ n | "x"'), r"<\d*x>|-"),
        (Constraint.grammar('root ::= "v" [0-9] ("." [0-9])?'), r"v\d(\.\d)?"),
        (Constraint.grammar('start: "[" %json {"enum": [1, 22]} "]"'), r"\[(1|22)\]"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_kind_of_form(engine: Engine, form: Constraint, pattern: str, temperature: float) -> None:
    many = [asked(form, seed=seed, temperature=temperature, max_tokens=80) for seed in range(5)]
    for completion in engine.generate([PROMPT] * 5, many):
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, completion.text), completion.text
        else:
            assert completion.finish_reason == "length"
            assert len(completion.token_ids) == 80


def test_neighbours_notice_nothing(engine: Engine) -> None:
    """Free, constrained and ruled rows in one batch give the tokens that each gives alone."""
    forms = [
        None,
        Constraint.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 20}),
        Constraint.regex("[a-z ]{40,}"),
        Constraint.choice(["one", "two", "three"]),
    ]
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.8, "logprobs": 3},
        {"logit_bias": ((40, 5.0),), "bad_words": ((41, 42), (50,)), "temperature": 0.7},
        {"presence_penalty": 0.5, "min_tokens": 8, "prompt_logprobs": 1, "logprobs": 0},
    ]
    params = [asked(form, seed=i, max_tokens=30, **way) for i, form in enumerate(forms) for way in ways]
    prompts = [f"{i} {PROMPT}" for i in range(len(params))]
    together = engine.generate(prompts, params)
    alone = [engine.generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert together == alone
    free = engine.generate(prompts[:5], [asked(None, seed=0, max_tokens=30, **way) for way in ways])
    assert [c.token_ids for c in free] == [c.token_ids for c in together[:5]]


def test_a_preempted_answer_goes_on_in_its_form(tiny_base: Path) -> None:
    """With blocks for two of six answers and no prefix cache, all are computed again, and give what they give alone."""
    form = Constraint.json_schema(
        {"type": "array", "items": {"enum": ["ab", "cd", 17]}, "minItems": 8, "maxItems": 8}
    )
    params = [asked(form, seed=seed, max_tokens=200) for seed in range(6)]
    config = EngineConfig(num_blocks=34, block_size=8, max_sequences=6, task_rows=2, prefix_cache=False)
    with Engine(tiny_base, config=config, device="cpu") as engine:
        together = engine.generate([PROMPT] * 6, params)
        assert engine.scheduler.num_preemptions > 0
        alone = [engine.generate([PROMPT], p)[0] for p in params]
    assert together == alone
    for completion in together:
        check(completion, {"type": "array", "minItems": 8, "maxItems": 8})


def test_a_lost_or_advanced_guide_is_made_again_from_the_tokens(engine: Engine) -> None:
    tokens = engine.model.tokenizer("abcabc", add_special_tokens=False)["input_ids"]
    form = Constraint.regex("[a-c]{6}x")
    behind, ahead = (Guide(engine.guidance, form, (), ignore_eos=False) for _ in range(2))
    behind.follow([1, 2, *tokens], 2)
    for token in tokens:
        ahead.follow([1, 2], 2) if token is tokens[0] else None
        ahead.take(token)
    ahead.follow([1, 2, *tokens[:3]], 2)  # its last tokens were never booked
    ahead.follow([1, 2, *tokens], 2)
    logits = torch.zeros(2, engine.model.vocab_size)
    TokenMasks().forbid([(0, behind), (1, ahead)], logits)
    assert torch.equal(logits[0], logits[1])
    assert logits.isfinite().any()
    x = engine.model.tokenizer("x")["input_ids"][0]
    assert [behind.allows(x), behind.allows(tokens[0]), behind.accepts()] == [True, False, False]
    assert behind.take(x) == "complete"


def test_masks_of_many_rows_are_those_of_each(engine: Engine) -> None:
    """Beside llguidance's own, one at a time: other sizes of a batch, ends of answers, stop tokens, NaN, a device."""
    vocab, eos = engine.model.vocab_size, engine.guidance.eos_token_ids
    masks = TokenMasks()
    encode = engine.model.tokenizer
    stop = encode("z")["input_ids"][0]
    for count in (1, 5, 2):
        guides = []
        for i in range(count):
            form = Constraint.regex(f"[a-{'bcdef'[i]}]{{2,6}}")
            guide = Guide(engine.guidance, form, (stop,) if i % 2 else (), ignore_eos=i == 2)
            for token in encode("ab" * (i % 3), add_special_tokens=False)["input_ids"]:
                guide.take(token)
            guides.append((2 * i, guide))
        logits = torch.randn(2 * count, vocab)
        logits[0, 3] = float("nan")
        expected = logits.clone()
        for row, guide in guides:
            bits = np.unpackbits(np.frombuffer(guide.matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = torch.from_numpy(bits[:vocab]).bool()
            if row == 4:
                allowed[list(eos)] = False
            if row // 2 % 2 and guide.accepts():
                allowed[stop] = True
            expected[row] += torch.where(allowed, 0.0, -torch.inf)
        on_device = logits.clone()
        assert masks.forbid(guides, logits) == {}
        assert torch.equal(logits.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert logits[0, 3].isnan()
        _add_on_device(on_device, [row for row, _ in guides], torch.from_numpy(masks._bits[:count]))
        assert torch.equal(on_device.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_states_used_up_by_others_do_not_end_an_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers in a form share the lexer's states: when these run out, a guide goes on with a matcher of its own."""
    import llguidance

    made: list[Any] = []

    def few(**limits: Any) -> Any:
        made.append(limits)
        return real(**(limits | {"max_lexer_states": 400}))

    real = llguidance.LLParserLimits
    monkeypatch.setattr(llguidance, "LLParserLimits", few)
    form = Constraint.json_schema(
        {"type": "array", "items": {"type": "string", "maxLength": 90}, "minItems": 9}
    )
    params = [asked(form, seed=seed, max_tokens=60) for seed in range(30)]
    answers = engine.generate([PROMPT] * 30, params)
    assert len(made) > 1, "the limit was never reached: the test shows nothing"
    assert {c.finish_reason for c in answers} == {"length"}
    assert all(c.text.startswith("[") for c in answers)


def test_a_form_that_breaks_off_ends_its_own_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Constraint.regex("[a-z]{50}")
    take = Guide.take

    def fail(self: Guide, token: int) -> Any:
        if self._constraint == broken and len(self._tokens) == 3:
            raise NoTokenLeft("too complex")
        return take(self, token)

    monkeypatch.setattr(Guide, "take", fail)
    forms = [None, broken, Constraint.regex("[a-z]{30}")]
    free, ended, other = engine.generate([PROMPT] * 3, [asked(form, max_tokens=40) for form in forms])
    assert (ended.finish_reason, ended.error) == ("error", "too complex")
    assert len(ended.token_ids) == 3
    assert other.finish_reason == "stop"
    assert free == engine.generate([PROMPT], asked(None, max_tokens=40))[0]


def test_the_end_of_the_form_ends_the_answer(engine: Engine) -> None:
    digits = Constraint.regex("[0-9]{4}")
    for params in (
        {},
        {"ignore_eos": True},
        {"min_tokens": 40},
        {"stop_token_ids": (0, 5)},
        {"max_tokens": 4},
    ):
        completion = one(engine, digits, **params)
        assert completion.finish_reason == "stop", params
        assert re.fullmatch(r"\d{4}", completion.text)
    short = one(engine, digits, max_tokens=3)
    assert (short.finish_reason, len(short.text)) == ("length", 3)
    empty = one(engine, Constraint.choice([""]), min_tokens=3, ignore_eos=True)
    assert (empty.finish_reason, empty.text) == ("stop", "")


def test_ends_are_allowed_when_the_form_is_complete_and_only_then(engine: Engine) -> None:
    """Of "aaa…" the end of text is wanted by a bias: it comes with the third letter, or not at all."""
    form, wants_end = Constraint.regex("a{3,}"), {"logit_bias": ((0, 100.0), (2, 50.0)), "temperature": 0.0}
    assert one(engine, form, **wants_end).text == "aaa"
    assert one(engine, form, min_tokens=6, **wants_end).text == "a" * 6
    unending = one(engine, form, ignore_eos=True, max_tokens=9, **wants_end)
    assert (unending.finish_reason, unending.text) == ("length", "a" * 9)
    assert one(engine, form, ignore_eos=True, stop_token_ids=(2,), **wants_end).text == "aaa"


def test_a_seed_gives_the_same_answer_and_others_give_others(engine: Engine) -> None:
    form = Constraint.regex("[a-z]{12}")
    texts = [one(engine, form, seed=seed).text for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 2


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    free, kept = engine.generate(
        [PROMPT] * 2,
        [asked(form, max_tokens=1, temperature=0.0, logprobs=5) for form in (None, Constraint.choice(["%"]))],
    )
    assert free.logprobs is not None
    assert kept.logprobs is not None
    assert kept.text == "%"
    assert free.logprobs[0].top == kept.logprobs[0].top
    assert kept.logprobs[0].logprob < free.logprobs[0].logprob


def test_what_nothing_can_follow_ends_with_a_reason(engine: Engine) -> None:
    letters = tuple(engine.model.tokenizer("xyz")["input_ids"])
    completion = one(engine, Constraint.regex("x[a-f]{9}"), allowed_token_ids=letters)
    assert (completion.finish_reason, completion.text) == ("error", "x")
    assert "no token is left" in str(completion.error)
    assert engine.tasks.registry.quarantined() == {}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda: Constraint.regex("(a"), "unclosed group"),
        (lambda: Constraint.regex(r"(a)\1"), "backreferences"),
        (lambda: Constraint.regex(r"[^\s\S]"), "no text"),
        (lambda: Constraint.json_schema({"type": "strin"}), "Invalid type"),
        (lambda: Constraint.json_schema({"not": {}}), 'cannot be enforced: "not"'),
        (lambda: Constraint.json_schema({"not": {}, "x-guidance": {"lenient": True}}), "cannot be enforced"),
        (
            lambda: Constraint.json_schema({"oneOf": [{"type": "string"}, {"type": "integer"}], "if": {}}),
            'cannot be enforced: "if"',
        ),
        (lambda: Constraint.json_schema({"type": "string", "format": "no-such"}), "format"),
        (lambda: Constraint.json_schema({"$ref": "http://example.com/x"}), "not present"),
        (lambda: Constraint.json_schema({"$ref": "#/$defs/none"}), "does not exist"),
        (lambda: Constraint.json_schema({"minLength": 5, "maxLength": 3, "type": "string"}), "Unsatisfiable"),
        (lambda: Constraint.json_schema("{"), "not valid JSON"),
        (lambda: Constraint.json_schema("3"), "object"),
        (lambda: Constraint.json_schema(False), "nothing"),
        (lambda: Constraint.json_schema({"enum": [float("nan")]}), "JSON cannot"),
        (lambda: Constraint.json_schema(json.loads('{"items":' * 70 + "{}" + "}" * 70)), "nested"),
        (lambda: Constraint.json_schema("[" * 100_000), "not valid JSON"),
        (lambda: Constraint.json_schema({"description": "x" * 200_000}), "131072 bytes"),
        (lambda: Constraint.choice([]), "1 to 2048"),
        (lambda: Constraint.choice(["a", 3]), "texts"),  # type: ignore[list-item]
        (lambda: Constraint.regex("\ud800"), "Unicode"),
        (lambda: Constraint.grammar(" "), "empty"),
        (lambda: Constraint.grammar("start: nowhere"), "unknown name"),
        (lambda: Constraint.grammar("start: start"), "no text"),
        (lambda: Constraint.grammar('root ::= "a" | b'), "GBNF"),
        (lambda: Constraint.grammar("root ::= " + "(" * 3000 + '"a"' + ")" * 3000), "deep"),
    ],
)
def test_what_cannot_be_a_form_is_refused(engine: Engine, form: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        one(engine, form())
    assert caught.value.param == "structured"


def test_tokenizers_without_fast_code_or_end_are_refused_by_name(engine: Engine) -> None:
    for guidance, message in (
        (Guidance(object(), 300, (0,)), "fast tokenizer"),
        (Guidance(engine.model.tokenizer, 300, ()), "ends them"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            guidance.compile(Constraint.json_object())


def test_without_llguidance_a_form_is_refused_by_name(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peqa_runtime.engine.grammar.llguidance", None)
    guidance = Guidance(engine.model.tokenizer, 300, (0,))
    for compile_form in (guidance.compile, guidance.compile_carefully):
        with pytest.raises(InvalidRequest, match="pip install llguidance"):
            compile_form(Constraint.json_object())


def test_forms_are_kept_up_to_a_number(engine: Engine) -> None:
    guidance = Guidance(engine.model.tokenizer, 300, (0,), kept=2)
    forms = [Constraint.regex(f"a{{{n}}}") for n in (1, 2, 3)]
    for form in (*forms[:2], forms[0], forms[2]):
        guidance.compile(form)
    assert list(guidance._forms) == [forms[0], forms[2]]


def test_forms_are_compiled_by_who_asks_and_never_in_the_engine_s_thread(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More forms wait than are kept, and answers that are preempted begin again."""
    compiled: list[tuple[str, Constraint]] = []

    def noted(tokenizer: Any, constraint: Constraint) -> Any:
        compiled.append((threading.current_thread().name, constraint))
        return new_matcher(tokenizer, constraint)

    monkeypatch.setattr("peqa_runtime.engine.guidance.new_matcher", noted)
    config = EngineConfig(num_blocks=10, block_size=4, max_sequences=3, task_rows=2, prefix_cache=False)
    engine = Engine(tiny_base, config=config, device="cpu")
    engine.guidance._kept = 1
    served = AsyncEngine(engine)
    forms = [Constraint.regex(f"[a-c]{{{n}}}") for n in range(20, 26)]

    async def answer(number: int) -> str:
        request = Request(str(number), (1, 2, 3, 4), asked(forms[number], max_tokens=30))
        outputs = [output async for output in served.submit(request)]
        return str(engine.model.tokenizer.decode([o.token_id for o in outputs if o.token_id]))

    async def work() -> list[str]:
        return await asyncio.gather(*map(answer, range(len(forms))))

    try:
        answers = asyncio.run(asyncio.wait_for(work(), 60))
    finally:
        served.stop()
    assert engine.scheduler.num_preemptions > 0
    for text, form in zip(answers, forms, strict=True):
        assert re.fullmatch(form.source, text)
    assert compiled == [(threading.current_thread().name, form) for form in forms]


def test_only_so_many_forms_are_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peqa_runtime.engine.guidance.HELD", 3)
    guidance = Guidance(engine.model.tokenizer, 300, (0,), kept=1)
    held = [guidance.compile(Constraint.regex(f"a{{{n}}}")) for n in range(1, 6)]
    assert [form is not None for form in held] == [True, True, True, False, False]
    del held
    assert guidance.compile(Constraint.regex("b")) is not None


def check_bytes(tokenizer: Any, vocab_size: int, eos: tuple[int, ...]) -> None:
    """Every token has its bytes, by the alphabet of byte-level tokenizers; an added token's are its text."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    read = Guidance(tokenizer, vocab_size, eos)._vocabulary()
    added = tokenizer.added_tokens_decoder
    for token, text in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        wanted = text.encode() if token in added else bytes(alphabet[character] for character in text)
        if wanted == b"\xff":
            continue  # no text has this byte: it is llguidance's own mark of special tokens
        assert read.is_special_token(token) is (token in added and added[token].special), token
        assert read.decode_bytes([token]) == wanted, token


def test_tokens_are_read_byte_for_byte(engine: Engine, tuning_base: Path) -> None:
    from transformers import AutoTokenizer

    check_bytes(engine.model.tokenizer, 300, (0,))
    check_bytes(AutoTokenizer.from_pretrained(tuning_base), 264, (0,))  # 7 rows of logits more than tokens


@pytest.mark.slow
def test_smollm2_keeps_to_schemas_and_reads_every_token(smollm2_base: Path) -> None:
    rng = random.Random(11)
    schemas = [schema(rng) for _ in range(12)]
    with Engine(smollm2_base, config=EngineConfig(num_blocks=512), device="cpu") as engine:
        check_bytes(engine.model.tokenizer, engine.model.vocab_size, engine.model.eos_token_ids)
        params = [asked(Constraint.json_schema(s), seed=i, max_tokens=200) for i, s in enumerate(schemas)]
        answers = engine.generate([f"An example of {json.dumps(s)}:\n" for s in schemas], params)
    for answer, wanted in zip(answers, schemas, strict=True):
        check(answer, wanted)
