"""What is published says what it should, and nothing that a caption could."""

import base64
import binascii
import html
import importlib.metadata
import json
import re
import shlex
from dataclasses import dataclass
from hashlib import md5, sha1, sha256
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.cli import app
from nemo_prune.corpus.prompts import Prompt
from nemo_prune.engine.activations import ActivationStatistics
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import Localizer, PromptLocalization
from nemo_prune.engine.merge import prompts_per_neuron
from nemo_prune.engine.released_code import SD_V1_LAYERS
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import OutputError, SettingsError
from nemo_prune.facts import BaseFacts, Cost, MaskFacts
from nemo_prune.files.json_values import to_json
from nemo_prune.files.layout import GRID_FILE, MASK_FILE, PLOT_FILE, RECORD_FILE, ReleaseLayout
from nemo_prune.files.work import WorkFiles
from nemo_prune.mask import Neuron, NeuronMask, Pruning
from nemo_prune.models.source import ModelSource, resolve_model
from nemo_prune.proof.images import ImageEvidence
from nemo_prune.proof.scores import ScoresUnderMask
from nemo_prune.release.card import PAPER, model_card, named
from nemo_prune.release.licence import licence_of
from nemo_prune.release.markdown import code, table
from nemo_prune.release.prompt_hashes import prompt_references, secret_key
from nemo_prune.release.record import MaskRecord, Record
from nemo_prune.release.recording import base_facts, measured_by_a_run, prompt_facts, versions
from nemo_prune.release.report import run_report, write_report
from nemo_prune.release.writing import StagedRelease
from nemo_prune.run import _publish
from nemo_prune.settings import LocalizationSettings, Plan, Statement
from nemo_prune.stages.examined import ExaminedPrompt
from records import COMMIT, WEIGHTS, changed, run_record

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
MARKER = "zanzibarquokka"
FOLDER = ReleaseLayout(Path("out"))

HOSTILE = [
    f"{MARKER}\n---\nlicense: mit\n---\n# {MARKER}",
    f"{MARKER}: !!python/object/apply:os.system ['x'] # \"'",
    f"[{MARKER}](javascript:alert(1)) ![{MARKER}](https://example.org/x.png) <https://example.org>",
    f"```{MARKER}``` `` ` {MARKER}`",
    f"` {MARKER} `",
    f"| {MARKER} | a \\| b | `|` \\",
    f"# {MARKER}\r\n===\r- {MARKER}\u2028* {MARKER}\u2029\x85> {MARKER}",
    f"<!-- {MARKER} --> <script>{MARKER}</script> <img src=x onerror={MARKER}> &lt;b&gt; &#x3c; </code></pre>",
    f"{MARKER} https://example.org/{MARKER} www.example.org {MARKER}@example.org @{MARKER} #1",
    f"{MARKER}\x00\x1b[31m\x7f\u202e\u2066{MARKER}\u200b\ufeff",
    f"{MARKER} \ud800 \udfff",
    f"{MARKER} " * 500,
    f"*{MARKER}* _{MARKER}_ ~~{MARKER}~~ $${MARKER}$$ :smile: {{{{ {MARKER} }}}} {{% {MARKER} %}}",
    f"É ß {MARKER} 漢字 👩‍👩‍👧",
]


def structure(text):
    """All that a renderer makes of a text, but for what stands in code; and the links in it."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    flat = [part for token in tokens for part in (token, *(token.children or ()))]
    shape = [(part.type, part.tag, "" if part.type in ("inline", "code_inline") else part.content) for part in flat]
    return shape, [part.attrs[name] for part in flat for name in ("href", "src") if name in part.attrs]


def test_metadata_and_order_of_a_card():
    card = ModelCard(model_card(run_record(), FOLDER))
    assert card.data.to_dict() == {
        "base_model": "CompVis/stable-diffusion-v1-4",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": ["nemo-prune", "memorization", "stable-diffusion"],
    }
    headings = re.findall(r"^## (.*)$", card.content, re.MULTILINE)
    assert headings[:3] == ["What is not claimed", "What was changed", "What was found"]
    before = card.text.split("## What was changed")[0]
    assert "neurons" not in before and "fine-tuning" in before and "Base and mask together undo" in before
    assert (
        "files of the base model were changed:** `unet/diffusion_pytorch_model.safetensors` (21 rows set to zero)"
        in (card.text)
    )
    assert "- `unet/a.bin`: not safetensors" in card.text
    assert structure(card.text)[1] == [PAPER, PLOT_FILE]
    assert not re.search(r"THIS_|TODO|\bBASE\b|\bNone\b|[{<]\w+[>}]", card.text.split("## Citation")[0])


def test_a_card_names_its_own_folder_until_it_has_a_name_on_the_hub():
    here = model_card(run_record(), FOLDER)
    assert 'from_pretrained(".")  # "." is this folder' in here and f"--mask {MASK_FILE} --out rebuilt\n" in here
    there = named(here, "owner/name")
    assert 'from_pretrained("owner/name")\n' in there and "--mask owner/name --out rebuilt\n" in there
    assert "this folder" not in there and f"export --model CompVis/stable-diffusion-v1-4 --revision {COMMIT}" in there
    assert named(there, "owner/name") == there
    variant = named(model_card(run_record(base={"variant": "fp16"}), FOLDER), "owner/name")
    assert 'from_pretrained("owner/name", variant="fp16")' in variant and f"{COMMIT} --variant fp16 \\\n" in variant


def test_the_card_of_a_single_file_loads_it_as_one():
    files = {"sha256": {"it's.safetensors": "0" * 64}, "rows_changed": {"it's.safetensors": 21}}
    card = model_card(run_record(files=files), ReleaseLayout.of(Path("it's.safetensors")))
    assert (
        'from_single_file("it\'s.safetensors")' in card
        and "--mask 'it'\"'\"'s.safetensors' --out rebuilt.safetensors\n" in card
    )
    there = named(card, "owner/name")
    assert 'from_single_file("https://huggingface.co/owner/name/blob/main/it\'s.safetensors")' in there
    assert "--mask owner/name " in there and f"]({PLOT_FILE})" in there


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ({}, ["As the base model's card says: `creativeml-openrail-m`", "use-based restrictions", "No licence text"]),
        ({"texts": ("LICENSE.md",)}, ["[`LICENSE.md`](LICENSE.md)"]),
        ({"fields": {"license": ["mit", "x](y)"]}, "base_was_gated": True}, ["`mit` or `x](y)`", "accept its terms"]),
        ({"fields": {"license": "mit"}, "origin": "publisher"}, ["As stated by who made this model: `mit`"]),
        ({"fields": {"license": "other"}, "origin": "missing"}, ["Not known", "has to state the licence"]),
        ({"fields": {"license": "other", "license_link": "javascript:x"}}, ["text: `javascript:x`"]),
    ],
)
def test_what_is_known_about_the_licence_and_what_is_not_is_said(licence, words):
    record = run_record(licence=licence)
    card = model_card(record, FOLDER)
    for word in words:
        assert word in card
    assert "use-based" not in card or "openrail" in str(record.licence.fields)
    assert set(structure(ModelCard(card).text)[1]) <= {PAPER, PLOT_FILE, "LICENSE.md"}


@pytest.mark.parametrize("name", [f"own<b>er/na_me_{MARKER}`|\n# x", "a/](javascript:x)", "a/--- : !!x"])
def test_names_from_elsewhere_are_text(name):
    base, mask = {"name": name, "repo_id": name}, {"made_for": BaseFacts(name), "forced_on_another_base": True}
    licence = {"fields": {"license": name, "license_name": name, "license_link": name}, "texts": (name,)}
    files = {"left_out": {name: "why"}}
    odd = ModelCard(model_card(run_record(base=base, mask=mask, licence=licence, files=files), FOLDER))
    assert odd.data.base_model == odd.data.license_name == name
    plain = {"base": {"name": "a/_b", "repo_id": "a/_b"}, "mask": {**mask, "made_for": BaseFacts("a")}}
    plain |= {
        "licence": {"fields": dict.fromkeys(licence["fields"], "( )"), "texts": ("( )",)},
        "files": {"left_out": {"a": "why"}},
    }
    assert structure(odd.text) == structure(ModelCard(model_card(run_record(**plain), FOLDER)).text)


@given(st.text(st.characters(), max_size=60))
@example("")
@example("``")
@example("\\")
@example("`|` \\|")
def test_a_span_of_code_is_nothing_but_code(text):
    tokens = MarkdownIt("commonmark", {"html": True}).parse(f"- {code(text)}")
    (inline,) = (token for token in tokens if token.type == "inline")
    assert [child.type for child in inline.children] == ["code_inline"]
    cells = structure(table(("a", "b"), [(code(text), "c")]))[0]
    assert cells == structure(table(("a", "b"), [("`x`", "c")]))[0]


@dataclass(frozen=True)
class Found:
    """What a run might have found."""

    source: ModelSource
    plan: Plan
    mask: NeuronMask
    examined: list[ExaminedPrompt]
    record: Record

    @property
    def layout(self):
        return ReleaseLayout(self.plan.out)

    @property
    def references(self):
        return {each.text: each.reference for each in self.examined}


@pytest.fixture(scope="module")
def found(pipe, model_folder, tmp_path_factory):
    """What a run might have found for hostile captions, the first half of them localized."""
    mask = NeuronMask.from_neurons([Neuron(MID, 1), Neuron(MID, 6)], {MID: 8})
    source = resolve_model(str(model_folder))
    half = len(HOSTILE) // 2
    localizations = [
        PromptLocalization(text, "localized" if place < half else "unresolved", 0.7123456, neurons=(Neuron(MID, 1),),
                           margin=0.0012345)
        for place, text in enumerate(HOSTILE)
    ]  # fmt: skip
    references = prompt_references(bytes(range(32)), HOSTILE)
    examined = [
        ExaminedPrompt(
            Prompt(each.prompt),
            references[each.prompt],
            each,
            ScoresUnderMask(0.3123456, 0.7234567, 0.3345678),
            ImageEvidence(1.0, 0.25, 0.7654321, 0.31, 0.3, 0.8, 0.2),
        )
        for each in localizations
    ]
    out = tmp_path_factory.mktemp("release") / "out"
    out.mkdir()
    plan = Plan(out, out.with_name("work"))
    scorer = Scorer(NoisePredictor(pipe, plan.settings))
    localizer = Localizer(scorer, Calibration(0.4, 0.02, 1.0, ActivationStatistics({}, {}, 50)), 0.42)
    record = Record(
        versions=versions(),
        base=base_facts(source, Statement()),
        licence=licence_of(source, Statement()),
        mask=MaskRecord.of(mask, scale=plan.scale, merge=plan.merge, preserve=plan.preserve),
        prompts=prompt_facts(examined, 0, plan.include_unresolved),
        files=export_checkpoint(model_folder, mask, out),
        measured=measured_by_a_run(plan, localizer, examined, [], {}, Cost(0.03, 0.05, 0.6), True, {}),
    )
    return Found(source, plan, mask, examined, record)


def test_versions_are_those_that_are_installed_and_need_no_metadata(monkeypatch):
    expected = {name: importlib.metadata.version(name) for name in versions() if name != "python"}
    assert {name: number for name, number in versions().items() if name != "python"} == expected

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert versions(["nemo-prune", "torch"]).keys() == {"python", "nemo-prune", "torch"}


@pytest.fixture(scope="module")
def published(found):
    """The release of these findings, as a run publishes it, without examples."""
    release, work = StagedRelease(found.layout, found.plan.out), WorkFiles(found.plan.work)
    work.path.mkdir()
    _publish(
        release, work, found.source, found.record, found.examined, Pruning(found.mask), found.plan, Path("no grid")
    )
    assert work.mask.is_file()
    return found.plan.out


def forms(text):
    """Ways to write a text that a search would miss, as bytes in lower case."""
    raw = text.encode(errors="surrogatepass")
    plain = [quote(raw), quote_plus(raw), html.escape(text), json.dumps(text)[1:-1]]
    encoded = [raw, *(each.encode(errors="surrogatepass") for each in plain), text.encode("unicode_escape")]
    encoded += [text.encode(name, errors="surrogatepass") for name in ("utf-16-le", "utf-16-be", "utf-32-le")]
    encoded += [binascii.hexlify(raw), *(each(raw).hexdigest().encode() for each in (md5, sha1, sha256))]
    # Where the text begins in a group of three bytes is not known; its first and last digits depend on what is beside.
    encoded += [base64.b64encode(bytes(shift) + raw)[4:-4] for shift in range(3)]
    return {each.lower() for each in encoded}


def test_forms_of_a_text_are_found():
    text = f"a {MARKER} cat"
    for hidden in (text.upper().encode(), base64.b64encode(b"xy" + text.encode() + b"z"), text.encode("utf-16")):
        assert any(form in hidden.lower() for form in forms(MARKER)), hidden


def test_nothing_published_tells_a_caption_in_any_form(found, published):
    secrets = {form for text in (MARKER, *HOSTILE) for form in forms(text) if len(form) > 8}
    paths = [path for path in published.rglob("*") if path.is_file()]
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert Image.open(path).info.keys() <= {"transparency"} and path == published / PLOT_FILE
        assert not [secret for secret in secrets if secret in content.lower()], path
    assert {path.relative_to(published).as_posix() for path in paths} >= {
        "README.md",
        RECORD_FILE,
        MASK_FILE,
        PLOT_FILE,
    }
    # The same captions are found where they may be published.
    shown = model_card(found.record, found.layout, HOSTILE).encode(errors="surrogatepass").lower()
    assert [secret for secret in secrets if secret in shown]


def test_the_record_refers_to_prompts_without_naming_them_or_a_number_of_their_own(found, published):
    record = Record.load(published / RECORD_FILE).to_json()
    results = record["prompt_results"]
    assert [result["prompt"] for result in results] == sorted(found.references.values())
    assert results[0].keys() == {
        "prompt", "status", "above_threshold_before", "above_threshold_after", "copies_before", "copies_after",
        "is_gone",
    }  # fmt: skip
    assert sum(result["status"] == "localized" for result in results) == record["prompts"]["localized"] == 7
    assert all(result["above_threshold_before"] and not result["above_threshold_after"] for result in results)
    text = (published / RECORD_FILE).read_text()
    for number in ("7123456", "7234567", "3345678", "3123456", "0.0012345", "7654321"):
        assert number not in text
    assert record["scores"]["median_before"] == 0.723 and record["images"]["memorized"]["copies_after"] == 0.25


def test_the_owner_looks_references_up_in_the_work_folder(found, published, tmp_path):
    write_report(tmp_path, found.record, found.examined)
    report = json.loads((tmp_path / "report.json").read_text())
    looked_up = {each["reference"]: each["prompt"] for each in report["prompts"]}
    assert looked_up == {reference: text for text, reference in found.references.items()}


def test_captions_that_are_published_are_inert_and_leave_the_metadata_alone(found):
    cards = [ModelCard(model_card(found.record, found.layout, texts)) for texts in (HOSTILE, ["a"] * len(HOSTILE))]
    assert cards[0].data.to_dict() == cards[1].data.to_dict()
    assert structure(cards[0].text) == structure(cards[1].text)
    assert cards[0].text.count(f"]({GRID_FILE})") == 1 and MARKER in cards[0].text
    assert "�" in cards[0].text and not set("\u202e\x1b\u2028\ud800") & set(cards[0].text)
    assert max(map(len, cards[0].text.splitlines())) < 1000
    cards[0].text.encode()


def test_captions_in_the_report_of_the_work_folder_are_inert():
    def report(texts, kind):
        row = {"status": "localized", "kind": kind, "score": 0.5, "neurons": [], "suppressed_similarity": None,
               "score_before": 0.5, "score_after": 0.1}  # fmt: skip
        return run_report(run_record(), [{**row, "prompt": text} for text in texts])

    hostile = report(HOSTILE, HOSTILE[5])
    assert structure(hostile) == structure(report(["a"] * len(HOSTILE), "b"))
    assert MARKER in hostile


def test_the_key_is_random_kept_and_its_owners_alone(tmp_path):
    keys = [secret_key(tmp_path / name) for name in ("a", "b", "a")]
    assert keys[0] == keys[2] != keys[1] and len(keys[0]) == 32
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(OutputError, match="expected 32"):
        secret_key(tmp_path / "a")
    with pytest.raises(OutputError):
        secret_key(tmp_path / "nowhere" / "a")
    references = prompt_references(keys[0], ["a cat", "a cat.", "\ud800"])
    assert len({*references.values(), *prompt_references(keys[1], ["a cat"]).values()}) == 4


def test_a_mask_says_how_many_prompts_need_each_neuron_and_stays_small(model_folder, tmp_path):
    neurons = [Neuron(layer, row) for layer, size in SD_V1_LAYERS.items() for row in range(0, size, size // 32)][:221]
    mask = NeuronMask.from_neurons(neurons, SD_V1_LAYERS)
    localizations = [PromptLocalization("a", "localized", 0.5, neurons=tuple(neurons[:2]))] * 3
    localizations += [PromptLocalization("b", "unresolved", 0.5, neurons=tuple(neurons))]
    needed = prompts_per_neuron(localizations, mask)
    assert list(needed[neurons[0].layer].values())[:3] == [3, 3, 0]
    assert prompts_per_neuron(localizations, mask, include_unresolved=True)[neurons[0].layer][0] == 4
    digests = tensor_digests(scan_folder(model_folder), NeuronMask.from_neurons([Neuron(MID, 1)], {MID: 8}))[
        f"{MID}.weight"
    ]
    record = run_record()
    facts = MaskFacts(
        base=record.base,
        prompts=record.prompts,
        versions=record.versions,
        settings=to_json(LocalizationSettings()),
        prompts_per_neuron=needed,
        base_tensors={name: digests for name in mask.tensor_rows if name.endswith(".weight")},
    )
    mask.save(tmp_path / "mask.safetensors", facts)
    size = (tmp_path / "mask.safetensors").stat().st_size
    assert mask.num_neurons == 221 and sum(mask.sizes.values()) == 5760 and size < 14_000
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "mask.safetensors"), "--json"])
    assert json.loads(shown.stdout)["metadata"]["prompts_per_neuron"][neurons[0].layer]["0"] == 3
    assert "0 (3), 10 (3), 20 (0)" in " ".join(
        CliRunner().invoke(app, ["inspect", str(tmp_path / "mask.safetensors")], env={"COLUMNS": "400"}).stdout.split()
    )


def test_the_publisher_names_the_base_of_a_local_checkpoint_but_not_another_one_than_the_hubs(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    files = scan_folder(tmp_path)
    base = base_facts(ModelSource(files), Statement(base_model="owner/base"))
    assert base.repo_id == "owner/base" and base.stated_by_publisher and base.model is None
    card = ModelCard(model_card(changed(run_record(), base=base), FOLDER))
    assert card.data.base_model == "owner/base" and "by its publisher's word" in card.text
    hub = ModelSource(files, "owner/base", COMMIT)
    assert not base_facts(hub, Statement(base_model="owner/base")).stated_by_publisher
    with pytest.raises(SettingsError, match="--base-model"):
        base_facts(hub, Statement(base_model="owner/other"))
    assert base_facts(ModelSource(files, "demo"), Statement()).model == "demo"


@pytest.mark.slow
def test_the_commands_of_a_card_rebuild_the_release(found, published, model_folder, tmp_path, monkeypatch):
    given = {"--model": model_folder, "--mask": published, "--out": tmp_path / "out", "--scale": -1 / 3}
    arguments = [
        *(str(part) for item in given.items() for part in item),
        "--license",
        "mit",
        "--base-model",
        "owner/base",
    ]
    exported = CliRunner().invoke(app, ["export", *arguments])
    assert exported.exit_code == 0 and "No licence text" in exported.stderr and "--license" not in exported.stderr
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "owner/base")
    assert "Nothing was measured on this model" in card.text
    assert "| examined | 14 |" in card.text
    monkeypatch.chdir(tmp_path / "out")
    Path("base").symlink_to(model_folder)
    (commands,) = re.findall(r"```bash\n(.*?)```", card.text, re.DOTALL)
    for command in commands.replace("\\\n", "").splitlines():
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, (command, result.output)
    Path("rebuilt", "LICENSE").write_text("added by hand")
    assert CliRunner().invoke(app, ["diff", "base", "rebuilt"]).exit_code == 0
    Path("rebuilt", "more").write_text("added by hand")
    assert CliRunner().invoke(app, ["diff", "base", "rebuilt"]).exit_code == 1
    digest = sha256((tmp_path / "out" / "rebuilt" / WEIGHTS).read_bytes()).hexdigest()
    assert f"- `{WEIGHTS}`: `{digest}`" in card.text
