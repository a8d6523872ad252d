"""Faults of the machine become errors that tell what to do; everything else stays a bug."""

import errno
import os
import resource
import shutil
import sys
from types import SimpleNamespace

import duckdb
import numpy as np
import pytest
import torch

from common import machine
from common.errors import ConfigError, ResourceError, naming
from common.machine import environment_hint, machine_error, require_memory
from tests.errors import refused

NO_SEGMENT = "Original error was: libopenblas.so: failed to map segment from shared object"


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [
    MemoryError(), np._core._exceptions._ArrayMemoryError((2**50,), np.dtype(float)),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError("can't start new thread"),
    duckdb.OutOfMemoryException("Out of Memory Error: Allocation failure"), OSError(errno.ENOMEM, "Cannot allocate"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object", name="torch"),
    ImportError(f"\nIMPORTANT: see below\n\n{NO_SEGMENT}"),
    caused_by(ModuleNotFoundError("Could not import module", name="transformers"), MemoryError())])
def test_every_form_of_too_little_memory_is_recognized(error):
    problem = machine_error(error)
    assert (type(problem), problem.where) == (ResourceError, "memory")
    assert "batch_size" in problem.fix


def test_the_cause_of_a_failed_import_is_shown():
    assert machine_error(ImportError(f"\nIMPORTANT: see below\n\n{NO_SEGMENT}\n")).why == NO_SEGMENT


RESOURCES = ["ENOSPC", "EDQUOT", "EFBIG", "EMFILE", "ENFILE", "EAGAIN", "EIO", "ENODEV", "ESTALE", "ENOTCONN"]
PATHS = ["EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG", "ELOOP", "EROFS", "ENOSYS",
         "EOPNOTSUPP", "EINVAL", "EXDEV"]


@pytest.mark.parametrize(("name", "kind"), [*((name, ResourceError) for name in RESOURCES),
                                            *((name, ConfigError) for name in PATHS), ("ECHILD", ConfigError)])
def test_an_error_of_the_system_names_its_file_and_reason(name, kind):
    number = getattr(errno, name)
    problem = machine_error(OSError(number, os.strerror(number), "/data/x"))
    assert type(problem) is kind
    assert problem.where == "/data/x"
    assert os.strerror(number) in problem.what
    assert ("permissions" in problem.fix) == (name in ("EACCES", "EPERM"))


def test_a_full_disk_shows_the_bytes_needed_and_free(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=2048))
    with pytest.raises(OSError, match="left") as raised, naming(tmp_path / "new" / "x", 12_345):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert machine_error(raised.value).why == "12,345 bytes are needed; 2,048 bytes are free"
    assert asked == [tmp_path]  # the nearest folder that exists


def test_a_folder_that_cannot_be_read_hides_no_full_disk(monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.exists", refuse)
    problem = machine_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x"))
    assert (type(problem), problem.where, problem.why) == (ResourceError, "/data/x", "")


def test_a_failed_rename_names_the_final_path():
    problem = machine_error(OSError(errno.EIO, "Input/output error", "/data/.x.tmp-1", None, "/data/x"))
    assert problem.where == "/data/x"


@pytest.mark.parametrize(("error", "name"), [
    (ModuleNotFoundError("No module named 'duckdb'", name="duckdb"), "'duckdb'"),
    (ImportError("libcudart.so.12: cannot open shared object file", name="torch._C"), "'torch'")])
def test_a_package_that_cannot_be_loaded_is_named(error, name):
    problem = machine_error(error)
    assert (type(problem), problem.where) == (ConfigError, sys.executable)
    assert name in problem.what
    assert environment_hint() in problem.fix


@pytest.mark.parametrize("error", [ValueError("shapes differ"), RuntimeError("size mismatch"), KeyError("memory"),
                                   ImportError("cannot import name 'x' from 'common.run'", name="common.run")])
def test_a_bug_is_not_a_fault_of_the_machine(error):
    assert machine_error(error) is None


@pytest.mark.parametrize(("megabytes", "enough"), [(500, False), (1279, False), (1280, True), (None, True)])
def test_a_memory_limit_below_the_minimum_is_refused(monkeypatch, megabytes, enough):
    limit = resource.RLIM_INFINITY if megabytes is None else megabytes << 20
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (limit, limit))
    if enough:
        require_memory()
    else:
        with refused(ResourceError, "memory", names=[megabytes, 1280], fix=["ulimit -v"]):
            require_memory()
    assert ("ulimit -v" in machine_error(MemoryError()).fix) == (megabytes is not None)


def test_the_hint_prefers_an_existing_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "common" / "command.py"))
    assert environment_hint() == f"source {tmp_path / 'setup.sh'}"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert environment_hint() == f"source {tmp_path / '.venv' / 'bin' / 'activate'}"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))  # which is active, and lacks the package
    assert environment_hint() == f"source {tmp_path / 'setup.sh'}"
