"""The report of the evidence: one file with everything in it, for the work folder and never for publication."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from nemo_prune import __version__
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.facts import SparedPoint
from nemo_prune.files.work import write_atomically
from nemo_prune.proof.drawing import BASE, CANDIDATE, drawn_images
from nemo_prune.proof.evidence import Evidence
from nemo_prune.proof.replication import CaptionReplication
from nemo_prune.proof.scores import ScoresUnderMask
from nemo_prune.release import charts
from nemo_prune.release.evidence_wording import (
    attack_rows,
    broken_limits,
    replication_rows,
    utility_rows,
    verdict,
)
from nemo_prune.release.wording import counted

REPORT_FILE = "report.html"
_TEMPLATES = PackageLoader("nemo_prune.release", "templates")
_SHOWN_SIDE = 256
_SMALL_SIDE = 96
_MOST_CAPTIONS = 80
_MOST_PER_MODEL = 4


@dataclass(frozen=True)
class PromptNeurons:
    """Which neurons serve a prompt.

    Attributes:
        prompt: the caption.
        kind: its type.
        status: what the localization says.
        neurons: layer -> rows.
        score_before: memorization score on fresh seeds.
        score_after: the same under the mask.
    """

    prompt: str
    kind: str | None
    status: str
    neurons: Mapping[str, Sequence[int]]
    score_before: float | None = None
    score_after: float | None = None

    @classmethod
    def of(cls, found: PromptLocalization, kind: str | None, scores: ScoresUnderMask | None) -> "PromptNeurons":
        """What a run found out about a prompt."""
        layers: dict[str, list[int]] = {}
        for neuron in found.neurons:
            layers.setdefault(neuron.layer, []).append(neuron.index)
        before, after = (scores.score_before, scores.score_after) if scores else (None, None)
        return cls(found.prompt, kind, found.status, layers, before, after)


@dataclass(frozen=True)
class ReportContext:
    """What a report tells beside the evidence.

    Attributes:
        training_images: caption -> its training image.
        layer_sizes: layer -> its neurons.
        prompts: which neurons serve which prompts; empty where that is not known.
        threshold: tau, where scores are known.
        settings: name -> value, as text.
        versions: package -> version.
        max_replication: the stated limit.
        max_utility_loss: the stated limit.
        spared: what a limit on the change for ordinary captions gave up; empty without one.
    """

    training_images: Mapping[str, Image.Image] = field(default_factory=dict)
    layer_sizes: Mapping[str, int] = field(default_factory=dict)
    prompts: Sequence[PromptNeurons] = ()
    threshold: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    max_replication: float | None = None
    max_utility_loss: float | None = None
    spared: Sequence[SparedPoint] = ()


def write_evidence_report(path: Path, evidence: Evidence, images: Path, context: ReportContext) -> Path:
    """Write the report.

    Args:
        path: the file.
        evidence: what was measured.
        images: folder of the images that were drawn.
        context: what else it tells.

    Returns:
        The file.
    """
    environment = Environment(loader=_TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    script = environment.loader.get_source(environment, "report.js")[0].strip()
    summary = evidence.summary
    write_atomically(
        path,
        environment.get_template("report.html").render(
            evidence=evidence,
            summary=summary,
            verdict=verdict(summary),
            limits=_limits(evidence, context),
            replication_rows=replication_rows(summary),
            utility_rows=utility_rows(summary),
            attack_rows=attack_rows(summary),
            counted=counted,
            **_rows(evidence, context),
            captions=[_caption(each, images, context) for each in evidence.captions[:_MOST_CAPTIONS]],
            charts={name: Markup(chart) for name, chart in _charts(evidence, context).items()},
            context=context,
            recall=_recall(evidence, context),
            style=Markup(environment.loader.get_source(environment, "report.css")[0]),
            script=Markup(script),
            # Only this script may run: whatever a caption holds can't.
            script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
            version=__version__,
        ),
    )
    return path


def picture(image: Image.Image) -> str:
    """An image as an address that holds it; larger ones are made smaller and lose a little."""
    image = image.convert("RGB")
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    small = max(image.size) <= _SMALL_SIDE
    written = io.BytesIO()
    image.save(written, format="PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def _rows(evidence: Evidence, context: ReportContext) -> dict[str, list[tuple]]:
    """Rows of the tables that say what they say in numbers alone."""
    summary = evidence.summary
    tokens = summary.tokens
    drawing = summary.drawing
    settings = {
        "scheduler": drawing.scheduler,
        "steps": drawing.num_inference_steps,
        "guidance": drawing.guidance_scale,
        "first seed": summary.seed,
        "images per caption and round": summary.images_per_round,
        **context.settings,
    }
    return {
        "token_rows": [
            (name, f"{value:.2f}", f"{tokens.ordinary[name]:.2f}" if name in tokens.ordinary else "")
            for name, value in (tokens.memorized if tokens else {}).items()
        ],
        "variant_rows": [(each.name, counted(each.base), counted(each.candidate)) for each in summary.variants],
        "treated_rows": [
            (each.treatment, counted(each.copies), "" if each.nearest is None else f"{each.nearest:.2f}")
            for each in summary.regrown + summary.refilled
        ],
        "part_rows": [(part, passes, f"{summary.seconds[part]:.0f}") for part, passes in summary.passes.items()],
        "setting_rows": list(settings.items()),
    }


def _limits(evidence: Evidence, context: ReportContext) -> dict:
    return {
        "stated": context.max_replication is not None or context.max_utility_loss is not None,
        "broken": broken_limits(evidence.summary, context.max_replication, context.max_utility_loss),
    }


def _caption(found: CaptionReplication, images: Path, context: ReportContext) -> dict:
    """One caption with its pictures."""
    training = context.training_images.get(found.prompt)
    return {
        "found": found,
        "images": len(found.seeds),
        "training": picture(training.copy()) if training else None,
        BASE: [picture(each) for each in drawn_images(images, BASE, found.prompt)[:_MOST_PER_MODEL]],
        CANDIDATE: [picture(each) for each in drawn_images(images, CANDIDATE, found.prompt)[:_MOST_PER_MODEL]],
    }


def _charts(evidence: Evidence, context: ReportContext) -> dict[str, str]:
    summary, drawn = evidence.summary, {}
    if summary.changes.rows:
        short = {_short(name): count for name, count in summary.changes.rows.items()}
        sizes = {_short(name): size for name, size in context.layer_sizes.items()}
        drawn["layers"] = charts.bars("layers", short, sizes, "rows that differ")
    scores = [each for each in context.prompts if each.score_before is not None and each.score_after is not None]
    if scores:
        groups = {"before": [each.score_before for each in scores], "after": [each.score_after for each in scores]}
        drawn["scores"] = charts.distributions("scores", groups, "memorization score, fresh seeds", context.threshold)
    groups = {
        name: [value for each in evidence.captions for value in _judged(each, name)] for name in (BASE, CANDIDATE)
    }
    drawn["similarities"] = charts.distributions(
        "similarities", groups, "similarity to the nearest reference", summary.yardstick.cut
    )
    if summary.utility is not None:
        change = summary.utility.held_out
        drawn["utility"] = charts.lines(
            "utility", change.timesteps, change.relative_error, ("timestep", "relative change of the noise prediction")
        )
    curves = {
        f"{each.model}, {'memorized' if each.memorized else 'never trained on'}": each.curve
        for each in summary.attacks
        if each.start == "caption"
    }
    if curves:
        drawn["attack"] = charts.lines(
            "attack",
            summary.attacks[0].looks,
            curves,
            ("steps of the attack", "similarity to the target"),
            summary.yardstick.cut,
        )
    if context.spared:
        points = sorted(context.spared, key=lambda point: point.change)
        drawn["spared"] = charts.lines(
            "spared",
            [point.change for point in points],
            {"prompts gone": [point.gone for point in points]},
            ("change on ordinary prompts, as a share of what everything suppressed changes", "memorized prompts gone"),
        )
    return drawn


def _judged(found: CaptionReplication, model: str) -> Sequence[float]:
    scores = found.base if model == BASE else found.candidate
    return scores.nearest if scores.own else scores.to_base_seeds


def _recall(evidence: Evidence, context: ReportContext) -> dict | None:
    """The recall matrix with pictures' names: what comes back in each cell."""
    if evidence.recall is None:
        return None
    known = list(context.training_images)
    recall = evidence.recall

    def cells(row) -> list[dict]:
        return [
            {
                "similarity": similarity,
                "own": place != -1 and known[place] == caption,
                "other": None if place == -1 or known[place] == caption else known[place],
            }
            for caption, similarity, place in zip(recall.captions, row.similarity, row.nearest_of, strict=True)
        ]

    rows = {"nothing": cells(recall.before), **{text: cells(row) for text, row in recall.rows.items()}}
    return {"captions": recall.captions, "rows": rows}


def _short(layer: str) -> str:
    return layer.replace(".transformer_blocks.0.attn2", "")
