"""Resolve a run's `processor` to the provider and the model to call, by the providers' catalogues."""

import difflib
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime

from daemon.errors import Refused
from daemon.providers import PROVIDERS, Model, find_model, models

_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True, slots=True)
class Resolved:
    """The provider and the model to call. `requested` is the model of `processor`; `warning` a sentence where it differs,
    or soon will."""

    provider: str
    model: str
    requested: str
    warning: str | None = None


def resolve(processor: str | None, *, strict: bool, catalogued: bool = True, today: date | None = None) -> Resolved:
    """Find the model for a processor, or its successor where it is retired.

    Args:
        processor: `provider:model`, or `provider` alone for its default model.
        strict: Refuse retired models instead of calling their successors.
        catalogued: False where the provider is a compatible server that the catalogue is not about: then names are
            passed through, for its `dall-e-3` is its own.
        today: The day to judge retirement by; by default the present one (UTC).

    Raises:
        Refused: `unknown_provider`; `model_retired` if strict, or if no successor is named.
    """
    provider, _, requested = (processor or "").strip().partition(":")
    if provider not in PROVIDERS:
        raise Refused(
            f"There is no provider {provider[:40]!r}.",
            code="unknown_provider",
            hint=f"Write processor as provider:model; providers are {', '.join(PROVIDERS)}.",
        )
    today = today or datetime.now(UTC).date()
    requested = requested or _default(provider, today)
    if not catalogued:
        return Resolved(provider, requested, requested)
    known = entry(provider, requested)
    if known is None:
        return Resolved(provider, requested, requested, _unknown(provider, requested, today))
    if known.retired is None:
        return Resolved(provider, requested, requested)
    if known.retired > today:
        return Resolved(provider, requested, requested, _ending(provider, known, known.retired, today))
    model = None if strict else _successor(provider, known, today)
    if model is None:
        raise retired(provider, known)
    return Resolved(
        provider,
        model.name,
        requested,
        f"{requested} was retired on {known.retired}; {model.name} is used instead{_price_change(known, model)}.",
    )


def entry(provider: str, name: str) -> Model | None:
    """Return the catalogue's entry for a model or for one of its dated snapshots; None if it is not listed."""
    return find_model(provider, name) or find_model(provider, _SNAPSHOT.sub("", name))


def retired(provider: str, model: Model) -> Refused:
    """Return the error for a retired model (`model_retired`)."""
    hint = f"Use {provider}:{model.successor}." if model.successor else _offer(provider, datetime.now(UTC).date())
    since = f" on {model.retired}" if model.retired else ""
    return Refused(f"The model {model.name} was retired{since}.", code="model_retired", hint=hint)


def did_you_mean(provider: str, name: str, today: date | None = None) -> str:
    """Return a hint for a name that is not listed: the nearest one, or all."""
    live = _live(provider, today or datetime.now(UTC).date())
    close = difflib.get_close_matches(name, live, n=1)
    return f"Did you mean {provider}:{close[0]}?" if close else f"Known models: {', '.join(live)}."


def _live(provider: str, today: date) -> list[str]:
    return [model.name for model in models(provider) if model.retired is None or model.retired > today]


def _default(provider: str, today: date) -> str:
    return _live(provider, today)[0]


def _offer(provider: str, today: date) -> str:
    return f"Use one of {', '.join(_live(provider, today))}."


def _successor(provider: str, model: Model, today: date) -> Model | None:
    """Return the first successor that is not retired; successors retire, too."""
    seen = {model.name}
    while model.successor is not None and model.successor not in seen:
        seen.add(model.successor)
        following = find_model(provider, model.successor)
        if following is None:
            return None
        if following.retired is None or following.retired > today:
            return following
        model = following
    return None


def _unknown(provider: str, name: str, today: date) -> str:
    return (
        f"{provider} may not have a model {name[:80]}; it is asked all the same. {did_you_mean(provider, name, today)}"
    )


def _ending(provider: str, model: Model, ends: date, today: date) -> str:
    days = (ends - today).days
    left = "tomorrow" if days == 1 else f"in {days} days"
    instead = f" Change to {provider}:{model.successor}." if model.successor else ""
    return f"{model.name} is retired {left}, on {ends}.{instead}"


def _price_change(old: Model, new: Model) -> str:
    if new.price is None or old.price == new.price:
        return ""
    before = "" if old.price is None else f", before ${old.price:.4f}"
    return f" (${new.price:.4f} an image{before})"
