"""Which captions of a large corpus are memorized: sieves for all, closer looks at what passes."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow

from nemo_prune.compute.local import LocalSession
from nemo_prune.compute.session import Session
from nemo_prune.corpus.stream import ORDINARY, CaptionStream
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.json_values import to_json
from nemo_prune.files.pictures import save_distributions
from nemo_prune.files.staging import check_new_file
from nemo_prune.files.work import LineLog, WorkFolder
from nemo_prune.progress import Listener, Stage
from nemo_prune.proof.images import draw_images, seed_agreement
from nemo_prune.screening.detection import Cut, Separation, fdr_cut, separation
from nemo_prune.screening.screened import PASSED_COLUMN, PROMPT_COLUMN, caption_table, write_screened
from nemo_prune.screening.settings import ScreenOptions, SieveSettings
from nemo_prune.screening.sieves import Sieves
from nemo_prune.settings import VerificationSettings

Numbered = tuple[int, str]

_PASSED_AT_ONCE = 8
_AGREEMENT = "image_agreement"
_DISTRIBUTIONS_FILE = "distributions.png"


@dataclasses.dataclass(frozen=True)
class ScreenResult:
    """What a screening found.

    Attributes:
        cut: what passes, and with what certainty.
        separations: sieve -> kind -> how well it separates; empty without labels.
        facts: the same and the costs, JSON values only, without any caption.
        picture: the distributions of the values.
    """

    cut: Cut
    separations: dict[str, dict[str, Separation]]
    facts: dict
    picture: Path


@dataclasses.dataclass
class _Sieved:
    """The known values of numbered captions.

    Attributes:
        values: sieve -> one value per caption, NaN if not known yet.
        sample_passes: latents that went through the U-Net for them.
        num_captions: how many are known.
        prompts_per_second: of this process; None if all were known before.
    """

    values: dict[str, np.ndarray]
    sample_passes: int = 0
    num_captions: int = 0
    prompts_per_second: float | None = None

    def add(self, record: dict) -> None:
        place = slice(record["first"], record["first"] + len(record["norm"]))
        for name, values in self.values.items():
            values[place] = record[name]
        self.sample_passes += record["sample_passes"]
        self.num_captions += len(record["norm"])


def screen_captions(
    session: Session,
    captions: CaptionStream,
    ordinary: Sequence[str],
    options: ScreenOptions,
    sieve: SieveSettings,
    verification: VerificationSettings,
    listener: Listener = Listener(),
) -> ScreenResult:
    """Sieve a corpus, set the cut, look closer at what passes, and write all captions by value.

    Args:
        session: the model.
        captions: the corpus.
        ordinary: captions that are not memorized, like those of the corpus; the cut is calibrated on them.
        options: what to write, where and how.
        sieve: the numbers of the sieves.
        verification: how the images are drawn that confirm.
        listener: hears stages and progress.

    Raises:
        NemoPruneError: something can't be done as asked; what was computed is kept in the work folder.
    """
    check_new_file(options.out, options.overwrite)
    source = session.source
    sieve, verification = sieve.fitted_to(source.norm_step), verification.fitted_to(source.guidance_scale)
    ordinary = list(dict.fromkeys(ordinary))
    work = _open_work(session, captions, ordinary, options, sieve).path
    ordinary_log = LineLog(work / "ordinary.jsonl", {"prompts": text_hash(ordinary)})
    usual = _sieve_all(
        session, ordinary, len(ordinary), options.captions_at_once, ordinary_log, sieve, listener, Stage.SIEVE_ORDINARY
    )
    # Places in a corpus mean something only for this corpus: another one begins the log anew.
    log = LineLog(work / "sieved.jsonl", {"prompts": captions.digest})
    texts = (prompt.text for prompt in captions)
    sieved = _sieve_all(
        session, texts, captions.num_prompts, options.captions_at_once, log, sieve, listener, Stage.SIEVE
    )
    values = sieved.values[sieve.sieve]
    cut = fdr_cut(values, usual.values[sieve.sieve], options.fdr)
    passed = np.zeros(len(values), bool) if cut.cut is None else values >= cut.cut
    table = caption_table(captions)
    numbered = [(number, table[PROMPT_COLUMN][number].as_py()) for number in np.flatnonzero(passed).tolist()]
    looks = _closer_looks(session, numbered, work, options, verification, listener)
    columns = {"score": values, **sieved.values, PASSED_COLUMN: passed}
    columns |= {name: _with_gaps(found, len(values)) for name, found in looks.items()}
    agreement = list(looks.get(_AGREEMENT, {}).values())
    confirmed = sum(each >= verification.replication_cut for each in agreement) if options.confirm else None
    write_screened(options.out, table, np.argsort(-values, kind="stable"), columns)
    picture = work / _DISTRIBUTIONS_FILE
    save_distributions(picture, _groups(sieved.values, usual.values, captions.kinds), {sieve.sieve: cut.cut})
    separations = _separations(sieved.values, captions.kinds)
    facts = {**_facts(captions, sieve, cut, separations, sieved), "confirmed": confirmed}
    return ScreenResult(cut, separations, facts, picture)


def _facts(
    captions: CaptionStream,
    sieve: SieveSettings,
    cut: Cut,
    separations: dict[str, dict[str, Separation]],
    sieved: _Sieved,
) -> dict:
    kinds = captions.kinds or []
    return {
        "prompts": captions.num_prompts,
        "duplicates": captions.num_duplicates,
        "empty": captions.num_empty,
        "unlabelled": kinds.count(None),
        "passed": cut.num_passed,
        "sieve": to_json(sieve),
        "cut": to_json(cut),
        "separation": {
            name: {kind: to_json(found) for kind, found in of_kind.items()} for name, of_kind in separations.items()
        },
        "sample_passes_per_prompt": sieved.sample_passes / sieved.num_captions,
        "prompts_per_second": sieved.prompts_per_second,
    }


def _open_work(
    session: Session,
    captions: CaptionStream,
    ordinary: Sequence[str],
    options: ScreenOptions,
    sieve: SieveSettings,
) -> WorkFolder:
    identity = {
        "model": session.model_digest,
        "prompts": captions.digest,
        "calibration prompts": text_hash(ordinary),
        "settings": to_json(session.settings),
        "sieve": to_json(sieve),
        "dtype": session.options.dtype,
    }
    return WorkFolder(options.work, identity, options.overwrite)


# --- the sieves ---


def _sieve_all(
    session: Session,
    texts: Iterable[str],
    total: int,
    at_once: int,
    log: LineLog,
    settings: SieveSettings,
    listener: Listener,
    stage: Stage,
) -> _Sieved:
    """The values of all captions: from the log, or computed if they are not in it."""
    names = ("norm",) if settings.sieve == "norm" else ("norm", "anisotropy")
    sieved = _Sieved({name: np.full(total, np.nan) for name in names})
    # A caption that stands in the log twice counts once.
    for record in {each["first"]: each for each in log}.values():
        sieved.add(record)
    began, before = time.perf_counter(), sieved.num_captions
    known = np.isfinite(sieved.values["norm"])
    waiting = ((place, text) for place, text in enumerate(texts) if not known[place])
    batch_size = session.options.batch_size or at_once
    chunks = _chunks(waiting, max(batch_size, at_once // batch_size * batch_size))
    with listener.stage(stage) as advance:
        advance(before, total)
        for record in session.map(partial(sieve_chunk, settings=settings), chunks):
            log.append(record)
            sieved.add(record)
            advance(sieved.num_captions, total)
    if sieved.num_captions > before:
        sieved.prompts_per_second = round((sieved.num_captions - before) / (time.perf_counter() - began), 2)
    return sieved


def sieve_chunk(session: LocalSession, chunk: Sequence[Numbered], settings: SieveSettings) -> Iterator[dict]:
    """The sieves' values of consecutive captions.

    Args:
        session: the model.
        chunk: numbered captions.
        settings: the numbers of the sieves.

    Yields:
        One record: number of the first, one list of values per sieve, sample passes.
    """
    before = session.predictor.sample_passes
    values = _sieves(session, settings).values([text for _, text in chunk])
    yield {"first": chunk[0][0], **values, "sample_passes": session.predictor.sample_passes - before}


@lru_cache(maxsize=1)
def _sieves(session: LocalSession, settings: SieveSettings) -> Sieves:
    """The unconditional halves are the same for all captions."""
    return Sieves(session.predictor, settings)


def _chunks(numbered: Iterable[Numbered], most: int) -> Iterator[list[Numbered]]:
    """Numbered captions in lists of consecutive numbers."""
    chunk: list[Numbered] = []
    for each in numbered:
        if chunk and (len(chunk) == most or each[0] != chunk[-1][0] + 1):
            yield chunk
            chunk = []
        chunk.append(each)
    if chunk:
        yield chunk


# --- closer looks at what passed ---


def _closer_looks(
    session: Session,
    passed: Sequence[Numbered],
    work: Path,
    options: ScreenOptions,
    verification: VerificationSettings,
    listener: Listener,
) -> dict[str, dict[int, float]]:
    """Column -> number of a caption -> value."""
    looks = {"memorization_score": (score_chunk, "scores.jsonl", Stage.SCORE_PASSED)}
    if options.confirm:
        # Images of another guidance are other images.
        file = f"images_{verification.guidance_scale:g}.jsonl"
        looks[_AGREEMENT] = (partial(confirm_chunk, verification=verification), file, Stage.CONFIRM)
    found: dict[str, dict[int, float]] = {}
    for column, (task, file, stage) in looks.items():
        log = LineLog(work / file, {"values": column})
        known = {record["prompt"]: record["value"] for record in log}
        waiting = [text for _, text in passed if text not in known]
        chunks = (waiting[first : first + _PASSED_AT_ONCE] for first in range(0, len(waiting), _PASSED_AT_ONCE))
        with listener.stage(stage) as advance:
            advance(len(known), len(passed))
            for record in session.map(task, chunks):
                log.append(record)
                known[record["prompt"]] = record["value"]
                advance(len(known), len(passed))
        found[column] = {number: known[text] for number, text in passed}
    return found


def score_chunk(session: LocalSession, chunk: Sequence[str]) -> Iterator[dict]:
    """NeMo's memorization score of captions, one record per caption."""
    for text, each in zip(chunk, session.scorer.score_prompts(chunk), strict=True):
        yield {"prompt": text, "value": each.memorization.score}


def confirm_chunk(session: LocalSession, chunk: Sequence[str], verification: VerificationSettings) -> Iterator[dict]:
    """How much the images of captions agree with each other from seed to seed, one record per caption."""
    for text in chunk:
        yield {"prompt": text, "value": seed_agreement(draw_images(session.pipe, text, verification))}


def _with_gaps(found: dict[int, float], total: int) -> pyarrow.Array:
    values = np.full(total, np.nan)
    values[list(found)] = list(found.values())
    return pyarrow.array(values, mask=np.isnan(values))


# --- what labels tell ---


def _separations(values: dict[str, np.ndarray], kinds: Sequence[str | None] | None) -> dict[str, dict[str, Separation]]:
    """Sieve -> kind, and `memorized` for all of them -> separation from the ordinary captions."""
    if kinds is None:
        return {}
    of_kind = {kind: np.array([each == kind for each in kinds]) for kind in sorted({*kinds} - {None, ORDINARY})}
    of_kind["memorized"] = np.array([each not in (None, ORDINARY) for each in kinds])
    ordinary = np.array([each == ORDINARY for each in kinds])
    if not ordinary.any() or not of_kind["memorized"].any():
        return {}
    return {
        name: {kind: separation(each[places], each[ordinary]) for kind, places in of_kind.items()}
        for name, each in values.items()
    }


def _groups(
    values: dict[str, np.ndarray], usual: dict[str, np.ndarray], kinds: Sequence[str | None] | None
) -> dict[str, dict[str, np.ndarray]]:
    """What the picture compares: the labels' kinds, or the corpus, with the ordinary captions of the calibration."""
    if kinds is None:
        return {name: {"calibration": usual[name], "corpus": each} for name, each in values.items()}
    named = np.array([kind or "unlabelled" for kind in kinds])
    order = sorted(set(named.tolist()), key=lambda kind: (kind != ORDINARY, kind))
    return {name: {kind: each[named == kind] for kind in order} for name, each in values.items()}
