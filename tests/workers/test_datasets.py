"""Data sets by name: what each kind of file gives, and that nothing outside the data sets folder can be named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from search.errors import InvalidCalibration
from workers import datasets
from workers.datasets import Images, Texts, load


def refusal(name: str) -> str:
    with pytest.raises(InvalidCalibration) as refused:
        load(name)
    problem = refused.value.problem()
    assert problem["field"] == "calibration.dataset"
    assert problem["value"] == name
    assert "python-docs" in problem["accepted"]
    return str(problem["detail"])


def jsonl(file: Path, *rows: object) -> None:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


def picture(file: Path, brightness: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (brightness,) * 3).save(file)


class TestTexts:
    def test_python_docs_is_the_language_reference(self) -> None:
        found = load("python-docs")
        assert isinstance(found, Texts)
        assert len(found.documents) > 50
        assert any("metaclass" in document for document in found.documents)

    @pytest.mark.parametrize("name", ["book.txt", "book"])
    def test_a_text_file_is_a_document_with_or_without_its_ending(self, datasets_folder: Path, name: str) -> None:
        (datasets_folder / "book.txt").write_text("Ein Bär — 熊\n")
        assert load(name) == Texts(["Ein Bär — 熊\n"])

    def test_jsonl_of_strings(self, datasets_folder: Path) -> None:
        jsonl(datasets_folder / "lines.jsonl", "one", "two")
        assert load("lines") == Texts(["one", "two"])

    @pytest.mark.parametrize("column", ["text", "sentence", "content"])
    def test_jsonl_of_records_with_labels(self, datasets_folder: Path, column: str) -> None:
        jsonl(datasets_folder / "films.jsonl", {column: "good", "label": 1}, {column: "bad", "label": 0})
        assert load("films.jsonl") == Texts(["good", "bad"], [1, 0])

    def test_records_without_text_are_left_out(self, datasets_folder: Path) -> None:
        jsonl(datasets_folder / "films.jsonl", {"text": "good", "label": 1}, {"text": None, "label": 0})
        assert load("films") == Texts(["good"], [1])

    def test_parquet(self, datasets_folder: Path) -> None:
        pd.DataFrame({"text": ["a", "b"], "label": [2, 0]}).to_parquet(datasets_folder / "table.parquet")
        assert load("table") == Texts(["a", "b"], [2, 0])

    def test_a_folder_is_read_whole_and_in_order(self, datasets_folder: Path) -> None:
        (datasets_folder / "library" / "b").mkdir(parents=True)
        (datasets_folder / "library" / "b" / "2.md").write_text("second")
        (datasets_folder / "library" / "a.txt").write_text("first")
        (datasets_folder / "library" / "notes.pdf").write_bytes(b"\x00")
        assert load("library") == Texts(["first", "second"])


class TestImages:
    def test_arrays_with_labels(self, datasets_folder: Path) -> None:
        images = np.random.default_rng(0).random((3, 1, 4, 4), dtype=np.float32)
        np.savez(datasets_folder / "digits.npz", images=images, labels=[7, 8, 9])
        found = load("digits")
        assert isinstance(found, Images)
        np.testing.assert_array_equal(np.stack(found.images), images)
        assert found.labels == [7, 8, 9]

    def test_one_bare_array(self, datasets_folder: Path) -> None:
        np.save(datasets_folder / "photos.npy", np.zeros((2, 5, 5, 3), dtype=np.uint8))
        found = load("photos.npy")
        assert isinstance(found, Images)
        assert (len(found.images), found.labels) == (2, None)

    def test_a_folder_per_class_gives_labels(self, datasets_folder: Path) -> None:
        for brightness, name in enumerate(["cats/1.png", "cats/2.PNG", "dogs/1.jpg"]):
            picture(datasets_folder / "animals" / name, brightness)
        found = load("animals")
        assert isinstance(found, Images)
        assert [file.parent.name for file in found.images] == ["cats", "cats", "dogs"]
        assert found.labels == [0, 0, 1]

    def test_loose_images_have_none(self, datasets_folder: Path) -> None:
        picture(datasets_folder / "loose" / "1.png", 10)
        found = load("loose")
        assert isinstance(found, Images)
        assert found.labels is None


class TestHub:
    def test_an_id_is_found_in_the_hubs_cache(self, tmp_path: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = tmp_path / "datasets--org--films" / "snapshots" / commit
        blobs = tmp_path / "datasets--org--films" / "blobs"
        (snapshot / "data").mkdir(parents=True)
        blobs.mkdir()
        pd.DataFrame({"text": ["good", "bad"], "label": [1, 0]}).to_parquet(blobs / "1234")
        # The cache keeps contents apart, and links to them.
        (snapshot / "data" / "train.parquet").symlink_to(blobs / "1234")
        (tmp_path / "datasets--org--films" / "refs").mkdir()
        (tmp_path / "datasets--org--films" / "refs" / "main").write_text(commit)
        assert _load_offline("org/films", tmp_path).strip() == "Texts(documents=['good', 'bad'], labels=[1, 0])"

    def test_an_unknown_id_is_refused(self, tmp_path: Path) -> None:
        said = _load_offline("org/nothing", tmp_path)
        assert "there is no data set 'org/nothing' here, and the hub gives none" in said


def _load_offline(name: str, cache: Path) -> str:
    program = (
        "import sys\nfrom search.errors import InvalidCalibration\nfrom workers.datasets import load\n"
        "try:\n    print(load(sys.argv[1]))\nexcept InvalidCalibration as error:\n    print(error.detail)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "BITFRONTIER_DATA": str(cache)}
    done = subprocess.run([sys.executable, "-c", program, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestBounds:
    """Nothing outside of the folder is read, and nothing unpacks to more than may be read."""

    @pytest.mark.parametrize("file", ["b.txt", "deep/b.jsonl", "b.png"])
    def test_a_link_out_of_the_folder_is_not_followed(self, datasets_folder: Path, file: str) -> None:
        secret = datasets_folder.parent / f"secret{Path(file).suffix}"
        secret.write_text('"secret"')
        (datasets_folder / "library" / "deep").mkdir(parents=True)
        (datasets_folder / "library" / file).symlink_to(secret)
        assert "is a link out of the data sets folder" in refusal("library")

    def test_a_link_within_it_is(self, datasets_folder: Path) -> None:
        (datasets_folder / "book.txt").write_text("words")
        (datasets_folder / "library").mkdir()
        (datasets_folder / "library" / "b.txt").symlink_to(datasets_folder / "book.txt")
        assert load("library") == Texts(["words"])

    @pytest.mark.parametrize(
        "name", ["http://host/data", "file:///etc/passwd", "org/../name", ".hidden", "a\nb", "a b"]
    )
    def test_no_address_is_asked_for(self, datasets_folder: Path, name: str) -> None:
        assert "there is no data set" in refusal(name)

    @pytest.mark.parametrize("file", ["book.txt", "lines.jsonl", "table.parquet"])
    def test_text_that_is_too_long(self, datasets_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "MOST_BYTES", 1000)
        if file.endswith("parquet"):
            # Packed, ten thousand times the same takes a few hundred bytes.
            pd.DataFrame({"text": ["again " * 1000]}).to_parquet(datasets_folder / file)
        else:
            (datasets_folder / file).write_text("x" * 1001)
        assert "MB; at most 0 MB are read" in refusal(file)

    def test_a_folder_counts_as_a_whole(self, datasets_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "MOST_BYTES", 1000)
        (datasets_folder / "library").mkdir()
        for letter in "abc":
            (datasets_folder / "library" / f"{letter}.txt").write_text(letter * 400)
        assert "'c.txt' cannot be read: it unpacks to" in refusal("library")

    def test_rows_without_end(self, datasets_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "MOST_ROWS", 9)
        pd.DataFrame({"text": ["same"] * 10}).to_parquet(datasets_folder / "table.parquet")
        assert "it has 10 rows; at most 9 are read" in refusal("table")

    @pytest.mark.parametrize("name", ["bomb.npz", "bomb.npy"])
    def test_arrays_that_unpack_to_more_than_is_read(
        self, datasets_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(datasets, "MOST_ARRAY_BYTES", 10**6)
        np.savez_compressed(datasets_folder / "bomb.npz", images=np.zeros((1, 1, 1000, 1000), dtype=np.float64))
        assert (datasets_folder / "bomb.npz").stat().st_size < 10**5
        # NumPy tells an archive by its content, not by its name.
        (datasets_folder / "bomb.npz").rename(datasets_folder / name)
        assert "it unpacks to 8 MB; at most 1 MB are read" in refusal(name)

    def test_an_array_that_claims_more_than_it_has(self, datasets_folder: Path) -> None:
        head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999, 9999999, 9, 9), }\n"
        with zipfile.ZipFile(datasets_folder / "claims.npz", "w") as archive:
            archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
        assert "'claims.npz' cannot be read" in refusal("claims")

    def test_a_picture_of_too_many_pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        picture(tmp_path / "bomb.png", 0)
        assert datasets.open_image(tmp_path / "bomb.png", grey=False).shape == (4, 6, 3)
        monkeypatch.setattr(datasets, "MOST_PIXELS", 23)
        with pytest.raises(ValueError, match="6 × 4 pixels; at most 23"):
            datasets.open_image(tmp_path / "bomb.png", grey=False)

    def test_a_picture_that_claims_billions_of_pixels(self, tmp_path: Path) -> None:
        picture(tmp_path / "bomb.png", 0)
        content = bytearray((tmp_path / "bomb.png").read_bytes())
        content[16:24] = struct.pack(">II", 60_000, 60_000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / "bomb.png").write_bytes(content)
        with pytest.raises(ValueError, match="exceeds limit"):
            datasets.open_image(tmp_path / "bomb.png", grey=False)

    def test_a_picture_of_another_kind_than_its_ending(self, tmp_path: Path) -> None:
        Image.new("RGB", (6, 4)).save(tmp_path / "page.eps")
        (tmp_path / "page.eps").rename(tmp_path / "page.png")
        with pytest.raises(ValueError, match="cannot identify"):
            datasets.open_image(tmp_path / "page.png", grey=False)


class TestRefusals:
    @pytest.mark.parametrize(
        "name", ["nothing", "../secret", "../secret.txt", "a/../../secret.txt", "linked.txt", "linked", "a/..", "a/b/c"]
    )
    def test_what_is_not_in_the_folder(self, datasets_folder: Path, name: str) -> None:
        (datasets_folder.parent / "secret.txt").write_text("secret")
        (datasets_folder / "a").mkdir()
        (datasets_folder / "linked.txt").symlink_to(datasets_folder.parent / "secret.txt")
        assert "there is no data set" in refusal(name)

    def test_an_absolute_path(self, datasets_folder: Path) -> None:
        secret = datasets_folder.parent / "secret.txt"
        secret.write_text("secret")
        assert "there is no data set" in refusal(str(secret))

    @pytest.mark.parametrize("content", ["", "  \n\n"])
    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
    def test_an_empty_file(self, datasets_folder: Path, name: str, content: str) -> None:
        (datasets_folder / name).write_text(content)
        assert refusal(name) == f"'{name}' is empty"

    def test_an_empty_folder(self, datasets_folder: Path) -> None:
        (datasets_folder / "void").mkdir()
        assert refusal("void") == "'void' is empty"

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("bad.jsonl", b'{"text": "a"}\n{', "'bad.jsonl' cannot be read"),
            ("odd.jsonl", b'{"words": "a"}\n', "no column of text, sentence, content among words"),
            ("named.jsonl", b'{"text": "a", "label": "positive"}\n', "'named.jsonl' cannot be read"),
            ("number.jsonl", b"1\n", "'number.jsonl' cannot be read"),
            ("latin.txt", "Bär".encode("latin-1"), "'latin.txt' cannot be read"),
            ("bad.npz", b"PK\x03\x04 no archive", "'bad.npz' cannot be read"),
            ("bad.npy", b"", "'bad.npy' cannot be read"),
            ("pickle.npy", b"\x80\x04N.", "'pickle.npy' cannot be read"),
            ("bad.parquet", b"PAR1", "'bad.parquet' cannot be read"),
            ("weights.bin", b"\x00", "of a kind that cannot be read"),
        ],
    )
    def test_a_file_that_cannot_be_read(self, datasets_folder: Path, name: str, content: bytes, says: str) -> None:
        (datasets_folder / name).write_bytes(content)
        assert says in refusal(name)

    @pytest.mark.parametrize(
        ("arrays", "says"),
        [
            ({"pictures": np.zeros((2, 1, 4, 4))}, "`images` must be an array of four dimensions"),
            ({"images": np.zeros((2, 4, 4))}, "`images` must be an array of four dimensions"),
            ({"images": np.zeros((2, 1, 4, 4)), "labels": np.zeros(3)}, "there are 2 `images` and 3 `labels`"),
            ({"images": np.array([{}], dtype=object)}, "cannot be read"),
        ],
    )
    def test_arrays_of_the_wrong_form(self, datasets_folder: Path, arrays: dict[str, np.ndarray], says: str) -> None:
        np.savez(datasets_folder / "arrays.npz", **arrays)
        assert says in refusal("arrays")
