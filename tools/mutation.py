"""Shows that the tests of every mechanism can fail: mutates its source file and runs its test files.

python tools/mutation.py [MECHANISM ...] [--mutants N] [--seed S]

A mechanism is `kind/name` or a name of `tools/mutation.yaml`, which says what its test files are. Fails unless at
least three mutants of every mechanism are killed: a test fails by an assertion. A mutant under which the tests only
crash says nothing about what they check: it is not counted, and the next one is drawn. Survivors are printed; some are
equivalent to what they were made from.

Why no mutation tester is used: mutmut 3.8 and cosmic-ray 8.7 swap operators and constants, but neither drops a factor
or a call, nor holds an index still, which are the faults that tests of routers let pass. mutmut leaves decorated
functions alone (our statistics are `@torch.no_grad`), and draws first from strings and arguments that become None,
which all crash. cosmic-ray rewrites the working tree and imports torch anew for every mutant. Here every mutant is a
fork of one process that has imported torch.
"""

import argparse
import gc
import importlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import yaml
from mutants import Mutant, mutants_of


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
TEST_FILES = Path(__file__).with_suffix(".yaml")
FOLDERS = {
    "host": "modeling/hosts",
    "router": "modeling/routers",
    "experts": "modeling/experts",
    "block": "modeling/blocks",
    "attention": "modeling/attention",
    "layer": "modeling/layers",
    "objective": "modeling/objectives",
    "connector": "modeling/connectors",
    "adapter": "adapters",
    "adapter_experts": "adapters/experts",
    "shared": "modeling",
}
# The suite over all mechanisms of the registry; a mechanism is held by its own cases.
SUITE = "tests/mechanisms/test_mechanism_suite.py"
OUTSIDE_OF_THE_SUITE = ("adapter", "adapter_router", "adapter_experts", "shared")
KILLED_AT_LEAST = 3
# A test that takes longer than this, in seconds of CPU, is left out: an exact check has to kill.
LONGEST_TEST = 2.0
TIMEOUT = 300.0  # of a run, in seconds
FORK = multiprocessing.get_context("fork")


@dataclass
class Mechanism:
    """A source file and the tests that hold it.

    Attributes:
        key: kind and name.
        source: the file.
        tests: paths from the root of the repository.
        case: how the ids of its cases in the suite begin.
    """

    key: str
    source: Path
    tests: list[str]
    case: str = ""

    @property
    def module(self) -> str:
        return ".".join(self.source.relative_to(SOURCE).with_suffix("").parts)


@dataclass(eq=False)
class Watch:
    """What a run of pytest tells.

    Attributes:
        long: node ids of tests that are left out; those that prove too long are added.
        case: how the ids of the cases in the suite begin that are run.
        outcome: `"survived"`, `"killed"` or `"crashed"`.
        finished: how many tests came to their end.
        modules: of other libraries that were imported.
    """

    long: set[str]
    case: str = ""
    outcome: str = "survived"
    finished: int = 0
    modules: list[str] = field(default_factory=list)
    crashes: int = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def is_run(path: str, _: str, case: str) -> bool:
            return not path.startswith(SUITE) or case.startswith((f"{self.case}]", f"{self.case}-"))

        items[:] = [item for item in items if item.nodeid not in self.long and is_run(*item.nodeid.partition("["))]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        def leave_out(*_: Any) -> None:
            self.long.add(item.nodeid)
            raise pytest.skip.Exception("takes too long")

        signal.signal(signal.SIGPROF, leave_out)
        signal.setitimer(signal.ITIMER_PROF, LONGEST_TEST)
        try:
            result = yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.finished += 1
        return result

    def pytest_exception_interact(self, node: Any, call: pytest.CallInfo) -> None:
        if call.excinfo is not None and issubclass(call.excinfo.type, AssertionError | pytest.fail.Exception):
            self.outcome, node.session.shouldstop = "killed", "killed"
        else:
            self.outcome, self.crashes = "crashed", self.crashes + 1
            if self.crashes == 3:
                node.session.shouldstop = "crashed"


class MutantLoader(SourceFileLoader):
    """Loads a module from other source than its file's, and is its own finder."""

    def __init__(self, module: str, path: Path, source: str):
        super().__init__(module, str(path))
        self.source = source

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec")


def run_here(mechanism: Mechanism, source: str, long: set[str], pipe: Any) -> None:
    """Run the tests of a mechanism with `source` in its file's place, in a process of their own."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.meta_path.insert(0, MutantLoader(mechanism.module, mechanism.source, source))
    watch = Watch(long, mechanism.case)
    without = ("-p", "no:cacheprovider", "-p", "no:unraisableexception")  # which collects garbage at the end
    code = pytest.main(["-q", "-m", "not slow", *without, *mechanism.tests], plugins=[watch])
    if mechanism.module not in sys.modules or code not in (0, 1, 2):
        watch.outcome = "crashed"
    watch.modules = [
        name
        for name, module in sys.modules.items()
        if (path := getattr(module, "__file__", None)) and not (SOURCE in Path(path).parents or "/tests/" in path)
    ]
    pipe.send(watch)


def run(mechanism: Mechanism, source: str, long: set[str]) -> Watch:
    """Return what the tests of a mechanism say of `source`."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=run_here, args=(mechanism, source, long, sender))
    process.start()
    sender.close()
    try:
        watch = receiver.recv() if receiver.poll(TIMEOUT) else Watch(long, outcome="crashed")
    except EOFError:
        watch = Watch(long, outcome="crashed")
    if process.is_alive():
        process.join(5)
        process.kill()
    process.join()
    return watch


def preload(modules: list[str]) -> None:
    """Import what the tests need of other libraries, so that the next process need not."""
    for name in modules:
        if name not in sys.modules and name.partition(".")[0] not in ("hf_moe", "conftest", "__main__", "_pytest"):
            try:
                importlib.import_module(name)
            except Exception:  # a module that only its package may import
                continue
    gc.freeze()


def mechanisms() -> dict[str, Mechanism]:
    """Return all mechanisms by `kind/name`: those of the registry, and what else `tools/mutation.yaml` lists."""
    listed, found = yaml.safe_load(TEST_FILES.read_text()), {}
    for kind, folder in FOLDERS.items():
        in_suite = kind not in OUTSIDE_OF_THE_SUITE
        files = (SOURCE / "hf_moe" / folder).glob("[!_]*.py") if in_suite else ()
        for name in sorted({path.stem for path in files} | set(listed.get(kind, ()))):
            own = [str(path.relative_to(ROOT)) for path in ROOT.glob(f"tests/systems/*/test_{name}.py")]
            tests = [*listed.get(kind, {}).get(name, ()), *own, *([SUITE] if in_suite else ())]
            source = SOURCE / "hf_moe" / folder / f"{name}.py"
            found[f"{kind}/{name}"] = Mechanism(f"{kind}/{name}", source, tests, f"{kind} {name}")
    return found


def judge(mechanism: Mechanism, count: int, seed: int) -> tuple[int, list[Mutant]]:
    """Return how many of `count` mutants were killed, and the survivors.

    Raises:
        SystemExit: if the tests fail without a mutant.
    """
    source = mechanism.source.read_text()
    plain = run(mechanism, source, set())
    if plain.outcome != "survived" or not plain.finished:
        raise SystemExit(f"{mechanism.key}: its tests fail without a mutant: {' '.join(mechanism.tests)}")
    preload(plain.modules)
    killed, survivors = 0, []
    for drawn, mutant in enumerate(mutants_of(source, f"{seed} {mechanism.key}")):
        if killed + len(survivors) == count or drawn == 4 * count:
            break
        outcome = run(mechanism, mutant.source, plain.long).outcome
        killed += outcome == "killed"
        if outcome == "survived":
            survivors.append(mutant)
    return killed, survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mechanisms", nargs="*", help="kind/name or name; all where none is given")
    parser.add_argument("--mutants", type=int, default=6, help="how many of each, at least three")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    known = mechanisms()
    chosen = {key: one for key, one in known.items() if {key, key.partition("/")[2]} & set(arguments.mechanisms)}
    unknown = set(arguments.mechanisms) - {name for key in chosen for name in (key, key.partition("/")[2])}
    if unknown or arguments.mutants < KILLED_AT_LEAST:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}" if unknown else "--mutants < 3"
        )
    os.chdir(ROOT)
    print("| mechanism | test files | mutants | killed | survivors |\n|---|---|---|---|---|")
    weak = []
    for mechanism in (chosen or known).values():
        killed, survivors = judge(mechanism, arguments.mutants, arguments.seed)
        files = " ".join(Path(test).name for test in mechanism.tests)
        where = " ".join(f"{mechanism.source.name}:{mutant.line}" for mutant in survivors)
        print(f"| {mechanism.key} | {files} | {killed + len(survivors)} | {killed} | {where} |", flush=True)
        for mutant in survivors:
            print(
                f"    {mechanism.source.relative_to(ROOT)}:{mutant.line}\n    - {mutant.before}\n    + {mutant.after}"
            )
        if killed < KILLED_AT_LEAST:
            weak.append(mechanism.key)
    if weak:
        raise SystemExit(f"Fewer than {KILLED_AT_LEAST} mutants were killed of: {', '.join(weak)}")


if __name__ == "__main__":
    sys.path.insert(0, str(SOURCE))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
