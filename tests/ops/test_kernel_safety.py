"""Kernels under threads, in forked processes, without numba, and with a cache that is missing or of another day."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrla.ops import METHODS, MRLALight, chosen_path, use

ROOT = Path(__file__).parents[2]
PREPARE = """
import torch
from torch.nn import Module
from mrla.ops import MRLABase, MRLALight, use

def chain():
    torch.manual_seed(0)
    mixers = [kind(32, heads=4, init="released") for kind in (MRLALight, MRLABase) for _ in range(2)]
    for mixer in mixers:
        torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return mixers

def run(mixers, x):
    leaf, memory, total = x.clone().requires_grad_(), None, 0
    for mixer in mixers:
        out, memory = mixer(leaf, leaf * 0.5, memory)
        total = total + out.square().mean()
    return [total.detach(), *torch.autograd.grad(total, leaf)]

def near(one, other):
    return all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(one, other, strict=True))
"""


def python(
    script: str, *options: str, timeout: float = 120, prepare: str = PREPARE, **environment: str | None
) -> subprocess.CompletedProcess:
    """Runs a script in a process of its own, where a warning is an error."""
    given = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", prepare + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={name: value for name, value in given.items() if value is not None},
        cwd=Path(__file__).parent,
    )


def assert_silent(done: subprocess.CompletedProcess, printed: str = "right") -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == printed.split(), done.stderr
    assert done.stderr == ""


def chain() -> list[Any]:
    made: list[Any] = [METHODS[name](32, heads=4, init="released") for name in ("light", "base") for _ in range(2)]
    for mixer in made:
        torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    return made


def run(mixers: list[Any], x: Tensor) -> list[Tensor]:
    leaf, memory, total = x.clone().requires_grad_(), None, torch.zeros(())
    for mixer in mixers:
        out, memory = mixer(leaf, leaf * 0.5, memory)
        total = total + out.square().mean()
    parameters = [one for mixer in mixers for one in mixer.parameters()]
    return [total.detach(), *torch.autograd.grad(total, [leaf, *parameters], materialize_grads=True)]


# --- the choice


def test_a_choice_is_of_one_thread():
    seen: dict[str, str] = {}

    def look(name: str) -> None:
        seen[name] = chosen_path()

    with use("reference"):
        thread = threading.Thread(target=look, args=("started inside",))
        thread.start()
        thread.join()
        look("here")
    assert seen == {"started inside": chosen_path(), "here": "reference"}


def test_two_threads_choose_differently_at_once():
    pytest.importorskip("numba")
    both, seen = threading.Barrier(2, timeout=30), {}

    def choose(path: Any) -> None:
        with use(path):
            both.wait()
            seen[path] = chosen_path()
            both.wait()

    threads = [threading.Thread(target=choose, args=(path,)) for path in ("fused", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"fused": "fused", "reference": "reference"}


def test_choices_nest_and_are_given_back():
    pytest.importorskip("numba")
    assert chosen_path() == "fused"
    with use("reference"):
        with use("fused"):
            assert chosen_path() == "fused"
        assert chosen_path() == "reference"
        with pytest.raises(ZeroDivisionError), use("fused"):
            raise ZeroDivisionError
        assert chosen_path() == "reference"
    assert chosen_path() == "fused"


@pytest.mark.unchecked
@pytest.mark.parametrize("path", ["slow", "", None, "FUSED"])
def test_other_words_are_refused(path):
    with pytest.raises(ValueError, match="must be one of 'fused', 'reference', 'cpu': got"), use(path):
        pass
    assert chosen_path() in ("fused", "reference")


# --- threads


@pytest.mark.parametrize("torchs_threads", [1, 2])
def test_eight_threads_train_at_once(torchs_threads):
    """Each its own mixers; large enough that each asks for torch's threads too."""
    pytest.importorskip("numba")
    mixers, images = chain(), [torch.randn(2, 32, 23, 25) for _ in range(8)]
    before = torch.get_num_threads()
    torch.set_num_threads(torchs_threads)
    try:
        expected = [run(deepcopy(mixers), x) for x in images]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(2):
                found = list(pool.map(lambda x: run(deepcopy(mixers), x), images))
                for one, other in zip(found, expected, strict=True):
                    assert all(map(torch.equal, one, other))
    finally:
        torch.set_num_threads(before)


def test_eight_threads_share_mixers_in_eval_mode():
    pytest.importorskip("numba")
    mixers, images = [mixer.eval() for mixer in chain()], [torch.randn(3, 32, 9, 11) for _ in range(8)]
    expected = [run(mixers, x) for x in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: run(mixers, x), images * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.sweep
@pytest.mark.unchecked
def test_eight_threads_meet_the_kernels_for_the_first_time(tmp_path):
    """Before anything is compiled or loaded."""
    pytest.importorskip("numba")
    script = """
    from concurrent.futures import ThreadPoolExecutor
    from copy import deepcopy
    mixers, x = chain(), torch.randn(2, 32, 23, 25)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: run(deepcopy(mixers), x), range(8)))
    with use("reference"):
        expected = run(deepcopy(mixers), x)
    assert all(near(one, expected) for one in found)
    print("right")
    """
    assert_silent(python(script))


def test_threads_of_ones_own_where_there_is_no_openmp(monkeypatch):
    """macOS and Windows."""
    pytest.importorskip("numba")
    from mrla.ops.kernels.cpu import launch

    mixers, x = chain(), torch.randn(2, 32, 23, 25)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        expected = run(deepcopy(mixers), x)
        shared: list[int] = []
        share = launch._share
        monkeypatch.setattr(launch, "_openmp", None)
        monkeypatch.setattr(launch, "_share", lambda *given: (shared.append(given[2]), share(*given))[1])
        found = run(deepcopy(mixers), x)
    finally:
        torch.set_num_threads(before)
    assert set(shared) <= {2, 3}
    assert shared
    assert all(map(torch.equal, found, expected))


def test_more_than_one_thread_takes_part():
    """OpenMP's threads are entered, where torch has them: a kernel is seen by threads of different numbers."""
    pytest.importorskip("numba")
    from mrla.ops.kernels.cpu import launch
    from mrla.ops.kernels.cpu.records import Record

    if launch._openmp is None:
        pytest.skip("no OpenMP to enter")
    import ctypes

    at: set[int] = set()
    lock = threading.Lock()

    def note(_: Any) -> None:
        with lock:
            at.add(threading.get_ident())

    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(note)
    address = ctypes.cast(entry, ctypes.c_void_p).value
    kernel = SimpleNamespace(address=address, ctypes=entry, record=Record("note", {}))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        launch.run(kernel, items=4, work=1 << 20)
        assert len(at) == 2
        at.clear()
        launch.run(kernel, items=4, work=10)  # too little to share
        assert at == {threading.get_ident()}
        at.clear()
        launch.run(kernel, items=1, work=1 << 20)
        assert at == {threading.get_ident()}
        at.clear()
        launch.run(kernel, items=0, work=1 << 20)
        assert not at
    finally:
        torch.set_num_threads(before)


# --- processes


def test_a_forked_child_computes():
    """Where torch's threads have been used before the fork, and do not exist behind it."""
    pytest.importorskip("numba")
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    script = """
    import os, sys
    torch.set_num_threads(2)
    mixers, x = chain(), torch.randn(2, 32, 23, 25)
    for mixer in mixers:
        mixer.eval()
    expected = run(mixers, x)
    for generation in range(2):
        child = os.fork()
        if child == 0:
            # Backward too; torch's own operators are kept to one thread, which is theirs to ask for after a fork.
            torch.set_num_threads(1)
            leaf = x.clone().requires_grad_()
            from mrla.ops.kernels.cpu import launch
            same = launch._forked and all(map(torch.equal, run(mixers, x), expected))
            os._exit(0 if same else 7)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, status
        assert all(map(torch.equal, run(mixers, x), expected))  # and the parent goes on
    print("right")
    """
    assert_silent(python(script))


@pytest.mark.sweep
def test_a_forked_child_that_does_not_ask_for_one_thread_computes():
    """Inference on as many threads as before: kernels keep to one by themselves."""
    pytest.importorskip("numba")
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    script = """
    import os
    torch.set_num_threads(2)
    mixer, x = MRLALight(32, heads=4, init="released").eval(), torch.randn(4, 32, 33, 33)
    with torch.no_grad():
        expected = mixer(x, x)[0]
        child = os.fork()
        if child == 0:
            # Compared by numpy: torch's own comparison would wait for threads that are not there.
            os._exit(0 if (mixer(x, x)[0].numpy() == expected.numpy()).all() else 7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    print("right")
    """
    assert_silent(python(script, timeout=40))


@pytest.mark.sweep
def test_workers_of_a_data_loader_compute():
    pytest.importorskip("numba")
    script = """
    from torch.utils.data import DataLoader, Dataset
    torch.set_num_threads(2)
    mixers = [mixer.eval() for mixer in chain()]
    images = torch.randn(6, 2, 32, 23, 25)

    class Mixed(Dataset):
        def __len__(self):
            return 6
        def __getitem__(self, at):
            return run(mixers, images[at])[1]

    expected = [run(mixers, x)[1] for x in images]
    found = list(DataLoader(Mixed(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    assert all(map(torch.equal, found, expected))
    print("right")
    """
    assert_silent(python(script))


TWO_PROCESSES = """
import sys
import torch
import mrla
from torch import nn

def network():
    torch.manual_seed(0)
    model = mrla.attach(mrla_network(), "METHOD")
    for mixer in (module for module in model.modules() if isinstance(module, mrla.ops.LayerMixer)):
        mixer.reset_parameters("released")
        if getattr(mixer, "decay", None) is not None:
            nn.init.normal_(mixer.decay, std=0.3)
    return model.eval()  # the statistics of a batch would be those of one process's images

def mrla_network():
    import timm
    return timm.create_model("test_resnet", num_classes=3)

if __name__ == "__main__":
    rank, images = int(sys.argv[1]), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    alone, model = network(), network()
    alone(images).square().mean().backward()
    torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(images[2 * rank : 2 * rank + 2]).square().mean().backward()
    from mrla.ops.kernels.cpu import light, base
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5 * float(other.grad.abs().max()) + 1e-7)
    torch.distributed.destroy_process_group()
"""


@pytest.mark.sweep
@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["light", "base"])
def test_two_processes_give_the_gradients_of_one(method, tmp_path):
    pytest.importorskip("numba")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.replace("METHOD", method))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


# --- without numba


WITHOUT_NUMBA = """
import sys
class Hides:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite"):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Hides())
import importlib.util
_find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "numba" else _find(name, package)
"""


def test_without_numba_all_works_in_silence():
    script = """
    import timm
    import mrla
    from mrla.ops import chosen_path
    assert chosen_path() == "reference"
    for method in ("light", "base"):
        model = mrla.attach(timm.create_model("test_resnet", num_classes=3), method)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 32, 32)).square().mean().backward()
            optimizer.step()
        with use("reference"):
            model.eval()(torch.randn(1, 3, 32, 32))
    try:
        with use("fused"):
            pass
    except ValueError as error:
        assert "pip install 'mrla[fast]'" in str(error), error
        print("right")
    assert "numba" not in sys.modules
    """
    assert_silent(python(script, prepare=WITHOUT_NUMBA + PREPARE))


def test_a_numba_that_does_not_import_is_told_once():
    """As where numpy is too new for it: all goes by torch's operators."""
    broken = """
    import sys
    class Breaks:
        def find_spec(self, name, path=None, target=None):
            if name == "numba":
                import importlib.util
                return importlib.util.spec_from_loader(name, self)
        def create_module(self, spec):
            return None
        def exec_module(self, module):
            raise ImportError("Numba needs NumPy 2.3 or less. Got NumPy 9.0.")
    sys.meta_path.insert(0, Breaks())
    """
    script = """
    import warnings
    import timm
    import mrla
    from mrla.ops import chosen_path
    model = mrla.attach(timm.create_model("test_resnet", num_classes=3), "base")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    assert len(told) == 1 and "Got NumPy 9.0" in str(told[0].message), told
    assert chosen_path() == "reference"
    try:
        with use("fused"):
            pass
    except ValueError as error:
        assert "does not run here" in str(error), error
        print("right")
    """
    assert_silent(python(script, prepare=textwrap.dedent(broken) + PREPARE))


def test_without_jit_all_goes_by_torch():
    script = """
    import os
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    from mrla.ops import chosen_path
    run(chain(), torch.randn(2, 32, 5, 5))
    print("right" if chosen_path() == "reference" else "compiled")
    """
    assert_silent(python(script))


def test_importing_loads_no_numba():
    """Nor does making and attaching mixers, or running them by torch's operators."""
    script = """
    import sys
    import mrla
    with use("reference"):
        run(chain(), torch.randn(2, 32, 5, 5))
    print("right" if "numba" not in sys.modules else "loaded")
    """
    assert_silent(python(script))


# --- machine code between processes


def cache_script(check: str) -> str:
    return textwrap.dedent(
        """
        from mrla.ops.kernels.cpu import light
        mixer, x = MRLALight(32, heads=4).eval(), torch.randn(2, 32, 5, 5)
        with torch.no_grad():
            assert torch.equal(mixer(x, x)[0], x)
        kernel = light.apply(__import__("numpy").float32)
        """
    ) + textwrap.dedent(check)


@pytest.mark.sweep
@pytest.mark.unchecked
def test_code_is_kept_between_processes(tmp_path):
    """Of every kernel: a second process compiles nothing."""
    pytest.importorskip("numba")
    script = """
    import importlib, numpy
    from mrla.ops.kernels.cpu.compiling import KernelSource
    names = ("norms", "light", "light_numbers", "base", "base_numbers")
    modules = [importlib.import_module("mrla.ops.kernels.cpu." + name) for name in names]
    sources = [one for module in modules for one in vars(module).values() if isinstance(one, KernelSource)]
    kernels = [one(numpy.float32) if one.reads_maps else one() for one in sources]
    kernels += [modules[0].branch_gradients(numpy.uint16)]  # the same kernel for another type is kept beside it
    print(len(kernels), sum(one.cache_hits for one in kernels))
    """
    first, second = (
        python(script, NUMBA_CACHE_DIR=str(tmp_path), HOME=str(tmp_path), timeout=400, prepare="") for _ in range(2)
    )
    assert_silent(first, "19 0")
    assert_silent(second, "19 19")
    assert len(list(tmp_path.rglob("*.nbc"))) == 19
    assert len(list(tmp_path.rglob("*.nbi"))) == 18


@pytest.mark.sweep
@pytest.mark.unchecked
def test_changed_sources_are_compiled_anew(tmp_path):
    """A copy of the package, edited in a file that the kernel's own file only calls: numba would not look there."""
    pytest.importorskip("numba")
    import shutil

    shutil.copytree(ROOT / "mrla", tmp_path / "mrla", ignore=shutil.ignore_patterns("__pycache__"))
    where: dict[str, str | None] = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert_silent(python(cache_script("print(kernel.cache_hits)"), **where), "0")
    planes = tmp_path / "mrla" / "ops" / "kernels" / "cpu" / "planes.py"
    changed = planes.read_text().replace("upper[0] * taps[0]", "upper[0] * taps[1]")
    assert changed != planes.read_text()
    planes.write_text(changed)
    assert_silent(python(cache_script("print(kernel.cache_hits)"), **where), "0")


def test_the_number_of_the_sources_follows_every_file(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    from mrla.ops.kernels.cpu import compiling

    folder = Path(compiling.__file__).parent
    for path in folder.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compiling.py"))
    assert compiling._sources() == compiling.SOURCES
    for path in tmp_path.glob("*.py"):
        before = path.read_bytes()
        path.write_bytes(before + b"# changed\n")
        assert compiling._sources() != compiling.SOURCES, path.name
        path.write_bytes(before)
    assert compiling._sources() == compiling.SOURCES


@pytest.mark.sweep
@pytest.mark.unchecked
@pytest.mark.parametrize("kind", ["a folder that cannot be made", "no home and a read-only package"])
def test_without_a_place_for_code_all_works_in_silence(kind, tmp_path):
    """Tests may run as root, whom no mode stops: a path under a plain file stops everybody."""
    pytest.importorskip("numba")
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "cache")
    where: dict[str, str | None] = {"NUMBA_CACHE_DIR": below}
    check = "print('right')"  # numba goes on to the package's own folder
    if kind.startswith("no home"):
        import shutil

        check = "print('right' if type(kernel._cache).__name__ == 'NullCache' else 'kept')"

        shutil.copytree(ROOT / "mrla", tmp_path / "mrla", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / "mrla" / "ops" / "kernels" / "cpu" / "__pycache__").write_text("")  # where numba would put it
        where = {"NUMBA_CACHE_DIR": None, "HOME": below, "XDG_CACHE_HOME": below, "PYTHONPATH": str(tmp_path)}
        where |= {"PYTHONDONTWRITEBYTECODE": "1"}
    assert_silent(python(cache_script(check), **where))


def test_a_mixer_of_its_own_type_in_another_thread_is_left_alone():
    """What a thread chooses does not reach a mixer that is at work in another."""
    pytest.importorskip("numba")
    mixer, x = MRLALight(32, heads=4, init="released").eval(), torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        fused = mixer(x, x)[0]
        with use("reference"):
            reference = mixer(x, x)[0]
            found = ThreadPoolExecutor(1).submit(lambda: mixer(x, x)[0].detach()).result()
    assert not torch.equal(fused, reference)  # the two ways differ in the last bits, so that they can be told apart
    assert torch.equal(found, fused)
