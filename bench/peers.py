"""What other ways of looking into the same model cost, in the same run: `python -m bench.peers [--rounds 5]`.

Each row is one way, over the plain model: for a whole forward, and for a decode step of one token behind it. A package that is
not installed is named as such. What is kept differs and is said; torchlens comes last, as it wraps torch's functions.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from .capture import Watched, steps
from .model import Decoding, build
from .rounds import paired, seconds

Forward = Callable[..., Any]
STEPS = 6  # of a peer, whose steps are all alike


@dataclass(frozen=True, slots=True)
class Peer:
    """A way of looking into a model.

    Parameters
    ----------
    name : str
    keeps : str
        What there is afterwards.
    package : str
        That has to be installed.
    make : callable
        Given the model, returns what runs it on (ids, **keywords).
    """

    name: str
    keeps: str
    package: str
    make: Callable[[Any], Forward]

    @property
    def version(self) -> str | None:
        """None: not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def hidden_states(model: Any) -> Forward:
    return lambda ids, **more: model(ids, output_hidden_states=True, **more)


def attentions(model: Any) -> Forward:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return lambda ids, **more: eager(ids, output_attentions=True, **more)


def nnsight(model: Any) -> Forward:
    from nnsight import NNsight

    watched = NNsight(model)

    def run(ids: torch.Tensor, **more: Any) -> list[Any]:
        kept: list[Any] = []
        with watched.trace(ids, **more):
            for layer in watched.model.layers:
                kept.append(layer.output.save())  # noqa: PERF401 - the block is read as source
        return kept

    return run


def transformer_lens(model: Any) -> Forward:
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    own = copy.deepcopy(model)
    own.config.architectures = ["LlamaForCausalLM"]
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="<s>", pad_token="a", unk_token="a"
    )
    with tempfile.TemporaryDirectory() as folder:
        own.config.save_pretrained(folder)
        tokenizer.init_kwargs["name_or_path"] = folder
        tokenizer.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=own, tokenizer=tokenizer)
    run: Forward = bridge.run_with_cache
    return run


def torchlens(model: Any) -> Forward:
    import torchlens as lens

    return lambda ids, **more: lens.trace(model, (ids,), input_kwargs=more)


PEERS = (
    Peer("output_hidden_states", "every block's output, whole", "transformers", hidden_states),
    Peer("output_attentions (eager)", "every attention matrix, whole", "transformers", attentions),
    Peer("nnsight", "every block's output, whole", "nnsight", nnsight),
    Peer("TransformerLens run_with_cache", "every activation, whole", "transformer-lens", transformer_lens),
    Peer("torchlens trace", "every operation's output, whole", "torchlens", torchlens),
)
OURS = {
    "bnviz activations": ["activations"],
    "bnviz activations, attention, keys_values": ["activations", "attention", "keys_values"],
}


def _decode(model: Any, ids: torch.Tensor, forward: Forward) -> float:
    """Seconds of a decode step, run by a peer behind a plain prompt, the median of STEPS after one."""
    decoding = Decoding(model, ids, forward)
    decoding.step()
    return float(np.median([seconds(decoding.step) for _ in range(STEPS)]))


def _told(measure: Callable[[], Any]) -> str:
    """A ratio; or that a package can't do it."""
    try:
        return str(measure())
    except Exception as error:
        return f"no ({type(error).__name__})"


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 12), ("hidden", 512), ("tokens", 1024), ("rounds", 5)):
        ask.add_argument(f"--{name}", type=int, default=value)
    given = ask.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peers
    model, ids = build(given.layers, given.hidden, given.tokens)
    few = max(3, given.rounds // 2)

    def plain() -> float:
        return seconds(lambda: model(ids))

    def plain_step() -> float:
        return steps(model, ids)

    print(
        f"{given.layers}-layer llama, hidden {given.hidden}, {given.tokens} tokens, float32, 1 thread, processor time"
    )
    print(f"{'way':<44}{'version':>9}{'forward':>24}{'decode step':>24}  keeps")
    with torch.no_grad():
        for label, probes in OURS.items():
            ours = Watched(model, ids, probes)
            ratios = paired(plain, ours.first, given.rounds), paired(plain_step, ours.step, few)
            print(f"{label:<44}{'':>9}{ratios[0]!s:>24}{ratios[1]!s:>24}  statistics", flush=True)
        for peer in PEERS:
            if peer.version is None:
                print(f"{peer.name:<44}  {peer.package} is not installed")
                continue
            forward = peer.make(model)
            whole = _told(partial(paired, plain, partial(seconds, partial(forward, ids)), given.rounds))
            alone = partial(_decode, model, ids, model)
            one = _told(partial(paired, alone, partial(_decode, model, ids, forward), few))
            print(f"{peer.name:<44}{peer.version:>9}{whole:>24}{one:>24}  {peer.keeps}", flush=True)


if __name__ == "__main__":
    main()
