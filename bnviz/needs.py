"""What a diagnostic needs: whether a run holds it, and what to say where it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import catalog
from .counts import caveats, counts_of, refusal
from .errors import BnvizError, UnknownName
from .schema import DiagnosticSpec, ProbeSpec

if TYPE_CHECKING:
    import xarray as xr

NOT_APPLICABLE = "Not applicable"
ON_REQUEST = "On request"


def split(need: str) -> tuple[str, str]:
    """Record and variable of a need.

    Examples
    --------
    >>> split("attention.mass"), split("host")
    (('attention', 'mass'), ('host', ''))
    """
    record, _, variable = need.partition(".")
    return record, variable


def holds(records: Mapping[str, xr.Dataset], need: str) -> bool:
    """Whether the records hold what is needed; a variable named as its dimension is a coordinate, and counts."""
    record, variable = split(need)
    return record in records and (not variable or variable in records[record].variables)


def lack(spec: DiagnosticSpec, records: Mapping[str, xr.Dataset], provenance: Mapping[str, Any]) -> str:
    """Why a diagnostic cannot run on these records, with what to do about it; empty when it can.

    Parameters
    ----------
    spec : DiagnosticSpec
    records : mapping of str to Dataset
    provenance : mapping
        Of the run: what was found in the model, which probes were attached, notes.

    Returns
    -------
    str
        Without full stop. "Not applicable: ..." where the model has nothing of the kind, so that no capture could get it;
        "On request: ..." where only a probe or an experiment that is asked for by name gets it; "Not complete: ..." where a place
        ran more often than it was seen.
    """
    lacking = [need for need in spec.needs if not holds(records, need)]
    if not lacking:
        return refusal(counts_of(provenance), _kinds(spec.needs))
    if any(split(need)[0] == "labels" for need in lacking):
        return "Not captured: labels. Pass labels=[...] to diagnose, one for each captured sample"
    absent = sorted({record for record, _ in map(split, lacking) if record not in records})
    if not absent:
        return _of_a_record(spec, lacking[0])
    for name in absent:
        if none := _none_found(name, provenance):
            return f"{NOT_APPLICABLE}: {none} in this model"
    return _to_get(absent, ", ".join(lacking), provenance)


def sort_of(why: str) -> str:
    """`NOT_APPLICABLE`, `ON_REQUEST`, or empty for what else is lacking, of the words of `lack`."""
    return next((sort for sort in (NOT_APPLICABLE, ON_REQUEST) if why.startswith(sort)), "")


def _to_get(absent: Sequence[str], lacking: str, provenance: Mapping[str, Any]) -> str:
    """The call that gets records which are not there."""
    if experiments := [name for name in absent if name in catalog.names("experiments")]:
        named = ", ".join(f'"{name}"' for name in experiments)
        return f"{ON_REQUEST}: bnviz.experiment(model, batch, {named}), which runs the model again"
    attached = dict(provenance.get("options") or {}).get("probes") or ()
    if all(name in attached for name in absent):
        return f"Not captured: {lacking}. {', '.join(absent)} was watched and nothing was kept: the notes of the run say why"
    named = ", ".join(f'"{name}"' for name in absent)
    declared = [_declared(name) for name in absent]
    if any(probe is not None and not probe.default for probe in declared):
        return f"{ON_REQUEST}: bnviz.capture(model, probes=[..., {named}])"
    return f"Not captured: {lacking}. Add probes=[{named}] and run again"


def reservations(spec: DiagnosticSpec, provenance: Mapping[str, Any]) -> list[str]:
    """What to know of the records behind a result: a sentence where places were not seen in every watched forward."""
    return caveats(counts_of(provenance), _kinds(spec.needs), int(provenance.get("watched") or 0))


def _kinds(needs: Sequence[str]) -> list[str]:
    """Kinds of site behind the records that are needed."""
    found = [_declared(split(need)[0]) for need in needs]
    return list(dict.fromkeys(kind for probe in found if probe for kind in probe.sites))


def _of_a_record(spec: DiagnosticSpec, need: str) -> str:
    """The record is there and a variable of it is not: it was not asked for, or this model has none."""
    (name, wanted), said = split(need), f"Not captured: {need}"
    if name in catalog.names("experiments"):
        return f'Not measured: {need}. Run bnviz.experiment(model, batch, "{name}") again'
    probe = _declared(name)
    variable = next((v for v in probe.variables if v.name == wanted), None) if probe else None
    if variable is not None and variable.option:
        labels = ", labels=y" if any(split(n)[0] == "labels" for n in (*spec.needs, *spec.wants)) else ""
        return f'{said}. Capture again: bnviz.capture(model, probes=["{name}"], {variable.option}{labels})'
    if variable is not None and variable.optional:
        return f"{NOT_APPLICABLE}: {need} ({variable.doc}) is not defined for this model"
    return f'{said}. Capture again with probes=["{name}"]'


def _none_found(name: str, provenance: Mapping[str, Any]) -> str:
    """ "no attention found" where the model has nothing that the probe looks at, as the run says; else empty."""
    for note in provenance.get("notes") or ():
        if said := re.match(rf"{re.escape(name)}: (no .+? found) in ", str(note)):
            return said[1]
    found = dict(provenance.get("found") or {})
    if 0 not in found.values():
        return ""
    probe = _declared(name)
    known = [kind for kind in (probe.sites if probe else ()) if kind in found]
    return f"no {' or '.join(known)} found" if known and not any(found[kind] for kind in known) else ""


def _declared(name: str) -> ProbeSpec | None:
    """The declaration of the probe or experiment that gives the record `name`; None where it cannot be read without torch."""
    try:
        spec: ProbeSpec = catalog.load("experiments" if name in catalog.names("experiments") else "probes", name).spec
    except (UnknownName, ImportError):
        return None
    return spec


def labels_record(labels: Any, records: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """The record `labels` from an array of whole numbers or names.

    Raises
    ------
    BnvizError
        It is not one label for each sample of every record that has samples.
    """
    import numpy as np
    import xarray as xr

    values = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if values.ndim != 1:
        raise BnvizError(
            f"labels has shape {values.shape}, expected one label for each captured sample, shape (sample,)."
        )
    for kind, record in records.items():
        if kind != "labels" and record.sizes.get("sample", len(values)) != len(values):
            raise BnvizError(
                f"labels has {len(values)} entries, expected {record.sizes['sample']}: "
                f"one for each sample of the record {kind!r}."
            )
    attrs: dict[str, Any] = {}
    if not np.issubdtype(values.dtype, np.integer):
        table, values = np.unique(values, return_inverse=True)
        attrs["table"] = [str(entry) for entry in table]
    return xr.Dataset({"label": ("sample", values.astype(np.int64))}, attrs=attrs)
