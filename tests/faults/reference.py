"""Undisturbed runs of all stages. Every run is made only once, and all test processes share it."""

import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from common.lock import FolderLock
from tests.errors import Outcome
from tests.faults.forking import Forks
from tests.faults.world import STAGES, World, write_raw

COMMON = "export"  # the stage that has run before the cases of the kinds again and forced
FORCED = "runs/quantization/tea/rqvae-td/"  # the run that the case "rqvae forced" deletes and repeats


class Case(NamedTuple):
    """A command, the files before it, and the files after its undisturbed run.

    There are three kinds. fresh: a stage runs for the first time. again: the stages have run before, and this stage
    writes other contents. forced: the stages have run before, and this stage repeats its finished run.
    """

    name: str              # the stage and the kind
    script: str
    words: list[str]
    repeated: list[str]    # the flags of the command that continues after a fault
    before: World
    after: World
    operations: list[str]  # the name and the path of each operation of the undisturbed run, in order

    def points(self, *names: str) -> list[int]:
        """Return the numbers of the operations with these names, or of all operations."""
        return [number for number, operation in enumerate(self.operations, start=1)
                if not names or operation.split()[0] in names]

    def point(self, name: str, part: str) -> int:
        """Return the number of the last operation `name` with a path that contains `part`."""
        return max(number for number in self.points(name) if part in self.operations[number - 1])

    def check_unharmed(self, world: World) -> None:
        """Fail if an earlier file has changed, unless it is already the new one, or if an artifact is damaged."""
        now, after = world.files(), self.after.files()
        changed = [name for name, content in self.before.files().items() if now.get(name) not in (
            content, after.get(name)) and not (self.name.endswith("forced") and name.startswith(FORCED))]
        assert not changed, f"changed: {changed}"
        assert not world.mismatched(), f"do not match their meta files: {world.mismatched()}"

    def check_repeated(self, world: World, outcome: Outcome) -> None:
        """Fail if the repeated command did not succeed, or if the files differ from those of the undisturbed run."""
        assert outcome.code == 0, outcome.err
        assert "Traceback" not in outcome.err, outcome.err
        found, expected = world.files(), self.after.files()
        different = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        assert not different, f"other bytes: {different}"
        assert not world.temporary(), f"left: {world.temporary()}"


class Reference:
    """The undisturbed runs. They are in the folder `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    @cached_property
    def forks(self) -> Forks:
        return Forks()

    def close(self) -> None:
        if "forks" in vars(self):
            self.forks.close()

    def run(self, world: World, script: str, words: list[str], fault: dict) -> Outcome:
        """Run a command as fast as the system can do it."""
        if sys.platform != "linux":  # forking is not safe there
            return world.run(script, *words, fault=fault)
        return self.forks.run(script, words, world.root, fault)

    def before(self, name: str) -> World:
        """Return the state before the first run of a stage."""
        place = list(STAGES).index(name)
        return self.after(list(STAGES)[place - 1]) if place else self._raw()

    def after(self, name: str) -> World:
        """Return the state after the first run of a stage."""
        return self.case(name).after

    def case(self, name: str, kind: str = "fresh") -> Case:
        """Return a case, and make its undisturbed run if no test has made it yet."""
        stage = STAGES[name]
        before = self.before(name) if kind == "fresh" else self.after(name if name == "export_t5" else COMMON)
        flags = stage.flags.split() + (stage.other.split() if kind == "again" else [])
        words = [*flags, "--force"] if kind == "forced" else flags
        folder = self.folder / f"{name} {kind}"
        after, log = World(folder / "world"), folder / "operations.txt"
        with FolderLock(folder, wait=True):
            if not log.exists():
                before.copy(after.root)
                outcome = self.run(after, stage.script, words, {"log": str(folder / "log.txt")})
                assert outcome.code == 0, outcome.err
                (folder / "log.txt").rename(log)
        operations = log.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return Case(f"{name} {kind}", stage.script, words, flags, before, after, operations)

    def _raw(self) -> World:
        world = World(self.folder / "raw" / "world")
        with FolderLock(self.folder / "raw", wait=True):
            if not world.root.exists():
                write_raw(world.root / "raw")
        return world
