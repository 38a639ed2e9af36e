"""Whole folders by GPTQ and block by block: what is served, mixed bits, error, sources, families, memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_cases import Make, quantize_options, save_random_model
from transformers import AutoConfig, AutoModelForCausalLM

from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.model import load, quantize_folder, quantize_rtn, read_manifest, verify_digest
from peqa_runtime.model.base_checkpoint import read_spec
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.calibration import CalibrationText
from peqa_runtime.model.quantizers.float_source import open_source
from peqa_runtime.model.quantizers.plan import Rule
from peqa_runtime.model.quantizers.run import calibrate
from peqa_runtime.model.quantizers.skeleton import load_skeleton
from peqa_runtime.model.quantizers.workbench import Workbench


@pytest.mark.parametrize(("method", "group_size"), [("gptq", 32), ("gptq", -1), ("blockwise", 32)])
def test_the_base_gives_what_the_quantizer_saw(
    make_base: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibration_text: Path,
    method: str,
    group_size: int,
) -> None:
    """Hidden states that the quantizer passed on to the last block are those of the loaded base."""
    monkeypatch.setattr(Workbench, "drop_hidden", lambda *_, **__: None)
    monkeypatch.setattr(Workbench, "remove", lambda self: None)
    base = make_base("base", method, group_size=group_size)
    verify_digest(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with open_source(base) as source:
        calibration = calibrate(source, CalibrationText(calibration_text, windows=8, tokens=32), model)
    bench = Workbench(
        tmp_path / ".base.unfinished", json.loads((tmp_path / ".base.unfinished/request.json").read_text())
    )
    seen = bench.hidden("quantized", 1, 8, 32, 64)
    with torch.no_grad():
        for index, window in enumerate(calibration.windows):
            out = model(window, output_hidden_states=True)
            torch.testing.assert_close(seen.read(index), out.hidden_states[1], rtol=1e-4, atol=1e-4)
        weights = bench.weights(1)
        for name, weight in weights.items():
            module = model.get_submodule(name)
            assert torch.equal(dequantize(module.weight_codes()), dequantize(weight))
    assert set(weights) == {name for name in read_manifest(base).linears if ".1." in name}


def test_a_mixed_base_is_served(make_base: Make, calibration_text: Path, tiny_hf_folder: Path) -> None:
    rules = (
        Rule("*.down_proj", {"bits": 8, "group_size": -1}),
        Rule("*.k_proj", {"bits": 2, "method": "rtn"}),
        Rule("re:.*[.]1[.].*gate_proj", {"method": "blockwise"}),
        Rule("model.layers.0.self_attn.o_proj", {"skip": True}),
    )
    base = make_base("base", "gptq", rules=rules)
    spec, manifest = read_spec(base), read_manifest(base)
    assert spec.of("model.layers.1.mlp.down_proj").bits == 8
    assert spec.of("model.layers.0.self_attn.k_proj").bits == 2
    assert spec.modules_to_not_convert == ("model.layers.0.self_attn.o_proj",)
    assert len(manifest.linears) == 13
    note = json.loads((base / "config.json").read_text())["quantization_config"]["quantizer"]
    assert note["method"] == "gptq"
    assert note["calibration"] | {"sha256": ""} == {
        "source": "text.txt", "sha256": "", "seed": 0, "windows": 8, "tokens": 32
    }  # fmt: skip
    assert note["rules"][1] == {"match": "*.k_proj", "bits": 2, "method": "rtn"}
    assert note["training"]["epochs"] == 1
    original = AutoModelForCausalLM.from_pretrained(tiny_hf_folder)
    found = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    kept = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(found.get_parameter(kept), original.get_parameter(kept))
    plain = quantize_rtn(original.get_parameter("model.layers.0.self_attn.k_proj.weight").detach(), 2, 32)
    assert torch.equal(found.get_submodule("model.layers.0.self_attn.k_proj").qweight, plain.qweight)
    load(base, device="cpu")  # verifies the digest, and compares served with dense logits


def test_better_integers_make_better_models(
    make_base: Make, tiny_hf_folder: Path, calibration_text: Path
) -> None:
    """Weights that never were quantized: next-token distributions, from round-to-nearest to block-wise."""
    model = AutoModelForCausalLM.from_pretrained(tiny_hf_folder)
    with open_source(tiny_hf_folder) as source:
        windows = calibrate(
            source, CalibrationText(calibration_text, windows=16, tokens=32, seed=5), model
        ).windows

    def distance(base: Path) -> float:
        other = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            pairs = [(model(w).logits.log_softmax(-1), other(w).logits.log_softmax(-1)) for w in windows]
        return sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in pairs)

    more = CalibrationText(calibration_text, windows=32, tokens=32)
    training = TrainingOptions(epochs=4, batch=2)
    rounded = distance(make_base("rtn", "rtn", calibration=None))
    by_gptq = distance(make_base("gptq", "gptq", calibration=more))
    trained = distance(make_base("blockwise", "blockwise", calibration=more, training=training))
    assert by_gptq < 0.8 * rounded
    assert trained < by_gptq


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1)])
def test_training_gains_on_every_block_of_attention(
    tiny_hf_folder: Path, calibration_text: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    """Held-out error of each block's outputs against where GPTQ left it."""
    report = quantize_folder(
        tiny_hf_folder, tmp_path / "base", bits, group_size, "blockwise", progress=False,
        options=quantize_options(
            calibration_text, calibration=CalibrationText(calibration_text, 64, 32), training=TrainingOptions()
        ),
    )  # fmt: skip
    assert len(report.blocks) == 2
    for block in report.blocks:
        assert block["gain"]["after"] < 0.97 * block["gain"]["before"]
    assert report.linears == {f"{bits} bit blockwise": 14}


def test_the_same_seed_gives_the_same_base(make_base: Make, calibration_text: Path) -> None:
    digests = [read_spec(make_base(name, "blockwise")).base_digest for name in ("a", "b")]
    assert digests[0] == digests[1]
    other = make_base("c", "blockwise", calibration=CalibrationText(calibration_text, 8, 32, seed=1))
    assert read_spec(other).base_digest != digests[0]


def test_a_base_is_a_source_too(make_base: Make, tiny_base: Path, tmp_path: Path) -> None:
    """Its linears are decoded, its embedding and the rest stay as they are."""
    again = make_base("again", "rtn", bits=3, group_size=64, source=tiny_base, calibration=None)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_base, again))
    for name in read_manifest(tiny_base).linears:
        decoded = dequantize(before.get_submodule(name).weight_codes())
        assert torch.equal(after.get_submodule(name).qweight, quantize_rtn(decoded, 3, 64).qweight)
    assert read_manifest(again).model_id == read_manifest(tiny_base).model_id
    base = make_base("lower", "gptq", bits=3, source=tiny_base)
    assert read_spec(base).bits == 3
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight,
        before.get_input_embeddings().weight,
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.25},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_other_families_run_as_the_model_does(family: str, tmp_path: Path) -> None:
    """Each block with the call that was recorded for it, one after the other, gives the model's hidden states."""
    model = save_random_model(tmp_path, family, FAMILIES[family])
    ids = torch.randint(1, 300, (1, 20))
    with open_source(tmp_path) as source, torch.no_grad():
        skeleton = load_skeleton(source)
        (hidden,), calls = skeleton.entries([ids], source), skeleton.calls(ids, source)
        for name, call in zip(skeleton.blocks, calls, strict=True):
            with skeleton.filled([name], source, torch.device("cpu")):
                out = skeleton.model.get_submodule(name)(hidden, *call.args, **call.kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
    caught: list[torch.Tensor] = []
    last = model.get_submodule(skeleton.blocks[-1])
    last.register_forward_hook(lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids, use_cache=False)
    torch.testing.assert_close(hidden, caught[0], rtol=1e-5, atol=1e-5)


LAYERS = 16
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc returns at once what is freed, so that what a process holds is what it uses."""
MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from peqa_runtime.model import shard_writer
from peqa_runtime.model.quantize import QuantizeOptions, quantize_folder
from peqa_runtime.model.quantizers.calibration import CalibrationText
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.plan import Rule
from peqa_runtime.model.quantizers.workbench import Workbench

def held():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

method, small, source, text, out = sys.argv[1], *map(Path, sys.argv[2:])
shard_writer._SHARD_BYTES = 1 << 20
options = QuantizeOptions(
    calibration=CalibrationText(text, 4, 16), device="cpu", training=TrainingOptions(epochs=1, batch=2),
    rules=(Rule("*[!k]_proj", {"method": "rtn"}),),
)

def quantize(folder, name):
    quantize_folder(folder, out / name, 4, 64, method, options=options, progress=False)

quantize(small, "small")  # imports, first buffers
start, peak, between, done = held(), 0, 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, held())
        time.sleep(0.004)

drop_hidden = Workbench.drop_hidden

def after_a_block(*args, **kwargs):
    global between
    between = max(between, held())
    drop_hidden(*args, **kwargs)

Workbench.drop_hidden = after_a_block
thread = threading.Thread(target=watch)
thread.start()
quantize(source, "large")
done.set()
thread.join()
print(peak - start, between - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("method", ["gptq", "blockwise"])
def test_memory_is_that_of_a_few_blocks_and_none_is_kept(
    tiny_hf_folder: Path, calibration_text: Path, tmp_path: Path, method: str
) -> None:
    """While a block is at work 4.6 times its floats were measured, and 1.3 times between two: imports, buffers."""
    source = tmp_path / "deep"
    shutil.copytree(tiny_hf_folder, source)
    config = AutoConfig.from_pretrained(source)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": LAYERS}
    for name, value in {**sizes, "num_attention_heads": 32, "num_key_value_heads": 16}.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="20MB")
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    command = [
        sys.executable,
        "-c",
        MEASURED,
        method,
        *map(str, (tiny_hf_folder, source, calibration_text, tmp_path)),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | GIVES_BACK | {"OMP_NUM_THREADS": "1"},
    )
    peak, between = (int(number) / block for number in done.stdout.split())
    print(f"blocks of {block >> 20} MB in {LAYERS} layers: {peak:.1f} at the peak, {between:.1f} between two")
    assert peak < 6 < LAYERS / 2
    assert between < 2.5, "the codes of all layers would be two more"
