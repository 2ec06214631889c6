"""Gives damaged and malicious files to the package's readers, and tells which it did not stand.

    python test/fuzz/fuzz.py KIND [KIND...] [--mutants 5000] [--seed 1]     KIND: a name of kinds.py, or all

A reader may succeed or raise a UserError of one line. Everything else is a failure: another exception, more
than 10 s of processor time, more than 1 GB, a file that is left or half-written, or the death of the process.

Each kind is read in a child process. Its limits are the kernel's, so that also compiled code is ended. Mutant
I of a seed is always the same bytes: `--keep FOLDER` writes those that failed there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / folder)
    for folder in ("", "bag", "model", "lab/training", "lab/lerobot")
]
os.environ["OMP_NUM_THREADS"] = "1"

from kinds import KINDS, Kind  # noqa: E402

from deer_vla_ros.errors import UserError  # noqa: E402

SECONDS = 10
"""The most processor time for one file."""
PATIENCE = 120.0
"""The most time for one file on a clock [s]: a reader that only waits takes no processor time."""
BYTES = 10**9
"""The most memory, and the largest file, that one reading may take in addition to what the process has."""
RESERVED = 4 * BYTES
"""What one reading may reserve without filling it, as Python does where more is read than a file has."""
MEMORY = "took over 1 GB"
LONGEST_LINE = 1000
"""The most characters of an error's line, without the path."""
MOST_DEATHS = 20
"""A kind is given up after so many dead processes: each may have cost SECONDS."""


@dataclass
class Result:
    """What happened to the mutants of one kind. failures: mutant number and what it did. slowest [s of
    processor time] and largest [bytes]: of any one reading."""

    kind: str
    mutants: int = 0
    read: int = 0
    refused: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    def take(self, number: int, outcome: str, seconds: float, largest: int) -> None:
        self.mutants += 1
        self.read += outcome == "read"
        self.refused += outcome == "refused"
        if outcome not in ("read", "refused"):
            self.failures.append((number, outcome))
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, largest)

    def lines(self) -> list[str]:
        """The figures, and each different failure with its number of mutants and the first of them."""
        lines = [
            f"{self.kind:24} {self.mutants:6} mutants {self.read:6} read {self.refused:6} refused "
            f"{len(self.failures):5} failed, slowest {self.slowest:5.2f} s, most {self.largest / 1e6:4.0f} MB"
        ]
        first = {}
        for number, failure in self.failures:
            first.setdefault(failure, number)
        counts = Counter(failure for _, failure in self.failures)
        lines += [
            f"    {count:5} x, first mutant {first[each]}: {each}" for each, count in counts.most_common()
        ]
        return lines


def mutant(kind: Kind, whole: bytes, seed: int, number: int) -> bytes:
    """The bytes of mutant `number`; always the same for one version of this file and of Python."""
    random = Random(f"{kind.name} {seed} {number}")
    return random.choice(kind.mutations)(whole, random)


def fuzz(kind: Kind, mutants: int, seed: int, keep: Path | None = None) -> Result:
    """Reads so many mutants of a kind."""
    result, number, deaths = Result(kind.name), 0, 0
    while number < mutants and deaths < MOST_DEATHS:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            receiver, sender = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(receiver)
                _child(kind, Path(folder), number, mutants, seed, sender)
            os.close(sender)
            number, death = _follow(receiver, child, number, result)
            if death:
                deaths += 1
                result.take(number, death, 0.0, 0)
                number += 1
            os.close(receiver)
    if keep is not None and result.failures:
        _keep(kind, seed, [failed for failed, _ in result.failures], keep)
    return result


def _follow(receiver: int, child: int, number: int, result: Result) -> tuple[int, str]:
    """Takes what a child reports until it ends. Returns the next mutant, and how the child died if it did."""
    with open(receiver, "rb", closefd=False) as reports:
        hung = False
        while True:
            if not select.select([reports], [], [], PATIENCE)[0]:
                os.kill(child, signal.SIGKILL)
                hung = True
            line = reports.readline()
            if not line:
                break
            result.take(*json.loads(line))
            number += 1
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if hung:
        return number, f"waited over {PATIENCE:.0f} s"
    if status == 0:
        return number, ""
    if status > 0:
        raise RuntimeError(
            f"{result.kind}: the whole file cannot be read, or this program is wrong: see above"
        )
    name = signal.Signals(-status).name
    return number, f"took over {SECONDS} s" if name == "SIGXCPU" else f"the process died: {name}"


def _child(kind: Kind, folder: Path, number: int, mutants: int, seed: int, sender: int) -> None:
    """Reads mutants from `number` on, and reports each. It never returns."""
    status = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        warnings.simplefilter("ignore")
        work, scratch = folder / "work", folder / "scratch"
        work.mkdir(), scratch.mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
        kind.make(work)
        path = work / kind.file
        whole = path.read_bytes()
        kind.read(work)  # imports, and fills caches
        path.write_bytes(whole)  # some readers write to the file, too
        before = _listing(folder)
        data = _status("VmData")
        resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for each in range(number, mutants):
            path.write_bytes(mutant(kind, whole, seed, each))
            _limit_data(data + BYTES)
            report = _read(kind, work, each)
            if report[1].startswith(MEMORY):
                # It may only have reserved the memory: with more room, its peak decides.
                _limit_data(data + RESERVED)
                report = _read(kind, work, each)
                if report[1].startswith(f"{MEMORY}: "):
                    report[1] = "refused"
            path.write_bytes(whole)
            if report[1] in ("read", "refused") and (left := _listing(folder) ^ before):
                report[1] = f"left or changed {sorted(left)[0]}"
                before = _listing(folder)
            os.write(sender, json.dumps(report).encode() + b"\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _limit_data(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))


def _read(kind: Kind, work: Path, number: int) -> list:
    """[number, outcome, seconds, bytes] of one reading."""
    if _status("VmHWM") - _status("VmRSS") > BYTES // 4:  # the last reading took much
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory begins anew, which takes time
    memory, begin = _status("VmRSS"), time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(begin) + SECONDS + 1, resource.RLIM_INFINITY))
    try:
        kind.read(work)
        outcome = "read"
    except UserError as error:
        outcome = _judge(error, work)
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)
        ours = [each for each in at if "deer_vla_ros" in each.filename] or at
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        outcome = f"{type(error).__name__} at {place}: {_shape(str(error))}"
    seconds, peak = time.process_time() - begin, _status("VmHWM") - memory
    if peak > BYTES:
        outcome = MEMORY
    return [number, outcome, seconds, max(peak, 0)]


def _judge(error: UserError, work: Path) -> str:
    """Whether a UserError is one line that can be printed, and was not made of a limit of this process."""
    line = str(error).replace(str(work), "")
    if len(line.splitlines()) != 1:
        return f"an error of {len(line.splitlines())} lines: {_shape(line)}"
    if len(line) > LONGEST_LINE:
        return f"an error of {len(line)} characters: {_shape(line)}"
    chain: BaseException | None = error
    while chain is not None:
        if _lacks_memory(chain):
            return f"{MEMORY}: {_shape(line)}"
        if isinstance(chain, OSError) and chain.errno == 27:  # EFBIG
            return f"wrote a file of over 1 GB: {_shape(line)}"
        chain = chain.__cause__ or chain.__context__
    return "refused"


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "can't allocate" in str(error) or "Cannot allocate" in str(error)


def _shape(message: str) -> str:
    """The beginning of a message without its numbers, so that equal failures are counted together."""
    return "".join("#" if letter.isdigit() else letter for letter in " ".join(message.split())[:100])


def _listing(folder: Path) -> set[tuple[str, int]]:
    """Every path below a folder, with its size."""
    return {(str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*")}


def _status(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _keep(kind: Kind, seed: int, numbers: list[int], keep: Path) -> None:
    """Writes the mutants of these numbers."""
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        kind.make(Path(folder))
        whole = (Path(folder) / kind.file).read_bytes()
        for number in numbers:
            name = f"{kind.name}-{seed}-{number}-{Path(kind.file).name}"
            (keep / name).write_bytes(mutant(kind, whole, seed, number))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="+", metavar="KIND", help=f"{', '.join(KINDS)}, or all")
    parser.add_argument("--mutants", type=int, default=200, help="of each kind (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the files that failed there")
    given = parser.parse_args(arguments)
    names = list(KINDS) if given.kinds == ["all"] else given.kinds
    if unknown := [name for name in names if name not in KINDS]:
        parser.error(f"no kind {', '.join(unknown)}: give {', '.join(KINDS)}, or all")
    failed = 0
    for name in names:
        result = fuzz(KINDS[name], given.mutants, given.seed, given.keep)
        print("\n".join(result.lines()), flush=True)
        failed += bool(result.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
