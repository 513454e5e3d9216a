"""The rules of the house: who may import whom, how long a room is, and that names lead somewhere."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import childtune_kernels
from childtune_kernels import plan_row

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "childtune_kernels"

# From the ground up; a module imports from lower floors only, and from `backends` as said below.
# A new module gets its place here first.
FLOORS: list[set[str]] = [
    {"_version", "labels", "plan_row"},  # tables and names, no tensors' work
    {"machine"},  # devices, versions, free memory
    # a mask's names and shapes; files that appear only when they are whole; progress bars; what ranks
    # tell each other; interleaved timing; Child-Tuning as it is usually written
    {"mask_scope", "whole_file", "progress", "rank_values", "rounds", "unfused"},
    {"backends"},  # the kernels: reference, cpp, ...
    {"registry", "group_options"},  # which kernel serves; what a group may say
    {"ops", "option_scheduler"},  # the contract of every op; options that follow the step
    {"sharding"},  # what of a sharded parameter lies on this rank
    {"mask_parts", "part_order"},  # words of parts; the order of their elements
    {"score_parts"},  # scores of parts
    # masks; how compact state writes a child down; the parts of Fisher information; weights as bits
    {
        "child_layout",
        "child_mask",
        "fisher_files",
        "fisher_parts",
        "fully_sharded",
        "fisher_scope",
        "radix_select",
        "smallest_words",
        "weight_bits",
    },
    # masters, remainders, types of moments; the original code's rule
    {"percentile_rule", "weight_formats"},
    # groups that were saved; a parameter's state; sums of its gradients
    {"child_gradients", "saved_groups", "state_tensors", "summary"},
    # the tables of a step; which elements of gradients are sent for it
    {"bucket_masks", "step_plan"},
    # what an optimizer, a model and a disk bring; gradients one by one; Fisher to masks
    {
        "fisher_examples",
        "fisher_recording",
        "named_weights",
        "parameters",
        "selection",
        "weight_files",
    },
    # compact state of parts, as state dicts have it; which tensors a model has
    {"sharded_child", "model_shapes"},
    {
        "adamw_export",
        "child_exchange",
        "exchanged_parameters",
        "child_file",
        "fisher_sums",
        "state_dicts",
    },  # loaded and saved
    # what stands when a step goes into a CUDA graph; what ranks must agree on
    {"graph_capture", "rank_agreement"},
    {"new_group", "step_factor"},
    {"step_planner"},  # which plans a step takes
    {"gradient_release"},  # steps of single parameters, from within backward
    {"child_checkpoint", "fisher", "optimizer"},
    # an optimizer under DistributedDataParallel, and with the released code's signature
    {"comm_hook", "compat"},
    # for the command line only: the self-check; who steps side by side, what it takes, pictures and tables
    {"self_check", "contenders"},
    {"side_by_side"},
    {"report", "integrations"},  # and what an ecosystem needs
    {"__init__"},  # the public names and nothing else
    {"__main__", "commands"},  # the command line: what is called, and a room a command
]
# What a backend may import of the package besides itself: the columns of the table it is handed.
OPEN_TO_BACKENDS = {"plan_row"}
# Who may import from backends, and only inside functions: a backend is loaded when it is chosen.
LOADS_BACKENDS = {"registry"}
PRINTS_ABOUT_BACKENDS = {"commands.info"}
FOR_THE_COMMAND_LINE = {"report", "integrations"}
# Rooms whose modules import each other: imports inside them are their own affair.
OF_SEVERAL_MODULES = {"backends", "commands", "integrations", "ops", "report"}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
every_module = pytest.mark.parametrize("module", MODULES)
KERNELS = [module for module in MODULES if re.match(r"backends\.(?!__init__$)", module)]
OTHERS = [module for module in MODULES if not module.startswith("backends.")]


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, tree: ast.AST | None = None) -> set[str]:
    """What a module imports: of the package as `.name`, of others by their top-level name."""
    here = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    here = [part for part in here if part != "__init__"]
    found: set[str] = set()
    for node in ast.walk(tree or tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(node.module or "")
                continue
            start = here[: len(here) + 1 - node.level]
            base = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            candidates = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            found |= {"." + (name if known(name) else base) for name in candidates}
    return {
        "." + name.removeprefix("childtune_kernels").lstrip(".")
        if name.split(".")[0] == "childtune_kernels"
        else name
        for name in found
    }


def known(name: str) -> bool:
    """Whether a dotted name is a module of the package, or a folder of modules."""
    return name in MODULES or f"{name}.__init__" in MODULES


def inside_package(names: set[str]) -> set[str]:
    """Modules of the package among imports; the package itself is `__init__`."""
    return {name[1:] or "__init__" for name in names if name.startswith(".")}


def room_of(module: str) -> str:
    return module.split(".")[0]


def floor_of(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def test_the_import_reader_sees_imports() -> None:
    assert {".ops", ".registry", ".plan_row", "torch"} <= imports("step_plan")
    assert ".backends.cpp" in imports("registry")
    assert ".backends.reference.bitmask" in imports("backends.reference.child_adamw")
    assert ".plan_row" in imports("backends.cpp")
    assert {".", ".commands.info"} <= imports("__main__")
    assert {".registry", ".backends.cpp"} <= imports("commands.info")


@every_module
def test_every_module_stands_on_one_floor(module: str) -> None:
    assert sum(room_of(module) in rooms for rooms in FLOORS) == 1, (
        f"{module}: give it a place in FLOORS"
    )


def test_every_place_in_the_table_is_taken() -> None:
    assert set().union(*FLOORS) == {room_of(module) for module in MODULES}


@every_module
def test_imports_go_down(module: str) -> None:
    for imported in inside_package(imports(module)):
        if room_of(imported) == room_of(module) in OF_SEVERAL_MODULES:
            continue
        if module == "__main__" and room_of(imported) == "commands":
            continue
        assert floor_of(imported) < floor_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", KERNELS)
def test_backends_import_nothing_above_them_and_never_each_other(module: str) -> None:
    column = module.split(".")[1]
    for imported in inside_package(imports(module)):
        own = imported.startswith("backends.") and imported.split(".")[1] == column
        assert own or imported in OPEN_TO_BACKENDS, f"{module} imports {imported}"


@pytest.mark.parametrize("module", [m for m in KERNELS if m.startswith("backends.reference")])
def test_the_reference_imports_only_torch_and_itself(module: str) -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    for imported in imports(module):
        assert imported.startswith(".backends.reference") or imported.split(".")[0] in allowed


@pytest.mark.parametrize("module", OTHERS)
def test_backends_are_loaded_by_the_registry_when_they_are_chosen(module: str) -> None:
    loads = {name for name in inside_package(imports(module)) if room_of(name) == "backends"}
    assert not loads or module in LOADS_BACKENDS | PRINTS_ABOUT_BACKENDS
    if module in LOADS_BACKENDS:
        at_import: list[ast.stmt] = [
            node for node in tree_of(module).body if isinstance(node, ast.ImportFrom)
        ]
        eager = inside_package(imports(module, ast.Module(at_import, [])))
        assert not {name for name in eager if room_of(name) == "backends"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("ops.")])
def test_ops_import_the_registry_and_the_columns_only(module: str) -> None:
    for imported in inside_package(imports(module)):
        assert imported in {"registry", "plan_row"} or room_of(imported) == "ops"


@every_module
def test_reports_and_integrations_are_for_the_command_line(module: str) -> None:
    for imported in inside_package(imports(module)):
        if room_of(imported) in FOR_THE_COMMAND_LINE:
            allowed = {"__main__", "commands", room_of(imported)}
            assert room_of(module) in allowed


@every_module
def test_files_are_named_for_what_they_hold(module: str) -> None:
    assert not BANNED_NAMES & set(module.split("."))


@every_module
def test_files_and_functions_are_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "_version"])
def test_modules_classes_and_functions_say_what_they_are(module: str) -> None:
    tree = tree_of(module)
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_public_names_exist_and_explain_themselves() -> None:
    assert len(set(childtune_kernels.__all__)) == len(childtune_kernels.__all__)
    for name in childtune_kernels.__all__:
        value = getattr(childtune_kernels, name)
        if name == "__version__":
            assert re.fullmatch(r"\d+\.\d+\.\d+\S*", value)
            continue
        assert value.__doc__, name
        if isinstance(value, type):
            for member_name, member in vars(value).items():
                if callable(member) and not member_name.startswith("_"):
                    assert member.__doc__, f"{name}.{member_name}"
    imported = {
        alias.asname or alias.name
        for node in tree_of("__init__").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(childtune_kernels.__all__)


def string_constant(header: str, name: str) -> str:
    """A C++ string constant of neighbouring literals."""
    match = re.search(rf"{name} =\s*((?:\"[^\"]*\"\s*)+);", header)
    assert match, f"{name} is not in plan_row.h"
    return "".join(re.findall(r'"([^"]*)"', match[1]))


def test_the_kernels_read_the_columns_that_python_writes() -> None:
    header = (ROOT / "csrc" / "plan_row.h").read_text(encoding="utf-8")
    assert string_constant(header, "kRowFields") == plan_row.ROW_FIELDS
    assert string_constant(header, "kGroupFields") == plan_row.GROUP_FIELDS
    for struct, fields in (("PlanRow", plan_row.ROW_FIELDS), ("PlanGroup", plan_row.GROUP_FIELDS)):
        body = re.search(rf"struct {struct} {{(.*?)\n}};", header, re.S)
        assert body
        members = re.findall(r"(?:int64_t|double|IndexMap) (\w+);", body[1])
        assert members == [field.split(":")[0] for field in fields.split(",")]
    assert f"kMapLevels = {plan_row.MAP_LEVELS};" in header
    codes = re.search(r"enum DtypeCode[^{]*{([^}]*)}", header)
    assert codes
    named = {f"torch.{k.lower()}": int(v) for k, v in re.findall(r"k(\w+) = (\d)", codes[1])}
    assert named == {str(dtype): code for dtype, code in plan_row.DTYPE_CODES.items()}
    assert plan_row.GroupNumbers._fields == tuple(plan_row.GROUP_FIELDS.split(","))


def cited(text: str) -> set[int]:
    """Equation numbers in `eq. 3`, `eq. 1 to 5`, `eq. 2 and 7`, `eq. 1, 2 and 5`."""
    numbers: set[int] = set()
    for citation in re.findall(r"[Ee]q\. (\d+(?:(?:, | and | to )\d+)*)", text):
        for part in re.split(r", | and ", citation):
            first, _, last = part.partition(" to ")
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


SOURCES = [*MODULES.values(), *sorted((ROOT / "csrc").rglob("*.[ch]*")), ROOT / "SPEC.md"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cited_equations_stand_in_the_specification(path: Path) -> None:
    specification = (ROOT / "SPEC.md").read_text(encoding="utf-8")
    equations = {int(number) for number in re.findall(r"\*\*Eq\. (\d+),", specification)}
    text = re.sub(r"\n *(?://|#)? *", " ", path.read_text(encoding="utf-8"))
    assert cited(text) <= equations
    sections = {int(number) for number in re.findall(r"(?m)^## (\d+)\.", specification)}
    assert {int(number) for number in re.findall(r"section (\d+)", text)} <= sections
    for quoted in re.findall(r'SPEC\.md, "([^"]+)"', text):
        assert re.search(rf"(?m)^(\*\*|## \d+\. ){re.escape(quoted)}", specification), quoted


def test_the_citation_reader_sees_citations() -> None:
    assert cited("SPEC.md, eq. 1 to 3; Eq. 7, in double; eq. 9, 10 and 12") == {
        1,
        2,
        3,
        7,
        9,
        10,
        12,
    }
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    specification = (ROOT / "SPEC.md").read_text(encoding="utf-8")
    assert cited(code) == {int(number) for number in re.findall(r"\*\*Eq\. (\d+),", specification)}
