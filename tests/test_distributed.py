"""Many workers: the same numbers as here, whoever dies on the way."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import distributed
import pytest
import submitit
import torch
from random_models import MODELS, native
from random_pairs import ragged_dataset, random_dataset
from submitit.core.utils import FailedJobError, UncompletedJobError

from patching import ActivationPatcher, SweepResult, worker
from patching import submitit as submitit_jobs
from patching.distributed import Workers
from patching.errors import MissingPackage, PatchingError, StoreError
from patching.store import Journal
from patching.submitit import Submitit

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pool(n=2):
    return ProcessPoolExecutor(n, FORK)


def build(kind):
    return MODELS[kind]()


def sweep(model, dataset=None, **options):
    given = {"activation": "z", "over": ("layer", "pos", "head"), **options}
    dataset = ragged_dataset(model) if dataset is None else dataset
    return ActivationPatcher(model).sweep(dataset, progress=False, **given)


def assert_same_bits(got, expected):
    for name in ("clean", "corrupted", "patched"):
        assert getattr(got, name).tobytes() == getattr(expected, name).tobytes(), name


@pytest.fixture
def expected(any_model, tmp_path):
    """The same units, run here."""
    return sweep(any_model, store=Journal(tmp_path / "here", 1, 30))


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_pool_of_loaded_models_gives_the_same_bits(kind, tmp_path):
    model = build(kind)
    here = sweep(model, store=Journal(tmp_path / "here", 1, 30))
    with pool() as workers:
        got = sweep(
            model,
            store=Journal(tmp_path / "there", 1, 30),
            executor=Workers(workers, functools.partial(build, kind)),
        )
    assert_same_bits(got, here)
    assert_same_bits(SweepResult.load(tmp_path / "there"), here)


def test_forked_processes_have_the_model(any_model, tmp_path, expected):
    with pool() as workers:
        got = sweep(any_model, store=Journal(tmp_path / "run", 1, 30), executor=workers)
    assert_same_bits(got, expected)


def test_without_a_store(any_model):
    with pool() as workers:
        got = sweep(any_model, executor=workers)
    assert_same_bits(got, sweep(any_model))


@pytest.mark.parametrize(
    "options",
    [
        dict(replacement="resample", seed=4),
        dict(replacement="mean"),
        dict(metric="kl_div", direction="noising"),
    ],
)
def test_values_across_pairs_are_those_of_all_pairs(any_model, tmp_path, options):
    dataset = random_dataset(any_model, 4)
    here = sweep(any_model, dataset, store=Journal(tmp_path / "here", 1), **options)
    for name, load in [("loaded", functools.partial(build, next(iter(MODELS)))), ("forked", None)]:
        with pool() as workers:
            executor = Workers(workers, load)
            got = sweep(any_model, dataset, store=Journal(tmp_path / name, 1), executor=executor, **options)
        assert_same_bits(got, here)


def test_threads_take_turns_with_one_model(any_model, tmp_path, expected):
    with ThreadPoolExecutor(3) as threads:
        got = sweep(any_model, store=Journal(tmp_path / "run", 1, 30), executor=threads)
    assert_same_bits(got, expected)
    assert torch.get_num_threads() == 1


def test_a_pool_started_before_says_what_to_do(any_model):
    with pool(1) as workers:
        workers.submit(int).result()
        with pytest.raises(PatchingError, match=r"do not have the model.*Workers\(pool, load="):
            sweep(any_model, executor=workers)


def other_weights():
    return native(seed=1, d_mlp=32)


def test_a_worker_with_another_model_is_refused(any_model):
    with (
        pool(1) as workers,
        pytest.raises(PatchingError, match="a model with other weights than"),
    ):
        sweep(any_model, executor=Workers(workers, other_weights))


def test_a_function_that_cannot_travel_is_named(any_model):
    with pool(1) as workers, pytest.raises(PatchingError, match="must be importable there.*not as lambdas"):
        sweep(any_model, executor=Workers(workers, lambda: None))


def test_another_executor_is_refused(any_model):
    with pytest.raises(PatchingError, match="executor= takes a concurrent.futures.Executor"):
        sweep(any_model, executor="spark")


# Deaths


def lethal(mark, logits):
    """A metric that kills its worker once."""
    try:
        Path(mark).unlink()
    except FileNotFoundError:
        return logits[:, -1, 5]
    os.kill(os.getpid(), signal.SIGKILL)


def always_lethal(logits):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_replaced(any_model, tmp_path):
    here = sweep(
        any_model, metric=functools.partial(lethal, tmp_path / "none"), store=Journal(tmp_path / "h", 1, 30)
    )
    (tmp_path / "mark").touch()
    metric = functools.partial(lethal, tmp_path / "mark")
    got = sweep(any_model, metric=metric, store=Journal(tmp_path / "run", 1, 30), executor=Workers(pool))
    assert not (tmp_path / "mark").exists(), "it did kill"
    assert_same_bits(got, here)


def test_a_given_pool_that_breaks_says_what_to_do_and_the_store_goes_on(any_model, tmp_path):
    (tmp_path / "mark").touch()
    metric = functools.partial(lethal, tmp_path / "mark")
    with pool() as workers, pytest.raises(PatchingError, match="with a new pool: with store= it goes on"):
        sweep(any_model, metric=metric, store=Journal(tmp_path / "run", 1, 30), executor=workers)
    here = sweep(any_model, metric=metric, store=Journal(tmp_path / "here", 1, 30))
    with pool() as workers:
        got = sweep(any_model, metric=metric, store=tmp_path / "run", executor=workers)
    assert_same_bits(got, here)


def test_workers_that_always_die_come_to_an_end(any_model):
    with pytest.raises(PatchingError, match="workers died 2 times in a row and no unit came back"):
        sweep(any_model, metric=always_lethal, executor=Workers(lambda: pool(1), retries=1))


def wrong(activation, site):
    return activation[:, :1, :1]


def test_an_error_in_a_worker_is_the_users_own(any_model):
    with pool(1) as workers, pytest.raises(PatchingError, match="the replacement returned"):
        sweep(any_model, replacement=wrong, executor=workers)


def test_a_killed_drivers_workers_let_go(any_model, tmp_path):
    """Driver killed with -9: its workers end, the lock is free, and the run goes on."""
    here = sweep(any_model, store=Journal(tmp_path / "here", 1, 10))

    def drive():
        def die(done=[]):  # noqa: B006
            done.append(1)
            if len(done) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        from patching.store.journal import OpenJournal

        keep = OpenJournal.keep
        OpenJournal.keep = lambda self, unit, part: (keep(self, unit, part), die())
        sweep(any_model, store=Journal(tmp_path / "run", 1, 10), executor=Workers(pool))

    process = FORK.Process(target=drive)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(StoreError, match="not finished"):
        SweepResult.load(tmp_path / "run")
    assert len(list((tmp_path / "run" / "parts").iterdir())) == 5
    assert_same_bits(sweep(any_model, store=tmp_path / "run"), here)


class Idle(ProcessPoolExecutor):
    """A pool whose processes have nothing to do when their driver is killed."""

    def submit(self, fn, /, *args, **kwargs):
        super().submit(os.getpid).result()
        for child in multiprocessing.active_children():
            os.write(SAID[1], b"%d " % child.pid)
        os.kill(os.getpid(), signal.SIGKILL)


SAID = os.pipe()


def test_workers_of_a_killed_driver_end_that_never_had_a_unit(any_model):
    workers = Workers(functools.partial(Idle, 2, FORK))
    process = FORK.Process(target=functools.partial(sweep, any_model, executor=workers))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    pids = [int(pid) for pid in os.read(SAID[0], 100).split()]
    assert len(pids) == 2
    until = time.monotonic() + 60
    try:
        while any(map(is_running, pids)):
            assert time.monotonic() < until, "a process waits for units that nobody will send"
            time.sleep(0.1)
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


def is_running(pid):
    """Whether a process is there and not only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_other_forks_of_the_driver_are_not_bound_to_it():
    process = FORK.Process(target=lambda: os._exit(threading.active_count()))
    process.start()
    process.join()
    assert process.exitcode == 1, "a thread of ours was started in it"


def test_a_worker_whose_driver_died_before_its_first_unit_ends(monkeypatch):
    class Dead:
        def is_alive(self):
            return False

    def ended(code):
        raise SystemExit(code)

    monkeypatch.setattr(worker.multiprocessing, "parent_process", Dead)
    monkeypatch.setattr(worker.os, "_exit", ended)
    monkeypatch.setattr(worker, "_SETTLED", set())
    with pytest.raises(SystemExit):
        worker._settle(torch.get_num_threads())


# dask: a local process of two threads; submitit: jobs on this machine, as SLURM would run them


def environment():
    """With which other processes find the package and the test files, and look for no hub."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def importable(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


LOAD = functools.partial(build, next(iter(MODELS)))


def test_dask_gives_the_same_bits(importable, tmp_path):
    model = LOAD()
    here = sweep(model, store=Journal(tmp_path / "here", 1, 30))
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        workers = Workers(client.get_executor(), LOAD)
        got = sweep(model, store=Journal(tmp_path / "run", 1, 30), executor=workers)
    assert_same_bits(got, here)


def jobs(folder):
    executor = submitit.AutoExecutor(folder, cluster="local")
    executor.update_parameters(timeout_min=10)
    return executor


def test_jobs_of_submitit_give_the_same_bits_though_one_is_killed(importable, tmp_path):
    model, metric = LOAD(), functools.partial(lethal, tmp_path / "mark")
    here = sweep(model, metric=metric, store=Journal(tmp_path / "here", 4, 10_000))
    (tmp_path / "mark").touch()
    got = sweep(
        model, metric=metric, store=Journal(tmp_path / "run", 4, 10_000),
        executor=Workers(jobs(tmp_path / "jobs"), LOAD),
    )  # fmt: skip
    assert not (tmp_path / "mark").exists(), "it did kill"
    assert_same_bits(got, here)


def test_jobs_cannot_be_forked(any_model, tmp_path):
    with pytest.raises(PatchingError, match=r"jobs of submitit load the model themselves: .*load="):
        sweep(any_model, executor=jobs(tmp_path / "jobs"))
    assert not worker.FORKED, "the model is let go of"


class Client:
    """Has a ``submit`` of its own, as dask's client has, and is no executor."""

    def submit(self, function):
        raise AssertionError("nothing is submitted")


def test_what_only_looks_like_an_executor_is_told_apart(any_model):
    with pytest.raises(PatchingError, match=r"executor= takes .*; got <.*Client object"):
        sweep(any_model, executor=Client())
    for made in (Client(), Client):
        with pytest.raises(PatchingError, match=r"Workers takes .*; got <.*Client object"):
            sweep(any_model, executor=Workers(made, LOAD))


class FakeJob:
    """A job that ends as it is told."""

    def __init__(self, error=None, answer=None, ended=True):
        self.error, self.answer, self.ended, self.was_cancelled = error, answer, ended, False

    def done(self):
        return self.ended

    def exception(self):
        return self.error

    def result(self):
        return self.answer

    def cancel(self, check):
        self.was_cancelled = True


class FakeExecutor:
    def __init__(self, *jobs):
        self.jobs, self.submitted = [*jobs], []

    def submit(self, function):
        self.submitted.append(function)
        return self.jobs.pop(0)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(submitit_jobs, "SECONDS", 0.01)


def test_a_job_without_an_answer_is_submitted_again(fast):
    gone = UncompletedJobError("its node died")
    executor = FakeExecutor(FakeJob(gone), FakeJob(gone), FakeJob(answer=7))
    future = Submitit(executor, retries=2).submit(max, 3, 4)
    assert future.result(timeout=60) == 7
    assert [function() for function in executor.submitted] == [4, 4, 4]


@pytest.mark.parametrize(
    ("error", "tries"), [(UncompletedJobError("its node died"), 3), (FailedJobError("your metric"), 1)]
)
def test_a_job_that_fails_says_so(fast, error, tries):
    """One whose function raises is not tried again."""
    executor = FakeExecutor(*[FakeJob(error)] * 3)
    future = Submitit(executor, retries=2).submit(max, 3, 4)
    assert future.exception(timeout=60) is error
    assert len(executor.submitted) == tries


def test_jobs_that_cannot_be_looked_at_fail(fast):
    broken = FakeJob()
    broken.done = lambda: 1 / 0
    executor = Submitit(FakeExecutor(broken, FakeJob(answer=7)), retries=2)
    futures = executor.submit(max, 3, 4), executor.submit(max, 3, 4)
    assert isinstance(futures[0].exception(timeout=60), ZeroDivisionError)
    assert futures[1].result(timeout=60) == 7


def test_an_answer_that_cannot_be_read_is_an_error(fast):
    lost = FakeJob()
    lost.result = lambda: 1 / 0
    executor = Submitit(FakeExecutor(lost, FakeJob(answer=7)), retries=2)
    futures = executor.submit(max, 3, 4), executor.submit(max, 3, 4)
    assert isinstance(futures[0].exception(timeout=60), ZeroDivisionError)
    assert futures[1].result(timeout=60) == 7


def test_jobs_are_waited_for(fast):
    with Submitit(FakeExecutor(FakeJob(answer=7), FakeJob(answer=8)), retries=2) as executor:
        futures = executor.submit(max, 3, 4), executor.submit(max, 3, 4)
    assert [future.done() for future in futures] == [True, True]


def test_jobs_are_cancelled_with_their_futures(fast):
    waiting = FakeJob(ended=False)
    executor = Submitit(FakeExecutor(waiting), retries=2)
    future = executor.submit(max, 3, 4)
    executor.shutdown(cancel_futures=True)
    assert future.cancelled()
    assert waiting.was_cancelled


# Ray: two nodes of one core, both of them on this machine, started once

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment()})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_ray_gives_the_same_bits_though_an_actor_is_killed(cluster, any_model, tmp_path):
    """The model travels through the object store; the first unit kills its actor."""
    metric = functools.partial(lethal, tmp_path / "mark")
    here = sweep(any_model, metric=metric, store=Journal(tmp_path / "here", 1, 30))
    (tmp_path / "mark").touch()
    got = sweep(any_model, metric=metric, store=Journal(tmp_path / "run", 1, 30), executor="ray")
    assert not (tmp_path / "mark").exists(), "it did kill"
    assert_same_bits(got, here)
    assert_same_bits(SweepResult.load(tmp_path / "run"), here)


def slowly(logits):
    time.sleep(0.05)
    return logits[:, -1, 5]


def test_ray_gives_the_same_bits_though_a_node_is_lost(cluster, any_model, tmp_path):
    """And there is no room for another actor: the one that is left does the rest."""
    here = sweep(any_model, metric=slowly, store=Journal(tmp_path / "here", 1, 100))
    parts, ended, lost = tmp_path / "run/parts", threading.Event(), []

    def lose():
        while not (parts.is_dir() and [*parts.glob("*.safetensors")]) and not ended.wait(0.02):
            pass
        lost.append(not ended.is_set())
        cluster.remove_node(*cluster.worker_nodes, allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    try:
        got = sweep(any_model, metric=slowly, store=Journal(tmp_path / "run", 1, 100), executor="ray")
    finally:
        ended.set()
        losing.join()
        cluster.add_node(**NODE)
    assert lost == [True], "after the first unit and before the last"
    assert_same_bits(got, here)


def test_ray_is_an_extra(any_model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"executor='ray' needs the package 'ray'.*patching\[ray\]"):
        sweep(any_model, executor="ray")
