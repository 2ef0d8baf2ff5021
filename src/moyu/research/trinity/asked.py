"""What a scoreboard is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moyu import methods
from moyu.calibration.settings import Settings
from moyu.errors import UserError
from moyu.kernels import BackendName
from moyu.model import machine

MODELS = ("swiglu", "relu", "gelu")
BYTES = (0.75, 0.6, 0.5)  # of a model in 16 bits
FILE_BYTES = (0.85, 0.7, 0.55)  # of a quantised file's own
QUANTISE = "quantise"  # the row of rounding all weights, beside the methods
DOCUMENTS, FILE_DOCUMENTS = 24, 12
FILE_MATCHED = 4  # documents of a file's board on which the matched references are measured
ALL = 10_000  # windows: as many as the text has
SLOW = ("oracle-greedy",)  # a bound that takes minutes a cell: only where it is named
QUICK_METHODS = ("cats", "griffin", "popularity")
QUICK_FILE_METHODS = ("levels", "cats", "griffin")


@dataclass(frozen=True)
class Target:
    """What a cell was asked for: a byte fraction of the dense step in these bits, a sparsity, or neither."""

    kind: str  # "bytes", "sparsity", "native": what the method skips by itself; "rounding"; "file": nothing is skipped of it
    value: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}{self.value:.3f}" if self.kind in ("bytes", "sparsity") else self.kind


@dataclass(frozen=True)
class Asked:
    """Which scoreboard."""

    models: Sequence[str] = MODELS
    methods: Sequence[str] = ()  # none: all of the registry
    bytes: Sequence[float] = ()  # none: BYTES or FILE_BYTES
    quick: bool = False
    documents: int | None = None  # None: DOCUMENTS or FILE_DOCUMENTS
    seed: int = 0
    speed: bool = True
    device: str = "cpu"
    backend: BackendName = "auto"  # of what is timed
    text: Path | None = None  # None: the Python code that comes with MOYU
    competitors: Sequence[Path] = ()  # files beside the models that they were made from

    def check(self) -> None:
        """Refuse what cannot be run, before anything is loaded."""
        for name in self.methods:
            if name != QUANTISE:
                methods.method_class(name)
        for value in self.bytes:
            if not 0 < value < 1:
                raise UserError(f"byte fraction must be in (0, 1), not {value}", "0.75,0.6,0.5 are the default")
        if self.documents is not None and self.documents < 2:
            raise UserError(f"{self.documents} documents give no interval", "use at least 2")
        machine.check(self.device, self.backend)

    def names(self, of_file: bool = False) -> list[str]:
        """Methods of the rows."""
        if self.methods:
            return list(self.methods)
        quick = QUICK_FILE_METHODS if of_file else QUICK_METHODS
        own: list[str] = [*quick] if self.quick else [n for n in methods.names() if n not in SLOW]
        return own if of_file else [QUANTISE, *own]

    def fractions(self, of_file: bool = False) -> Sequence[float]:
        """Byte fractions of the columns."""
        return self.bytes or (FILE_BYTES if of_file else BYTES)

    def count(self, of_file: bool = False) -> int:
        """Documents that are scored, at most."""
        usual = FILE_DOCUMENTS if of_file else DOCUMENTS
        return 6 if self.quick else self.documents or usual

    def settings(self) -> Settings:
        """How models and text are opened: more test windows than documents, of which each document's first is taken."""
        test = ALL if self.text is not None else 48 if self.quick else 8 * (self.documents or DOCUMENTS)
        calibration = 4 if self.quick else 8
        window, boundary = (128, 64) if self.quick else (256, 128)
        return Settings(
            window=window,
            boundary=boundary,
            calibration=calibration,
            test=test,
            seed=self.seed,
            device=self.device,
            text=self.text,
            by_document=self.text is not None,
        )
