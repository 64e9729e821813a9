"""The processes of the storm: who is started, killed, missed and started again."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.storm import disturb
from tests.storm.control import Control
from tests.storm.hazards import Plan

LAYOUT, CUT, HOG, CROWD, GREEDY, DISTURBER, MAIN = 96, 98, 99, 100, 101, 110, 127
"""Seats of processes that are not workers; theirs are 0 and on."""

REGIONS = 2


@dataclass
class Member:
    """A live process. ``kill_at``: when it will be killed, if it still lives."""

    seat: int
    role: str
    kill_at: float


class Crew:
    """All of them. One seed makes all others: of each life of each seat."""

    def __init__(
        self, worker: Path, control: Control, plan: Plan, seed: int, workers: int, hog_mib: int
    ) -> None:
        self.members: dict[int, Member] = {}
        self.kills = 0
        self.lives = 0
        self._worker, self._control, self._plan = worker, control, plan
        self._seed, self._workers, self._hog = seed, workers, hog_mib
        self._life = dict.fromkeys(range(MAIN + 1), 0)
        self._again: list[tuple[float, int]] = []
        self._population = workers
        self._next_population = 0.0
        self._rng = random.Random(seed)

    def start(self) -> None:
        """Everybody."""
        plan = self._plan
        for seat in range(self._workers):
            self._again.append((0, seat))
        if plan.layout:
            self._again += [(0, LAYOUT + region) for region in range(REGIONS)]
        seats = {"cut": CUT, "hog": HOG, "crowd": CROWD, "greedy": GREEDY}
        self._again += [(0, seats[role]) for role in plan.roles]
        for number, name in enumerate(sorted(plan.disturbances)):
            self._disturb(DISTURBER + number, name)

    def role(self, seat: int) -> tuple[str, list[str], Path | None]:
        """The role of a seat, its arguments and its cgroup."""
        tight = "memcg" in self._plan.disturbances and seat % 8 == 7
        match seat:
            case 96 | 97:
                return "layout", [str(seat - LAYOUT), self._plan.layout], None
            case 98:
                return "cut", [""], None
            case 99:
                return "hog", [str(self._hog)], None
            case 100:
                return "crowd", ["100"], disturb.WORKERS
            case 101:
                return "greedy", [""], disturb.GREEDY
        group = disturb.TIGHT if tight else disturb.WORKERS
        return "work", ["", *self._plan.actions], group

    def spawn(self, seat: int, role: str, arguments: list[str], group: Path | None) -> int:
        """A process of the C program."""
        self._life[seat] += 1
        rng = random.Random(f"{self._seed}/{seat}/{self._life[seat]}")
        life = str(rng.getrandbits(63))
        command = [str(self._worker), role, str(self._control.path), str(seat), life, *arguments]
        environment = {"STORM_CGROUP": str(group)} if group else {}
        pid = os.posix_spawn(self._worker, command, environment)
        # some while they begin, some in the middle of it; always some, to the end
        longest = 6 if rng.random() < 0.5 else 120
        kills = role == "work" and self._plan.kill
        self.members[pid] = Member(
            seat, role, time.monotonic() + rng.uniform(0.02, longest) if kills else float("inf")
        )
        with suppress(OSError):
            first = role in ("hog", "greedy", "crowd")
            Path(f"/proc/{pid}/oom_score_adj").write_text("1000" if first else "0")
        self.lives += role == "work"
        return pid

    def _disturb(self, seat: int, name: str) -> None:
        what = disturb.DISTURBANCES[name]
        rng = random.Random(f"{self._seed}/{name}")
        pid = os.fork()
        if pid:
            self.members[pid] = Member(seat, name, float("inf"))
            return
        status = 1
        try:
            while not self._control.stop:
                self._control.beat(seat, name, os.getpid())
                start = time.monotonic()
                what.turn(rng)
                # the others are to get on, too, however slow the machine is
                took = time.monotonic() - start
                time.sleep(rng.uniform(0, what.pause) + min(2 * took, 60))
            status = 0
        except Exception as error:
            self._control.find(f"{name}: {error!r}")
        finally:
            os._exit(status)

    def turn(self) -> None:
        """Bury who died, kill whose time has come, start who is missing."""
        now = time.monotonic()
        self.reap()
        for pid, member in self.members.items():
            if member.kill_at <= now:
                member.kill_at = float("inf")
                self.kills += 1
                os.kill(pid, signal.SIGKILL)
        if now > self._next_population:
            self._population = self._rng.randint(2, self._workers)
            self._next_population = now + self._rng.uniform(5, 30)
        seated = {member.seat for member in self.members.values()}
        later: list[tuple[float, int]] = []
        for when, seat in self._again:
            idle = seat < LAYOUT and seat >= self._population
            if when > now or idle or seat in seated:
                later.append((when, seat))
            else:
                role, arguments, group = self.role(seat)
                self.spawn(seat, role, arguments, group)
        self._again = later

    def reap(self) -> None:
        """Processes that have ended. Orphans come to us as well, and are nobody's business."""
        while True:
            try:
                pid, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            member = self.members.pop(pid, None)
            if not member:
                continue
            self._control.clear(member.seat)
            status = os.waitstatus_to_exitcode(raw)
            if status not in (0, -signal.SIGKILL):
                self._control.find(
                    f"process {member.seat} ({member.role}, life {self._life[member.seat]}) "
                    f"ended with {status}"
                )
            pause = {"crowd": 20.0, "greedy": 4.0, "hog": 5.0}.get(member.role, 0.0)
            if member.seat < DISTURBER:
                self._again.append((time.monotonic() + pause, member.seat))

    def end(self, patience: float) -> bool:
        """Let all end by themselves, then kill them. Whether all have gone."""
        self._control.stop = True
        deadline = time.monotonic() + patience
        while self.members and time.monotonic() < deadline:
            self.reap()
            self._control.beat(MAIN, "end", os.getpid())
            time.sleep(0.1)
            if time.monotonic() > deadline - patience / 2:
                for pid in self.members:
                    os.kill(pid, signal.SIGKILL)
        for group in (disturb.WORKERS, disturb.TIGHT, disturb.GREEDY):
            with suppress(OSError):
                (group / "cgroup.kill").write_text("1")
        self.reap()
        return not self.members
