"""What quantised keys and values lose, and how many bits their codes take once coded: by channel, and against a neighbour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

from ._own_tokens import OwnTokens, own_tokens
from ._uniform_codes import ends, entropies, grouped_errors, uniform

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE, ELSEWHERE = 1 << 19, 1 << 23  # values that are quantised at once: 2 MiB in float32 on a CPU, 32 MiB on a GPU
ROUNDING = 1e-13  # of a squared mean in float32
_HEAD = ("step", "layer", "kv_head")
_BITS = ("step", "layer", "bits", "kv_head")


def _of(side: str) -> tuple[Variable, ...]:
    """The variables of keys, or of values."""
    groups = "tokens by channel" if side == "key" else "channels by token"
    return (
        Variable(f"{side}_entropy", _BITS, "bit", f"bits of a code of {side}s, coded by channel", "last", True),
        Variable(
            f"{side}_delta_entropy",
            _BITS,
            "bit",
            "the same of the difference to the code of the first token of its run",
            "last",
            True,
        ),
        Variable(
            f"{side}_channel_error",
            _BITS,
            "1",
            "squared error over squared length, ends of each channel over the passage",
            "last",
            True,
        ),
        Variable(
            f"{side}_group_error", _BITS, "1", f"the same, ends of groups of {groups}: what KIVI keeps", "last", True
        ),
        Variable(
            f"{side}_locality",
            _HEAD,
            "1",
            "variance of what a token adds to the first of its run over the variance of tokens; 2: as strangers",
            "last",
            True,
        ),
        Variable(f"{side}_token_error", (*_BITS, "key"), "1", "squared error of a token in groups", "last", True),
        Variable(f"{side}_overhead", ("step", "layer"), "bit", "of the ends of a group, a value", "last", True),
    )


@probe(
    sites=("attention",),
    variables=(
        Variable("code_bits", ("step", "layer", "bits"), "bit", "bits of a code before it is coded", "last"),
        *_of("key"),
        *_of("value"),
    ),
    memory="2 x 4 B x len(bits) a key, key-value head and layer of a passage",
    default=False,
)
class KvCodes:
    """Errors and entropies of uniform codes of the keys and the values of a passage.

    Two quantisers are tried at each number of bits. In groups (KIVI): keys by channel over `group` tokens, values by token over
    `group` channels; their ends cost `overhead`. By channel (CacheGen): ends of a channel are those of the whole passage, and its
    codes are then coded by their own frequencies, or their differences to the code of the first token of each run of `run`.

    Parameters
    ----------
    bits : sequence of int
        Of a code, each 1 to 8.
    group : int
        Values that share their ends in KIVI's quantiser.
    run : int
        Tokens of a run, whose first is the one that others are compared with.
    channels : int
        Channels of a head whose codes are counted for entropies: evenly spaced, the same in every head. Errors and `locality` are
        of all.

    Raises
    ------
    SchemaError
        An option out of its range.

    Notes
    -----
    With low and high the ends of a group or channel, b bits: code = round((x - low) (2^b - 1) / (high - low)), read as
    low + code (high - low) / (2^b - 1). Error = sum ||x - read||^2 / sum ||x||^2 over the tokens, exact; NaN where a head is
    zero. The last group is as long as what is left. KIVI keeps the last tokens as they are (its residual), here all are
    quantised. `overhead` = 2 x 16 bits over the values of a group: KIVI's ends in half precision.
    `entropy` = mean over channels of -sum p log2 p, p the shares of the codes of a channel over the tokens of one sequence: what
    an ideal coder needs that was told these shares. `delta_entropy` the same of code_j - code_first of every token that is not
    the first of its run; codes are whole numbers, so nothing is lost by it. With n tokens an entropy is at most log2 n, and is
    too low by about (2^b - 1) / (2 n ln 2).
    `locality` = sum over channels of Var(x_j - x_first) over sum of Var(x_j): 2 for independent tokens, small where neighbours
    are alike.
    `token_error` = ||x_j - read_j||^2 in groups. Several sequences are put together by tokens; each has ends of its own.
    Keys as they lie in the cache, after rotation. Of passages alone: decoding, calls that go on with a cache and other texts have
    none. A head that holds a value that is not finite is NaN.

    Cost: about ten passes over keys and values for each number of bits, and one addition a counted code. Measured, 12 layers of
    8 heads of 64 on one CPU thread: a prefill of 4,096 tokens takes 1.7 times as long, of 1,024 twice.

    Sources: KIVI, arXiv:2402.02750; CacheGen, arXiv:2310.07240.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> k = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 1, 4, 1)
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), k, k, k, None, True, 1.0)
    >>> kept = KvCodes(bits=(1, 2), run=2).observe(seen)
    >>> kept["key_entropy"].tolist(), kept["key_delta_entropy"].tolist(), kept["key_locality"].tolist()
    ([[1.0], [2.0]], [[0.0], [0.0]], [0.0])
    >>> kept["key_group_error"][1].tolist(), kept["code_bits"].tolist()
    ([0.0], [1, 2])
    """

    spec: ClassVar[ProbeSpec]

    def __init__(
        self, *, bits: Sequence[int] = (2, 3, 4, 8), group: int = 32, run: int = 10, channels: int = 16
    ) -> None:
        for name, value, least in (("group", group, 1), ("run", run, 2), ("channels", channels, 1)):
            if value < least:
                raise SchemaError(f"Probe {self.spec.name}: {name} is {value}, expected {least} or more.")
        if not bits or not all(isinstance(b, int) and 1 <= b <= 8 for b in bits):
            raise SchemaError(f"Probe {self.spec.name}: bits are {bits}, expected whole numbers from 1 to 8.")
        self.bits, self.group, self.run, self.channels = tuple(sorted(set(bits))), group, run, channels

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor]:
        """Numbers of one passage: (bits, kv_head), and of tokens (batch, bits, kv_head, key)."""
        import torch

        own = own_tokens(seen)
        if own is None or seen.context.phase == "decode" or own.key.shape[2] != seen.key.shape[2]:
            return {}
        kept: dict[str, Tensor] = {}
        for side, rows in (("key", own.key), ("value", own.value)):
            if rows.shape[-1]:
                found = self._side(rows, own, side == "key")
                kept |= {f"{side}_{name}": value for name, value in found.items()}
                within = min(self.group, rows.shape[-2 if side == "key" else -1])
                kept[f"{side}_overhead"] = torch.tensor(32 / within)
        return kept | {"code_bits": torch.tensor(self.bits)} if kept else {}

    def _side(self, rows: Tensor, own: OwnTokens, keys: bool) -> dict[str, Tensor]:
        """Of keys, or of values, (batch, heads, tokens, dim); where there is padding, of each sequence's own tokens in a row."""
        import torch

        batch, heads, tokens, dim = rows.shape
        if own.valid is None:
            here, order = torch.ones(batch, tokens, dtype=torch.bool, device=rows.device), None
        else:
            order = own.valid.logical_not().int().argsort(dim=-1, stable=True)
            here = own.valid.gather(1, order)
            rows = rows.gather(2, order[:, None, :, None].expand(batch, heads, tokens, dim))
        parts: dict[str, list[Tensor]] = {}
        together = max(1, (AT_ONCE if rows.is_cpu else ELSEWHERE) // (tokens * dim))
        each = here[:, None].expand(batch, heads, tokens).flatten(0, 1)
        chunks = (torch.split(flat, together) for flat in (rows.flatten(0, 1), each))
        for some, marks in zip(*chunks, strict=True):
            for name, value in self._numbers(some, marks, keys).items():
                parts.setdefault(name, []).append(value)
        whole = {name: torch.unflatten(torch.cat(some), 0, (batch, heads)) for name, some in parts.items()}
        found = _over_sequences(whole, here.sum(1))
        by_token = whole["token"].transpose(1, 2)
        if order is not None:
            by_token = torch.empty_like(by_token).scatter_(-1, order[:, None, None].expand(by_token.shape), by_token)
        return found | {"token_error": by_token}

    def _numbers(self, rows: Tensor, here: Tensor, keys: bool) -> dict[str, Tensor]:
        """Sums and entropies of each of (m, tokens, dim), m heads of sequences."""
        import torch

        exact = rows.to(torch.promote_types(rows.dtype, torch.float32)).masked_fill(~here[..., None], 0)
        fine = exact.isfinite().flatten(1).all(1)
        exact = torch.where(fine[:, None, None], exact, 0)
        marks = here[..., None]
        if keys:
            lost = [e.mT for e in grouped_errors(exact.mT, marks.mT, self.group, self.bits)]
        else:
            lost = grouped_errors(exact, None, self.group, self.bits)
        token = torch.stack([e.sum(-1) * here for e in lost], 1)
        found = {"token": token, "group": token.sum(-1), "energy": exact.square().sum((1, 2))}
        coded = zip(*self._coded(exact, here), strict=True)
        found |= dict(zip(("channel", "entropy", "delta"), (torch.stack(c, 1) for c in coded), strict=True))
        found["adds"], found["varies"] = _variances(exact, here, self.run)
        return {
            name: value.masked_fill(~fine.view(-1, *[1] * (value.dim() - 1)), torch.nan)
            for name, value in found.items()
        }

    def _coded(self, exact: Tensor, here: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each number of bits: squared error, entropy of codes and of their differences, (m,) each."""
        import torch

        tokens, dim = exact.shape[1:]
        some = torch.arange(min(self.channels, dim), device=exact.device) * dim // min(self.channels, dim)
        first = torch.arange(tokens, device=exact.device) // self.run * self.run
        later = here & (first != torch.arange(tokens, device=exact.device))
        low, high = ends(exact, here[..., None].expand(exact.shape), 1)
        for bits in self.bits:
            code, read = uniform(exact, low, high, bits)
            error = ((read - exact).square_() * here[..., None]).sum((1, 2))
            counted = code[..., some].long()
            delta = counted - counted[:, first] + 2**bits - 1
            by_channel = entropies(counted, here, 2**bits).mean(-1)
            yield error, by_channel, entropies(delta, later, 2 ** (bits + 1) - 1).mean(-1)


def _variances(exact: Tensor, here: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """(m,) each: variance of tokens less the first of their run, and of tokens, summed over channels."""
    import torch

    place = torch.arange(exact.shape[1], device=exact.device)
    first = place // run * run
    return _variance(exact - exact[:, first], here & (first != place)), _variance(exact, here)


def _variance(values: Tensor, here: Tensor) -> Tensor:
    """(m,): 0 where it is no more than the rounding of a mean."""
    count = here.sum(1).clamp_min(1)
    mean = (values * here[..., None]).sum(1, keepdim=True) / count[:, None, None]
    spread: Tensor = ((values - mean).square() * here[..., None]).sum((1, 2)) / count
    return spread.masked_fill(spread <= ROUNDING * mean.square().sum((1, 2)), 0)


def _over_sequences(whole: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """(bits, heads) and (heads,) from (batch, heads, ...): sums over sums, entropies by tokens."""
    import torch

    def ratio(part: Tensor, of: Tensor) -> Tensor:
        return (part / of).masked_fill(of == 0, torch.nan)

    told = torch.where(tokens > 1, tokens, 0)  # one token has no distribution
    share = (told / told.sum())[:, None]
    energy = whole["energy"].sum(0)[:, None]
    entropy, delta = (whole[name].masked_fill((told == 0)[:, None, None], 0) for name in ("entropy", "delta"))
    return {
        "entropy": (entropy * share[..., None]).sum(0).T,
        "delta_entropy": (delta * share[..., None]).sum(0).T,
        "channel_error": ratio(whole["channel"].sum(0), energy).T,
        "group_error": ratio(whole["group"].sum(0), energy).T,
        "locality": ratio((whole["adds"] * share).sum(0), (whole["varies"] * share).sum(0)),
    }
