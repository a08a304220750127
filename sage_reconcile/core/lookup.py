"""What a plan will ask about a machine beyond what runs there, and what of it nobody looked for. Pure."""

from dataclasses import dataclass, replace

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.facts import Gap, ModelFact
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.quantities import ports_of
from sage_reconcile.core.runtimes import program_of
from sage_reconcile.core.spec import EngineSpec, is_path, needs_gpu

# What the gap of a model is called that nobody looked for. A program that nobody looked for has no fact.
_UNASKED_MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelQuestion:
    """A model that a plan will ask about."""

    model: str
    # Variables of the engine, which may say where the hub's cache is.
    env: tuple[tuple[str, str], ...] = ()
    # Whether its memory matters.
    shape: bool = False
    # Whether the hub may be asked for that, where its cache does not tell.
    hub: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What a plan will ask about: (program, directory) pairs, models, and ports."""

    programs: tuple[tuple[str, str], ...] = ()
    models: tuple[ModelQuestion, ...] = ()
    ports: frozenset[int] = frozenset()


def lookup(desired: DesiredState) -> Lookup:
    """The programs, models and ports that a plan for this state asks about."""
    return Lookup(
        programs=tuple((program_of(wanted.spec), wanted.directory) for wanted in desired.wanted),
        models=questions(tuple(wanted.spec for wanted in desired.wanted), ask_hub=desired.ask_hub),
        ports=frozenset(wanted.spec.port for wanted in desired.wanted if isinstance(wanted.spec.port, int)).union(
            *(ports_of(pool) for pool in (desired.ports.llm, desired.ports.embedding, desired.ports.rerank))
        ),
    )


def questions(specs: tuple[EngineSpec, ...], *, ask_hub: bool = False) -> tuple[ModelQuestion, ...]:
    """Paths, because they may be missing; and the models of all that goes on GPUs. The first engine of each asks."""
    found: dict[str, ModelQuestion] = {}
    for spec in specs:
        on_gpu, earlier = needs_gpu(spec), found.get(spec.model)
        if (is_path(spec.model) or on_gpu) and (earlier is None or (on_gpu and not earlier.shape)):
            env = tuple(sorted(spec.env.items()))
            hub = ask_hub and on_gpu and not is_path(spec.model)
            found[spec.model] = ModelQuestion(model=spec.model, env=env, shape=on_gpu, hub=hub)
    return tuple(found.values())


def seen_for(desired: DesiredState, observed: ObservedState) -> ObservedState:
    """A world that was recorded, as a look for this desired state would have seen it.

    What was looked for and is not asked about is left out, as it is of no plan; what is asked about and was not looked
    for is a gap.
    """
    asked = lookup(desired)
    names = {name for name, _ in asked.programs}
    found = {fact.model: fact for fact in observed.models}
    answered = {asks.model: found[asks.model] for asks in asked.models if _answers(found.get(asks.model), asks)}
    gaps = [
        Gap(what=_UNASKED_MODEL, subject=asks.model, why=f"nobody looked for the model {asks.model}")
        for asks in asked.models
        if asks.model not in answered
    ]
    return replace(
        observed,
        programs=tuple(fact for fact in observed.programs if fact.name in names),
        models=tuple(fact for fact in observed.models if fact.model in answered),
        gaps=tuple(sorted((*observed.gaps, *gaps), key=lambda gap: (gap.what, gap.subject, gap.why))),
    )


def why_unasked(model: str, observed: ObservedState) -> str:
    """The sentence that nobody looked for a model; empty when that is not so."""
    return next((gap.why for gap in observed.gaps if (gap.what, gap.subject) == (_UNASKED_MODEL, model)), "")


def _answers(fact: ModelFact | None, question: ModelQuestion) -> bool:
    if fact is None:
        return False
    return not question.shape or fact.shape is not None or bool(fact.shape_why or fact.why)
