"""What is usual for a model: given, published for it, or measured on ordinary prompts."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from nemo_prune.compute.local import LocalSession
from nemo_prune.compute.session import Session
from nemo_prune.engine.activations import ActivationStatisticsFitter, neuron_activations
from nemo_prune.engine.calibration import Calibration, MeasuredPrompt, enough_prompts, fit_calibration, measure_prompts
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.errors import OutputError
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.locks import sole_lock
from nemo_prune.files.work import LineLog
from nemo_prune.models.known import OrdinaryCaptions
from nemo_prune.progress import Advance, Listener, Stage, ignored
from nemo_prune.settings import LocalizationPlan, Plan

# Ordinary prompts of 500 leave a distance of 1/sqrt(500) = 0.04 by chance alone; another population of
# captions moves the means more than that, another model's weights by far more.
MOST_DISTANCE = 0.5
_TEXTS_AT_ONCE = 50


def calibrate_session(
    session: Session, ordinary: OrdinaryCaptions, plan: Plan | LocalizationPlan, file: Path, listener: Listener
) -> Calibration:
    """The calibration that the plan names, that a file holds, that was published for the model, or a measured one.

    Args:
        session: the model.
        ordinary: captions that it does not memorize.
        plan: may name a finished calibration.
        file: where the calibration is kept.
        listener: hears the stage.

    Raises:
        OutputError: a file holds a calibration of another model, other settings or other prompts.
        DownloadError: what was published can't be fetched.
        PromptError: there are too few ordinary prompts.
    """
    with listener.stage(Stage.CALIBRATE) as advance:
        if plan.calibration:
            return Calibration.load(plan.calibration, session.calibration_identity)
        if file.exists():
            return Calibration.load(file, identity_with(session, ordinary.texts))
        if ordinary.published is None:
            return measure_calibration(session, ordinary.texts, file, advance)
        published = ordinary.published.load()
        (reason,) = session.map(partial(_reason_against, published=published), [ordinary.texts])
        if reason is not None:
            origin = f"measured afresh, because {reason}"
            return measure_calibration(session, ordinary.texts, file, advance, origin)
        published.save(file, identity_with(session, ordinary.texts))
        return published


def measure_calibration(
    session: Session,
    texts: Sequence[str],
    file: Path,
    advance: Advance = ignored,
    origin: str = Calibration.origin,
) -> Calibration:
    """Calibrate on ordinary prompts and keep it in a file, in the place of any other.

    What is measured is kept beside the file as it comes, until the file is complete.

    Args:
        session: the model.
        texts: ordinary prompts.
        file: where the calibration is kept.
        advance: called with the prompts done and their number.
        origin: what the calibration says about how it was made.

    Raises:
        OutputError: the file can't be written, or another process measures it.
        PromptError: there are too few prompts.
    """
    different, identity = enough_prompts(texts), identity_with(session, texts)
    log_file = file.with_name(f".{file.name}.jsonl")
    busy = OutputError(f"Another process measures {file}. Wait until it is done, or choose another file.")
    with sole_lock(file.with_name(f".{file.name}.lock"), busy):
        log = LineLog(log_file, identity)
        measured = {record["prompt"]: MeasuredPrompt.from_record(record) for record in log}
        waiting = [text for text in different if text not in measured]
        for each in session.map(_measure_chunk, session.chunks_of(waiting)):
            log.append(each.as_record())
            measured[each.prompt] = each
            advance(len(measured), len(different))
        # In the order of the prompts: it decides about the last digits.
        in_order = (measured[text] for text in different)
        calibration = fit_calibration(in_order, session.settings.threshold_num_std)
        calibration = dataclasses.replace(calibration, origin=origin)
        calibration.save(file, identity)
        log_file.unlink()
    return calibration


def identity_with(session: Session, texts: Sequence[str]) -> dict:
    """What a calibration on these prompts depends on."""
    return session.calibration_identity | {"prompts": text_hash(texts)}


@torch.no_grad()
def why_not(published: Calibration, predictor: NoisePredictor, texts: Sequence[str]) -> str | None:
    """Why a published calibration does not fit a model; None where it does.

    Args:
        published: the calibration.
        predictor: the model.
        texts: ordinary prompts; the mean activations on them must be near the published ones. Their
            distance is the root mean square over all neurons, in the published standard deviations.
    """
    statistics = published.statistics
    if {name: len(mean) for name, mean in statistics.mean.items()} != predictor.sizes:
        return "its layers have other sizes than the published statistics"
    fitter = ActivationStatisticsFitter()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        embeds = predictor.encode(texts[start : start + _TEXTS_AT_ONCE])
        fitter.update(neuron_activations(predictor.layers, embeds))
    z_scores = torch.cat(list(statistics.z_scores(fitter.statistics.mean).values()))
    distance = float(z_scores.square().mean().sqrt())
    if distance <= MOST_DISTANCE:
        return None
    return (
        f"its mean activations lie {distance:.2f} standard deviations from the published ones ({MOST_DISTANCE} at most)"
    )


def _measure_chunk(session: LocalSession, texts: Sequence[str]) -> Iterator[MeasuredPrompt]:
    return measure_prompts(session.scorer, texts)


def _reason_against(session: LocalSession, texts: Sequence[str], published: Calibration) -> list[str | None]:
    return [why_not(published, session.predictor, texts)]
