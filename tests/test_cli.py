"""The command line: bad input is one line with a next step and exit code 2, `--json` prints nothing but JSON."""

from __future__ import annotations

import ast
import errno
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest
import torch
import typer
from transformers import MambaConfig, MambaForCausalLM

import moyu
from moyu import files, kernels, methods, records
from moyu.calibration import context, settings
from moyu.calibration.walk import calibrate
from moyu.commands import cli, writing
from moyu.commands import info as info_command
from moyu.commands import words as early
from moyu.errors import panics_are_errors
from moyu.kernels import BACKENDS, gpu
from moyu.measure import text
from moyu.measure.windows import Windows
from moyu.model import loading, machine, prompts, zoo
from tiny import build, tokens

SMALL = ["--window", "32", "--prompt-tokens", "16"]
QUICK = ["-m", "popularity", *SMALL]


@pytest.fixture
def moyu_command(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moyu", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return command


@pytest.fixture
def refused(moyu_command):
    """Run a command that must be refused as a user's mistake; its one line."""

    def command(*words: object) -> str:
        code, out, err = moyu_command(*words)
        lines = err.splitlines()
        assert code == 2, err
        assert not out
        assert all(re.fullmatch(r"moyu: [^:]+", line) for line in lines[:-1]), err  # progress, and nothing else
        problem, _, step = lines[-1].removeprefix("moyu: error: ").partition(": ")
        assert lines[-1].startswith("moyu: error: ") and problem and step, err
        return lines[-1]

    return command


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A plan of the embedded relu model."""
    loaded = loading.load("relu")
    ids = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    plan = calibrate(loaded.model, methods.method("popularity"), Windows(ids, 16), sparsity=0.5, name="relu")
    return plan.save(tmp_path_factory.mktemp("plans") / "popularity")


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "swigul"], "did you mean 'swiglu'"),
        (["run", "no/such/folder"], "zoo name"),
        (["study", "decay", "--model", "swigul"], "did you mean 'swiglu'"),
        (["trinity", "--models", "relu,swigul"], "did you mean 'swiglu'"),
        (["eval", "./missing", *QUICK], "no model './missing'"),
        (["eval", "relu", "--device", "cuda:99", *QUICK], "device 'cuda:99' cannot be used"),
        (["run", "swiglu", "--sparsity", "1"], r"\[0, 1\), not 1.0: "),
        (["eval", "swiglu", "--sparsity", "-0.1"], r"\[0, 1\)"),
        (["calibrate", "swiglu", "--sparsity", "1.5"], r"\[0, 1\)"),
        (["run", "swiglu", "--sparsity", "nan"], r"\[0, 1\)"),
        (["bench", "--shape", "tiny", "--sparsity", "2"], r"\[0, 1\)"),
        (["run", "swiglu", "--bytes", "0"], r"\(0, 1\]"),
        (["run", "swiglu", "--bytes", "0.5", "--sparsity", "0.5"], "both"),
        (["run", "swiglu", "--method", "catz"], "did you mean cats"),
        (["bench", "--shape", "tiny", "--method", "catz"], "did you mean cats"),
        (["run", "swiglu", "--method", "cett", "--knob", "tua=0.2", "--shape", "none"], "tua.*did you mean"),
        (["run", "swiglu", "--knob", "tau"], "NAME=VALUE"),
        (["run", "swiglu", "--shape", "llama-3.2-1"], "did you mean 'llama-3.2-1b'"),
        (["bench", "--shape", "lama-3-8b"], "did you mean 'llama-3-8b'"),
        (["bench"], "MODEL or --shape"),
        (["run", "swiglu", "--window", "32"], "--prompt-tokens"),
        (["run", "swiglu", "--window", "4096"], "use --window"),
        (["calibrate", "swiglu", "--max-ppl-increase", "much"], "write 1%"),
        (["calibrate", "swiglu", "--max-kl", "0"], "write 0.02"),
        (["calibrate", "swiglu", "--max-kl", "0.02", "--bytes", "0.9"], "give one of them"),
        (["generate", "swiglu", "--new-tokens", "0"], "'--new-tokens'"),
        (["generate", "swiglu", "--plan", "nowhere"], "moyu calibrate"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["zoo", "train", "swigul"], "did you mean 'swiglu'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(refused, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(says, refused(*words))
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["study", "figure1", "--model", "relu"], "--model"),
        (["study", "figure1", "texts", "--device", "cpu", "--backend", "cpu"], "--device and --backend"),
        (["study", "--list", "--quick"], "--quick"),
        (["eval", "relu", "--plan", "PLAN", "--method", "teal", "--bytes", "0.5"], "--method and --bytes"),
        (["eval", "relu", "--limit", "5"], "--limit"),
        (["bench", "relu", "--plan", "PLAN", "--sparsity", "0.3"], "--sparsity"),
        (["fit", "lte", "relu", "--tune", "tuned", "--out", "plans"], "--out"),
        (["generate", "relu", "--draft-length", "3"], "--draft-length"),
        (["run", "relu", "--shape", "none", "--shape-layers", "3"], "--shape-layers"),
        (["trinity", "--quick", "--documents", "3"], "--documents"),
        (["trinity", "--no-speed", "--backend", "cpu"], "--backend"),
        (["zoo", "--json", "train", "relu"], "--json"),
        (["calibrate", "relu", "-m", "relu-zero", "--sparsity", "0.3"], "--sparsity"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_before_anything_is_loaded(
    refused, words, option, plans, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    assert f"error: {option} would do nothing (" in refused(*(plans if word == "PLAN" else word for word in words))
    assert everything(tmp_path) == []


def test_comparing_without_a_plan_is_refused(refused):
    assert "and there is neither: give one" in refused("generate", "relu", "--compare")


def test_every_parameter_of_a_command_is_read():
    """What the line above cannot list: a parameter that the body of its command never names."""
    commands = [command.callback for command in (*cli.app.registered_commands, *cli.zoo_app.registered_commands)]
    assert len(commands) > 10
    for command in commands:
        assert command is not None
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(command))).body
        assert isinstance(tree, ast.FunctionDef)
        read = {node.id for inner in tree.body for node in ast.walk(inner) if isinstance(node, ast.Name)}
        assert {argument.arg for argument in tree.args.args} <= read, command.__name__


@pytest.mark.parametrize(
    "words", [["calibrate", "relu"], ["eval", "relu"], ["profile", "relu"], ["fit", "lte", "relu"], ["study", "decay"]]
)
def test_commands_that_decode_nothing_use_the_back_end_that_is_asked_for(moyu_command, words, tmp_path, monkeypatch):
    """Products with stored weights run on it."""

    def load(*_, **__):
        raise moyu.UserError(kernels.describe(), "as asked")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.chdir(tmp_path)
    code, _, err = moyu_command(*words, "--backend", "reference")
    assert code == 2 and "error: reference: reference" in err


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (["run", "--sparsity", "lots"], "moyu run"),
        (["rum"], "moyu"),
        (["calibrate", "--colour"], "moyu calibrate"),
        (["run", "swiglu", "b"], "moyu run"),
        (["zoo", "train"], "moyu zoo train"),
    ],
)
def test_a_misspelt_command_line_is_one_line_and_names_the_help_of_its_command(moyu_command, words, asks):
    code, out, err = moyu_command(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("moyu: error: ") and err.endswith(f": see `{asks} -h`\n")


def test_no_command_is_the_help(moyu_command):
    code, out, err = moyu_command()
    assert code == 2 and "Usage:" in out + err and "error" not in err


def test_a_model_without_a_known_network(refused, tmp_path):
    tokenizer = loading.load("swiglu").tokenizer
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    before = everything(tmp_path)
    assert "MambaForCausalLM" in refused("calibrate", tmp_path / "mamba", *QUICK, "--out", tmp_path / "plans")
    assert everything(tmp_path) == before


def test_a_folder_that_holds_no_model(refused, tmp_path):
    assert "cannot load" in refused("eval", tmp_path, *QUICK)
    shutil.copytree(zoo.path("relu"), tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in refused("eval", tmp_path / "cut", *QUICK)


def test_a_tokenizer_at_which_its_library_panics(refused, tmp_path):
    folder = shutil.copytree(zoo.path("relu"), tmp_path / "own")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["continuing_subword_prefix"] = "#" * 400  # longer than any word: it is cut off there without a look
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(told))
    assert "cannot load" in refused("generate", folder, "--new-tokens", 2)


def test_what_libraries_print_comes_through_unless_they_panic(capfd):
    def reads(said: bytes, error: BaseException):
        os.write(2, said)
        raise error

    with panics_are_errors():
        os.write(2, b"a remark")
    with pytest.raises(KeyError), panics_are_errors():
        reads(b", another", KeyError())
    with pytest.raises(RuntimeError, match="out of range"), panics_are_errors():
        reads(b", a trace", type("PanicException", (BaseException,), {})("out of range"))
    assert capfd.readouterr().err == "a remark, another"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"def f():\n", "fewer than one window"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_text_of_no_use(refused, tmp_path, content, says):
    (tmp_path / "text").write_bytes(content)
    assert says in refused("eval", "relu", *QUICK, "--text", tmp_path / "text")


def test_a_tokenizer_of_more_tokens_than_the_model_has(refused, tmp_path):
    build("llama", torch.float32).save_pretrained(tmp_path / "small")
    loading.load("swiglu").tokenizer.save_pretrained(tmp_path / "small")
    for words in (["generate", "--prompt", "def read_config(path):"], ["eval", "-m", "cats", *SMALL]):
        line = refused(words[0], tmp_path / "small", *words[1:])
        assert re.search(r"token \d+ is none of the 128 that .* has: is this the tokenizer", line)


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(moyu_command, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    folder, ran = shutil.copytree(zoo.path("relu"), tmp_path / "own"), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import OPTConfig as Own, OPTForCausalLM as OwnModel\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    for kind in (config["model_type"], "own"):
        maps = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": maps, "model_type": kind}))
        code, _, err = moyu_command("generate", folder, "--new-tokens", 2)
        assert code == 0 or (code == 2 and "cannot load" in err and err.count("\n") == 1), err
        assert not ran.exists()


def test_a_text_of_special_tokens(refused, tmp_path):
    """No byte of it is text, so there are no bits per byte."""
    (tmp_path / "text").write_text("<eos><bos><pad>" * 400)
    assert "special tokens alone" in refused("eval", "relu", *QUICK, "--text", tmp_path / "text")
    (tmp_path / "text").write_text("def f(x):\n    return x\n" * 300 + "<eos><bos><pad>" * 200)
    assert "the text's last quarter is special tokens alone" in refused(
        "eval", "relu", *QUICK, "--text", tmp_path / "text"
    )


def test_a_missing_text(refused, tmp_path):
    assert "--text" in refused("eval", "relu", *QUICK, "--text", tmp_path / "text")


def test_a_plan_for_another_model(refused, plans):
    assert "made for 'relu'" in refused("eval", "gelu", "--plan", plans, *SMALL)
    assert "made for 'relu'" in refused("generate", "gelu", "--plan", plans, "--new-tokens", 2)


def test_a_plan_for_a_fine_tune():
    model = build("llama", torch.float32)
    plan = calibrate(model, methods.method("cats"), Windows(tokens(2, 20), 10), sparsity=0.5, name="tiny")
    tuned = build("llama", torch.float32)
    tuned.model.layers[1].mlp.down_proj.weight.data *= 1.05
    with pytest.raises(moyu.UserError, match=r"other weights of 'tiny' \(1 of .*first layer1.down"):
        moyu.apply(tuned, plan)
    assert "forward" not in vars(tuned)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_plan(refused, plans, tmp_path, name, keep):
    folder = shutil.copytree(plans, tmp_path / "plan")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * keep)])
    assert "truncated" in refused("eval", "relu", "--plan", folder, *SMALL)


@pytest.mark.parametrize("command", ["run", "calibrate", "profile"])
def test_an_output_that_cannot_be_written(refused, tmp_path, command):
    (tmp_path / "file").write_text("kept")
    assert "--out" in refused(command, "relu", *SMALL, "--out", tmp_path / "file" / "below")
    assert "--out" in refused(command, "relu", *SMALL, "--out", tmp_path / "file")
    assert everything(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_keeps_the_old_files(refused, plans, tmp_path, monkeypatch):
    folder = shutil.copytree(plans, tmp_path / "out" / "popularity")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    line = refused("calibrate", "relu", *QUICK, "--sparsity", "0.25", "--out", tmp_path / "out")
    assert "No space left" in line and "free some disk" in line
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert everything(tmp_path) == ["out/popularity/plan.json", "out/popularity/plan.safetensors"]


# ------------------------------------------------------------------------------------------------------------ stopping


def test_ctrl_c_in_the_process(moyu_command, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info_command, "describe", stop)
    assert moyu_command("info", "relu") == (130, "", "moyu: stopped\n")


def test_ctrl_c(tmp_path):
    words = [
        "from moyu.commands.cli import main; main()",
        "run",
        "relu",
        *QUICK,
        "--shape",
        "none",
        "--out",
        str(tmp_path),
    ]
    # Its own session: the signal reaches nobody else.
    with subprocess.Popen(
        [sys.executable, "-c", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    ) as process:
        assert process.stderr and process.stdout
        first = process.stderr.readline()  # the run has begun
        process.send_signal(signal.SIGINT)
        rest, out = process.stderr.read(), process.stdout.read()
    assert process.returncode == 130, first + rest
    assert not out and "Traceback" not in rest
    assert (first, rest.splitlines()[-1]) == ("moyu: load\n", "moyu: stopped")
    assert everything(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------- JSON


def objects(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_lists_as_json(moyu_command):
    code, out, err = moyu_command("methods", "--json")
    assert (code, err) == (0, "")
    assert [row["method"] for row in objects(out)] == list(methods.names())
    code, out, err = moyu_command("zoo", "--json")
    assert (code, err) == (0, "")
    assert [row["name"] for row in objects(out)] == list(zoo.names())


def test_calibrate_prints_records_only(moyu_command, tmp_path):
    code, out, err = moyu_command("calibrate", "relu", *QUICK, "--out", tmp_path, "--json")
    assert code == 0, err
    rows = [records.validate(row) for row in objects(out)]
    assert [(row.kind, row.method) for row in rows] == [("quality", "popularity")]
    assert moyu.Plan.load(tmp_path / "popularity").hash == rows[0].plan


def test_run_writes_everything(moyu_command, tmp_path):
    small = ["--method", "cats", "--shape", "none", "--window", 48, "--prompt-tokens", 24]
    code, out, err = moyu_command("run", "swiglu", *small, "--out", tmp_path, "--json")
    assert code == 0, err
    rows = [records.validate(row) for row in objects(out)]
    assert {row.kind for row in rows} >= {"environment", "quality", "generation"}
    assert records.read(tmp_path / "records.jsonl") == rows
    assert moyu.Plan.load(tmp_path / "plans" / "cats").method.name == "cats"
    assert "</html>" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------------------- where a model is to run

RUNS_A_MODEL = (
    ["run", "swiglu"],
    ["profile", "swiglu"],
    ["calibrate", "swiglu"],
    ["fit", "deja-vu", "relu"],
    ["generate", "swiglu"],
    ["chat", "swiglu"],
    ["serve", "swiglu"],
    ["eval", "swiglu"],
    ["bench", "swiglu"],
    ["bench", "--shape", "tiny"],
    ["study", "theorem", "--quick"],
    ["trinity", "--quick"],
)


@pytest.fixture
def nothing_is_loaded(monkeypatch, tmp_path):
    """Loading a model fails the test, and so does a file that is written."""

    def load(*words, **options):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(loading, "random_model", load)
    monkeypatch.chdir(tmp_path)
    yield
    assert everything(tmp_path) == []


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("command", RUNS_A_MODEL, ids=" ".join)
def test_where_a_model_cannot_run_is_refused_before_it_is_loaded(refused, command, monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", False)  # as on a machine that does not test the GPU kernels on its CPU
    assert "no device is called 'tpu9'" in refused(*command, "--device", "tpu9")
    assert "device 'cuda:99' cannot be used" in refused(*command, "--device", "cuda:99")
    assert "no back end is called 'gpuu': did you mean 'gpu'?" in refused(*command, "--backend", "gpuu")
    line = refused(*command, "--backend", "gpu")
    if torch.cuda.is_available():
        assert "cannot run on device 'cpu': give it its own --device" in line
    else:
        assert "pip install 'moyu-llm[gpu]'" in line


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_back_end_that_does_not_run_on_the_device(refused, monkeypatch):
    monkeypatch.setattr(gpu, "unavailable", lambda: None)  # as on a machine with a GPU
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    assert "'gpu' cannot run on device 'cpu': give it its own --device" in refused("eval", "relu", "--backend", "gpu")


def test_all_commands_that_run_a_model_say_where():
    shown = {" ".join(name): command.params for name, command in _commands(typer.main.get_command(cli.app))}
    placed = {name for name, params in shown.items() if {"device", "backend"} <= {p.name for p in params}}
    assert placed == {words[0] for words in RUNS_A_MODEL}
    assert set(shown) - placed == {"coverage", "doctor", "info", "methods", "pack", "report", "zoo", "zoo train"}


def _commands(group, before=()):
    for name, command in group.commands.items():
        yield (*before, name), command
        if hasattr(command, "commands"):
            yield from _commands(command, (*before, name))


def fresh(*words: str) -> tuple[int, str, str, float]:
    """A command in a process of its own: exit code, stdout, stderr, which ends in what was imported; processor seconds."""
    code = (
        "import sys\nfrom moyu.commands import cli\nsys.argv = ['moyu', *sys.argv[1:]]\ntry:\n    cli.main()\nfinally:\n"
        "    print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime  # others may use the processor too
    return done.returncode, done.stdout, done.stderr, seconds


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["-h"], ["generate", "-h"], ["zoo", "train", "-h"]])
def test_what_needs_no_torch_starts_fast(words):
    code, out, err, seconds = fresh(*words)
    assert (code, err) == (0, "[]\n")
    assert seconds < 2
    assert out == f"moyu {moyu.__version__}\n" if words == ["--version"] else "Usage: " in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "nosuchmodel"], "no model 'nosuchmodel': give a zoo name"),
        (["chat", "swigul"], "did you mean 'swiglu'?"),
        (["generate", "Llama-Q8_0.gguf"], "did you mean 'Llama-1B-Q8_0.gguf'?"),
        (["bench", "no/such/folder"], "no model 'no/such/folder'"),
        (["calibrate", "swiglu", "--method", "tael"], "unknown method 'tael': did you mean teal"),
        (["fit", "deja-vy"], "did you mean deja-vu"),
        (["calibrate", "--allocation", "grady"], "no allocation is called 'grady': did you mean 'greedy'?"),
        (["calibrate", "--text", "mien.txt"], "cannot read text 'mien.txt' (No such file or directory)"),
        (["generate", "--plan", "plans/tael"], "no plan in plans/tael (No such file or directory): did you mean plans/teal?"),
        (["eval", "--plan", "plans/teal", "--plan", "nowhere"], "no plan in nowhere"),
        (["eval", "--backend", "foo"], "no back end is called 'foo': did you mean 'auto'? There are auto, cpu, gpu, reference"),
        (["eval", "--device", "tpu9"], "no device is called 'tpu9'"),
        (["eval", "--weights", "q8"], "no weights are called 'q8': did you mean 'q8_0'?"),
        (["bench", "--shape", "lama-3-8b"], "no shape is called 'lama-3-8b': did you mean 'llama-3-8b'?"),
        (["zoo", "train", "rely"], "did you mean 'relu'?"),
        (["run", "--sparsity", "5"], "sparsity must be in [0, 1), not 5.0"),
        (["bench", "--shape", "tiny", "--sparsity", "nan"], "sparsity must be in [0, 1), not nan"),
        (["eval", "--bytes", "0"], "byte fraction must be in (0, 1], not 0.0"),
        (["calibrate", "--max-ppl-increase", "much"], "write 1% or 0.01"),
        (["calibrate", "--knob", "tau"], "--knob 'tau' has no value: write NAME=VALUE"),
        (["run", "--dense-layers", "first"], "--dense-layers 'first' is no list of layers"),
        (["calibrate", "--colour"], "No such option: --colour"),
    ],
)  # fmt: skip
def test_a_typo_is_answered_before_torch_is_imported(words, says, tmp_path, monkeypatch):
    """In some .3 seconds of the processor; torch alone takes over a second."""
    (tmp_path / "Llama-1B-Q8_0.gguf").touch()
    (tmp_path / "plans" / "teal").mkdir(parents=True)
    (tmp_path / "plans" / "teal" / "plan.json").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err, seconds = fresh(*words)
    line, imported = err.splitlines()
    assert (code, out, imported) == (2, "", "[]")
    assert line.startswith("moyu: error: ") and says in line
    assert seconds < 1


def test_the_words_that_are_checked_early_are_those_that_there_are():
    assert list(early.BACKENDS) == ["auto", *BACKENDS]
    assert list(early.WEIGHTS) == list(machine.WEIGHTS)
    assert list(early.ALLOCATIONS) == list(settings.ALLOCATIONS)
    assert list(early.SHAPES) == list(loading.SHAPES)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "moyu", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moyu {moyu.__version__}\n", "")
    done = subprocess.run(
        [sys.executable, "-m", "moyu", "run", "--colour"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "") and "see `python -m moyu run -h`" in done.stderr


def test_the_public_names_are_seen_without_importing_torch():
    code = "import moyu, sys; print(*dir(moyu)); print('torch' in sys.modules)"
    seen, torch_there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()
    assert {n for n in seen.split() if n == "__version__" or not n.startswith("__")} == set(moyu.__all__)
    assert torch_there == "False"


# --------------------------------------------------------------------------------------------------------- into a pipe


def test_a_method_is_one_line_in_a_pipe(moyu_command):
    code, out, err = moyu_command("methods")
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["method", "family", "granularity", "exact", "calibration", "knobs", "source"]
    assert [line.split()[0] for line in lines] == methods.names()
    (teal,) = [line for line in lines if "arXiv 2408.14690" in line]
    assert teal.split() == ["teal", "threshold", "token", "no", "yes", "-", "TEAL,", "arXiv", "2408.14690"]


@pytest.mark.parametrize("words", [["methods"], ["--help"], ["zoo", "--json"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    reads, writes = os.pipe()
    os.close(reads)  # as `head` leaves it
    done = subprocess.run(
        [sys.executable, "-m", "moyu", *words], stdout=writes, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_shell_completes_commands_and_options():
    words = {"_MOYU_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "moyu cal"}
    call = [sys.executable, "-c", "import sys; sys.argv = ['moyu']; from moyu.commands.cli import main; main()"]
    found = subprocess.run(call, env={**os.environ, **words}, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["calibrate"], found.stderr


# ----------------------------------------------------------------------------------------------------------- generating


def test_text_streams_and_dense_runs_only_where_it_is_compared(moyu_command, plans, monkeypatch):
    written = []
    write = writing.write

    def watched(loaded, anatomy, plan, ids, new_tokens, **options):
        written.append(None if plan is None else plan.method.name)
        return write(loaded, anatomy, plan, ids, new_tokens, **options)

    monkeypatch.setattr(writing, "write", watched)
    asked = ["generate", "relu", "--plan", plans, "--new-tokens", 8]
    code, out, err = moyu_command(*asked, "--json")
    assert code == 0, err
    row = records.validate(json.loads(out))
    assert written == ["popularity"]
    assert row.dense_text is None and row.first_difference is None and row.new_tokens == 8

    code, out, err = moyu_command(*asked)
    assert (code, out) == (0, f"{row.prompt}{row.sparse_text}\n")
    assert err.startswith("moyu: popularity: first token after") and "decode step: " in err and err.count("\n") == 2

    code, out, err = moyu_command(*asked, "--compare", "--json")
    compared = records.validate(json.loads(out))
    assert written == ["popularity", "popularity", "popularity", None]
    assert compared.sparse_text == row.sparse_text and len(compared.dense_tokens) == 8
    (dense,) = objects(moyu_command("generate", "relu", "--new-tokens", 8, "--json")[1])
    assert compared.dense_text == dense["dense_text"] == dense["sparse_text"]


def test_a_prompt_goes_into_the_chat_template_where_there_is_one(moyu_command, refused, monkeypatch):
    open_model = context.open_model

    def with_template(name, *rest):
        loaded = open_model(name, *rest)
        if loaded.name == "relu":
            loaded.tokenizer.chat_template = (
                "<bos># {{ messages[0]['content'] }}\n{% if add_generation_prompt %}def{% endif %}"
            )
        else:
            loaded.tokenizer.chat_template = "{{ raise_exception('nobody asked') }}"
        return loaded

    assert "has no chat template" in refused("generate", "relu", "--chat", "--prompt", "x")
    monkeypatch.setattr(context, "open_model", with_template)
    asked = ["generate", "relu", "--prompt", "reads a file", "--new-tokens", 4]
    (chat,) = objects(moyu_command(*asked, "--json")[1])
    assert chat["prompt"] == "<bos># reads a file\ndef"
    code, out, err = moyu_command(*asked)
    assert (code, out) == (0, f"{chat['sparse_text']}\n") and "--raw" in err
    (raw,) = objects(moyu_command(*asked, "--raw", "--json")[1])
    assert raw["prompt"] == "reads a file"
    # the template writes BOS itself, and there is no second one
    (same,) = objects(
        moyu_command("generate", "relu", "--raw", "--prompt", "# reads a file\ndef", "--new-tokens", 4, "--json")[1]
    )
    assert same["sparse_text"] == chat["sparse_text"]
    assert objects(moyu_command("generate", "relu", "--new-tokens", 4, "--json")[1])[0]["prompt"].startswith("def ")
    assert "fails (nobody asked)" in refused("generate", "gelu", "--prompt", "x")


def test_no_text_windows_are_loaded_to_generate(moyu_command, monkeypatch):
    monkeypatch.setattr(text, "windows_for", lambda *_, **__: pytest.fail("windows of text were loaded"))
    assert moyu_command("generate", "relu", "--new-tokens", 2)[0] == 0


def test_pieces_make_up_the_text_whatever_its_characters():
    loaded = loading.load("relu")
    for words in ("x = 'é ü 漢字 🙂'\n    return", "  indented\n\n\tand more"):
        ids = loaded.tokenizer(words, add_special_tokens=False)["input_ids"]
        pieces: list[str] = []
        text = prompts.Pieces(loaded.tokenizer, ids[:1], pieces.append)
        for token in ids[1:]:
            text.take(token)
        text.end()
        assert loaded.tokenizer.decode(ids[:1]) + "".join(pieces) == loaded.tokenizer.decode(ids)
        assert not any(prompts.BROKEN in piece for piece in pieces)


def test_more_tokens_than_the_model_has_positions(refused):
    limit = loading.load("relu").model.config.max_position_embeddings
    line = refused("generate", "relu", "--prompt", "def", "--new-tokens", limit)
    assert re.search(rf"more than the {limit} that 'relu' reads: use --new-tokens \d+ or fewer", line)


def test_a_prompt_and_steps_that_the_model_has_no_positions_for_are_refused_before_the_work(refused, monkeypatch):
    monkeypatch.setattr(context.Context, "plan", lambda *_, **__: pytest.fail("a plan was made"))
    assert "than the 512 that 'relu' reads: give a shorter --prompt" in refused(
        "run", "relu", *SMALL, "--prompt", "x " * 600
    )
    assert "than the 512 that the model reads: use --tokens 511 or fewer" in refused("bench", "relu", "--tokens", 5000)


def test_every_number_says_its_least(refused):
    """A count of 0 or below would load the model and then fail somewhere inside."""
    own = {"sparsity", "bytes_", "sirius"}  # checked with the others, with a sentence of their own
    for command in (*cli.app.registered_commands, *cli.zoo_app.registered_commands):
        assert command.callback is not None
        for name, hint in typing.get_type_hints(command.callback, include_extras=True).items():
            option = next(
                (m for m in getattr(hint, "__metadata__", ()) if isinstance(m, typer.models.OptionInfo)), None
            )
            kinds = {hint.__origin__, *typing.get_args(hint.__origin__)} if option is not None else set()
            if option is not None and kinds & {int, float} and name not in own:
                assert option.min is not None, f"{command.callback.__name__} {name}"
    for words in (
        ["bench", "relu", "--rounds", "0"],
        ["bench", "--shape", "tiny", "--layers", "0"],
        ["fit", "deja-vu", "relu", "--windows", "0"],
        ["run", "relu", "--shape-layers", "0"],
        ["zoo", "train", "relu", "--tokens", "0"],
        ["trinity", "--documents", "1"],
        ["generate", "relu", "--seed", "-1"],
    ):
        assert f"'{words[-2]}'" in refused(*words)


@pytest.mark.parametrize("words", ["def größe(x):\n", "def 漢字():\n"])
def test_a_prompt_in_the_c_locale_is_the_prompt(moyu_command, words):
    """There Python hands over the bytes of other characters one by one, as lone surrogates."""
    asked = ["generate", "relu", "--new-tokens", 4, "--json", "--prompt"]
    (wanted,) = objects(moyu_command(*asked, words)[1])
    code, out, err = moyu_command(*asked, words.encode().decode("ascii", "surrogateescape"))
    assert code == 0, err
    (found,) = objects(out)
    assert (found["sparse_text"], found["prompt"]) == (wanted["sparse_text"], wanted["prompt"])


def test_a_path_in_the_c_locale_is_written_into_records():
    row = records.stamp(kind="environment", command="moyu run größe".encode().decode("ascii", "surrogateescape"))
    assert json.loads(row.model_dump_json())["command"] == "moyu run größe"


def test_a_prompt_that_is_no_utf_8(refused):
    assert "the prompt is not UTF-8 text" in refused(
        "generate", "relu", "--prompt", b"\xff\xfe".decode("ascii", "surrogateescape")
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bench", "relu", "--layers", "2"], "--layers is of --shape"),
        (["generate", "relu", "--sirius", "0.1"], "no plan to draft with"),
        (["generate", "relu", "--temperature", "1"], "plain generation is greedy"),
        (["generate", "relu", "--weights", "q8"], "did you mean 'q8_0'"),
        (["calibrate", "relu", "--knob", "tau=0.2", "-m", "cats"], "no knob is called 'tau' in cats"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_options_that_contradict_each_other(refused, words, says):
    assert says in refused(*words)
