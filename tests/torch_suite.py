# SPDX-License-Identifier: Apache-2.0
"""Runs PyTorch's own distributed_test.py, as installed, on the backend "automoe".

    python tests/torch_suite.py 4 [test ...]    # world size, then names; default: all
    python tests/torch_suite.py 4 list          # what runs and what is skipped

Nothing of that file is stored here: its text is read from the installed torch, the
names of the backends that a test is meant for are widened in memory, and the result is
executed as the module. This process imports torch once and forks the ranks of one test
after the other, so that a test costs a second rather than one import of torch per rank;
multiprocessing's own fork server would not hand on the environment that the suite sets
per test. Neither this process nor a rank imports torch_automoe: torch finds the backend
by its entry point.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import faulthandler
import gc
import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
import sys
import textwrap
import time
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

BACKEND = "automoe"
SUITE = "torch.testing._internal.distributed.distributed_test"
# Asked for in place of a test: the names of all.
LIST = "list"
# A test that hangs costs this many seconds, and is then a failure of its own.
TEST_SECONDS = 60
# What the ranks of a test that has ended may take to go.
_EXIT_SECONDS = 5.0

# Text of the suite -> what stands there for us. A line stays a line, so that tracebacks
# show the installed file.
GATES = {
    '@require_backend_is_available({"gloo"})': (
        f'@require_backend_is_available({{"gloo", "{BACKEND}"}})'
    ),
    'BACKEND != "gloo"': f'BACKEND not in ("gloo", "{BACKEND}")',
    'BACKEND != "mpi"': f'BACKEND not in ("mpi", "{BACKEND}")',
    'BACKEND == "mpi" or BACKEND == "gloo"': (
        f'BACKEND in ("mpi", "gloo", "{BACKEND}")'
    ),
}
# Text of torch.distributed.monitored_barrier, which torch 2.13 refuses by name.
MONITORED_BARRIER_GATE = "get_backend(group) != Backend.GLOO"
_MONITORED_BARRIER_WIDENED = f'get_backend(group) not in (Backend.GLOO, "{BACKEND}")'
_PROFILED = (
    "PROFILING_SUPPORTED_BACKENDS",
    "CUDA_PROFILING_SUPPORTED_BACKENDS",
    "SEND_RECV_PROFILING_SUPPORTED_BACKENDS",
)
_FEATURES = ("gpu", "cuda", "ddp", "subgroup", "plugin")
# Decorators of the suite that skip inside the ranks, by their exit code.
_EXIT_DECORATORS = (
    "skip_if_no_gpu",
    "skip_if_odd_worldsize",
    "skip_if_rocm_multiprocess",
    "skip_if_small_worldsize",
)
_EXIT_DECORATOR_FACTORIES = (
    "nccl_skip_if_lt_x_gpu",
    "require_n_gpus_for_nccl_backend",
    "skip_if_lt_x_gpu",
)


def environment(world_size: int) -> dict[str, str]:
    """Return the variables that the process which runs the suite must start with."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCH_", "AUTOMOE_"))
    }
    return {
        **kept,
        "BACKEND": BACKEND,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        # The suite replaces it for each test; some tests ask when it is loaded.
        "INIT_METHOD": "file:///unused",
        # Else every test is skipped where there are fewer GPUs than ranks.
        "CUDA_VISIBLE_DEVICES": "",
        "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(TEST_SECONDS),
        # No thread may exist when the ranks are forked, and cores are few.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def load_suite() -> tuple[types.ModuleType, dict[str, int]]:
    """Load the installed suite with its gates widened, and count the substitutions."""
    from torch.testing._internal import common_distributed as common

    for feature in _FEATURES:
        common.DistTestCases.backend_feature[feature].add(BACKEND)
    common.TIMEOUT_OVERRIDE.clear()
    _skip_before_forking(common)
    # Whether it is installed decides what one test is skipped for.
    sys.modules["torchvision"] = None
    spec = importlib.util.find_spec(SUITE)
    source = Path(spec.origin).read_text(encoding="utf-8")
    counts = {}
    for old, new in GATES.items():
        counts[old] = source.count(old)
        source = source.replace(old, new)
    module = importlib.util.module_from_spec(spec)
    # Under its own name: ranks pickle objects of its classes.
    sys.modules[SUITE] = module
    _execute(source, spec.origin, module.__dict__)
    for name in _PROFILED:
        getattr(module, name).append(BACKEND)
    counts[MONITORED_BARRIER_GATE] = _widen_monitored_barrier()
    return module, counts


def _execute(source: str, filename: str, namespace: dict[str, Any]) -> None:
    # Without this file's __future__ imports, which would change annotations.
    exec(compile(source, filename, "exec", dont_inherit=True), namespace)


def _widen_monitored_barrier() -> int:
    """Let torch.distributed.monitored_barrier reach our backend; 0: it does already."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    function = dist.monitored_barrier
    source = textwrap.dedent(inspect.getsource(function))
    count = source.count(MONITORED_BARRIER_GATE)
    source = source.replace(MONITORED_BARRIER_GATE, _MONITORED_BARRIER_WIDENED)
    _execute(source, "<widened>", distributed_c10d.__dict__)
    dist.monitored_barrier = distributed_c10d.monitored_barrier
    return count


def _skip_before_forking(common: types.ModuleType) -> None:
    """Ask the decorators that let a rank exit with a code here, once per test.

    Their answer depends on the machine and the environment alone. It comes from
    themselves: applied to a probe, which they either call or not.
    """
    messages = {skip.exit_code: skip.message for skip in common.TEST_SKIPS.values()}

    class Called(Exception):
        pass

    def probe(_test: object) -> None:
        raise Called

    def decide(decorate: Callable) -> Callable:
        def decorated(function: Callable) -> Callable:
            try:
                decorate(probe)(object())
            except Called:
                return decorate(function)
            except SystemExit as skipped:
                return unittest.skip(messages[skipped.code])(function)
            raise AssertionError(f"{decorate} neither calls nor skips a test")

        return decorated

    def decide_factory(factory: Callable) -> Callable:
        return lambda *args, **kwargs: decide(factory(*args, **kwargs))

    for name in _EXIT_DECORATORS:
        setattr(common, name, decide(getattr(common, name)))
    for name in _EXIT_DECORATOR_FACTORIES:
        setattr(common, name, decide_factory(getattr(common, name)))


def count_groups(counter: Any) -> None:
    """Count in ``counter``, shared with the ranks, how often our creator is called."""
    from torch.distributed import Backend

    plugin = Backend._plugins.get(BACKEND.upper())
    if plugin is None:
        raise SystemExit(f"torch has not registered {BACKEND!r} by its entry point")

    def create(*args: Any) -> Any:
        backend = plugin.creator_fn(*args)
        with counter.get_lock():
            counter.value += 1
        return backend

    Backend._plugins[BACKEND.upper()] = plugin._replace(creator_fn=create)


def make_test_case(suite: types.ModuleType, groups: Any) -> type[unittest.TestCase]:
    """Make the class whose tests run on ranks forked from this process."""
    context = multiprocessing.get_context("fork")

    class TestAutoMoe(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        def setUp(self) -> None:
            super().setUp()
            # In a process of its own the suite would read it anew.
            suite.INIT_METHOD = os.environ["INIT_METHOD"]
            groups.value = 0
            self._timed_out = False
            # A file each, as what they write at once into one would be mixed up.
            type(self).stacks = [
                os.memfd_create("stack") for _ in range(int(self.world_size))
            ]
            threads = os.listdir("/proc/self/task")
            if len(threads) != 1:
                raise RuntimeError(f"{len(threads)} threads, expected one to fork from")
            self._start_processes(context.Process)

        def tearDown(self) -> None:
            ranks = self.processes
            super().tearDown()
            deadline = time.monotonic() + _EXIT_SECONDS
            for rank in ranks:
                rank.join(max(0.0, deadline - time.monotonic()))
                if rank.exitcode is None:
                    rank.kill()
                    rank.join()
                rank.close()
            for stack in self.stacks:
                os.close(stack)
            if os.path.exists(self.file_name):
                os.unlink(self.file_name)

        @classmethod
        def _run(cls, rank: int, *args: Any, **kwargs: Any) -> None:
            _die_with_parent()
            # A rank that is ended because it hangs says where it stands.
            faulthandler.register(
                signal.SIGTERM, file=cls.stacks[rank], all_threads=True, chain=True
            )
            # A forked child would skip what an interpreter does as it exits. But what
            # was registered before the fork is the parent's, its temporary folder say.
            atexit._clear()
            try:
                super()._run(rank, *args, **kwargs)
            finally:
                atexit._run_exitfuncs()

        def _get_timedout_process_traceback(self) -> None:
            self._timed_out = True
            super()._get_timedout_process_traceback()

        def _check_return_codes(self, fn: Callable, elapsed_time: float) -> None:
            # The suite itself would tell the exit codes of ranks that it has ended,
            # where all of them are gone by now.
            if self._timed_out:
                raise RuntimeError(
                    f"timed out after {elapsed_time} seconds\n{self._read_stacks()}"
                )
            super()._check_return_codes(fn, elapsed_time)
            # The suite itself looks at the first rank's only.
            if fn not in self.skip_return_code_checks:
                codes = [rank.exitcode for rank in self.processes]
                self.assertEqual(codes, codes[:1] * len(codes), "exit codes of ranks")

        def _read_stacks(self) -> str:
            texts = []
            for number, (rank, file) in enumerate(
                zip(self.processes, self.stacks, strict=True)
            ):
                rank.join(_EXIT_SECONDS)
                stack = os.pread(file, 1 << 20, 0)
                texts.append(f"rank {number}:\n{stack.decode(errors='replace')}")
            return "\n".join(texts)

    return TestAutoMoe


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def raised(text: str) -> bool:
    """Tell whether a failure's text holds what a rank raised."""
    return "exited with error code" in text


class Recorder(unittest.TestResult):
    """Notes what became of the test that ran last.

    Attributes:
        result: test; outcome: "passed", "failed" or "skipped"; text: the reason or the
            traceback; seconds; groups: that its ranks made on our backend, all of them.
    """

    def __init__(self, groups: Any) -> None:
        super().__init__()
        self._groups = groups

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._started = time.monotonic()
        self._outcome = ("passed", "")
        self._groups.value = 0

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._outcome = ("skipped", reason)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self._outcome = ("failed", self.errors[-1][1])

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._outcome = ("failed", self.failures[-1][1])

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        outcome, text = self._outcome
        self.result = {
            "test": test._testMethodName,
            "outcome": outcome,
            "text": text,
            "seconds": round(time.monotonic() - self._started, 2),
            "groups": self._groups.value,
        }


def list_tests(case: type[unittest.TestCase]) -> list[dict]:
    """Name all tests, with "" or the reason why they are skipped as the text."""
    names = unittest.defaultTestLoader.getTestCaseNames(case)
    reasons = [getattr(getattr(case, n), "__unittest_skip_why__", "") for n in names]
    return [{"test": n, "text": r} for n, r in zip(names, reasons, strict=True)]


def main() -> None:
    """Run tests of the suite at one world size, those named or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("world_size", type=int)
    parser.add_argument("tests", nargs="*", help=f"names, or {LIST!r}; default: all")
    parser.add_argument("--serve", type=int, help="descriptor: names come by stdin")
    arguments = parser.parse_args()
    if os.environ.get("BACKEND") != BACKEND:
        variables = environment(arguments.world_size)
        os.execve(sys.executable, [sys.executable, *sys.argv], variables)
    _die_with_parent()
    suite, counts = load_suite()
    groups = multiprocessing.get_context("fork").Value("q", 0)
    count_groups(groups)
    case = make_test_case(suite, groups)
    recorder = Recorder(groups)
    # Ranks that collect garbage would copy every page that they share with us.
    gc.freeze()
    serve = arguments.serve is not None
    with open(arguments.serve, "w") if serve else sys.stdout as out:
        print(json.dumps(counts), file=out, flush=True)
        every = [line["test"] for line in list_tests(case)]
        for name in map(str.strip, sys.stdin) if serve else arguments.tests or every:
            if name == LIST:
                answer = list_tests(case)
            else:
                case(name).run(recorder)
                answer = recorder.result
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
