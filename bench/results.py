"""What comes out of a measurement: a row for every contestant of a case, a verdict for every target."""

from dataclasses import dataclass
from statistics import median, quantiles

from bench.case import BEST_STOCK, COPY, STOCK, Case, Target


@dataclass
class Row:
    """One contestant in one case; a quantity that was not measured or makes no sense is None.

    ``ratio`` is the baseline's median over this one's: above 1 is faster than the baseline. ``copy_fraction`` is the
    bandwidth over that of a plain copy in the same rounds. ``peak_bytes`` is what a step has allocated at most beyond
    what was there before it, ``state_bytes`` what the optimizer's state takes. ``launches`` counts kernels, and
    ``syncs`` whether the step made the host wait for the device (0 or 1). ``kept_expected`` is what parameters and
    states should take, in bytes a parameter. ``missing`` says why a contestant could not take part, ``error`` how it
    failed.
    """

    case: str
    optimizer: str
    contestant: str
    clock: str
    baseline: str
    model: str
    params: int
    tensors: int
    groups: int
    dtype: str
    rounds: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None
    us_per_tensor: float | None = None
    bytes_per_param: float | None = None
    gb_per_s: float | None = None
    copy_fraction: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    kept_expected: float | None = None
    launches: int | None = None
    syncs: int | None = None
    note: str | None = None
    missing: str | None = None
    error: str | None = None

    @property
    def out(self) -> bool:
        """It takes no further part."""
        return self.missing is not None or self.error is not None

    @property
    def peak_fraction(self) -> float | None:
        """``peak_bytes`` over the bytes of the parameters."""
        return None if self.peak_bytes is None else self.peak_bytes / self.param_bytes

    @property
    def state_per_param(self) -> float | None:
        return None if self.state_bytes is None else self.state_bytes / self.params

    @property
    def kept_per_param(self) -> float | None:
        """Bytes a parameter of parameters and states together, where these are the question."""
        if self.kept_expected is None or self.state_bytes is None:
            return None
        return (self.param_bytes + self.state_bytes) / self.params

    @property
    def kept_error(self) -> float | None:
        """How far they are from what is expected, as a part of that."""
        return None if self.kept_per_param is None else abs(self.kept_per_param / self.kept_expected - 1.0)

    @property
    def param_bytes(self) -> int:
        return self.params * {"float64": 8, "float32": 4}.get(self.dtype, 2)


@dataclass
class Verdict:
    """A target and what was measured; ``holds`` is "yes", "no" or "not measured"."""

    case: str
    contestant: str
    target: str
    measured: float | None
    holds: str


def empty_rows(case: Case) -> dict[str, Row]:
    """A row for every contestant, by name, with nothing measured yet."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        name: Row(
            case.name, case.call, name, case.clock, case.baseline, case.model, case.numel, len(case.shapes),
            case.groups, dtype, kept_expected=case.kept.get(name), note=case.notes.get(name),
        )
        for name in case.contestants
    }  # fmt: skip


def summarize(case: Case, rows: dict[str, Row], times: dict[str, list[float]], moved: dict[str, int]) -> None:
    """Fill in the rows of the contestants that have times.

    Args:
        times: Seconds, one a timed call.
        moved: Bytes a call moves, of contestants that know; the others have the case's ``traffic``.
    """
    for name, seconds in times.items():
        row = rows[name]
        deciles = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
        row.rounds = len(seconds)
        row.median_ms, row.p20_ms, row.p80_ms = 1e3 * median(seconds), 1e3 * deciles[1], 1e3 * deciles[7]
        if case.clock in ("host", "cpu"):
            row.us_per_tensor = 1e3 * row.median_ms / len(case.shapes)
        row.bytes_per_param = case.traffic.get(name)
        size = moved.get(name, case.traffic.get(name, 0) * case.numel)
        row.gb_per_s = size / row.median_ms / 1e6 if size else None
    for name in times:
        row = rows[name]
        if name != COPY:
            row.ratio = over(rows[case.baseline].median_ms, row.median_ms)
        if COPY in rows:
            row.copy_fraction = over(row.gb_per_s, rows[COPY].gb_per_s)


def judge(case: Case, rows: dict[str, Row]) -> list[Verdict]:
    """Hold the rows of a case against its targets."""
    verdicts = []
    for target in case.targets:
        measured = quantity(target, rows)
        if measured is None:
            holds = "not measured"
        else:
            met = measured <= target.bound if target.against is None else measured >= target.bound
            holds = "yes" if met else "no"
        verdicts.append(Verdict(case.name, target.contestant, str(target), measured, holds))
    return verdicts


def quantity(target: Target, rows: dict[str, Row]) -> float | None:
    row = rows[target.contestant]
    if target.against is None:
        return getattr(row, target.quantity)
    if target.against == BEST_STOCK:
        # who was not to take part, such as a compiled step of too many tensors, is told in the table
        medians = [rows[name].median_ms for name in STOCK if name in rows and rows[name].missing is None]
        # one that failed might have been the fastest
        return over(None if None in medians else min(medians, default=None), row.median_ms)
    other = rows[target.against]
    if target.quantity == "bandwidth":
        return over(row.gb_per_s, other.gb_per_s)
    return over(other.median_ms, row.median_ms)


def over(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator
