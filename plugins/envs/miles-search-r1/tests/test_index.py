"""Indexes: what is found, and that corpus, vectors and embedding model are those that belong together."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from miles_search_r1.corpus import BLOCK, SAMPLED, fingerprint, open_corpus
from miles_search_r1.embedding import Embedding
from miles_search_r1.index import Building, build_index, load_index

from miles.api import ConfigError, DataError

WORDLLAMA = Embedding("wordllama")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A corpus of 400 numbered rooms, of which half have title and text."""
    path = tmp_path_factory.mktemp("many") / "corpus.jsonl"
    colours, things = (
        ["red", "green", "blue", "yellow", "black", "white", "brown", "pink", "grey", "orange"],
        ["cat", "dog", "cow", "pig"],
    )
    rows = []
    for i in range(400):
        title = f"{colours[i % 10]} {things[i // 10 % 4]} {colours[i // 40]}"
        text = f"It lives in room {i}."
        rows.append({"id": i, "contents": f"{title}\n{text}"} if i % 2 else {"id": i, "title": title, "text": text})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def built(corpus_file, tmp_path):
    """A corpus of its own and its index."""
    path = tmp_path / "corpus.jsonl"
    shutil.copy(corpus_file, path)
    build_index(path, tmp_path / "index", WORDLLAMA, Building())
    return path, tmp_path / "index"


def test_what_is_found(built):
    index = load_index(built[1])
    first, second = index.search(["the inn Amber Falcon", "merry badger"], 2)
    assert [row["id"] for _, row in first] == ["0", "1"] or [row["id"] for _, row in first] == ["0", "2"]
    assert second[0][1]["id"] == "3"
    for hits in (first, second):
        (best, row), (next_best, _) = hits
        assert 1.001 > best > next_best
        texts = [row["contents"], "the inn Amber Falcon" if hits is first else "merry badger"]
        a, b = index.encode(texts)
        assert best == pytest.approx(float(a @ b), abs=1e-5)


def test_fewer_passages_than_were_asked_for(built):
    assert [len(hits) for hits in load_index(built[1]).search(["a", "b"], 9)] == [4, 4]


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("Flat", ""), ("HNSW16", "efSearch=64"), ("IVF8,Flat", "nprobe=8"), ("IVF8,SQ8", "nprobe=8")],
)
def test_kinds_agree_in_memory_and_on_disk(many, tmp_path, kind, parameters):
    build_index(many, tmp_path / "index", WORDLLAMA, Building(kind=kind, batch_size=64))
    for memory_map in (False, True):
        index = load_index(tmp_path / "index", memory_map=memory_map, parameters=parameters)
        for i in (0, 17, 399):
            assert index.search([index.corpus.text(i)], 1)[0][0][1]["id"] == i


def test_prefixes_are_those_of_the_index(many, tmp_path):
    embedding = Embedding("wordllama", query_prefix="dog ", passage_prefix="cat ")
    build_index(many, tmp_path / "index", embedding, Building())
    index = load_index(tmp_path / "index")
    [[(score, row)]] = index.search(["red"], 1)
    query, passage = index.encode(["dog red", f"cat {index.corpus.text(row['id'])}"])
    assert score == pytest.approx(float(query @ passage), abs=1e-5)


def test_progress_is_told(many, tmp_path):
    told = []
    build_index(many, tmp_path / "i", WORDLLAMA, Building(batch_size=150), lambda *numbers: told.append(numbers))
    assert told == [(150, 400), (300, 400), (400, 400)]


def test_a_corpus_that_was_moved(built):
    path, folder = built
    moved = path.rename(path.with_name("elsewhere.jsonl"))
    with pytest.raises(DataError, match=r"is not there; say where it is with --corpus"):
        load_index(folder)
    assert len(load_index(folder, corpus=moved)) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + '{"id": "9", "contents": "more"}\n',
        lambda text: text.replace("Dunmore", "Velbyyy"),
        lambda text: text[1:],
    ],
    ids=["longer", "same length", "shorter"],
)
def test_a_corpus_that_was_changed(built, change):
    path, folder = built
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match="is not the corpus that it was made of"):
        load_index(folder)


def test_another_embedding_model(built):
    folder = built[1]
    made_of = json.loads((folder / "index.json").read_text())
    made_of["embedding"]["passage_prefix"] = "quite another one: "
    (folder / "index.json").write_text(json.dumps(made_of))
    with pytest.raises(DataError, match="gives the first passage another vector"):
        load_index(folder)


def test_files_of_two_indexes(built, many, tmp_path):
    build_index(many, tmp_path / "other", WORDLLAMA, Building())
    shutil.copy(tmp_path / "other" / "index.faiss", built[1])
    with pytest.raises(DataError, match="400 vectors, 4 lines and 4 passages"):
        load_index(built[1])


def test_half_an_index_is_none(built):
    (built[1] / "index.json").unlink()
    with pytest.raises(DataError, match=r"no index.json"):
        load_index(built[1])


def test_a_file_of_vectors_that_is_broken(built):
    (built[1] / "index.faiss").write_bytes(b"no index")
    with pytest.raises(DataError, match=r"index.faiss cannot be read"):
        load_index(built[1])


def test_an_index_of_another_format(built):
    (built[1] / "index.json").write_text('{"format": 9}')
    with pytest.raises(DataError, match="an index of format 9"):
        load_index(built[1])


def test_a_parameter_that_the_kind_does_not_have(built):
    with pytest.raises(ConfigError, match=r"'nprobe=3' for an index of kind Flat"):
        load_index(built[1], parameters="nprobe=3")


@pytest.mark.parametrize(
    ("kind", "said"), [("Falt", "kind 'Falt'"), ("IVF4096,Flat", "kind 'IVF4096,Flat' cannot be trained on 4 passages")]
)
def test_kinds_that_cannot_be(corpus_file, tmp_path, kind, said):
    with pytest.raises(ConfigError, match=said):
        build_index(corpus_file, tmp_path / "index", WORDLLAMA, Building(kind=kind))
    assert not (tmp_path / "index").exists()


def test_an_index_is_not_written_over(built):
    with pytest.raises(ConfigError, match="holds an index already"):
        build_index(*built, WORDLLAMA, Building())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no passage in it"),
        ("\n \n", "there is no passage in it"),
        ('{"contents": "a"}\n{"contents"', "passage 1 is no JSON"),
        ('{"contents": "a"}\n3', "passage 1 is no JSON object"),
        ('{"contents": "a"}\n{"title": "b"}', "passage 1 has title; `contents`, or `title` and `text`, is expected"),
    ],
)
def test_corpora_that_cannot_be_read(tmp_path, text, said):
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        build_index(path, tmp_path / "index", WORDLLAMA, Building())
    with pytest.raises(DataError, match="no such file"):
        open_corpus(tmp_path / "nowhere")


def test_lines_are_found_again(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes('{"contents": "é"}\r\n\n{"contents": "b\\nc"}\n   \n{"title": null, "text": "d"}'.encode())
    corpus = open_corpus(path)
    assert [corpus.text(i) for i in range(len(corpus))] == ["é", "b\nc", "d"]
    assert list(corpus.batches(2)) == [["é", "b\nc"], ["d"]]


def test_the_fingerprint_of_a_large_file(tmp_path):
    path, size = tmp_path / "large", 2 * SAMPLED * BLOCK
    path.write_bytes(bytes(size))
    before = fingerprint(path)
    for place in (0, size // 2, size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x" * (2 * BLOCK if place < size - 1 else 1))
        assert fingerprint(path) != before
        path.write_bytes(bytes(size))
        assert fingerprint(path) == before
    path.write_bytes(bytes(size + 1))
    assert fingerprint(path) != before


def test_vectors_are_on_disk_when_they_are_mapped(many, tmp_path):
    """A mapped index has its vectors in pages of the file, and not in memory of its own."""
    folder = tmp_path / "index"
    build_index(many, folder, WORDLLAMA, Building())
    index = load_index(folder, memory_map=True)
    assert str((folder / "index.faiss").resolve()) in Path("/proc/self/maps").read_text()
    assert index.search([index.corpus.text(7)], 1)[0][0][1]["id"] == 7
    assert np.load(folder / "offsets.npy").shape == (401,)
