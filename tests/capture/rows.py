"""Variables of a record whose rows merge by each of the rules."""

from __future__ import annotations

from bnviz.schema import Variable

MASS = Variable("mass", ("step", "layer", "head", "key"), "query", "", "add")
PEAK = Variable("peak", ("step", "layer", "head", "key"), "1", "", "max")
ROW = Variable("last_row", ("step", "layer", "head", "key"), "1", "", "last")
ENTROPY = Variable("entropy", ("step", "layer", "head", "query"), "nat", "", "append")
NAMED = {v.name: v for v in (MASS, PEAK, ROW, ENTROPY)}
