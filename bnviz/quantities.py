"""How numbers are written, everywhere bnviz writes one: in findings, titles, hovers, tables and on the command line.

SI for FLOP and rates, IEC for bytes, a true minus, no more digits than the sample supports, and a word where there is no number.
"""

from __future__ import annotations

import math

from bnviz.kinds import stream_and_part

_SI = ("", "k", "M", "G", "T", "P", "E")
_IEC = ("", "Ki", "Mi", "Gi", "Ti", "Pi")
_SMALL = ("", "m", "µ", "n")


def significant(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits; "undefined" for NaN, "∞" for infinity.

    Examples
    --------
    >>> significant(-0.012345), significant(1234567.0), significant(float("nan"))
    ('−0.0123', '1 230 000', 'undefined')
    """
    if value is None or math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    if abs(rounded) >= 10 ** (digits - places):  # 9.996 rounds up to 10.0: one digit less after the point
        places -= 1
    text = f"{rounded:,.{max(0, places)}f}".replace(",", " ")
    return text.replace("-", "−")


def _scaled(value: float, unit: str, prefixes: tuple[str, ...], base: int, digits: int) -> str:
    if not math.isfinite(value) or value == 0:
        return f"{significant(value, digits)} {unit}".strip() if math.isfinite(value) else significant(value)
    power = min(max(0, math.floor(math.log(abs(value), base) + 1e-9)), len(prefixes) - 1)
    shown = value / base**power
    if (round(abs(shown)) >= base or float(f"{abs(shown):.{digits}g}") >= base) and power < len(prefixes) - 1:
        power, shown = power + 1, shown / base
    room = max(digits, 4) if abs(shown) >= 1000 else digits
    return f"{significant(shown, room)} {prefixes[power]}{unit}"


def size(value: float, digits: int = 3) -> str:
    """Bytes, IEC.

    Examples
    --------
    >>> size(49152), size(1048576), size(1023.6 * 1024), size(4), size(float("nan"))
    ('48.0 KiB', '1.00 MiB', '1.00 MiB', '4 B', 'undefined')
    """
    if 0 < abs(value) < 1024:
        return f"{round(value)} B".replace("-", "−")
    return _scaled(value, "B", _IEC, 1024, digits)


def rate(value: float, unit: str, digits: int = 3) -> str:
    """SI amounts: FLOP, FLOP/s, B/s.

    Examples
    --------
    >>> rate(8.995e10, "FLOP/s"), rate(20.6e9, "B/s")
    ('90.0 GFLOP/s', '20.6 GB/s')
    """
    return _scaled(value, unit, _SI, 1000, digits)


def duration(seconds: float, digits: int = 3) -> str:
    """Time.

    Examples
    --------
    >>> duration(1.2e-6), duration(0.034), duration(2.14), duration(185.0)
    ('1.20 µs', '34.0 ms', '2.14 s', '3 min 5 s')
    """
    if not math.isfinite(seconds) or seconds == 0:
        return significant(seconds) if not math.isfinite(seconds) else "0 s"
    if abs(seconds) >= 60:
        whole = round(abs(seconds))
        sign = "−" if seconds < 0 else ""
        if whole >= 3600:
            return f"{sign}{whole // 3600} h {whole % 3600 // 60} min"
        return f"{sign}{whole // 60} min {whole % 60} s"
    power = 0
    while abs(seconds) * 1000**power < 0.9995 and power < len(_SMALL) - 1:
        power += 1
    return f"{significant(seconds * 1000**power, digits)} {_SMALL[power]}s"


def share(value: float, count: int | None = None) -> str:
    """A share as percent, with no more digits than `count` samples support; little is not nothing.

    Examples
    --------
    >>> share(0.7123), share(0.7123, 500), share(0.0123, 20_000), share(float("nan"))
    ('71 %', '71.2 %', '1.23 %', 'undefined')
    >>> share(0.0), share(0.003), share(0.0003, 500)
    ('0 %', '< 1 %', '< 0.1 %')
    """
    if value is None or not math.isfinite(value):
        return significant(value)
    places = 0 if count is None or count < 100 else 1 if count < 10_000 else 2
    if 0 < 100 * value < 0.5 * 10**-places:
        return f"< {10**-places:.{places}f} %"
    return f"{100 * value:.{places}f} %".replace("-", "−")


def count(value: float, digits: int = 3) -> str:
    """A count: exact to 9,999, then shortened.

    Examples
    --------
    >>> count(824), count(9999), count(12_345), count(824_448), count(2_660_000)
    ('824', '9,999', '12.3 k', '824 k', '2.66 M')
    """
    if not math.isfinite(value):
        return significant(value)
    if abs(value) < 10_000:
        return f"{round(value):,}".replace("-", "−")
    return _scaled(value, "", _SI, 1000, digits)


def counted(value: float, noun: str, plural: str = "") -> str:
    """A count with what is counted, in the singular or in the plural: an s, unless `plural` says it.

    Examples
    --------
    >>> counted(1, "diagnostic"), counted(0, "finding"), counted(12_345, "token")
    ('1 diagnostic', '0 findings', '12.3 k tokens')
    """
    return f"{count(value)} {noun if value == 1 else plural or noun + 's'}"


def ratio(value: float) -> str:
    """A ratio, a correlation: two digits after the point.

    Examples
    --------
    >>> ratio(0.7149), ratio(-0.2), ratio(-0.001)
    ('0.71', '−0.20', '0.00')
    """
    if not math.isfinite(value):
        return significant(value)
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # adding zero makes −0.00 a 0.00


def setting(value: float) -> str:
    """A number that was chosen, not measured: no zeros to fill up.

    Examples
    --------
    >>> setting(0.001), setting(12.0), setting(-1), setting(9.9658)
    ('0.001', '12', '−1', '9.97')
    """
    return f"{value:.3g}".replace("-", "−") if math.isfinite(value) else significant(value)


def factor(value: float) -> str:
    """A factor.

    Examples
    --------
    >>> factor(8.21), factor(0.53)
    ('×8.21', '×0.530')
    """
    return f"×{significant(value)}" if math.isfinite(value) else significant(value)


_RULES = {"B": size, "s": duration, "count": count, "query": count, "token": count}


def written(value: float, unit: str, digits: int = 3) -> str:
    """A value in one of `schema.UNITS`, by the rule of its unit; other units follow the number.

    Examples
    --------
    >>> written(49152, "B"), written(0.034, "s"), written(2e9, "FLOP/s"), written(2.314, "bit"), written(0.5, "1")
    ('48.0 KiB', '34.0 ms', '2.00 GFLOP/s', '2.31 bit', '0.500')
    """
    if unit in _RULES:
        return _RULES[unit](value, digits)
    if unit == "ns":
        return duration(value * 1e-9, digits)
    if unit in ("FLOP", "FLOP/s", "B/s"):
        return rate(value, unit, digits)
    if unit == "id":
        return str(round(value)) if math.isfinite(value) else significant(value)
    text = significant(value, digits)
    return text if unit in ("1", "name", "norm") or not math.isfinite(value) else f"{text} {unit}"


_PARTS = {"mlp": "MLP", "cross_attention": "cross-attention"}
_ORDINALS = {"2": "second", "3": "third", "4": "fourth"}


def part(kind: str) -> str:
    """What a part of a block is called in words.

    Examples
    --------
    >>> part("block"), part("mlp"), part("cross_attention"), part("mlp_2"), part("stream_2_mlp")
    ('block', 'MLP', 'cross-attention', 'second MLP', "second stream's MLP")
    """
    stream, own = stream_and_part(kind)
    if stream and own:
        return f"{part(stream)}'s {part(own)}"
    name, _, number = kind.rpartition("_")
    if number in _ORDINALS:
        return f"{_ORDINALS[number]} {part(name)}"
    return _PARTS.get(kind, kind)
