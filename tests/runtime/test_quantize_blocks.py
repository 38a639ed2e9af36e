"""Whole folders by GPTQ and block by block: what is served, mixed bits, interruption, sources, memory, refusals."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.errors import DiskFull, InvalidCheckpoint, InvalidData, InvalidRequest, UnsupportedModel
from peqa_runtime.model import load, quantize_folder, quantize_rtn, read_manifest, verify_digest
from peqa_runtime.model.base_checkpoint import read_spec
from peqa_runtime.model.quantize import QuantizeOptions
from peqa_runtime.model.quantizers import run as run_module
from peqa_runtime.model.quantizers import workbench as workbench_module
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.calibration import CalibrationText
from peqa_runtime.model.quantizers.float_source import open_source
from peqa_runtime.model.quantizers.gptq import GptqOptions
from peqa_runtime.model.quantizers.plan import Rule
from peqa_runtime.model.quantizers.run import calibrate
from peqa_runtime.model.quantizers.skeleton import load_skeleton
from peqa_runtime.model.quantizers.workbench import Workbench

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = random.Random(0)
    words = [
        "the",
        "cat",
        "and",
        "dog",
        "sat",
        "on",
        "mat",
        "then",
        "they",
        "ran",
        "into",
        "another",
        "house",
        "over",
    ]
    file.write_text(" ".join(rng.choice(words) for _ in range(9000)))
    return file


def options(text: Path, **changes: Any) -> QuantizeOptions:
    values: dict[str, Any] = {
        "calibration": CalibrationText(text, windows=8, tokens=32),
        "training": TrainingOptions(epochs=1, batch=2),
        "device": "cpu",
    }
    return QuantizeOptions(**{**values, **changes})


@pytest.fixture
def make(tiny_hf_folder: Path, text: Path, tmp_path: Path) -> Make:
    def quantize(name: str, method: str, bits: int = 3, group_size: int = 32, **changes: Any) -> Path:
        source = changes.pop("source", tiny_hf_folder)
        quantize_folder(
            source, tmp_path / name, bits, group_size, method,  # type: ignore[arg-type]
            options=options(text, **changes), progress=False,
        )  # fmt: skip
        return tmp_path / name

    return quantize


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "unfinished" in p.name or ".tmp-" in p.name)


@pytest.mark.parametrize(("method", "group_size"), [("gptq", 32), ("gptq", -1), ("blockwise", 32)])
def test_the_base_gives_what_the_quantizer_saw(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, method: str, group_size: int
) -> None:
    """Hidden states that the quantizer passed on to the last block are those of the loaded base."""
    monkeypatch.setattr(Workbench, "drop_hidden", lambda *_, **__: None)
    monkeypatch.setattr(Workbench, "remove", lambda self: None)
    base = make("base", method, group_size=group_size)
    verify_digest(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with open_source(base) as source:
        calibration = calibrate(source, CalibrationText(text, windows=8, tokens=32), model)
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


def test_a_mixed_base_is_served(make: Make, text: Path, tiny_hf_folder: Path) -> None:
    rules = (
        Rule("*.down_proj", {"bits": 8, "group_size": -1}),
        Rule("*.k_proj", {"bits": 2, "method": "rtn"}),
        Rule("re:.*[.]1[.].*gate_proj", {"method": "blockwise"}),
        Rule("model.layers.0.self_attn.o_proj", {"skip": True}),
    )
    base = make("base", "gptq", rules=rules)
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


def test_better_integers_make_better_models(make: Make, tiny_hf_folder: Path, text: Path) -> None:
    """Weights that never were quantized: next-token distributions, from round-to-nearest to block-wise."""
    model = AutoModelForCausalLM.from_pretrained(tiny_hf_folder)
    with open_source(tiny_hf_folder) as source:
        windows = calibrate(source, CalibrationText(text, windows=16, tokens=32, seed=5), model).windows

    def distance(base: Path) -> float:
        other = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            pairs = [(model(w).logits.log_softmax(-1), other(w).logits.log_softmax(-1)) for w in windows]
        return sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in pairs)

    more = CalibrationText(text, windows=32, tokens=32)
    training = TrainingOptions(epochs=4, batch=2)
    rounded = distance(make("rtn", "rtn", calibration=None))
    by_gptq = distance(make("gptq", "gptq", calibration=more))
    trained = distance(make("blockwise", "blockwise", calibration=more, training=training))
    assert by_gptq < 0.8 * rounded
    assert trained < by_gptq


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1)])
def test_training_gains_on_every_block_of_attention(
    tiny_hf_folder: Path, text: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    """Held-out error of each block's outputs against where GPTQ left it."""
    report = quantize_folder(
        tiny_hf_folder, tmp_path / "base", bits, group_size, "blockwise", progress=False,
        options=options(text, calibration=CalibrationText(text, 64, 32), training=TrainingOptions()),
    )  # fmt: skip
    assert len(report.blocks) == 2
    for block in report.blocks:
        assert block["gain"]["after"] < 0.97 * block["gain"]["before"]
    assert report.linears == {f"{bits} bit blockwise": 14}


def test_the_same_seed_gives_the_same_base(make: Make, text: Path) -> None:
    digests = [read_spec(make(name, "blockwise")).base_digest for name in ("a", "b")]
    assert digests[0] == digests[1]
    other = make("c", "blockwise", calibration=CalibrationText(text, 8, 32, seed=1))
    assert read_spec(other).base_digest != digests[0]


@pytest.mark.parametrize("method", ["gptq", "blockwise"])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = read_spec(make("whole", method)).base_digest
    assert leftovers(tmp_path) == []
    done: list[int] = []
    save = Workbench.save_block

    def stop(self: Workbench, index: int, *args: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(index)
        save(self, index, *args)

    monkeypatch.setattr(Workbench, "save_block", stop)
    with pytest.raises(KeyboardInterrupt):
        make("base", method)
    assert not (tmp_path / "base").exists()
    assert done == [0]
    monkeypatch.setattr(
        Workbench, "save_block", lambda self, index, *a: (done.append(index), save(self, index, *a))
    )
    assert read_spec(make("base", method)).base_digest == whole
    assert done == [0, 1]
    assert leftovers(tmp_path) == []


def test_another_request_starts_afresh(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run_module.BlockRun, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        make("base", "gptq", bits=2)
    mark = tmp_path / ".base.unfinished" / "block-00000.safetensors"
    mark.write_bytes(b"of the 2-bit run")
    monkeypatch.undo()
    base = make("base", "gptq", bits=4)
    assert read_spec(base).bits == 4
    assert read_spec(base).base_digest == read_spec(make("other", "gptq", bits=4)).base_digest


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_bits(
    tiny_hf_folder: Path, text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "deep"
    shutil.copytree(tiny_hf_folder, source)
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    say = f"--bits 2 --group-size 32 --method blockwise --epochs 1 --device cpu -q --calibration {text} "
    say += "--calibration-windows 8 --calibration-tokens 32"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "peqa_runtime",
            "quantize",
            str(source),
            "-o",
            str(tmp_path / name),
            *say.split(),
        ]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    calibration = CalibrationText(text, windows=8, tokens=32)
    quantize_folder(
        source, tmp_path / "whole", 2, 32, "blockwise",
        options=options(text, calibration=calibration, training=TrainingOptions(epochs=1.0)), progress=False,
    )  # fmt: skip
    process = start("base")
    while not (tmp_path / ".base.unfinished" / "block-00002.safetensors").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "base").exists()
    again = start("base")
    _, told = again.communicate()
    assert again.returncode == 0, told
    assert b"going on after" in told
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "base" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert leftovers(tmp_path) == []


def test_a_base_is_a_source_too(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    """Its linears are decoded, its embedding and the rest stay as they are."""
    again = make("again", "rtn", bits=3, group_size=64, source=tiny_base, calibration=None)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_base, again))
    for name in read_manifest(tiny_base).linears:
        decoded = dequantize(before.get_submodule(name).weight_codes())
        assert torch.equal(after.get_submodule(name).qweight, quantize_rtn(decoded, 3, 64).qweight)
    assert read_manifest(again).model_id == read_manifest(tiny_base).model_id
    base = make("lower", "gptq", bits=3, source=tiny_base)
    assert read_spec(base).bits == 3
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight,
        before.get_input_embeddings().weight,
    )


def test_full_disks_are_named_and_lose_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_spec(make("whole", "gptq")).base_digest
    write = workbench_module.write_atomic

    def full(path: Path, data: bytes, **_: Any) -> None:
        if path.name == "block-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(workbench_module, "write_atomic", full)
    with pytest.raises(DiskFull, match=r"the disk is full at .*run the same command again"):
        make("base", "gptq")
    monkeypatch.undo()
    assert (tmp_path / ".base.unfinished" / "block-00000.safetensors").exists()
    with monkeypatch.context() as small:
        usage = shutil.disk_usage(tmp_path)
        small.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DiskFull, match="needs about"):
            make("base", "gptq")
    assert not (tmp_path / "base").exists()
    assert read_spec(make("base", "gptq")).base_digest == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, "needs calibration text: a .txt"),
        (
            {"gptq": GptqOptions(act_order=True, static_groups=False)},
            "act-order without static groups scatters",
        ),
        ({"rules": (Rule("*.nothing", {"bits": 4}),)}, "fits no linear"),
    ],
)
def test_options_that_cannot_be(make: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make("base", "gptq", **changes)
    assert not (tmp_path / "base").exists()
    assert leftovers(tmp_path) == []


def test_what_cannot_be_calibrated(make: Make, tiny_hf_folder: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(InvalidRequest, match="reads no calibration text"):
        make("base", "rtn")
    with pytest.raises(InvalidData, match="no such file"):
        make("base", "gptq", calibration=CalibrationText(tmp_path / "none.txt"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_hf_folder / file, bare / file)
    with pytest.raises(InvalidCheckpoint, match="no tokenizer"):
        make("base", "gptq", source=bare)
    make("base", "gptq")
    with pytest.raises(InvalidCheckpoint, match="exists already"):
        make("base", "gptq")
    process = subprocess.Popen(
        [sys.executable, "-c", f"""
import sys, time
from filelock import FileLock
with FileLock({str(tmp_path / '.busy.unfinished.lock')!r}):
    print("locked", flush=True)
    time.sleep(60)
"""], stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(InvalidCheckpoint, match="another process is making"):
        make("busy", "gptq")
    process.kill()
    process.wait()


def test_models_that_do_more_between_their_blocks_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def between(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = self.layers[0].forward
        self.layers[0].forward = lambda *a, **k: first(*a, **k) * 2
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", between)
    with pytest.raises(UnsupportedModel, match=r"something happens between its blocks.*--method rtn"):
        make("base", "gptq")


def written(folder: Path, family: str, options: dict[str, Any]) -> Any:
    """A random model of two small blocks, saved in `folder`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def test_mixtures_of_experts_can_only_be_rounded(make: Make, tiny_hf_folder: Path, tmp_path: Path) -> None:
    """Experts are stored under other names than modules have; their floats stay as they are."""
    source = tmp_path / "experts"
    shutil.copytree(tiny_hf_folder, source)
    written(source, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})
    with pytest.raises(InvalidCheckpoint, match=r"mixtures of experts are stored otherwise.*--method rtn"):
        make("base", "gptq", source=source)
    shutil.rmtree(tmp_path / ".base.unfinished")
    assert len(read_manifest(make("base", "rtn", source=source, calibration=None)).linears) == 8


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
    model = written(tmp_path, family, FAMILIES[family])
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


MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from peqa_runtime.model import shard_writer
from peqa_runtime.model.quantize import QuantizeOptions, quantize_folder
from peqa_runtime.model.quantizers.calibration import CalibrationText
from peqa_runtime.model.quantizers.plan import Rule

def held():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

small, source, text, out = map(Path, sys.argv[1:])
shard_writer._SHARD_BYTES = 1 << 20
options = QuantizeOptions(
    calibration=CalibrationText(text, 4, 16), device="cpu", rules=(Rule("*[!k]_proj", {"method": "rtn"}),)
)
quantize_folder(small, out / "small", 4, 64, "gptq", options=options, progress=False)  # imports, first buffers
start, peak, done = held(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, held())
        time.sleep(0.004)

thread = threading.Thread(target=watch)
thread.start()
quantize_folder(source, out / "large", 4, 64, "gptq", options=options, progress=False)
done.set()
thread.join()
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_that_of_a_block_not_of_the_model(tiny_hf_folder: Path, text: Path, tmp_path: Path) -> None:
    source = tmp_path / "deep"
    shutil.copytree(tiny_hf_folder, source)
    config = AutoConfig.from_pretrained(source)
    for name, value in (("hidden_size", 512), ("intermediate_size", 1024), ("num_hidden_layers", 60)):
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="20MB")
    total = sum(p.numel() for p in model.parameters()) * 4
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    assert total > 60 * block
    command = [sys.executable, "-c", MEASURED, *map(str, (tiny_hf_folder, source, text, tmp_path))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    peak = int(done.stdout)
    print(f"floats {total >> 20} MB, a block {block >> 20} MB, peak of the run {peak >> 20} MB")
    assert peak < total / 3
