import pytest

from nemo_prune.errors import PromptError
from nemo_prune.prompts import Prompt, read_prompts


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
    assert read_prompts(path) == [Prompt('Say "hi";\nnow, twice', "TM")]


def test_image_column_is_relative_to_the_file(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("caption,image\na,images/a.png\n", encoding="utf-8")
    assert read_prompts(path)[0].image == tmp_path / "images/a.png"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("header.csv", b"Caption\n", "holds no prompt"),
        ("no_column.csv", b"title,url\na,b\n", "no caption column.*title,url"),
        ("latin1.txt", "Café".encode("latin-1"), "not UTF-8"),
        ("prompts.docx", b"a", "neither .txt nor .csv"),
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
