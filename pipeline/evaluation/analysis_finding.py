"""Feature reuse or rapid learning: states in words what the numbers of an analysis show."""

from __future__ import annotations

import math

from pipeline.config.wording import counted
from pipeline.evaluation.analysis import ALL, BODY, CENTROID, HEAD, NONE, Analysis, LayerChange
from pipeline.maml.confidence import Estimate

_ALIKE = 0.9  # CKA above which two representations count as the same
_ENOUGH = 0.9  # share of the gain above which a part of the network explains it


def finding(analysis: Analysis) -> str:
    """The finding, a few sentences for a person."""
    percent = analysis.metric == "accuracy"

    def shown(estimate: Estimate) -> str:
        return estimate.text(percent) + (" %" if percent else "")

    abilities, kept = analysis.abilities, _kept(analysis)
    sentences = [
        f"Adaptation in {counted(analysis.steps, 'step')} takes the "
        f"{analysis.metric} from {shown(abilities[NONE])} to {shown(abilities[ALL])}."
    ]
    for name, verb in ((HEAD, "keeps"), (BODY, "keeps"), (CENTROID, "reaches")):
        if name in kept:
            sentences.append(
                f"{name.capitalize()}: {shown(abilities[name])}, which {verb} "
                f"{100 * max(0.0, kept[name]):.0f} % of the gain."
            )
    sentences += [_changes(analysis.layers), _verdict(analysis.layers, kept)]
    sentences.append(
        f"On the straight way from θ to θ'_i the query loss never rises on "
        f"{100 * analysis.monotone_share:.0f} % of the tasks"
        + (": they lie in one valley." if analysis.monotone_share > 0.9 else ".")
    )
    return " ".join(filter(None, sentences))


def _kept(analysis: Analysis) -> dict[str, float]:
    """The share of the gain that is left when less adapts; empty if the gain is not certain.

    The gain is what adaptation as trained adds to the metric.
    """
    gain, uncertain = analysis.lost[NONE]
    if not gain > (math.inf if uncertain is None else uncertain):
        return {}
    return {name: 1 - lost.mean / gain for name, lost in analysis.lost.items()}


def _least_alike(body: list[LayerChange]) -> float:
    """The lowest CKA of the layers whose CKA is known; NaN if there is none."""
    known = [layer.cka.mean for layer in body if math.isfinite(layer.cka.mean)]
    return min(known, default=math.nan)


def _changes(layers: list[LayerChange]) -> str:
    """How much adaptation changes representations and parameters; '' if no CKA is known."""
    *body, head = layers
    cka = _least_alike(body)
    if not math.isfinite(cka):
        return ""
    seen = "look alike before and after" if cka > _ALIKE else "change"
    moved = max((layer.moved for layer in body), key=lambda moved: moved.mean)
    return (
        f"The body's representations {seen} (the lowest CKA of a layer is {cka:.2f}), its layers' "
        f"parameters move by up to {moved.text(percent=True)} %; the head's move by "
        f"{head.moved.text(percent=True)} %, the CKA of its outputs is {head.cka.text()}."
    )


def _verdict(layers: list[LayerChange], kept: dict[str, float]) -> str:
    """The verdict, from the share of the gain that head or body alone keep.

    CKA does not decide: it weighs directions by their variance, and the head may read one of little
    variance. CKA only says how large the change was that brought the gain.
    """
    body = layers[:-1]
    if not kept:
        return "Adaptation does not help for certain, so there is nothing to explain."
    if not any(layer.moved.mean for layer in body):
        return "Only the head adapts, so this is feature reuse by construction."
    alike = _least_alike(body) > _ALIKE
    by_head, by_centroid = kept[HEAD], kept.get(CENTROID, 0.0)
    by_body = kept[BODY] >= _ENOUGH
    if by_head >= _ENOUGH or (by_centroid >= _ENOUGH and not by_body):
        though = "" if alike else ", although adaptation changes it"
        return f"This is feature reuse: the body serves new tasks as it is{though}."
    if not by_body:
        return "It is both: neither the head alone nor the body alone explains the gain."
    if by_centroid >= _ENOUGH:
        return (
            "The features could be reused as they are, as the nearest centroid shows; but that is "
            "not how adaptation works here: the change of the body carries the gain."
        )
    if alike:
        reused = max(0.0, by_head, by_centroid)
        return (
            "This is rapid learning by small changes of the body: alike as its representations "
            f"look, those before adaptation keep {100 * reused:.0f} % of the gain."
        )
    return "This is rapid learning: the body itself changes for every task."
