"""What the site takes from the code, so that it cannot get stale.

A line ``<!-- NAME ARGUMENTS -->`` on a page becomes what :data:`GENERATORS` makes of it: a section of CONTRIBUTING.md,
a table of the config's dataclasses or of a registry, the memory of an optimizer. The pages of ``bench/results`` become
pages of the site, and links to them lead there.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import typing
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import griffe
import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import optimx
from bench import muon_cost, shapes
from bench.catalogue import cost_of, optimizers
from docs.docstrings import as_markdown
from optimx import lr_scheduler
from optimx._checks import Condition
from optimx.config.values import describe_type
from optimx.presets import PRESETS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
#: Endings of the files in that folder that become part of the site.
SUFFIXES = (".md", ".png", ".svg", ".json")
#: A directive; the marks of ``bench.report``, which writes what is between them, are none.
DIRECTIVE = re.compile(r"^<!-- (?!bench )(.+) -->$", re.MULTILINE)
#: A link to a result, as it is on the disk, from a page in ``docs`` or in a folder there.
RESULT_LINK = re.compile(r"(?<=\]\()((?:\.\./)*)\.\./bench/results/")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Called by mkdocs for every page."""
    return expand(markdown) if not page.file.generated_by else markdown


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by mkdocs first: the section of optimizers, which has its index, gets a page for each."""
    for entry in config.nav or ():
        for section in entry.values():
            if isinstance(section, list) and "optimizers/index.md" in section:
                section += [{name: f"optimizers/{page_of(name)}"} for name in optimizers()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs once: the results of the benchmarks are pages and pictures of the site."""
    for path in results():
        uri = f"benchmarks/{path.relative_to(RESULTS).as_posix()}"
        file = File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(file)
    return files


def expand(markdown: str) -> str:
    """A page with the generated parts in place of their directives, and links to results as the site has them.

    Raises:
        KeyError: There is no such generator, section or name.
    """

    def replace(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[1])
        return GENERATORS[name](*arguments)

    return RESULT_LINK.sub(r"\1benchmarks/", DIRECTIVE.sub(replace, markdown))


def results() -> list[Path]:
    """Reports and their pictures."""
    return sorted(path for path in RESULTS.rglob("*") if path.suffix in SUFFIXES)


def section(heading: str) -> str:
    """The text below a second-level heading of CONTRIBUTING.md, which has no links."""
    parts = re.split(r"^## (.+)\n", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[heading].strip()


def fields(name: str) -> str:
    """A section of the config: key, default, what it should be, meaning."""
    cls = getattr(optimx.config, name)
    hints = typing.get_type_hints(cls, include_extras=True)
    meanings = meanings_of(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if field.name != "args":
            what = "; ".join([describe_type(hints[field.name]), *conditions(hints[field.name])])
            meaning, said = without_default(meanings[field.name])
            rows.append((f"`{field.name}`", what, default_of(field) or said, meaning))
    return table(("key", "what", "default", "meaning"), rows)


def meanings_of(cls: type) -> dict[str, str]:
    """What a dataclass's docstring says of each attribute, on one line."""
    parsed = griffe.Docstring(as_markdown(cls.__doc__ or "")).parse("google", warnings=False)
    (attributes,) = (part.value for part in parsed if part.kind is griffe.DocstringSectionKind.attributes)
    return {item.name: " ".join(item.description.split()) for item in attributes}


def without_default(meaning: str) -> tuple[str, str]:
    """What a docstring says of an attribute, and what it says of its default."""
    match = re.search(r" \(default: ([^()]*)\)", meaning)
    return (meaning, "") if match is None else (meaning.replace(match[0], ""), match[1])


def conditions(hint: Any) -> list[str]:
    """The conditions on an annotation and on its arguments, as text."""
    own = [rule.text for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Condition)]
    parts = (part for part in typing.get_args(hint) if not isinstance(part, Condition))
    return [*own, *(text for part in parts for text in conditions(part))]


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default of a field, or nothing where it stands for another one."""
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    return "" if field.default in (None, ()) else f"`{field.default!r}`"


def page_of(name: str) -> str:
    """The page of an optimizer, which is named as its module is."""
    return f"{getattr(optimx, name).__module__.rpartition('.')[2]}.md"


def paper(name: str) -> str:
    """Where an optimizer was published, as the docstring of its module says."""
    module = inspect.getmodule(getattr(optimx, name))
    (first, *_) = re.findall(r"https?://[^\s),]+", inspect.getdoc(module) or "")
    return f"Paper: <{first}>"


def cost(name: str) -> str:
    """The cost of an optimizer, for each choice of arguments that changes it."""
    return cost_table((label, name, arguments) for label, arguments in VARIANTS.get(name, {"default": {}}).items())


def costs() -> str:
    """The cost of each optimizer with its default arguments."""
    return cost_table((f"[{name}]({page_of(name)})", name, {}) for name in optimizers())


def cost_table(rows: Iterable[tuple[str, str, dict[str, Any]]]) -> str:
    """A table with a row for each label, optimizer's name and arguments."""
    cells = [(label, *(f"{number:.3g}" for number in cost_of(name, arguments))) for label, name, arguments in rows]
    return table(("bytes a float32 parameter", "state", "moved by a step", "with `max_grad_norm`"), cells)


def muon_costs() -> str:
    """What a step of Muon computes and moves in models, by formula: a row for each form of the iterations."""
    rows = []
    for model, matrices in MUON_MODELS.items():
        for form in muon_cost.FORMS:
            cost = muon_cost.step_cost(matrices, form)
            numbers = (cost.flops / 1e12, cost.product_bytes / 1e9, cost.elementwise_bytes / 1e9)
            rows.append((model, f"{cost.params / 1e6:.1f}M", form, *(f"{number:.3g}" for number in numbers)))
    return table(("computed", "parameters", "form", "TFLOPs", "GB of the products", "GB beside them"), rows)


def memory_table() -> str:
    """Bytes that a bfloat16 matrix takes beside its gradient, and a step moves, by how it and its states are kept."""
    param = torch.nn.Parameter(torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta"))
    rows = []
    for label, settings in KEPT.items():
        cells = []
        for make in (optimx.AdamW, partial(optimx.SGD, momentum=0.9), partial(optimx.Adafactor, beta1=0.9)):
            with warnings.catch_warnings():
                # of a second moment that stands still
                warnings.simplefilter("ignore")
                (row,) = optimx.memory(make([param], **settings)).rows
            cells.append(f"{(row.params + row.states) / row.elements:.3g}, {row.traffic / row.elements:.3g}")
        rows.append((label, *cells))
    return table(("kept, moved", "AdamW", "SGD with momentum, Lion", "Adafactor with `beta1`"), rows)


#: How parameters and states may be kept.
KEPT: dict[str, dict[str, Any]] = {
    "all as torch keeps it": {},
    '`"master"`, float32 states': {"param_rounding": "master", "state_dtype": torch.float32},
    '`"remainder16"`, float32 states': {"param_rounding": "remainder16", "state_dtype": torch.float32},
    '`"stochastic"`, float32 states': {"param_rounding": "stochastic", "state_dtype": torch.float32},
    '`"remainder16"`, `"stochastic"` states': {"param_rounding": "remainder16", "state_dtype": "stochastic"},
    '`"remainder8"`, `"8bit"` states': {"param_rounding": "remainder8", "state_dtype": "8bit"},
    'all `"stochastic"`': {"param_rounding": "stochastic", "state_dtype": "stochastic"},
    '`"stochastic"`, `"8bit"` states': {"param_rounding": "stochastic", "state_dtype": "8bit"},
}

#: The matrices that Muon has in these models.
MUON_MODELS: dict[str, list[shapes.Shape]] = {
    "GPT-2 124M": shapes.repeated_matrices(shapes.gpt2()),
    "Llama 3 8B": shapes.llama_matrices(4096, 14_336, 1024) * 32,
}

#: Arguments that change the memory.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "Adafactor": {"a matrix of 1024 x 1024": {}, "with `beta1=0.9`": {"beta1": 0.9}},
    "Adam": {"default": {}, "`amsgrad=True`": {"amsgrad": True}},
    "AdamW": {"default": {}, "`amsgrad=True`": {"amsgrad": True}},
    "RMSprop": {
        "default": {},
        "`momentum=0.9`": {"momentum": 0.9},
        "`centered=True, momentum=0.9`": {"centered": True, "momentum": 0.9},
    },
    "SGD": {"default": {}, "`momentum=0.9`": {"momentum": 0.9}},
}


def names(kind: str) -> str:
    """A list or table of what configs and the command line can name."""
    if kind == "presets":
        rows = [(f"`{name}`", preset.summary, preset.source) for name, preset in PRESETS.items()]
        return table(("preset", "for", "source of its numbers"), rows)
    listed = {"optimizers": optimx.list_optimizers, "schedulers": optimx.list_schedulers}[kind]()
    return ", ".join(f"`{name}`" for name in listed)


def schedules() -> str:
    """A table of what ``optimx.lr_scheduler`` has beside torch's names, with the first line of each docstring."""
    rows = []
    for name in lr_scheduler.__all__:
        thing = getattr(lr_scheduler, name)
        if getattr(thing, "__module__", "").startswith("optimx."):
            rows.append((f"`{name}`", as_markdown(inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")))
    return table(("name", "what"), rows)


def reports() -> str:
    """Links to the pages of ``bench/results``."""
    lines = []
    for path in results():
        if path.suffix == ".md":
            uri = path.relative_to(RESULTS)
            (title, *_) = re.findall(r"^# (.+)$", path.read_text(), re.MULTILINE) or [uri.stem]
            where = f", {uri.parent.name}" if uri.parent.name else ""
            lines.append(f"- [{title}](benchmarks/{uri.as_posix()}){where}")
    return "\n".join(lines)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


GENERATORS: dict[str, Callable[..., str]] = {
    "section": section,
    "fields": fields,
    "memory_table": memory_table,
    "cost": cost,
    "costs": costs,
    "muon_costs": muon_costs,
    "names": names,
    "paper": paper,
    "reports": reports,
    "schedules": schedules,
}
