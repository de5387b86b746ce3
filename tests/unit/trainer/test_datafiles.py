"""Which files of a folder are read as rows."""

from pathlib import Path

from finetune_trainer.sources.datafiles import data_files, files_at


def test_what_lies_beside_rows_is_not_read_as_rows() -> None:
    cloned = [
        "README.md",
        ".gitattributes",
        "dataset_infos.json",
        "data/train-00000.parquet",
        "data/train-00001.parquet",
    ]
    assert data_files(cloned) == ["data/train-00000.parquet", "data/train-00001.parquet"]
    written_by_spark = ["_SUCCESS", "part-00000.json.gz", ".part-00000.json.gz.crc"]
    assert data_files(written_by_spark) == ["part-00000.json.gz"]
    saved_to_disk = ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"]
    assert data_files(saved_to_disk) == ["data-00000-of-00001.arrow"]  # which is refused by what it is


def test_empty_files_of_a_folder_are_not_rows(tmp_path: Path) -> None:
    (tmp_path / "part-0.jsonl").write_text("")
    (tmp_path / "part-1.jsonl").write_text('{"text": "a"}\n')
    assert [file.name for file in files_at(tmp_path)] == ["part-1.jsonl"]
    assert [file.name for file in files_at(tmp_path / "part-0.jsonl")] == [
        "part-0.jsonl"
    ]  # asked for: told to be empty
