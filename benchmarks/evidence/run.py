"""Matched models of 100 M parameters on a machine with GPUs: trained, watched, scored and studied.

    PYTHONPATH=src python3 benchmarks/evidence/run.py FOLDER --minutes 9      # again and again until it says "finished"

A model trains with a GPU to itself; when none is left to train, scoreboards and studies run side by side on the GPUs where
nothing trains. Everything is resumable: a stopped training from its checkpoint, a scoreboard from its cells, a study from its
parts. FOLDER/results holds what is worth keeping: records and training.json of each model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("relu", "gelu", "swiglu")
METHODS = (  # a process each, the longest first
    ("estimate",),
    ("lte",),
    ("moefication",),
    ("r-sparse",),
    ("deja-vu", "deja-vu-heads", "polar"),
    ("larosa", "prox", "wina"),
    ("griffin", "tda", "clada", "teal", "was", "countdown"),
    (
        "quantise",
        "random",
        "oracle",
        "popularity",
        "random-popular",
        "static-norm",
        "relu-zero",
        "cett",
        "cats",
        "chess",
    ),
)
STUDIES = (
    ("importance", "inertia", "decay", "dominance", "semantics"),
    ("prefix_swap", "over_activation"),
    ("decoding", "figure2"),
)
MOYU = (sys.executable, "-c", "from moyu.commands.cli import main; main()")
STOP = 20.0  # seconds before the end in which a training writes its checkpoint


@dataclass
class Job:
    """A process, what must be there before it starts, and what it leaves when it is finished."""

    name: str
    command: list[str]
    needs: Path
    done: Path
    threads: int
    trains: bool = False
    on: str = ""  # the GPU it runs on
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.done.exists()


def jobs(folder: Path, options: argparse.Namespace) -> Iterator[Job]:
    """All jobs, in the order in which they should start."""
    models, results = folder / "models", folder / "results"
    facts = {name: models / f"{name}-{options.size}" / "training.json" for name in options.models}
    for name, trained in facts.items():
        yield Job(
            f"train {name}",
            [
                sys.executable, "-m", "moyu.research.training", "train", name, "--size", options.size, "--watch", "--data",
                str(folder / "data"), "--out", str(trained.parent), "--tokens", str(options.tokens), "--batch",
                str(options.batch), "--device", options.device,
            ],
            folder / "data" / "meta.json",
            trained,
            4,
            trains=True,
        )  # fmt: skip
    for index, group in enumerate(STUDIES):
        for name, trained in facts.items():
            yield Job(
                f"study {name} {index}",
                [
                    *MOYU, "study", *group, "--model", trained.parent.name, "--device", options.device, "--out",
                    str(results / f"studies-{name}-{index}"), *(["--quick"] if options.quick else []),
                ],
                trained,
                results / f"study-{name}-{index}.done",
                2,
            )  # fmt: skip
    for index, group in enumerate(METHODS):
        for name, trained in facts.items():
            yield Job(
                f"score {name} {index}",
                [
                    *MOYU, "trinity", "--models", trained.parent.name, "--methods", ",".join(group), "--bytes", options.bytes,
                    "--documents", str(options.documents), "--no-speed", "--device", options.device, "--out",
                    str(results / "trinity"),
                ],
                trained,
                results / f"score-{name}-{index}.done",
                2,
            )  # fmt: skip


def start(job: Job, folder: Path, left: float) -> None:
    """Start a job's process, its output into a log."""
    log = folder / "logs" / f"{job.name.replace(' ', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    minutes = ["--minutes", f"{(left - STOP) / 60:.2f}"] if job.trains else []
    with log.open("ab") as file:
        job.process = subprocess.Popen(
            [*job.command, *minutes],
            cwd=folder / "models",
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment()
            | {
                "OMP_NUM_THREADS": str(job.threads),
                "MOYU_CORPUS": str(folder / "data" / "listing.json"),
                "CUDA_VISIBLE_DEVICES": job.on,
            },
        )
    print(f"{time.strftime('%X')} started {job.name}", flush=True)


def environment() -> dict[str, str]:
    """This process' environment, the package in it."""
    paths = [str(Path(__file__).resolve().parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def settle(job: Job, folder: Path) -> bool:
    """Whether the job's process has ended; says so, and shows the end of its log where it failed."""
    assert job.process is not None
    code = job.process.poll()
    if code is None:
        return False
    if code == 0 and not job.trains:
        job.done.touch()
    print(f"{time.strftime('%X')} {'ended' if code == 0 else f'FAILED ({code})'} {job.name}", flush=True)
    if code:
        log = folder / "logs" / f"{job.name.replace(' ', '-')}.log"
        print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return True


def main() -> None:
    """Run what is left until it is done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--size", default="100m")
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bytes", default="0.75,0.6,0.5,0.4")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpus", nargs="+", default=["0"], help="numbers of the GPUs to use")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--at-once", type=int, default=12, help="scoreboards and studies at once on a GPU")
    parser.add_argument("--quick", action="store_true", help="small studies, to see that all of it runs")
    options = parser.parse_args()
    end = time.monotonic() + options.minutes * 60
    folder = options.folder.resolve()
    for part in ("models", "results", "logs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if not (folder / "data" / "meta.json").exists():
        made = [
            sys.executable,
            "-m",
            "moyu.research.training",
            "prepare",
            "--size",
            options.size,
            "--data",
            str(folder / "data"),
        ]
        subprocess.run(made, check=True, env=environment())
    waiting = [job for job in jobs(folder, options) if not job.finished()]
    running: list[Job] = []
    while (waiting or running) and time.monotonic() < end:
        running = [job for job in running if not settle(job, folder)]
        for job in list(waiting):
            if not job.needs.exists() or (not job.trains and any(j.trains for j in waiting)):
                continue
            loads = {gpu: [j for j in running if j.on == gpu] for gpu in options.gpus}
            room = 1 if job.trains else options.at_once
            free = [gpu for gpu, load in loads.items() if len(load) < room and not any(j.trains for j in load)]
            if free:
                job.on = min(free, key=lambda gpu: len(loads[gpu]))
                waiting.remove(job)
                running.append(job)
                start(job, folder, end - time.monotonic())
        time.sleep(0.5)
    for job in running:
        if job.process is not None:
            job.process.terminate()
    for name in options.models:
        facts = folder / "models" / f"{name}-{options.size}" / "training.json"
        if facts.exists():
            shutil.copy(facts, folder / "results" / f"training-{name}.json")
    left = [job.name for job in jobs(folder, options) if not job.finished()]
    print("finished" if not left else f"left: {', '.join(left)}; run again to go on")


if __name__ == "__main__":
    main()
