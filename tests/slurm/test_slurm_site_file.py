"""The site file means the same to `submit` and to bash, or is refused: held against bash itself."""

import itertools
import subprocess
from pathlib import Path

import pytest

from foundation.errors import RecipeError
from slurm.site import Site, SiteFile, lines_for_bash, read_site

NASTY = "aZ09 \t\"'\\\\#$`~!&|;<>(){}[]*?=+-%^,.:/@\r\x0b\x0c\x1c\x85\u00e9\u2028"
NASTIEST = "a \"'\\#$~;\r"
NAMES = ("NETWORK_INTERFACE", "SRUN_OPTIONS", "PREFLIGHT_OPTIONS")


def read(folder: Path, text: str) -> Site | str:
    """What `submit` reads, or why it refuses."""
    path = folder / "site.env"
    path.write_bytes(text.encode())
    try:
        return read_site(path).site
    except RecipeError as error:
        return str(error)


def bash(text: str) -> list[str]:
    """What bash prints."""
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    return done.stdout.decode().split("\0")[:-1]


def test_every_value_of_a_few_characters_is_refused_or_read_as_bash_reads_it(tmp_path: Path) -> None:
    values = ["", *NASTY, *map("".join, itertools.product(NASTIEST, repeat=2))]
    values += [f"{quote}{value}{quote}" for quote in "\"'" for value in values]
    values += [f"{value} #{value}" for value in values[: len(NASTY) + 1]]
    accepted = {value: site for value in values if isinstance(site := read(tmp_path, f"QOS={value}\n"), Site)}
    assert len(accepted) > 100
    script = "".join(f"QOS={value}\nprintf '%s\\0' \"$QOS\"\n" for value in accepted)
    assert bash(script) == [site.qos or "" for site in accepted.values()]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "QOS=a;b",
            "QOS=a&",
            "QOS=a|cat",
            "QOS=a>b",
            "QOS=a(b)",
            "QOS=gpu#x",
            "QOS=#a",
            "QOS+=a",
            "QOS[0]=a",
        ),
        *("declare QOS=a", "readonly QOS=a", "true; QOS=a", "eval QOS=a", "unset QOS", "read QOS <<< a"),
        *("for QOS in a; do :; done", "[ 1 = 1 ] && QOS=a", " QOS=a", "QOS=a ACCOUNT=b", "QOS='a", "QOS=a\\"),
        *("QOS=a\r", "QOS=a\r\nACCOUNT=b\r", "GPUS_PER_NODE=08", "GPUS_PER_NODE=8_0", 'GPUS_PER_NODE=" 8"'),
    ],
)
def test_what_bash_reads_otherwise_is_refused(tmp_path: Path, text: str) -> None:
    assert isinstance(read(tmp_path, f"{text}\n"), str)


@pytest.mark.parametrize(
    "text",
    [
        *("export NCCL_IB_HCA=$NETWORK_INTERFACE B=${SRUN_OPTIONS}", "# QOS=a", "export A=1 # QOS=a"),
        *(
            'if [ "$QOS" = a ]; then module load x; fi',
            "module load PYTHON/3.11",
            "export MY_PYTHON=3",
            "QOS=a # b's",
        ),
    ],
)
def test_what_changes_nothing_of_ours_is_not(tmp_path: Path, text: str) -> None:
    assert isinstance(read(tmp_path, f"{text}\n"), Site)


@pytest.mark.parametrize(
    "text",
    [
        "if false; then\nNETWORK_INTERFACE=ib0\nfi",
        "cat > /dev/null <<END\nNETWORK_INTERFACE=ib0\nEND",
        "NETWORK_INTERFACE=ib1\nNETWORK_INTERFACE=ib0",
        "NETWORK_INTERFACE=ib0\nSRUN_OPTIONS='--a \"b c\"'",
        "source /dev/stdin <<< 'PREFLIGHT_OPTIONS''=--min-disk-gb=9'",
    ],
)
def test_a_job_has_what_submit_has_read_whatever_the_lines_do(tmp_path: Path, text: str) -> None:
    site = read(tmp_path, f"{text}\n")
    assert isinstance(site, Site)
    lines = lines_for_bash(SiteFile(site, tmp_path / "site.env", f"{text}\n"))
    printed = "".join(f"printf '%s\\0' \"${name}\"\n" for name in NAMES)
    shell = "".join(f"export {name}=of-the-shell\n" for name in NAMES)
    assert bash(shell + lines + printed) == [getattr(site, name.lower()) or "" for name in NAMES]


@pytest.mark.parametrize("option", ["--output=%t.log", "-o a", "--mem=1 --error a", "--output a"])
def test_what_ranks_say_stays_in_the_log(tmp_path: Path, option: str) -> None:
    refused = read(tmp_path, f"SRUN_OPTIONS='{option}'\n")
    assert isinstance(refused, str) and "the job's log is read for bad nodes" in refused
    assert isinstance(read(tmp_path, "SRUN_OPTIONS='--overcommit --x-o=1'\n"), Site)
