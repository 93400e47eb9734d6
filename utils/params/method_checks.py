"""Contradictions between the keys of pruning methods: each rule yields one line that names the key and the mend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from utils.params import Dynamic, Early, Params
from utils.params.catalog import keys
from utils.params.parsing import show
from utils.params.pattern import check_text
from utils.params.plan import SINGLE, Level, prunes_start
from utils.system.errors import UserError

Ignored = tuple[tuple[str, str, tuple[object, ...], str], ...]

_LAYERWISE = ("uniform", "erk", "er", "balanced", "from_mask")
DATA_FREE = ("magnitude", "random", "synflow", "ntk_sap")
CHANNELS_ON_DATA = ("snap", "taylor", "crop")
SIGNED = ("grasp",)
NO_REGROWTH = ("magnitude", "random", "synflow", "ntk_sap")
"""Criteria that read no data."""

ONE_ROUND = ("magnitude", "random", "snip", "grasp", "crop", "fisher", "prospr", "taylor")
"""Criteria that prune in one round unless pruning.rounds says otherwise."""

ONE_SCORING = ("magnitude", "random")
"""Criteria that score a weight alike whatever else is pruned, so that rounds change nothing."""


def _of(section: type, head: str, names: tuple[str, ...] = ()) -> list[str]:
    return [f"{head}.{f.name}" for f in dataclasses.fields(section) if not names or f.name in names]


IGNORED: Ignored = (
    ("pruning.normalize", "pruning.allocation", _LAYERWISE, "global"),
    ("pruning.group_score", "pruning.pattern", ("weight",), "block=HxW, kernel or channel"),
    ("pruning.round_schedule", "pruning.rounds", (1,), "2 or more"),
    ("graph.side", "graph.kind", (None, "random", "rreg"), "xnet"),
    ("graph.form", "graph.kind", (None, "random", "xnet"), "rreg"),
    ("graph.tries", "graph.form", ("simple",), "paper"),
    ("graph.degree", "graph.kind", (None,), "random, xnet or rreg"),
    ("early.window", "early.trigger", ("weight_distance", "weight_distance_released"), "early_bird"),
    ("dynamic.fraction", "dynamic.method", (None, "gmp"), "set or rigl"),
    ("dynamic.decay", "dynamic.method", (None, "gmp"), "set or rigl"),
    ("dynamic.initial_density", "dynamic.method", (None, "set", "rigl"), "gmp"),
    *(
        (name, "dynamic.method", (None,), "gmp, set or rigl")
        for name in _of(Dynamic, "dynamic", ("every", "until", "start"))
    ),
)
"""(key, other key, values of the other key that ignore the first, values that use it); for non-default values only."""

PLAN_IGNORED: Ignored = (
    ("pruning.step", "pruning.moment", ("init", "early", "oneshot", "levels", "ticktock"), "step"),
    *(
        (name, "pruning.moment", ("init", "step", "oneshot", "levels", "ticktock"), "early")
        for name in _of(Early, "early")
        if name != "early.window"
    ),
    ("levels.start", "pruning.moment", SINGLE, "levels or oneshot"),
    ("levels.start_criterion", "levels.start", (None,), "a density"),
    ("levels.start_allocation", "levels.start", (None,), "a density"),
)
"""The same for runs alone."""

_SCORING = (
    "criterion", "criterion_options", "normalize", "rounds", "round_schedule", "regrow", "pattern", "group_score",
    "layer_densities", "first_layer", "last_layer", "min_kept", "samples_per_class", "batches", "batch_size",
)  # fmt: skip
"""What only scores and their selection use, which layer graphs do without."""


def changed(name: str, params: Params) -> bool:
    """Whether the key `name` differs from its default."""
    return bool(keys()[name].of(params) != keys()[name].default)


def given(name: str, params: Params) -> str:
    """`name=value`, as typed."""
    return f"{name}={show(keys()[name], keys()[name].of(params))}"


def problems(params: Params, plan: bool) -> Iterator[str]:
    """One line per contradiction. `plan=False` leaves out what only a run can contradict."""
    yield from _pruning(params)
    yield from _graph(params)
    yield from _scoring(params, plan)
    if plan:
        yield from _moments(params)
        yield from _dynamic(params)


def plan_problems(params: Params, plan: list[Level]) -> Iterator[str]:
    """The same for contradictions with the levels of `plan`."""
    section, method = params.pruning, params.dynamic.method
    idle = min(plan, key=lambda level: level.epochs)
    if section.moment == "early" and not idle.epochs:
        yield f"pruning.moment=early: level {idle.number} trains 0 epochs, and an epoch must end; set training.epochs"
    early = params.early
    if section.moment == "early" and early.length == "configured" and early.latest is None:
        yield (
            "early.latest: not set, and with early.length=configured nothing would be left to train if the trigger "
            "never fired; set it below training.epochs"
        )
    if section.moment in ("step", "early") and not any(prunes_start(params, level.density) for level in plan):
        yield f"{given('pruning.moment', params)}: prunes nothing at density {plan[0].density:g}; lower pruning.density"
    if section.mask_file is not None and section.moment == "init" and not params.levels.densities:
        yield from _mask_alone(params)
    if method in ("set", "rigl") and params.graph.degree is None and all(level.density >= 1.0 for level in plan):
        yield f"dynamic.method={method}: no level is sparse, so nothing moves; lower pruning.density"
    if method == "gmp":
        for level in plan:
            if level.density >= level.begins:
                yield (
                    f"dynamic.method=gmp: density {level.density:g} is not below {level.begins:g}, which training "
                    "begins with; lower pruning.density or raise dynamic.initial_density"
                )


def _mask_alone(params: Params) -> Iterator[str]:
    """A mask file that is trained as it is leaves nothing to score."""
    section = params.pruning
    if params.dynamic.method == "gmp" or (section.density is not None and prunes_start(params, section.density)):
        return
    for field in ("criterion", "allocation", "from_mask", *_SCORING):
        if field not in ("pattern", "min_kept", "first_layer", "last_layer") and changed(f"pruning.{field}", params):
            yield f"{given(f'pruning.{field}', params)}: has no effect, pruning.mask_file is trained as it is; drop it"
    if section.control in ("shuffle", "invert"):
        yield f"{given('pruning.control', params)}: has no effect, pruning.mask_file is trained as it is; drop it"


def _scoring(params: Params, plan: bool) -> Iterator[str]:
    """How scores are made, against what makes them."""
    section, start = params.pruning, params.levels.start_criterion
    # Level 0 of an iterative run may have a criterion of its own.
    used = {section.criterion} if start is None or not plan else {section.criterion, start}
    idle: list[tuple[str, str]] = []
    channels = params.structured.budget is not None and params.structured.criterion in CHANNELS_ON_DATA
    if used <= set(DATA_FREE) and not channels:
        reads = "a criterion that reads data"
        idle += [(f"pruning.{name}", reads) for name in ("samples_per_class", "batches", "batch_size")]
    if used <= set(ONE_SCORING):
        idle += [("pruning.rounds", "a criterion whose scores change with the masks")]
    if section.rounds is None and used <= set(ONE_ROUND):
        idle += [("pruning.round_schedule", "one of several rounds, or set pruning.rounds")]
    for name, using in idle:
        if changed(name, params):
            yield (
                f"{given(name, params)}: has no effect with {given('pruning.criterion', params)}; "
                f"drop it or set pruning.criterion to {using}"
            )
    if ":" in section.pattern:
        for name in ("pruning.normalize", "pruning.group_score", "pruning.rounds", "pruning.round_schedule"):
            if changed(name, params):
                yield (
                    f"{given(name, params)}: has no effect with {given('pruning.pattern', params)}, which keeps the "
                    "best of every group at once; drop one of them"
                )


def _pruning(params: Params) -> Iterator[str]:
    section = params.pruning
    try:
        check_text(section.pattern)
    except UserError as error:
        yield str(error)
    if section.batches is not None and section.samples_per_class is not None:
        yield f"{given('pruning.batches', params)}: contradicts {given('pruning.samples_per_class', params)}; drop one"
    if section.pattern == "channel" and section.last_layer == "dense":
        yield "pruning.last_layer=dense: pruning.pattern=channel leaves the last layer whole already; drop it"
    if section.normalize == "lamp" and section.criterion in SIGNED:
        yield f"pruning.normalize=lamp: scores of {section.criterion!r} are signed, which it cannot rank; drop it"
    if section.regrow and section.criterion in NO_REGROWTH:
        yield (
            f"pruning.regrow=true: {section.criterion!r} never scores a pruned weight anew; drop it or choose another "
            "criterion, such as snip"
        )
    elif section.regrow and section.rounds in (None, 1):
        yield "pruning.regrow=true: needs several rounds; set pruning.rounds"
    if section.allocation == "from_mask" and section.from_mask is None:
        yield "pruning.from_mask: not set, and pruning.allocation=from_mask copies its layer ratios; name a mask file"
    if section.allocation != "from_mask" and section.from_mask is not None:
        yield f"{given('pruning.from_mask', params)}: has no effect without pruning.allocation=from_mask; drop it"
    if section.control == "shuffle" and section.pattern != "weight":
        yield f"pruning.control=shuffle: moves single weights, but {given('pruning.pattern', params)}; drop one of them"


def _graph(params: Params) -> Iterator[str]:
    kind, degree, section = params.graph.kind, params.graph.degree, params.pruning
    if kind is None:
        return
    for name in (f"pruning.{field}" for field in _SCORING):
        if changed(name, params):
            yield f"{given(name, params)}: has no effect with {given('graph.kind', params)}; drop one of them"
    if section.control in ("shuffle", "invert"):
        yield f"{given('pruning.control', params)}: has no effect with {given('graph.kind', params)}; drop one of them"
    if section.mask_file is not None:
        yield f"{given('pruning.mask_file', params)}: contradicts {given('graph.kind', params)}; drop one of them"
    if degree is None and section.allocation == "global":
        yield "pruning.allocation=global: needs scores, and graphs have none; use uniform, erk, er or balanced"
    if degree is not None:
        for name in ("pruning.density", "pruning.allocation", "pruning.from_mask"):
            if changed(name, params):
                yield f"{given(name, params)}: has no effect with {given('graph.degree', params)}; drop one of them"


def _moments(params: Params) -> Iterator[str]:
    section, levels = params.pruning, params.levels
    moment = section.moment
    if params.graph.kind is not None and moment != "init":
        yield f"{given('graph.kind', params)}: is drawn before training; set pruning.moment=init"
    if params.graph.degree is not None and levels.densities:
        yield f"{given('graph.degree', params)}: contradicts levels.densities; drop one of them"
    if moment == "step" and section.step is None:
        yield "pruning.step: not set, and pruning.moment=step needs it, such as 500it or 2ep"
    if levels.start is not None and section.mask_file is not None:
        yield f"{given('pruning.mask_file', params)}: contradicts {given('levels.start', params)}; drop one of them"
    rewound = moment == "init" or (moment in ("oneshot", "levels") and levels.rewind == "imp")
    if section.control == "reinitialise" and not rewound:
        yield (
            "pruning.control=reinitialise: only where training starts from initial weights; "
            "set pruning.moment=init or levels.rewind=imp"
        )


def _dynamic(params: Params) -> Iterator[str]:
    method, section = params.dynamic.method, params.pruning
    if method is None:
        return
    if section.moment in ("step", "early"):
        yield f"{given('dynamic.method', params)}: contradicts {given('pruning.moment', params)}; choose one of them"
    if method == "gmp":
        if section.moment != "init":
            yield f"dynamic.method=gmp: prunes while the network trains; set pruning.moment=init, not {section.moment}"
        if params.graph.kind is not None:
            yield f"dynamic.method=gmp: contradicts {given('graph.kind', params)}; drop one of them"
        if section.control == "shuffle":
            yield "pruning.control=shuffle: contradicts dynamic.method=gmp; drop one of them"
    elif section.pattern != "weight":
        yield f"dynamic.method={method}: moves single weights, but {given('pruning.pattern', params)}; drop one of them"
