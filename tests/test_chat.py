"""`moyu chat`: what is said, what is read again, and its commands."""

from __future__ import annotations

import io
import re
import sys

import pytest

from integrations.serving import embedded
from moyu.calibration import context
from moyu.commands import cli
from moyu.commands.conversation import Conversation
from moyu.engine.applied import Applied
from moyu.engine.generate import generate
from moyu.errors import UserError
from moyu.model.prompts import as_chat, prompt_ids

SAID = ["reads a file", "writes it", "and closes it"]
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return embedded("relu", "teal")


def texts(talk):
    pieces = []
    lines = [talk.say(text, pieces.append) for text in SAID]
    return [m["content"] for m in talk.history if m["role"] == "assistant"], lines, "".join(pieces)


@pytest.mark.parametrize("planned", [False, True])
def test_a_turn_reads_only_what_is_new(model, planned):
    """Dense answers are those of the whole conversation read at once; under a plan what was written stays as it was read."""
    loaded, plan = model
    with Conversation(loaded, plan if planned else None, "be brief", 20, GREEDY) as talk:
        answers, lines, shown = texts(talk)
        history = list(talk.history)
    assert shown == "".join(answers) and all(answers)
    counts = [tuple(map(int, re.match(r"(\d+) of (\d+) tokens", line).groups())) for line in lines]
    assert counts[0][0] == counts[0][1] and all(new < 20 < total for new, total in counts[1:])
    assert all("tokens/s" in line and "bits a weight" in line for line in lines)
    bits = [float(re.search(r"([\d.]+) bits", line)[1]) for line in lines]
    assert all(b < 31 if planned else b == pytest.approx(32, abs=0.05) for b in bits)
    if planned:
        return
    for turn, answer in enumerate(answers):
        ids = prompt_ids(loaded, as_chat(loaded, history[: 2 + 2 * turn], ""))
        with Applied(loaded.model, None) as session:
            fresh = [int(t) for t in generate(session, ids, max_new_tokens=20, **GREEDY)]
        assert loaded.tokenizer.decode(fresh, skip_special_tokens=True) == answer


def test_a_history_that_no_longer_begins_as_it_did_is_read_again(model):
    loaded, _ = model
    with Conversation(loaded, None, None, 12, GREEDY) as talk:
        talk.say(SAID[0], lambda _: None)
        talk.history[0]["content"] = "another"
        assert re.match(r"(\d+) of \1 tokens", talk.say(SAID[1], lambda _: None))


def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(model):
    loaded, _ = model
    with Conversation(loaded, None, None, 20, GREEDY) as talk:
        shown = []

        def show(piece):
            shown.append(piece)
            if len(shown) == 2:
                raise KeyboardInterrupt

        talk.say(SAID[0], show)
        assert talk.history[-1]["role"] == "assistant"
        assert re.match(r"(\d+) of \1 tokens", talk.say(SAID[1], lambda _: None))


def test_a_conversation_longer_than_the_model_reads_is_refused(model):
    loaded, _ = model
    with Conversation(loaded, None, None, 4, GREEDY) as talk:
        with pytest.raises(UserError, match="/reset begins a new one"):
            talk.say("word " * 600, lambda _: None)
        assert talk.history == []


@pytest.fixture
def typed(monkeypatch, capfd, model):
    """Run `moyu chat` on lines of input: (exit code, stdout, stderr)."""

    def command(*lines, words=("relu",)):
        monkeypatch.setattr(sys, "argv", ["moyu", "chat", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    monkeypatch.setattr(context, "open_model", lambda *_: model[0])
    return command


def test_commands(typed, model, tmp_path):
    _, plan = model
    folder = plan.save(tmp_path / "teal")
    said = typed(
        "", SAID[0], "/plan", f"/plan {folder}", SAID[1], "/plan nowhere", "/plan off", "/reset", "/nothing", SAID[0], "/quit", "x",
        words=("relu", "--new-tokens", "6", "--temperature", "0"),
    )  # fmt: skip
    code, out, err = said
    assert code == 0 and "Traceback" not in err
    answers = [line for line in err.splitlines() if "tokens of the conversation" in line]
    assert [a.rpartition("; ")[2] for a in answers] == ["dense", f"teal ({plan.hash})", "dense"]
    assert answers[0].split(",")[0] == answers[2].split(",")[0]  # nothing of before the reset was read
    assert "no plan in nowhere" in err and "no command '/nothing'" in err
    assert out.count("\n") >= 3


def test_the_end_of_the_input_ends_the_conversation(typed):
    assert typed(words=("relu",))[0] == 0


def test_a_model_without_a_chat_template_is_refused(typed, model, monkeypatch):
    monkeypatch.setattr(model[0].tokenizer, "chat_template", None)
    code, out, err = typed(SAID[0])
    assert code == 2 and not out and "has no chat template: `moyu generate --raw`" in err
