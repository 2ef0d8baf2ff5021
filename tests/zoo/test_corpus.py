"""The corpus: what is split where, what is left out, and what a machine without the listed files gets."""

import hashlib
import json
from collections import Counter

import pytest

from moyu.model.zoo import corpus
from moyu.model.zoo.corpus import Document


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that makes the corpus consist of the given files: name -> bytes."""

    def make(contents):
        for name, content in contents.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(corpus, "files", lambda: iter([(name, tmp_path / name) for name in sorted(contents)]))
        monkeypatch.setattr(corpus, "_locate", lambda name: tmp_path / name)
        return tmp_path

    return make


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A function that replaces the shipped list: split -> documents."""

    def make(**splits):
        files = {s: [[d.name, _digest(d.text)] for d in splits.get(s, [])] for s in ("train", "validation", "test")}
        (tmp_path / "listing.json").write_text(json.dumps({"files": files, "versions": {}, "python": "3"}))
        monkeypatch.setattr(corpus, "LISTING", tmp_path / "listing.json")
        corpus._shipped.cache_clear()

    yield make
    corpus._shipped.cache_clear()


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(seed, lines=30):
    return "".join(f"value_{seed}_{i} = compute({seed * i}, {i})\n" for i in range(lines))


def _names(split, count):
    found = (f"stdlib/module_{i}.py" for i in range(100_000))
    return [name for name, _ in zip((n for n in found if corpus.split_of(n) == split), range(count), strict=False)]


def test_shares_of_the_splits():
    shares = Counter(corpus.split_of(f"pkg/file_{i}.py") for i in range(20_000))
    assert shares["train"] / 20_000 == pytest.approx(0.92, abs=0.01)
    assert shares["validation"] / 20_000 == pytest.approx(0.04, abs=0.01)
    assert shares["test"] / 20_000 == pytest.approx(0.04, abs=0.01)


def test_model_files_of_transformers_are_training_only():
    assert {corpus.split_of(f"transformers/transformers/models/m{i}/modeling.py") for i in range(500)} == {"train"}


def test_the_closure_of_the_dependencies_is_read():
    packages = corpus.packages()
    assert {"torch", "transformers", "numpy", "tokenizers", "safetensors", "huggingface-hub", "sympy"} <= set(packages)
    assert len(packages) == len(set(packages))


@pytest.mark.parametrize(
    "content", [b"x = 1\n", b"# \xff\xfe\n" + b"x = 1\n" * 100, b"y" * 300_001], ids=["short", "not utf-8", "long"]
)
def test_unusable_files_are_left_out(tmp_path, content):
    (tmp_path / "a.py").write_bytes(content)
    assert corpus.read(tmp_path / "a.py") is None


def test_a_missing_file_is_left_out(tmp_path):
    assert corpus.read(tmp_path / "none.py") is None


def test_identical_files_are_read_once(library):
    first, second = _names("train", 2)
    library({first: _source(1).encode(), second: _source(1).encode()})
    assert len(corpus.collect()["train"]) == 1


def test_held_out_files_that_training_nearly_contains_are_dropped(library):
    (train,), (copy, fresh) = _names("train", 1), _names("test", 2)
    copied = _source(1) + "one_more_line = True\n"
    library({train: _source(1).encode(), copy: copied.encode(), fresh: _source(2).encode()})
    splits = corpus.collect()
    assert [d.name for d in splits["train"]] == [train]
    assert [d.name for d in splits["test"]] == [fresh]


def test_share_of_shingles_ignores_indentation_and_blank_lines():
    known = set(corpus.shingles(_source(1)))
    indented = "\n\n".join("    " + line for line in _source(1).splitlines())
    assert corpus.shared(indented, known) == 1.0
    assert corpus.shared(_source(2), known) == 0.0


def test_held_out_reads_only_files_that_did_not_change(library, listed):
    documents = [Document(n, _source(i)) for i, n in enumerate(_names("test", 25))]
    folder = library({d.name: d.text.encode() for d in documents})
    listed(test=documents)
    assert corpus.held_out("test") == documents
    (folder / documents[3].name).write_text(_source(999))
    (folder / documents[5].name).unlink()
    found = corpus.held_out("test")
    assert found == [d for i, d in enumerate(documents) if i not in (3, 5)]
    assert corpus.fingerprint(found)["exact"]


def test_max_bytes_stops_after_the_file_that_reaches_it(library, listed):
    documents = [Document(n, _source(i)) for i, n in enumerate(_names("test", 25))]
    library({d.name: d.text.encode() for d in documents})
    listed(test=documents)
    size = len(documents[0].text.encode())
    assert corpus.held_out("test", max_bytes=size) == documents[:1]
    assert corpus.held_out("test", max_bytes=size + 1) == documents[:2]


def test_another_python_gets_its_own_held_out_files_and_says_so(library, listed):
    documents = [Document(n, _source(i)) for i, n in enumerate(_names("test", 5))]
    library({d.name: d.text.encode() for d in documents} | {_names("train", 1)[0]: _source(77).encode()})
    listed(test=[Document(d.name, d.text + "# older") for d in documents])
    found = corpus.held_out("test")
    assert sorted(d.name for d in found) == sorted(d.name for d in documents)
    assert corpus.fingerprint(found)["exact"] is False


def test_fingerprint_depends_on_text_and_order():
    a, b = Document("a", _source(1)), Document("b", _source(2))
    prints = [corpus.fingerprint(d)["sha256"] for d in ([a, b], [b, a], [a], [a, Document("b", _source(3))])]
    assert len(set(prints)) == 4
    assert corpus.fingerprint([a, b]) == corpus.fingerprint(iter([a, b]))


def test_no_text_is_not_exact():
    assert corpus.fingerprint([])["exact"] is False


def test_stand_ins_come_in_a_fixed_shuffled_order(library, listed):
    names = _names("test", 15)
    library({name: _source(i).encode() for i, name in enumerate(names)})
    listed()
    found = [d.name for d in corpus.held_out("test")]
    assert sorted(found) == sorted(names) != found
    assert [d.name for d in corpus.held_out("test")] == found
    assert [d.name for d in corpus.held_out("test", max_bytes=1)] == found[:1]


def test_shuffled_keeps_the_words_and_loses_the_order():
    text = _source(4)
    mixed = corpus.shuffled(text, seed=1)
    assert mixed == corpus.shuffled(text, seed=1) != corpus.shuffled(text, seed=2)
    assert mixed != text and Counter(mixed) == Counter(text)


def test_shipped_list_keeps_its_splits_apart():
    files = corpus._shipped()["files"]
    names = {split: [name for name, _ in entries] for split, entries in files.items()}
    assert len(names["test"]) > 100 and len(names["validation"]) > 100 and len(names["train"]) >= 200
    for split, own in names.items():
        assert len(own) == len(set(own))
        assert {corpus.split_of(name) for name in own} == {split}
    digests = [digest for entries in files.values() for _, digest in entries]
    assert len(digests) == len(set(digests))


def test_this_machine_has_text_to_calibrate_and_to_test():
    train, test = corpus.train_documents(max_bytes=300_000), corpus.held_out("test", max_bytes=300_000)
    assert sum(len(d.text.encode()) for d in train) > 100_000
    assert sum(len(d.text.encode()) for d in test) > 100_000
    assert not {d.name for d in train} & {d.name for d in test}
    assert corpus.held_out("test", max_bytes=300_000) == test
