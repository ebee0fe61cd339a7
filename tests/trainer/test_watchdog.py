import subprocess
import sys
import threading
import time

from rank_processes import ROOT

from foundation.errors import ExitCode
from trainer.recipe import WatchdogSection
from trainer.watchdog import Watchdog


def test_barks_at_silence_and_not_before() -> None:
    heard = threading.Event()
    dog = Watchdog(WatchdogSection(factor=5, at_least_minutes=0.3 / 60), bark=lambda _: heard.set())
    dog.step_done()
    dog.start()
    for _ in range(5):
        time.sleep(0.05)
        dog.step_done()
    assert not heard.is_set()
    assert heard.wait(timeout=5)


def test_patience_grows_with_the_steps() -> None:
    dog = Watchdog(WatchdogSection(factor=10, at_least_minutes=0.001))
    assert dog.patience() == 1800.0  # the first step compiles
    dog._steps.append(0.001)
    assert dog.patience() == 0.06
    dog._steps.extend([1.0, 2.0, 100.0])
    assert dog.patience() == 15.0
    assert Watchdog(WatchdogSection(at_least_minutes=40)).patience() == 2400.0


def test_the_first_step_may_take_longer_than_those_that_follow() -> None:
    heard = threading.Event()
    dog = Watchdog(WatchdogSection(factor=1, at_least_minutes=0.05 / 60), bark=lambda _: heard.set())
    dog.step_done()
    dog.start()
    assert heard.wait(timeout=5)
    heard.clear()
    dog = Watchdog(WatchdogSection(factor=1, at_least_minutes=0.05 / 60), bark=lambda _: heard.set())
    dog.start()
    assert not heard.wait(timeout=0.5)
    dog.stop()


def test_stopped_is_silent() -> None:
    heard = threading.Event()
    dog = Watchdog(WatchdogSection(factor=1, at_least_minutes=0.05 / 60), bark=lambda _: heard.set())
    dog.step_done()
    dog.start()
    dog.stop()
    assert not heard.wait(timeout=0.3)


def test_paused_is_silent_until_it_goes_on() -> None:
    heard = threading.Event()
    dog = Watchdog(WatchdogSection(factor=1, at_least_minutes=1 / 60), bark=lambda _: heard.set())
    dog.step_done()
    dog.start()
    with dog.paused():
        time.sleep(1.5)
    assert not heard.is_set()
    assert heard.wait(timeout=10)


def test_ends_a_hung_process_with_stacks_and_exit_code_75() -> None:
    script = (
        "import time\n"
        "from trainer.recipe import WatchdogSection\n"
        "from trainer.watchdog import Watchdog\n"
        "def hangs_here(): time.sleep(60)\n"
        "dog = Watchdog(WatchdogSection(factor=1, at_least_minutes=0.005))\n"
        "dog.step_done()\n"
        "dog.start()\n"
        "hangs_here()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == ExitCode.REQUEUE
    assert "hangs_here" in done.stderr


def test_connections_that_do_not_close_end_the_process() -> None:
    script = (
        "import time\n"
        "from trainer.watchdog import ends_within\n"
        "with ends_within(30): pass\n"
        "with ends_within(0.2): time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == ExitCode.REQUEUE
    assert "have not closed" in done.stderr
