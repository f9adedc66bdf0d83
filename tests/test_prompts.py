import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from nemo_prune.corpus.prompts import Prompt, near_duplicates, read_corpus, read_prompts
from nemo_prune.errors import PromptError


def test_text_file_has_one_prompt_a_line_and_folds_duplicates(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\na dog\na cat\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a cat", "a dog"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("column", ["Caption", "caption", "prompt", "text"])
def test_table_with_any_delimiter_and_caption_column(tmp_path, delimiter, column):
    path = tmp_path / "prompts.csv"
    rows = [["", column, "type"], ["0", f'"a{delimiter} b"', "VM"], ["1", "c", ""]]
    path.write_text("\n".join(delimiter.join(row) for row in rows), encoding="utf-8-sig")
    assert read_prompts(path) == [Prompt(f"a{delimiter} b", "VM"), Prompt("c")]


def test_released_codes_format_with_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(
        ';Caption;URL;type;mean_sscd;max_sscd;Index\n0;"Say ""hi"";\nnow, twice";https://x.example/a,b.jpg;TM;.1;.2;3\n',
        encoding="utf-8",
    )
    (prompt,) = read_prompts(path)
    assert (prompt.text, prompt.kind) == ('Say "hi";\nnow, twice', "TM")
    assert prompt.columns["URL"] == "https://x.example/a,b.jpg"


def test_image_column_is_relative_to_the_file(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("caption,image\na,images/a.png\n", encoding="utf-8")
    assert read_prompts(path)[0].image == tmp_path / "images/a.png"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("header.csv", b"Caption\n", "holds no prompt"),
        ("no_column.csv", b"title,url\na,b\n", "no caption column.*title, url"),
        ("latin1.txt", "Café".encode("latin-1"), "not UTF-8"),
        ("prompts.docx", b"a", "none of .txt"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read_prompts(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PromptError, match=r"nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")


ROWS = [{"caption": "a cat", "type": "VM", "url": "http://a"}, {"caption": "a dog", "type": "TM", "url": "http://b"}]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_csv(path):
    path.write_text("caption;type;url\n" + "".join(";".join(row.values()) + "\n" for row in ROWS))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("suffix", "write"), [("jsonl", write_jsonl), ("parquet", write_parquet), ("tsv", write_csv)])
def test_every_format_gives_the_same_prompts_also_packed(tmp_path, suffix, write, packed):
    path = tmp_path / f"rows.{suffix}"
    write(path)
    if packed:
        path = tmp_path / f"rows.{suffix}.gz"
        path.write_bytes(gzip.compress((tmp_path / f"rows.{suffix}").read_bytes()))
    assert read_prompts(path) == [Prompt(row["caption"], row["type"], None, {"url": row["url"]}) for row in ROWS]


def test_a_pattern_takes_several_files_and_duplicates_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\na dog\na cat\n")
    (tmp_path / "b.txt").write_text("a dog\na bird\n")
    corpus = read_corpus(tmp_path / "*.txt")
    assert [prompt.text for prompt in corpus.prompts] == ["a cat", "a dog", "a bird"]
    assert corpus.num_duplicates == 2
    assert [prompt.text for prompt in read_prompts(tmp_path / "*.txt", limit=2)] == ["a cat", "a dog"]


def test_a_column_can_be_named_and_a_wrong_one_is_told(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("caption,title\nx,y\n")
    assert read_prompts(path, "title")[0].text == "y"
    with pytest.raises(PromptError, match="no column `name`"):
        read_prompts(path, "name")


def test_near_duplicates_are_grouped_along_chains():
    red = ["a red phone case", "a red phone case new", "red phone case new offer", "a Red, phone case!"]
    texts = [*red[:3], "a blue boat", "", red[3]]
    assert near_duplicates(texts) == [[0, 1, 2, 5], [3], [4]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv.gz"])
def test_damaged_files_are_named_errors(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"this is none of it\n")
    with pytest.raises(PromptError, match="rows"):
        read_prompts(path)


def test_half_a_character_in_json_is_readable_afterwards(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"caption": "a \\ud800 cat", "type": "\\udfff", "note": "\\udfff"}\n')
    (prompt,) = read_prompts(tmp_path / "prompts.jsonl")
    assert (prompt.text, prompt.kind, prompt.columns) == ("a ? cat", "?", {"note": "?"})
