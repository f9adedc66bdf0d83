"""Caption files as people have them: nothing is cut, swallowed or made up."""

import codecs
import datetime
import decimal
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from nemo_prune.cli import app
from nemo_prune.cli.options import ordinary_captions
from nemo_prune.corpus.prompts import Prompt, read_corpus, read_prompts
from nemo_prune.corpus.stream import CaptionStream, kind_of
from nemo_prune.errors import PromptError


def texts(path, column=None):
    return read_corpus(path, column).texts


def written(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def parquet(path, table):
    pyarrow.parquet.write_table(table, path)
    return path


# --- rows that are cut or swallowed ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # One column, and commas in its rows: the prompt must not become `masterpiece`.
        ("caption\nmasterpiece, best quality, a cat\n", r"line 2 has 3 cells, its header 1.*comma.*double quotes"),
        ("caption;type\na cat;VM\nmasterpiece; a dog;TM\n", "line 3 has 3 cells, its header 2.*semicolon"),
        ("caption\na cat,\n", "line 2 has 2 cells"),
        # Of R, whose header lacks the name of the first column.
        ("caption,type\n1,a cat,VM\n", "line 2 has 3 cells"),
        # A quote that is never closed swallows what follows, up to the end or to the next quote.
        ('caption,type\na cat,VM\n"a dog,VM\na bird,TM\n', r"line 3 opens a quote.*Close it"),
        ('caption,type\n"a dog,VM\na bird,TM\n"a fish",VM\n', "line 2 opens a quote"),
        ('type,caption\nVM,"a dog\nTM,a bird\nVM,"a fish"\n', "line 2 opens a quote"),
        # A quote that is closed too early: its caption would lose it.
        ('caption,type\n"Hello" she said,VM\n', "line 2 opens a quote"),
        # A caption in two lines without quotes.
        ("type,caption,url\nVM,a cat\non a mat,http://a\n", "line 2 has 2 cells, its header 3.*two lines"),
        ("caption,url,caption\na,b,c\n", "names the column `caption` twice"),
    ],
)
def test_a_row_that_would_be_cut_or_swallowed_is_an_error_with_its_line(tmp_path, content, message):
    path = written(tmp_path / "captions.csv", content)
    with pytest.raises(PromptError, match=message):
        read_prompts(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('caption\n"masterpiece, best quality, a cat"\n', ["masterpiece, best quality, a cat"]),
        ('caption,type\n"a dog\nin two lines",VM\na bird,TM\n', ["a dog\nin two lines", "a bird"]),
        ('caption,type\n"""Hello"" she said",VM\n', ['"Hello" she said']),
        ('caption,type\na 12" pizza,VM\n', ['a 12" pizza']),
        # Empty lines and columns without a name at the end are no cells.
        ("caption,type,\na cat,VM\n\na dog,TM,\n", ["a cat", "a dog"]),
        # Line breaks of Windows, between rows and within a cell.
        ('caption,type\r\n"a\r\nb",VM\r\nc,TM\r\n', ["a\nb", "c"]),
        # Two exports, one behind the other: the header stands there again, with its byte order mark.
        ("caption,type\na cat,VM\ncaption,type\na dog,TM\n", ["a cat", "a dog"]),
        ("caption\ncaption\n", ["caption"]),
        # What the text encoder saw in the training stays as it is.
        ("caption,type\n<i>Fish &amp; Chips</i> &#39;n,VM\n", ["<i>Fish &amp; Chips</i> &#39;n"]),
    ],
)
def test_what_is_whole_is_read_as_it_stands(tmp_path, content, expected):
    assert texts(written(tmp_path / "captions.csv", content)) == expected


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = written(tmp_path / "captions.csv", 'sep=;\ncaption;type\n"two\nlines";VM\n\na;b;c\n')
    with pytest.raises(PromptError, match="line 6 has 3 cells"):
        read_prompts(path)


def test_a_very_long_caption_is_read_whole(tmp_path):
    long = "word " * 400_000
    csv = written(tmp_path / "long.csv", f'caption,type\n"{long}",VM\n')
    lines = written(tmp_path / "long.jsonl", json.dumps({"caption": long}))
    assert texts(csv) == texts(lines) == [long.strip()]


# --- columns ---


@pytest.mark.parametrize("name", ["TEXT", "Prompt", " caption ", "CAPTION", "Text"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_columns_are_found_in_any_case_and_with_spaces_around_them(tmp_path, name, ending):
    path, row = tmp_path / f"captions.{ending}", {" Type": "VM", name: "a cat", "Note ": "x"}
    if ending == "parquet":
        parquet(path, pyarrow.Table.from_pylist([row]))
    else:
        content = json.dumps(row) if ending == "jsonl" else "\n".join(",".join(each) for each in (row, row.values()))
        written(path, content)
    assert read_prompts(path) == [Prompt("a cat", "VM", None, {"Note": "x"})]
    assert texts(path, "note") == ["x"]


def test_a_name_that_fits_two_columns_is_an_error_unless_it_is_one_of_them(tmp_path):
    path = written(tmp_path / "captions.csv", "Caption,CAPTION\na,b\n")
    with pytest.raises(PromptError, match=r"`Caption` and `CAPTION`.*--prompt-column.*--calibration-column"):
        read_prompts(path)
    assert texts(path, "CAPTION") == ["b"] and texts(path, "Caption") == ["a"]
    both = written(tmp_path / "both.csv", "text,caption\na,b\n")
    assert texts(both) == ["b"] and texts(both, "Text") == ["a"]


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;"])
def test_excels_first_line_names_the_delimiter(tmp_path, first):
    path = written(tmp_path / "captions.csv", f"{first}\r\ntype;caption\r\nVM;a cat, a mat\r\n")
    assert read_prompts(path) == [Prompt("a cat, a mat", "VM")]
    # A caption that looks like it, further down, is one.
    assert texts(written(tmp_path / "other.csv", "caption\nsep=;\n")) == ["sep=;"]


def test_a_column_full_of_nothing_is_told_and_the_rows_are_counted(tmp_path):
    empty = written(tmp_path / "empty.csv", "caption,title\n,a cat\n ,a dog\n")
    with pytest.raises(PromptError, match=r"empty in all of its 2 rows.*--prompt-column"):
        read_prompts(empty)
    with pytest.raises(PromptError, match="empty in all of its 2 rows"):
        CaptionStream(lambda: iter([Prompt(""), Prompt("")]))
    corpus = read_corpus(written(tmp_path / "some.csv", "caption,title\n,x\na cat,y\na cat,z\n"))
    assert (corpus.texts, corpus.num_empty, corpus.num_duplicates) == (["a cat"], 1, 1)
    # Empty lines of a text file are not rows.
    assert read_corpus(written(tmp_path / "some.txt", "a cat\n\n\na dog\n")).num_empty == 0


@pytest.fixture
def two_columns(tmp_path):
    rows = "".join(f",{number},ordinary thing {number}\n" for number in range(3))
    return written(tmp_path / "ordinary.csv", "caption,number,Title\n" + rows + "x,9,\n")


def test_the_column_of_the_ordinary_captions_can_be_named_and_empty_rows_are_told(two_columns, capsys):
    found = ordinary_captions("a model", str(two_columns), "title")
    assert found.texts == tuple(f"ordinary thing {number}" for number in range(3))
    assert "1 rows of" in capsys.readouterr().err
    assert ordinary_captions("a model", str(two_columns)).texts == ("x",)
    with pytest.raises(PromptError, match="no column `subject`"):
        ordinary_captions("a model", str(two_columns), "subject")
    with pytest.raises(PromptError, match="--calibration-prompts"):
        ordinary_captions("demo", None, "title")


@pytest.mark.parametrize("command", ["run", "localize", "calibrate", "screen"])
def test_every_command_with_ordinary_captions_takes_their_column(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert "--calibration-column" in result.output


# --- cells that are no text ---

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ["a cat"]),
        (b"caf\xc3\xa9", ["café"]),
        (["a cat", "a dog"], ["a cat", "a dog"]),
        (["a cat", None, "a dog"], ["a cat", "a dog"]),
        ([b"a cat"], ["a cat"]),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_cells_become_the_captions_that_they_hold(tmp_path, value, expected, ending):
    path = tmp_path / f"captions.{ending}"
    if ending == "parquet":
        parquet(path, pyarrow.table({"caption": [value], "type": ["VM"]}))
    else:
        # JSON has no bytes.
        value = json.loads(json.dumps(value, default=bytes.decode))
        written(path, json.dumps({"caption": value, "type": "VM"}))
    assert read_prompts(path) == [Prompt(text, "VM") for text in expected]


def test_nothing_and_not_a_number_are_empty_and_counted(tmp_path):
    rows = [{"caption": NAN}, {"caption": None}, {"caption": []}, {"caption": ""}, {"other": "x"}, {"caption": "a cat"}]
    lines = written(tmp_path / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    corpus = read_corpus(lines)
    assert (corpus.texts, corpus.num_empty) == (["a cat"], 5)
    stream = CaptionStream(lambda: iter([Prompt(""), Prompt("a"), Prompt(""), Prompt("a")]))
    assert (stream.num_prompts, stream.num_empty, stream.num_duplicates) == (1, 2, 1)
    assert [prompt.text for prompt in stream] == ["a"]
    # The words themselves are captions.
    assert texts(written(tmp_path / "words.csv", "caption,type\nnan,VM\nNone,TM\nnull,TM\n")) == ["nan", "None", "null"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "row 2: its caption is not text but int: 7"),
        (1.5, "row 2.*float"),
        (True, "row 2.*bool"),
        (datetime.date(2024, 1, 1), "row 2.*date"),
        (decimal.Decimal("1.5"), "row 2.*Decimal"),
        ({"en": "a cat"}, "row 2.*dict"),
        ([["a cat"]], "row 2.*list"),
        (b"caf\xe9", "row 2.*not UTF-8"),
        ("a\0b", "row 2.*NUL"),
    ],
)
def test_any_other_cell_is_an_error_with_its_row(tmp_path, value, message):
    column = pyarrow.array([None, value])
    with pytest.raises(PromptError, match=message):
        read_prompts(parquet(tmp_path / "captions.parquet", pyarrow.table({"caption": column})))


def test_what_travels_along_is_not_spelled_as_python_has_it(tmp_path):
    row = {"caption": "a", "type": NAN, "note": NAN, "tags": ["x"], "raw": None, "n": 3}
    path = written(tmp_path / "captions.jsonl", json.dumps(row))
    assert read_prompts(path) == [Prompt("a", None, None, {"n": "3"})]


def test_a_label_of_zero_is_a_label(tmp_path):
    table = pyarrow.table({"caption": ["a", "b", "c"], "Type": [0, 1, None], "Label ": [False, True, None]})
    prompts = read_prompts(parquet(tmp_path / "captions.parquet", table))
    for column in ("type", "TYPE", "label"):
        assert [kind_of(prompt, column) for prompt in prompts] == ["ordinary", "memorized", None]


STRINGS = ["a cat", None, "a dog", "a cat"]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(STRINGS, pyarrow.large_string()),
        pyarrow.array(STRINGS).dictionary_encode(),
        pyarrow.array([each and each.encode() for each in STRINGS], pyarrow.large_binary()),
        pyarrow.array([each and [each] for each in STRINGS], pyarrow.large_list(pyarrow.string())),
    ],
    ids=str,
)
def test_parquet_columns_of_every_kind_of_text(tmp_path, column):
    corpus = read_corpus(parquet(tmp_path / "captions.parquet", pyarrow.table({"caption": column})))
    assert (corpus.texts, corpus.num_duplicates, corpus.num_empty) == (["a cat", "a dog"], 1, 1)


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["caption", "caption"])
    with pytest.raises(PromptError, match="two columns `caption`"):
        read_prompts(parquet(tmp_path / "captions.parquet", table))


def test_a_data_set_of_the_hub_obeys_the_same_rules(monkeypatch):
    import datasets

    rows = {"Text ": [["a cat", "a dog"], None, ["a cat"]], "n": [0, 1, 2]}
    built = datasets.Dataset.from_dict(rows).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **options: built)
    corpus = read_corpus("owner/name")
    assert (corpus.texts, corpus.num_empty, corpus.num_duplicates) == (["a cat", "a dog"], 1, 1)
    with pytest.raises(PromptError, match="row 1: its caption is not text but int"):
        read_prompts("owner/name::n")


# --- JSON in other shapes ---


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson", "JSON"])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_is_read_like_lines(tmp_path, ending, indent):
    rows = [{"caption": "a cat"}, {"caption": "a dog"}]
    assert texts(written(tmp_path / f"captions.{ending}", json.dumps(rows, indent=indent))) == ["a cat", "a dog"]
    assert texts(written(tmp_path / f"plain.{ending}", json.dumps(["a cat", "a dog"], indent=indent))) == [
        "a cat",
        "a dog",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"caption": "a"}\n{"caption": "b', "line 2 is not valid JSON"),
        ('{"caption": "a", "caption": "b"}\n', "line 1.*a key stands twice"),
        ('[{"caption": "a"}, 7]', "item 2 is not a JSON object"),
        ('[{"caption": "a"}', "array from line 1 is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"caption": ' + "[" * 100_000, "line 1.*nested too deeply"),
        ('{\n  "captions": ["a cat"]\n}\n', "line 1 is not valid JSON.*one object per line"),
    ],
)
def test_other_json_is_a_named_error(tmp_path, content, message):
    with pytest.raises(PromptError, match=message):
        read_prompts(written(tmp_path / "captions.json", content))


# --- encodings and damage ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("txt", "Café 猫\nzwei\n"),
        ("csv", "caption\nCafé 猫\nzwei\n"),
        ("tsv", "n\tcaption\n1\tCafé 猫\n2\tzwei\n"),
        ("jsonl", '{"caption": "Café 猫"}\n{"caption": "zwei"}\n'),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_every_marked_encoding_is_read(tmp_path, encoding, ending, content, is_packed):
    encoded = content.encode(encoding)
    path = tmp_path / (f"captions.{ending}.GZ" if is_packed else f"captions.{ending}")
    assert texts(written(path, gzip.compress(encoded) if is_packed else encoded)) == ["Café 猫", "zwei"]


def test_big_endian_and_joined_files_with_a_mark_within(tmp_path):
    big = codecs.BOM_UTF16_BE + "a cat\n".encode("utf-16-be")
    assert texts(written(tmp_path / "big.txt", big)) == ["a cat"]
    joined = codecs.BOM_UTF8 + b"a cat\n" + codecs.BOM_UTF8 + b"a dog\n"
    assert texts(written(tmp_path / "joined.txt", joined)) == ["a cat", "a dog"]


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_utf_16_without_a_mark_is_not_read_as_something_else(tmp_path, ending):
    path = written(tmp_path / f"captions.{ending}", "caption\na cat\n".encode("utf-16-le"))
    with pytest.raises(PromptError, match=r"UTF-16.*Save it as UTF-8"):
        read_prompts(path)


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_windows_1252_is_named_with_its_line(tmp_path, ending):
    path = written(tmp_path / f"captions.{ending}", "caption\n" + "a cat\n" * 5000 + "Café bar\n", "cp1252")
    with pytest.raises(PromptError, match=r"not UTF-8: see line 5002, byte b'\\xe9'.*Windows-1252"):
        read_prompts(path)


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet"])
def test_a_packed_file_that_is_cut_or_damaged_is_a_named_error(tmp_path, ending):
    rows = [{"caption": f"a cat number {number}"} for number in range(2000)]
    path = tmp_path / f"captions.{ending}"
    if ending == "parquet":
        parquet(path, pyarrow.Table.from_pylist(rows))
    elif ending == "jsonl":
        written(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        written(path, "caption\n" + "".join(f"{row['caption']}\n" for row in rows))
    packed = gzip.compress(path.read_bytes())
    damaged = bytearray(packed)
    damaged[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    for content in (packed[: len(packed) // 2], bytes(damaged)):
        with pytest.raises(PromptError, match=r"captions\..*\.gz"):
            read_prompts(written(tmp_path / f"captions.{ending}.gz", content))
    assert len(read_prompts(written(tmp_path / f"whole.{ending}.gz", packed))) in (2000, 2001)


def test_a_packed_file_without_its_ending_is_told(tmp_path):
    with pytest.raises(PromptError, match=r"packed with gzip.*captions\.csv\.gz"):
        read_prompts(written(tmp_path / "captions.csv", gzip.compress(b"caption\na\n")))


# --- folders ---


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


@pytest.mark.parametrize("is_absolute", [True, False])
@pytest.mark.parametrize("name", ["captions", "data/captions"])
def test_a_folder_of_caption_files_works_from_anywhere(tmp_path, monkeypatch, is_absolute, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    written(folder / "b.csv", "Caption\na dog\n")
    written(folder / "a.jsonl", '{"text": "a cat"}\n')
    written(folder / "notes.docx", "x")
    written(folder / ".hidden.txt", "hidden")
    (folder / "inner").mkdir()
    written(folder / "inner" / "c.txt", "a bird\na cat\n")
    monkeypatch.chdir(tmp_path)
    corpus = read_corpus(folder if is_absolute else name)
    assert (corpus.texts, corpus.num_duplicates) == (["a cat", "a dog", "a bird"], 1)


@pytest.mark.parametrize("pattern", ["", "/*", "/*.txt"])
def test_a_text_beside_a_picture_is_the_caption_of_that_training_image(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    cat, dog, bird = (picture(tmp_path / "own" / name) for name in ("cat.png", "dog.JPG", "bird.webp"))
    written(tmp_path / "own" / "cat.txt", "a cat\n")
    written(tmp_path / "own" / "dog.JPG.txt", "a dog\nthe same dog\n")
    # A picture without a caption is none.
    for source in (tmp_path / "own", "own"):
        found = {prompt.text: prompt.image for prompt in read_prompts(f"{source}{pattern}")}
        assert {text: image.resolve() for text, image in found.items()} == {
            "a cat": cat,
            "a dog": dog,
            "the same dog": dog,
        }
    written(tmp_path / "own" / "bird.caption", "a bird")
    assert {prompt.text: prompt.image for prompt in read_prompts("own")}["a bird"].resolve() == bird


def test_a_stray_text_among_captions_of_pictures_is_not_taken_for_a_caption(tmp_path):
    picture(tmp_path / "cat.png")
    written(tmp_path / "cat.txt", "a cat")
    written(tmp_path / "README.txt", "These pictures are mine.")
    with pytest.raises(PromptError, match=r"1 text files without a picture.*README\.txt"):
        read_prompts(tmp_path)
    assert len(read_prompts(tmp_path / "*.txt")) == 2
    # One file by its name is a list of captions, whatever is beside it.
    assert read_prompts(tmp_path / "cat.txt") == [Prompt("a cat")]


def test_a_folder_without_captions_is_told(tmp_path):
    picture(tmp_path / "cat.png")
    with pytest.raises(PromptError, match="holds no caption file"):
        read_prompts(tmp_path)


def test_a_folder_of_pictures_with_a_table_as_the_hub_has_them(tmp_path):
    cat = picture(tmp_path / "train" / "cat.png")
    rows = [{"file_name": "cat.png", "text": "a cat"}, {"file_name": "elsewhere.png", "text": "a dog"}]
    written(tmp_path / "train" / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(tmp_path) == [
        Prompt("a cat", None, cat),
        Prompt("a dog", None, None, {"file_name": "elsewhere.png"}),
    ]


def test_an_address_in_the_image_column_travels_along(tmp_path):
    path = written(tmp_path / "captions.csv", "caption,image\na,https://example.org/a.png\nb,pictures/b.png\n")
    assert read_prompts(path) == [
        Prompt("a", None, None, {"image": "https://example.org/a.png"}),
        Prompt("b", None, tmp_path / "pictures" / "b.png"),
    ]
