"""Models, masks and records come from elsewhere: damaged or hostile, they give a named error and never a wrong byte."""

import json
import os
import shutil
import struct
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from typer.testing import CliRunner

from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.parts import publicly_named
from nemo_prune.checkpoint.privacy import cleaned_metadata
from nemo_prune.cli import app
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.merge import union_mask
from nemo_prune.engine.results import ResultsFile, ResultsHeader, read_results
from nemo_prune.errors import MaskError, ModelError, NemoPruneError, PromptError
from nemo_prune.facts import BaseFacts, MaskFacts, StatusCounts
from nemo_prune.files.mask_tensors import METADATA_KEY
from nemo_prune.files.safetensors_header import copy_with_metadata, read_header, read_metadata
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.source import ModelSource, resolve_model
from nemo_prune.publish.parcel import pack
from nemo_prune.release.from_mask import export_model
from nemo_prune.release.record import ImageAverages, Record
from records import WEIGHTS, run_record

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
TENSORS = {
    f"{LAYER}.bias": torch.arange(1, 5).bfloat16(),
    f"{LAYER}.weight": torch.arange(1, 13).reshape(4, 3).float(),
    "conv_in.weight": torch.arange(1, 9).reshape(2, 2, 2).half(),
    "positions": torch.arange(3),
}
MASK = NeuronMask({LAYER: torch.tensor([False, True, False, True])})
HOSTILE = st.sampled_from(
    [None, True, -1, 2**31, 2**63, 2**64, 10**400, 0.5, float("inf"), "", "..", "F64", "I32", "Q9", "../x", "\x1b[31m",
     "\ud800", [], [-1, 4], [4, 0], [0, 2**62], [True, True], {}, {"a": {}}, [[[]]]]
)  # fmt: skip
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """A file with some of its bytes changed, more, fewer or gone."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)) | st.integers(0, min(20, len(content))))
        piece = draw(st.binary(max_size=4))
        match draw(st.sampled_from(("replace", "insert", "delete", "flip", "truncate"))):
            case "replace":
                content = content[:place] + piece + content[place + len(piece) :]
            case "insert":
                content = content[:place] + piece + content[place:]
            case "delete":
                content = content[:place] + content[place + draw(st.integers(1, 9)) :]
            case "truncate":
                content = content[:place]
            case "flip" if place < len(content):
                flipped = content[place] ^ 1 << draw(st.integers(0, 7))
                content = content[:place] + bytes([flipped]) + content[place + 1 :]
    return content


@st.composite
def mutated_json(draw, value: object) -> object:
    """A JSON value with one value in it replaced, removed or named otherwise."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(HOSTILE)
    value = value.copy()
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    match draw(st.sampled_from(("inside", "remove", "rename"))):
        case "inside":
            value[key] = draw(mutated_json(value[key]))
        case "remove":
            del value[key]
        case "rename" if isinstance(value, dict):
            value[draw(st.sampled_from(["../x", "\x1b[2J", "ü", "x" * 300, "", *value]))] = value.pop(key)
    return value


def with_header(content: bytes, header: bytes) -> bytes:
    """A safetensors file with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def header_of(content: bytes) -> dict:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def pruned_bytes(content: bytes, mask: dict) -> bytes:
    """What an export must give: the header read without any of our code, and masked rows zeroed one by one."""
    (length,) = struct.unpack("<Q", content[:8])
    pruned = bytearray(content)
    for name, entry in header_of(content).items():
        rows = mask.get(name.rpartition(".")[0]) if name.endswith((".weight", ".bias")) else None
        if rows is not None:
            first, last = entry["data_offsets"]
            size = (last - first) // entry["shape"][0]
            for row in rows.nonzero().flatten().tolist():
                start = 8 + length + first + row * size
                pruned[start : start + size] = bytes(size)
    return bytes(pruned)


@pytest.fixture
def base(tmp_path):
    """The smallest folder that can be exported."""
    return make_base(tmp_path / "base")


@pytest.fixture(autouse=True)
def no_pipeline(monkeypatch):
    """The bases of these tests hold a few tensors by hand, which stock diffusers has no pipeline for."""
    monkeypatch.setattr("nemo_prune.release.writing.check_loads", lambda folder: None)


def make_base(folder):
    """The folder, made where it is missing: examples of one test share it."""
    if folder.exists():
        return folder
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    save_file(TENSORS, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def make_mask(base, path):
    found = NeuronMask.from_neurons([Neuron(LAYER, 1), Neuron(LAYER, 3)], {LAYER: 4})
    facts = MaskFacts(
        base=BaseFacts("x"),
        settings={"theta": 5.0},
        prompts=StatusCounts(total=2, localized=2, not_memorized=0, unresolved=0, unresolved_included=False),
        base_tensors=tensor_digests(scan_folder(base), found),
    )
    found.save(path, facts)
    return path


def published_bytes(file, copy):
    """A file as it is copied; a header that a mutation gave a key that is not published is written without it."""
    kept, dropped = cleaned_metadata(read_metadata(file), tensors_changed=True)
    if not dropped:
        return file.read_bytes()
    copy_with_metadata(file, copy, kept)
    return copy.read_bytes()


def assert_error_or_exactly_the_masked_rows(base, mask_file, out, mask=None):
    """Export, and hold what comes out against what must."""
    shutil.rmtree(out, ignore_errors=True)
    before = (base / WEIGHTS).read_bytes()
    try:
        if mask is None:
            export_model(ModelSource(scan_folder(base)), mask_file, out, force=True)
        else:
            out.mkdir()
            export_checkpoint(base, mask, out)
    except NemoPruneError as error:
        assert len(str(error)) < 1500
        return False
    layers = load_file(mask_file) if mask is None else mask.layers
    assert (out / WEIGHTS).read_bytes() == pruned_bytes(published_bytes(base / WEIGHTS, out.with_name("copy")), layers)
    assert not any("\x1b" in card.read_text() for card in out.glob("*.md"))
    assert (base / WEIGHTS).read_bytes() == before
    return True


@many
@given(st.data())
def test_mutated_bytes_give_an_error_or_exactly_the_masked_rows(tmp_path, data):
    base = make_base(tmp_path / "base")
    content = save(TENSORS, metadata={"format": "pt"})
    (base / WEIGHTS).write_bytes(data.draw(mutated(content)))
    assert_error_or_exactly_the_masked_rows(base, None, tmp_path / "out", MASK)


@many
@given(st.data())
def test_mutated_headers_give_an_error_or_what_the_official_reader_sees(tmp_path, data):
    base = make_base(tmp_path / "base")
    content = save(TENSORS)
    header = data.draw(mutated_json(header_of(content)))
    (base / WEIGHTS).write_bytes(with_header(content, json.dumps(header).encode()))
    if assert_error_or_exactly_the_masked_rows(base, None, tmp_path / "out", MASK):
        with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
            assert set(file.keys()) == set(read_header(base / WEIGHTS))


def test_an_intact_file_passes(base, tmp_path):
    assert assert_error_or_exactly_the_masked_rows(base, None, tmp_path / "out", MASK)


def test_hostile_headers_are_refused_before_anything_is_written(base, tmp_path):
    content = save({"a.weight": torch.ones(2, 3)})
    good = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    entries = [
        {"data_offsets": [0, 2**40]}, {"data_offsets": [-24, 0]}, {"data_offsets": [24, 0]},
        {"data_offsets": [4, 28]}, {"data_offsets": [0, 20]}, {"data_offsets": [0.0, 24.0]},
        {"data_offsets": [False, 24]}, {"data_offsets": [0, 24, 48]}, {"data_offsets": None},
        {"dtype": "F16"}, {"dtype": "F128"}, {"dtype": None}, {"dtype": []}, {"shape": [2, 4]}, {"shape": [2, -3]},
        {"shape": [2, 3, True]}, {"shape": [2.0, 3]}, {"shape": "23"}, {"shape": [1] * 10**5}, {"shape": [2**63] * 40},
    ]  # fmt: skip
    headers = [json.dumps({"a.weight": good | entry}).encode() for entry in entries]
    two = {"a.weight": good, "b": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]}}
    twice = json.dumps({"a.weight": good})[:-1].encode() + b', "a.weight": ' + json.dumps(good).encode() + b"}"
    headers += [
        json.dumps(two).encode(), twice, b"[]", b"null", b"7", b"", b"{", b"[" * 10**5, b'{"a.weight": ' * 10**5,
        b'{"a.weight": ' + b"9" * 10**5 + b"}", json.dumps({"a.weight": good}).encode("utf-16"), b"\xff\xfe{}",
        json.dumps({"a.weight": good, "__metadata__": {"a": 1}}).encode(), json.dumps({"__metadata__": []}).encode(),
    ]  # fmt: skip
    hostile = [with_header(content, header) for header in headers]
    hostile += [b"", b"\0" * 7, *(struct.pack("<Q", length) + content[8:] for length in (len(content), 2**63))]
    for damaged in hostile:
        (base / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ModelError, match="not a valid safetensors"):
            export_checkpoint(base, NeuronMask({"a": torch.ones(2, dtype=torch.bool)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_masked_layer_of_another_shape_or_no_floats_is_refused_and_elsewhere_it_is_kept(base, tmp_path):
    content = save({f"{LAYER}.weight": torch.ones(4, 2), "other": torch.ones(1)})
    mask = NeuronMask({LAYER: torch.ones(4, dtype=torch.bool)})
    for name, change, refused in (
        (f"{LAYER}.weight", {"shape": [8]}, True), (f"{LAYER}.weight", {"dtype": "I32"}, True),
        ("other", {"shape": []}, False), ("other", {"dtype": "I32"}, False),
    ):  # fmt: skip
        header = header_of(content)
        header[name] |= change
        (base / WEIGHTS).write_bytes(with_header(content, json.dumps(header).encode()))
        assert assert_error_or_exactly_the_masked_rows(base, None, tmp_path / "out", mask) is not refused


@settings(many, max_examples=40)
@given(st.data())
def test_mutated_masks_give_an_error_or_exactly_the_rows_that_they_hold(tmp_path, data):
    base, mask_file = tmp_path / "base", tmp_path / "mask.safetensors"
    if not base.exists():
        make_base(base)
        make_mask(base, tmp_path / "intact")
    content = (tmp_path / "intact").read_bytes()
    if data.draw(st.booleans()):
        mask_file.write_bytes(data.draw(mutated(content)))
    else:
        header = header_of(content)
        metadata = json.loads(header["__metadata__"][METADATA_KEY])
        # Else nothing that changes a row gets any further.
        metadata.pop("digest")
        header["__metadata__"][METADATA_KEY] = json.dumps(data.draw(mutated_json(metadata)))
        header = data.draw(st.just(header) | mutated_json(header))
        mask_file.write_bytes(with_header(content, json.dumps(header).encode()))
    assert_error_or_exactly_the_masked_rows(base, mask_file, tmp_path / "out")
    shown = CliRunner().invoke(app, ["inspect", str(mask_file)])
    assert shown.exit_code in (0, 1) and (shown.exception is None or isinstance(shown.exception, SystemExit))
    assert "\x1b" not in shown.output


def test_an_intact_mask_passes_and_a_flipped_bit_is_noticed(base, tmp_path):
    mask_file = make_mask(base, tmp_path / "mask.safetensors")
    assert assert_error_or_exactly_the_masked_rows(base, mask_file, tmp_path / "out")
    content = mask_file.read_bytes()
    for value in (1, 2, 255):
        mask_file.write_bytes(content[:-4] + bytes([value]) + content[-3:])
        with pytest.raises(MaskError, match="damaged"):
            NeuronMask.load(mask_file)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a..b", ".a", "a.", "", "a b", "[red]x", "a\x1b[2J", "ü"])
def test_layers_with_names_that_are_none_are_refused(tmp_path, name):
    save_file({name: torch.ones(2, dtype=torch.bool)}, tmp_path / "mask", {METADATA_KEY: '{"format_version": 1}'})
    with pytest.raises(MaskError, match="dotted module name"):
        NeuronMask.load(tmp_path / "mask")


def test_a_mask_of_another_dtype_or_of_gigabytes_is_refused_unread(tmp_path):
    described = {METADATA_KEY: '{"format_version": 1}'}
    save_file({"a": torch.ones(2)}, tmp_path / "floats", described)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    for name, word in (("floats", "F32"), ("large", "megabytes")):
        with pytest.raises(MaskError, match=word):
            NeuronMask.load(tmp_path / name)


def test_what_inspect_shows_can_not_steer_the_terminal(tmp_path):
    evil = "\x1b]0;x\x07\x1b[2J\u202eabc"
    mask = NeuronMask({LAYER: torch.ones(2, dtype=torch.bool)})
    mask.save(tmp_path / "mask", MaskFacts(BaseFacts(evil, commit=evil), {evil: evil}))
    for name, *options in (["mask"], [evil], ["mask", "--json"]):
        output = CliRunner().invoke(app, ["inspect", str(tmp_path / name), *options]).output
        assert not {"\x1b", "\x07", "\u202e"} & set(output) and "abc" in output


@many
@given(st.data())
def test_mutated_records_give_an_error_or_what_was_sealed(tmp_path, data):
    record = tmp_path / "nemo_prune.json"
    intact = run_record()
    intact.save(record)
    assert Record.load(record) == intact
    content = record.read_bytes()
    if data.draw(st.booleans()):
        record.write_bytes(data.draw(mutated(content)))
    else:
        record.write_text(json.dumps(data.draw(mutated_json(json.loads(content)))))
    with suppress(NemoPruneError):
        assert Record.load(record) == intact


@many
@given(st.data())
def test_records_that_were_mutated_and_sealed_anew_are_refused_or_push_what_lies_there(tmp_path, data):
    out = tmp_path / "out"
    if not out.exists():
        base = make_base(tmp_path / "base")
        export_model(ModelSource(scan_folder(base)), make_mask(base, tmp_path / "mask"), out)
        (tmp_path / "record.json").write_bytes((out / "nemo_prune.json").read_bytes())
        assert WEIGHTS in pack(out, "owner/name", allow_residual=True).sha256
    of_a_run = run_record(
        scores={"suppressed_above_threshold": 1}, images={"memorized": ImageAverages(2, copies_after=0.1)}
    )
    record = replace(Record.load(tmp_path / "record.json"), prompts=of_a_run.prompts, measured=of_a_run.measured)
    facts = record.to_json()
    facts = data.draw(st.just(facts) | mutated_json(facts))
    if isinstance(facts, dict):
        facts["seal"] = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (out / "nemo_prune.json").write_text(json.dumps(facts))
    with suppress(NemoPruneError):
        parcel = pack(out, "owner/name", allow_residual=True)
        parcel.check(lambda done, total: None)
        assert parcel.files.keys() == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert {WEIGHTS, "nemo_prune/mask.safetensors"} <= parcel.sha256.keys()


def test_hostile_records_are_refused(tmp_path):
    record = tmp_path / "nemo_prune.json"
    for content in (b"", b"[" * 10**5, b"\xff", b"7", b'{"a":' * 990 + b"1" + b"}" * 990, b"9" * 10**5):
        record.write_bytes(content)
        with pytest.raises(NemoPruneError):
            Record.load(record)
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(NemoPruneError):
        Record.load(record)


def make_results(path):
    neurons = (Neuron(LAYER, 1), Neuron(LAYER, 3))
    file = ResultsFile(path, ResultsHeader("digest", {LAYER: 4}, 0.5, {"theta": 5.0}))
    # Text ends a line at U+2028, JSON does not.
    file.append(PromptLocalization("a\u2028cat", "localized", 0.9, (0, 1), neurons, neurons, 0.1, 0.1, 5.0, 2, 0.01))
    file.append(PromptLocalization("a dog", "unresolved", 0.9, (0, 1), neurons[:1], neurons[:1]))
    return path


@many
@given(st.data())
def test_mutated_results_give_an_error_or_a_mask(tmp_path, data):
    intact = tmp_path / "results.jsonl"
    content = (intact if intact.exists() else make_results(intact)).read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(mutated(content))
    else:
        lines = data.draw(mutated_json([json.loads(line) for line in content.split(b"\n") if line]))
        content = b"\n".join(json.dumps(line).encode() for line in (lines if isinstance(lines, list) else [lines]))
    (tmp_path / "mutated.jsonl").write_bytes(content)
    with suppress(NemoPruneError):
        found = read_results(tmp_path / "mutated.jsonl")
        assert union_mask(found.localizations, found.header.layers, True).sizes == found.header.layers


def test_intact_results_are_read_and_hostile_ones_are_refused(tmp_path):
    found = read_results(make_results(tmp_path / "results.jsonl"))
    assert [each.prompt for each in found.localizations] == ["a\u2028cat", "a dog"]
    header = "Caption;Initial SSIM;Refined SSIM;Initial Neurons;Refined Neurons"
    for neurons in ("[" * 10**5, "[['a'], [], [], [], [], [], []]", "[[]]", "{}", "__import__('os')", "9" * 10**6):
        (tmp_path / "results.csv").write_text(f"{header}\nx;0.1;0.1;{neurons};{neurons}")
        with pytest.raises(PromptError, match="is not a result file"):
            read_results(tmp_path / "results.csv")


def refused(base, *words):
    with pytest.raises(ModelError) as caught:
        scan_folder(base)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "content",
    ["[]", "7", "{", "[" * 10**5, '{"unet": 1, "unet": 2}', '{"..": ["a", "B"]}', '{"/etc": ["a", "B"]}',
     '{"a/b": ["a", "B"]}', '{"": ["a", "B"]}', '{"\\u001b": ["a", "B"]}'],
)  # fmt: skip
def test_a_damaged_or_hostile_index_is_refused(base, content):
    (base / "model_index.json").write_text(content)
    refused(base, "model_index.json")
    with pytest.raises(ModelError):
        resolve_model(str(base))


def test_entries_that_name_no_component_are_passed_over(base):
    index = {"_class_name": "X", "unet": ["a", "B"], "checker": [None, None], "odd": [], "flag": True}
    (base / "model_index.json").write_text(json.dumps(index))
    assert Path(WEIGHTS) in scan_folder(base).kept


def test_links_out_of_the_folder_are_refused(base, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for name in ("unet/config.json", "LICENSE"):
        (base / name).symlink_to(secret)
        refused(base, name, str(secret), "cp -rL")
        (base / name).unlink()
    shutil.move(base / "unet", tmp_path / "elsewhere")
    (base / "unet").symlink_to(tmp_path / "elsewhere")
    refused(base, "unet", "cp -rL")


def test_links_within_the_folder_and_the_cache_of_the_hub_are_followed(tmp_path):
    repo = tmp_path / "models--owner--name"
    base = make_base(repo / "snapshots" / "commit")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (base / "model_index.json").write_text(json.dumps(parts))
    (base / "tokenizer").mkdir()
    blobs = {"vocab.json": repo / "blobs" / "1", "merges.txt": tmp_path / "blobs" / "2"}
    for name, blob in blobs.items():
        blob.parent.mkdir(exist_ok=True)
        blob.write_text(name)
        (base / "tokenizer" / name).symlink_to(os.path.relpath(blob, base / "tokenizer"))
    (base / "tokenizer" / "added_tokens.json").symlink_to("vocab.json")
    export_checkpoint(base, MASK, out := repo.parent / "out")
    assert [(out / "tokenizer" / name).read_text() for name in blobs] == list(blobs)
    assert (out / "tokenizer" / "added_tokens.json").read_text() == "vocab.json"
    assert not any(path.is_symlink() for path in out.rglob("*"))
    (base / "tokenizer" / "tokenizer.json").symlink_to(tmp_path / "models--other")
    refused(base, "tokenizer.json")


def test_pipes_loops_and_dangling_links_are_refused_and_not_read(base):
    for make in (os.mkfifo, lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("gone")):
        make(base / "unet" / "config.json")
        refused(base, "config.json")
        (base / "unet" / "config.json").unlink()
    (base / "model_index.json").unlink()
    os.mkfifo(base / "model_index.json")
    refused(base, "model_index.json")


def test_a_card_that_is_a_pipe_is_none(base, tmp_path):
    os.mkfifo(base / "README.md")
    assert assert_error_or_exactly_the_masked_rows(base, make_mask(base, tmp_path / "mask"), tmp_path / "out")


@pytest.mark.parametrize("shard", ["gone.safetensors", "../x", "/etc/passwd", "", 7, None, []])
def test_shards_that_are_not_beside_their_index_are_refused(base, shard):
    weights = {"weight_map": {"a": Path(WEIGHTS).name}}
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps(weights))
    scan_folder(base)
    weights["weight_map"]["b"] = shard
    index.write_text(json.dumps(weights))
    refused(base, index.name)


def test_a_name_that_can_not_be_printed_is_refused(base):
    (base / "unet" / "a\n## b.safetensors").touch()
    assert "## b" not in str(publicly_named(scan_folder(base).left_out))
    (base / "LICENSE\n## b.txt").touch()
    refused(base, "Rename")
