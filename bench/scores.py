"""What every score of keys costs on a long prompt, and how large and quick its report is: `python -m bench.scores`.

A 12-layer llama of 8 heads reads 8,192 tokens, plain and watched by turns; the ratio is of the processor time of each round. The
report has every view of those records; it is opened in Chromium where that is at hand.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bnviz
from tests.jupyter.conftest import CHROMIUM, FLAGS

from .rounds import seconds

PROBES = ["attention", "keys_values", "query_moments"]


def model(heads: int = 8, layers: int = 12) -> Any:
    """Random weights; time does not depend on them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64 * heads, "intermediate_size": 172 * heads, "num_hidden_layers": layers}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=heads, vocab_size=512, max_position_embeddings=1 << 18, **sizes)
    ).model.eval()


def opened(page: Path) -> float | None:
    """Seconds until Chromium has drawn the first figure of a page; None where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if CHROMIUM is None:
        return None
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1400, "height": 1000})
        began = time.perf_counter()
        tab.goto(page.as_uri())
        tab.locator("[data-state=drawn]").first.wait_for(timeout=60_000)
        took = time.perf_counter() - began
        browser.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    watched, ids = model(asked.heads, asked.layers), torch.arange(asked.tokens)[None] % 512
    ratios: dict[str, list[float]] = {}
    ways = {"attention, keys and values": PROBES[:2], "with queries' moments": PROBES}
    with torch.no_grad():
        watched(ids[:, :512])
        for _ in range(asked.rounds):
            plain = seconds(lambda: watched(ids, use_cache=True))
            for name, probes in ways.items():
                with bnviz.capture(watched, probes=probes, progress=False) as recorder:
                    ratios.setdefault(name, []).append(seconds(lambda: watched(ids, use_cache=True)) / plain)
                run = recorder.run
    print(
        f"{asked.layers} layers x {asked.heads} heads, {asked.tokens:,} tokens, float32, one thread, {asked.rounds} rounds"
    )
    for name, some in ratios.items():
        print(
            f"  {name:30s} {statistics.median(some):5.2f} x the plain prefill   aim 2.30   {run.nbytes / 2**20:.0f} MiB kept"
        )
    began = time.perf_counter()
    report = bnviz.diagnose(run)
    print(f"  diagnosed in {time.perf_counter() - began:.1f} s: {', '.join(report.names)}")
    with tempfile.TemporaryDirectory() as folder:
        page = report.save(Path(folder) / "report.html")
        print(f"  report {page.stat().st_size / 1e6:.2f} MB   aim 3 MB")
        took = opened(page)
        print(
            "  not opened: no Chromium" if took is None else f"  first figure in Chromium after {took:.2f} s   aim 2 s"
        )


if __name__ == "__main__":
    main()
