"""Databases for sweeps, the process that forks commands, and random moments to disturb them at."""

import os
import random
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import sqlalchemy
from nursery import Nursery, spare_the_disk

spare_the_disk()


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL server on loopback, run by a user who is not root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or (os.getuid() == 0 and shutil.which("runuser") is None):
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is not installed: apt-get install postgresql")
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # Not in tmp_path, which only its owner can read.
    with tempfile.TemporaryDirectory(prefix="tfjacreg-postgresql-") as name:
        prefix = []
        if os.getuid() == 0:
            shutil.chown(name, "postgres")
            prefix = ["runuser", "-u", "postgres", "--"]

        def control(program, *arguments):
            command = [*prefix, str(found[-1] / program), "-D", f"{name}/data", *arguments]
            subprocess.run(command, check=True, cwd=name, stdout=subprocess.DEVNULL)

        Path(name, "password").write_text("secret")
        Path(name, "password").chmod(0o644)
        login = ("--username=tester", f"--pwfile={name}/password", "--auth=scram-sha-256")
        control("initdb", *login, "--no-sync")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -F"
        control("pg_ctl", "start", "-w", "-o", options, "-l", f"{name}/log")
        yield f"postgresql://tester:secret@127.0.0.1:{port}/postgres"
        control("pg_ctl", "stop", "-m", "immediate")


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request):
    """The value of --storage: None, or a database of its own for each test."""
    if request.param == "sqlite":
        return None
    server = sqlalchemy.make_url(request.getfixturevalue("server"))
    server = server.set(drivername="postgresql+psycopg")
    name = f"test{random.SystemRandom().randrange(10**9)}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    url = server.set(drivername="postgresql", database=name)
    return url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def nursery():
    """Starts commands quickly: TensorFlow is imported once for all of them."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def moments(request):
    """Random numbers; a test that fails shows their seed, which `--moments` sets."""
    seed = request.config.getoption("moments")
    if seed is None:
        seed = random.SystemRandom().randrange(10**9)
    print(f"seed of the moments: --moments {seed}")
    return random.Random(f"{seed} {request.node.name}")
