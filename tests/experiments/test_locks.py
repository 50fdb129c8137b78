"""Locks of runs and of the ledger: one owner at a time, and free when it is gone."""

import contextlib
import subprocess
import threading
import time

from tfjacreg.experiments.locks import FileLocks, PostgresLocks, server_url


def test_locks_of_runs(tmp_path, storage):
    """One owner among processes; the process of the run is one with its worker."""

    def locks():
        if storage is None:
            return FileLocks(tmp_path)
        return PostgresLocks(tmp_path, server_url(storage), "study")

    first, second = locks(), locks()
    with contextlib.closing(first), contextlib.closing(second):
        lock = first.acquire("run")
        assert lock is not None and second.acquire("run") is None
        other = second.acquire("other")
        assert other is not None
        second.release("other", other)
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
        first.release("run", lock)
        assert second.acquire("run") is None
        child.kill()
        child.wait()
        lock = second.acquire("run")
        assert lock is not None and first.acquire("run") is None
        second.release("run", lock)
        lock = first.acquire("run")
        assert lock is not None
        first.release("run", lock)


def test_changes_of_the_ledger_wait_for_each_other(tmp_path, storage):
    inside, most = [], []

    def enter():
        locks = FileLocks(tmp_path)
        if storage is not None:
            locks = PostgresLocks(tmp_path, server_url(storage), "study")
        with contextlib.closing(locks):
            for _ in range(5):
                with locks.exclusive():
                    inside.append(1)
                    time.sleep(0.01)
                    most.append(len(inside))
                    inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 15


def test_locks_of_machines_without_a_common_folder(tmp_path, server):
    """The server's locks alone: the first machine's folder is not the second's."""
    url = server_url(server)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = PostgresLocks(tmp_path / "a", url, "study")
    second = PostgresLocks(tmp_path / "b", url, "study")
    with contextlib.closing(second):
        with contextlib.closing(first):
            assert first.acquire("run") is not None and second.acquire("run") is None
            assert second.acquire("other") is not None
        # The connection has ended, as that of a killed worker does.
        deadline = time.monotonic() + 300
        while second.acquire("run") is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
