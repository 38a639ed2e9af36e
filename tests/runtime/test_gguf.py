"""GGUF import: codes bit for bit, the model that comes out, the tokenizer, and files that lie."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model import import_gguf, load, read_manifest, verify_digest
from peqa_runtime.model.base_checkpoint import open_tensors, read_spec
from peqa_runtime.model.importers import gguf as importer
from peqa_runtime.model.importers.gguf import to_weight
from peqa_runtime.model.importers.gguf_file import GgufFile
from peqa_runtime.model.importers.gguf_tokenizer import build_tokenizer

Q4_0, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))
F32, F16, BF16, Q6_K = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q6_K"))
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 16, 64, 96, 300

LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def byte_vocabulary() -> list[str]:
    """Three control tokens, 256 bytes in GPT-2's spelling, and merges up to VOCAB."""
    from tokenizers import pre_tokenizers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return tokens + [f"{left}{right}" for left in "abcdefg" for right in "hijklmn"][: VOCAB - len(tokens)]


def tiny(tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tie,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp's converter orders them: rotary pairs next to each other."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def heads_of(name: str) -> int | None:
    return {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)


def write_gguf(path: Path, model: LlamaForCausalLM, kinds: dict, **metadata: object) -> None:
    """Write `model` as GGUF and set its weights to what that file says. `kinds`: type per part, "" = the default."""
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HEAD_DIM,
    }
    for key, value in {**values, **metadata}.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        else:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 50000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    tokens = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens[259:]])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    state = model.state_dict()

    def put(name: str, hf_name: str, part: str) -> None:
        weight = state[hf_name].numpy()
        heads = heads_of(part)
        kind = kinds.get(part, kinds[""]) if weight.ndim == 2 else F32
        data = gguf_quantize(permute(weight, heads) if heads else weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        exact = gguf_dequantize(data, kind).reshape(weight.shape)
        state[hf_name].copy_(torch.from_numpy(unpermute(exact, heads) if heads else exact))

    for i in range(2):
        for part, module in LINEARS.items():
            put(f"blk.{i}.{part}.weight", f"model.layers.{i}.{module}.weight", part)
        put(f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight", "norm")
        put(f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight", "norm")
    put("token_embd.weight", "model.embed_tokens.weight", "token_embd")
    put("output_norm.weight", "model.norm.weight", "norm")
    if not model.config.tie_word_embeddings:
        put("output.weight", "lm_head.weight", "output")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny-model.Q4_1.gguf"
    write_gguf(path, tiny(tie=True), {"": Q4_1, "token_embd": Q8_0})
    return path


@pytest.mark.parametrize(
    ("tie", "kinds"),
    [
        (True, {"": Q4_1, "token_embd": Q8_0}),
        (True, {"": Q4_0, "token_embd": F16}),
        (False, {"": Q8_0, "token_embd": Q8_0, "output": Q8_0}),
        (
            False,
            {"": Q4_1, "ffn_down": Q8_0, "attn_v": F16, "attn_k": BF16, "attn_output": Q4_0, "output": F32},
        ),
        (False, {"": Q4_0, "token_embd": Q4_0, "output": Q8_0}),
    ],
    ids=["q4_1", "q4_0-f16", "q8_0-untied", "mixed", "q4-embedding"],
)
def test_imported_model_computes_what_the_file_says(tmp_path: Path, tie: bool, kinds: dict) -> None:
    model = tiny(tie)
    write_gguf(tmp_path / "m.gguf", model, kinds)
    import_gguf(tmp_path / "m.gguf", tmp_path / "base", progress=False)
    verify_digest(tmp_path / "base")
    ids = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits
        imported = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        found = imported(ids).logits
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=1e-3)
    assert imported.config.rope_parameters["rope_theta"] == 50000.0
    assert load(tmp_path / "base").manifest == read_manifest(tmp_path / "base")


@pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q8_0], ids=lambda kind: kind.name)
def test_codes_are_kept_bit_for_bit(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    write_gguf(tmp_path / "m.gguf", tiny(tie=True), {"": kind, "token_embd": F32})
    import_gguf(tmp_path / "m.gguf", tmp_path / "base", progress=False)
    tensor = next(
        t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.1.ffn_down.weight"
    )
    blocks = np.asarray(tensor.data).reshape(HIDDEN, INNER // 32, -1)
    module = "model.layers.1.mlp.down_proj"
    with open_tensors(tmp_path / "base") as handles:
        qweight, scales, zeros = (
            handles[f"{module}.{leaf}"].get_tensor(f"{module}.{leaf}")
            for leaf in ("qweight", "scales", "zeros")
        )
    bits = 8 if kind == Q8_0 else 4
    codes = unpack_codes(qweight, bits, INNER).numpy().reshape(HIDDEN, INNER // 32, 32)
    d = blocks[..., 0:2].copy().view(np.float16)[..., 0].astype(np.float32)
    np.testing.assert_array_equal(scales.numpy(), d)
    if kind == Q8_0:
        np.testing.assert_array_equal(codes.astype(np.int16) - 128, blocks[..., 2:].view(np.int8))
        assert (zeros == 128).all()
        return
    nibbles = blocks[..., 2:] if kind == Q4_0 else blocks[..., 4:]
    for i in range(16):  # element i is the low nibble of byte i, element 16 + i the high one
        np.testing.assert_array_equal(codes[..., i], nibbles[..., i] % 16)
        np.testing.assert_array_equal(codes[..., 16 + i], nibbles[..., i] // 16)
    if kind == Q4_0:
        assert (zeros == 8).all()
    else:
        m = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
        np.testing.assert_array_equal(zeros.numpy(), -m / d)
        assert (zeros != zeros.round()).float().mean() > 0.5, "zero points stay fractions"


@pytest.mark.parametrize(
    ("m", "scale", "zero"),
    [(0.0, 1.0, 0.0), (0.25, 0.25, -1.0), (-3.0, 3.0, 1.0)],
    ids=["0", "plus", "minus"],
)
def test_block_without_step(m: float, scale: float, zero: float) -> None:
    raw = np.frombuffer(struct.pack("<ee", 0.0, m) + bytes([0x5A] * 16), np.uint8)
    weight = to_weight(q4_1_blocks(raw), "here")
    assert weight.scales.item() == scale
    assert weight.zeros.item() == zero
    assert not torch.signbit(weight.zeros).item() or zero < 0
    assert not weight.qweight.any()
    assert (dequantize(weight) == m).all()


def q4_1_blocks(raw: np.ndarray) -> importer.Blocks:
    d, m = (raw[i : i + 2].view(np.float16).astype(np.float32).reshape(1, 1) for i in (0, 2))
    codes = np.concatenate((raw[4:] & 15, raw[4:] >> 4)).reshape(1, 32)
    return importer.Blocks(codes, d, m, 8.0, 4)


def test_float_steps_of_any_sign_and_size_stay_finite() -> None:
    for d, m in ((6e-8, 65504.0), (-0.5, 1.0), (65504.0, -65504.0)):
        weight = to_weight(
            q4_1_blocks(np.frombuffer(struct.pack("<ee", d, m) + bytes(range(16)), np.uint8)), "here"
        )
        exact = np.float32(np.float16(d)) * np.concatenate((np.arange(16), np.zeros(16))) + np.float32(
            np.float16(m)
        )
        np.testing.assert_allclose(dequantize(weight).numpy()[0], exact, rtol=1e-6)
    with pytest.raises(InvalidCheckpoint, match="here holds NaN"):
        to_weight(
            q4_1_blocks(np.frombuffer(struct.pack("<ee", float("nan"), 0.0) + bytes(16), np.uint8)), "here"
        )


def test_spec_and_name_of_an_import(good_file: Path, tmp_path: Path) -> None:
    import_gguf(good_file, tmp_path / "base", progress=False)
    manifest, spec = read_manifest(tmp_path / "base"), read_spec(tmp_path / "base")
    assert manifest.model_id == "tiny-model"
    assert len(manifest.linears) == 14
    shape = manifest.linears["model.layers.0.self_attn.k_proj"]
    assert (shape.out_features, shape.in_features, shape.groups) == (
        KV_HEADS * HEAD_DIM,
        HIDDEN,
        HIDDEN // 32,
    )
    assert (spec.bits, spec.group_size) == (4, 32)
    assert spec.overrides["model.embed_tokens"].bits == 8
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("<|im_start|>a").input_ids == [1, tokenizer.convert_tokens_to_ids("a")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"", "no GGUF file"),
        (lambda b: b"GGUX" + b[4:], "no GGUF file"),
        (lambda b: b[:4] + struct.pack("<I", 9) + b[8:], "GGUF version 9"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "big-endian"),
        (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "announces"),
        (lambda b: b[:8] + struct.pack("<Q", 60000) + b[16:], "announces|truncated"),
        (lambda b: b[:16] + struct.pack("<Q", 1 << 40) + b[24:], "announces"),
        (lambda b: b[:24] + struct.pack("<Q", 1 << 62) + b[32:], "damaged"),
        (lambda b: b[:40], "truncated|announces"),
        (lambda b: b[: len(b) // 2], "truncated"),
        (lambda b: b[:-1], "truncated"),
    ],
    ids=[
        "empty",
        "magic",
        "version",
        "endian",
        "tensors",
        "more tensors",
        "entries",
        "string",
        "cut head",
        "cut",
        "1",
    ],
)
def test_files_that_lie(good_file: Path, tmp_path: Path, change, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(change(good_file.read_bytes()))
    with pytest.raises(InvalidCheckpoint, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "base", progress=False)
    assert not (tmp_path / "base").exists()


def test_random_damage_of_the_head_is_named_or_harmless(good_file: Path, tmp_path: Path) -> None:
    good = good_file.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(24, 9000)] = rng.randrange(256)
        (tmp_path / "m.gguf").write_bytes(data)
        try:
            with GgufFile(tmp_path / "m.gguf") as file:
                importer.llama_config(file.metadata, {name: t.shape for name, t in file.tensors.items()})
                build_tokenizer(file.metadata, 128)
        except InvalidCheckpoint:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("kinds", "metadata", "message"),
    [
        ({"": Q4_0, "ffn_up": F32}, {"expert_count": 8}, "mixture-of-experts"),
        ({"": Q4_0}, {"rope.scaling.type": "yarn"}, "'yarn' cannot be imported"),
        ({"": Q4_0}, {"rope.dimension_count": 8}, "rotate only a part"),
        ({"": Q4_0}, {"block_count": 3}, "incomplete: no tensor for model.layers.2"),
        ({"": Q4_0}, {"block_count": 1}, "does not belong to a llama model"),
        ({"": Q4_0}, {"feed_forward_length": 128}, "must have shape"),
        ({"": Q4_0}, {"attention.head_count": "four"}, "must be a positive integer"),
        ({"": F32}, {}, "holds no Q4_0, Q4_1 or Q8_0 linear"),
    ],
    ids=["experts", "rope", "partial", "layers", "fewer layers", "shape", "type", "floats"],
)
def test_models_that_cannot_be_imported(tmp_path: Path, kinds: dict, metadata: dict, message: str) -> None:
    write_gguf(tmp_path / "m.gguf", tiny(tie=True), kinds, **metadata)
    with pytest.raises(InvalidCheckpoint, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "base", progress=False)


def test_k_quants_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("output.weight", np.zeros((2, 210), np.uint8), raw_dtype=Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidCheckpoint, match=r"'output.weight' is stored as Q6_K.*Q4_1"):
        GgufFile(tmp_path / "m.gguf")


def test_other_architectures_are_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="'mamba' cannot be imported"):
        importer.llama_config({"general.architecture": "mamba"}, {})


def test_interrupted_import_leaves_nothing_and_is_repaired(
    good_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    stale = tmp_path / "base.tmp-0123456789ab"  # what kill -9 leaves
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importer, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_gguf(good_file, base, progress=False)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    import_gguf(good_file, base, progress=False)
    verify_digest(base)
    with pytest.raises(InvalidCheckpoint, match="exists already"):
        import_gguf(good_file, base, progress=False)


@pytest.mark.parametrize("text", ["2024", " 7", "a 42 b", "1,000.5", "v2 10"])
def test_digits_stand_alone(text: str) -> None:
    """As SmolLM's own tokenizer: every digit is a token, and no space joins one."""
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*byte_vocabulary(), "20", "24", "Ġ7", "Ġ4", "00"],
        "tokenizer.ggml.merges": ["2 0", "2 4", "Ġ 7", "Ġ 4", "0 0"],
    }
    tokenizer = build_tokenizer(metadata, 64)
    pieces = tokenizer.tokenize(text)
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == [c for c in text if c.isdigit()]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_unknown_tokenizers_are_refused() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.merges": ["a a"],
    }
    with pytest.raises(InvalidCheckpoint, match="not two known tokens"):
        build_tokenizer(metadata, 64)
    with pytest.raises(InvalidCheckpoint, match=r"'bert' cannot be rebuilt.*tokenizer_from"):
        build_tokenizer({"tokenizer.ggml.model": "bert"}, 64)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.pre": "martian",
    }
    with pytest.raises(InvalidCheckpoint, match="'martian' is not known"):
        build_tokenizer(metadata, 64)


@pytest.mark.slow
def test_smollm2_logits_equal_transformers_own_load(smollm2_gguf: Path, smollm2_base: Path) -> None:
    """Both in fp32, within 1e-3; as it is served, with activations of 16 bits, within 1e-1."""
    from transformers import GgufConfig

    from peqa_runtime.model.self_check import packed_logits

    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    imported = AutoModelForCausalLM.from_pretrained(smollm2_base, dtype=torch.float32)
    served = load(smollm2_base)
    text = "In 2024 the museum sold 1,234 tickets.\nSELECT name FROM visitors WHERE age > 30;\nCafé — naïve façade 😀"
    ids = served.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids).logits[0]
        plain = (imported(ids).logits[0] - expected).abs().max().item()
    packed = (packed_logits(served, ids[0]) - expected).abs().max().item()
    print(
        f"\nlargest logit {expected.abs().max():.2f}; largest difference: imported fp32 {plain:.2e}, "
        f"as served ({served.dtype}) {packed:.2e}"
    )
    assert plain < 1e-3
    assert packed < 1e-1


@pytest.mark.slow
def test_smollm2_tokenizer(smollm2_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_base)
    assert tokenizer.tokenize("In 2024, 15 apples") == [
        "In",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        ",",
        "Ġ",
        "1",
        "5",
        "Ġapples",
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("x").input_ids == tokenizer("x", add_special_tokens=False).input_ids, "no BOS is added"
