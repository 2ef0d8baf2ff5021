"""Tasks of lm-evaluation-harness: what is scored is sparse, with the boundary of each request, in every batch."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import moyu
from moyu import Applied, UserError, calibrate, methods
from moyu.measure.windows import Windows
from moyu.model import zoo
from tiny import build, tokens

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from moyu.integrations import lm_eval as integration
from moyu.integrations.lm_eval import SparseLM, find_tasks
from moyu.model.zoo import questions
from test_cli import moyu_command, refused  # noqa: F401  # fixtures

NAMES = ["cats", "teal", "griffin"]
LENGTHS = [(5, 3), (9, 1), (5, 7), (12, 4), (9, 6), (5, 3)]  # of contexts and continuations


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo.path("swiglu"))


@pytest.fixture(scope="module")
def swiglu():
    return moyu.load("swiglu")


def plan_for(model, name, sparsity=0.5):
    return calibrate(model, methods.method(name), Windows(tokens(4, 40), 20), sparsity=sparsity, name="tiny")


def requests():
    rows = [tokens(1, a + b, seed=n)[0].tolist() for n, (a, b) in enumerate(LENGTHS)]
    return [(None, ids[:a], ids[a:]) for ids, (a, _) in zip(rows, LENGTHS, strict=True)]


def sparse_scores(model, plan, tokenizer, batch):
    lm = SparseLM(model, tokenizer, batch)
    with Applied(model, plan, engine="mask") as applied, lm.under(applied) as counted:
        return lm._loglikelihood_tokens(requests()), counted


@pytest.mark.parametrize("batch", [1, 4])
def test_dense_scores_are_the_harness_own(tokenizer, batch):
    model = build("llama")
    ours = SparseLM(model, tokenizer, batch)._loglikelihood_tokens(requests())
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)._loglikelihood_tokens(requests(), True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [s for s, _ in ours] == pytest.approx([s for s, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_sparsity_0_is_dense_exactly(tokenizer, name, batch):
    model = build("llama", torch.float32)
    dense = SparseLM(model, tokenizer, batch)._loglikelihood_tokens(requests())
    assert sparse_scores(model, plan_for(model, name, 0.0), tokenizer, batch)[0] == dense


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_each_request_has_the_score_of_moyus_own_evaluation(tokenizer, name, batch):
    model = build("llama")
    plan = plan_for(model, name)
    scores, counted = sparse_scores(model, plan, tokenizer, batch)
    for (score, _), (_, context, asked) in zip(scores, requests(), strict=True):
        windows = Windows(torch.tensor([context + asked]), len(context) - 1)
        quality = moyu.evaluate(model, plan, windows, matched=False)
        assert score == pytest.approx(-float(quality.method.nll.double().sum()), abs=1e-4)
        # A silent dense run would give the dense score, and nothing would have been counted.
        assert abs(score + float(quality.dense.nll.double().sum())) > 1e-2
    assert sum(positions for _, positions in counted) == sum(asked for _, asked in LENGTHS)
    assert all(counter.skipped_bytes > 0 for counter, _ in counted)


def test_text_without_a_context_is_refused_where_the_prompt_decides(tokenizer):
    model = build("llama", torch.float32)
    lm = SparseLM(model, tokenizer)
    with Applied(model, plan_for(model, "griffin"), engine="mask") as applied, lm.under(applied):
        with pytest.raises(UserError, match="'griffin' decides from the prompt, and this task scores text without one"):
            lm._loglikelihood_tokens([(None, [1], [5, 6, 7])])


PROMPTS = [
    "def read(path):\n    ",
    "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path =",
    "x =",
]


def written(lm):
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, options), n) for n, prompt in enumerate(PROMPTS)]
    return lm.generate_until(asked)


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_generation_is_that_of_the_model_under_the_plan(swiglu, name):
    """Also in a batch, which the harness pads on the left."""
    model, tokenizer = swiglu.model, swiglu.tokenizer
    windows = Windows(tokenizer(PROMPTS[1] * 4, return_tensors="pt")["input_ids"], 16)
    plan = calibrate(model, methods.method(name), windows, sparsity=0.6, name="swiglu")
    lm = SparseLM(model, tokenizer, 3)
    dense = written(lm)
    with Applied(model, plan, engine="mask") as applied:
        with lm.under(applied) as counted:
            together = written(lm)
        alone = []
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
            text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            alone.append(text.split("\n\n")[0])
    assert together == alone and together != dense
    assert sum(positions for _, positions in counted) == 3 * 7  # the prompt gives the first of 8
    assert all(counter.sparsity == pytest.approx(0.6, abs=0.15) for counter, _ in counted)


def test_the_command_puts_dense_and_plans_side_by_side(moyu_command, tmp_path):  # noqa: F811
    small = ["--window", "32", "--prompt-tokens", "16", "--limit", "3", "-m", "griffin", "-m", "popularity"]
    tasks = "python_next_line,python_assignment"
    code, out, err = moyu_command("eval", "relu", "--tasks", tasks, *small, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r["method"], r["task"], r["metric"]) for r in rows] == [
        (method, task, metric)
        for task, metrics in (("python_next_line", ["acc", "acc_norm"]), ("python_assignment", ["exact_match, line"]))
        for method in ("griffin", "popularity")
        for metric in metrics
    ]
    for row in rows:
        assert row["kind"] == "task" and row["simulated"] and row["samples"] == 3
        assert row["realized_sparsity"] == pytest.approx(0.5, abs=0.01) and 0.5 < row["byte_fraction"] < 0.9
        assert row["stderr"] is not None and row["stderr_dense"] is not None and row["sparse_positions"] > 0
    file = tmp_path / "records.jsonl"
    file.write_text(out)
    code, out, err = moyu_command("report", file)
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert "python_assignment" in page and "±" in page


@pytest.fixture
def own_tasks(monkeypatch):
    """Without the harness' own thousands, which take ten seconds to list."""
    monkeypatch.setattr(integration, "TaskManager", lambda **kw: TaskManager(**kw | {"include_defaults": False}))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "python_next_lin"], "no task 'python_next_lin': did you mean python_next_line"),
        (["--tasks", "qqq"], "did you mean python_next_line or python_assignment"),
        (["--tasks", "python_next_line", "--limit", "0"], "for '--limit': Input should be greater than or equal to 1"),
        (["--limit", "4"], "--tasks"),
        (["--tasks", "x", "--task-folder", "/nowhere"], "no folder '/nowhere'"),
    ],
)
def test_what_cannot_be_asked_is_refused(refused, own_tasks, words, says):  # noqa: F811
    assert says in refused("eval", "relu", *words)


def test_without_the_harness_the_command_says_how_to_install_it(refused, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "moyu.integrations.lm_eval")
    monkeypatch.delattr(moyu.integrations, "lm_eval", raising=False)
    assert "pip install 'moyu-llm[eval]'" in refused("eval", "relu", "--tasks", "python_next_line")


def test_data_that_cannot_be_read_is_said(own_tasks, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere.json}\noutput_type: multiple_choice\n"
        "test_split: train\ndoc_to_text: a\ndoc_to_target: b\ndoc_to_choice: c\n"
    )
    with pytest.raises(UserError, match="task 'own' or its data cannot be read"):
        find_tasks(["own"], tmp_path)


@pytest.mark.parametrize("options", ["", "dataset_kwargs: {}\n", "dataset_kwargs: {data_files: null}\n"])
def test_a_task_that_names_no_files_reads_none(own_tasks, tmp_path, monkeypatch, options):
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\n{options}output_type: multiple_choice\n"
        "test_split: train\ndoc_to_text: a\ndoc_to_target: b\ndoc_to_choice: c\n"
    )
    (tmp_path / "a_file_of_the_user.json").write_text('{"a": "x", "b": 0, "c": ["y", "z"]}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="task 'own': it reads 'json' files and names none: give `dataset_kwargs"):
        find_tasks(["own"], tmp_path)


def test_a_task_of_named_files_is_read(own_tasks, tmp_path):
    (tmp_path / "documents.json").write_text('{"a": "x", "b": 0, "c": ["y", "z"]}')
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'documents.json'}}}\n"
        "output_type: multiple_choice\ntest_split: train\ndoc_to_text: a\ndoc_to_target: b\ndoc_to_choice: c\n"
    )
    (task,) = find_tasks(["own"], tmp_path)["own"]["tasks"].values()
    assert [document["a"] for document in task.test_docs()] == ["x"]


def test_a_task_without_a_name_is_said(own_tasks, tmp_path):
    (tmp_path / "own.yaml").write_text("task: null\noutput_type: multiple_choice\n")
    with pytest.raises(UserError, match=r"cannot be read.*the `task` of every YAML file") as error:
        find_tasks(["own"], tmp_path)
    assert "\n" not in str(error.value)


def test_questions_of_the_zoo_have_their_answers():
    lines, words = questions.next_line()["test"], questions.assignment()["test"]
    assert len(lines) == len(words) == 200
    for row in lines:
        assert len(set(row["choices"])) == 4 and row["context"].count("\n") == 8
    assert len({row["answer"] for row in lines}) == 4
    documents = [d.text for d in zoo.corpus.held_out("test")]
    assert all(any(r["context"] + r["choices"][r["answer"]] in d for d in documents) for r in lines.select(range(20)))
    assert all(any(f"{r['context']} {r['target']}\n" in d for d in documents) for r in words.select(range(20)))
