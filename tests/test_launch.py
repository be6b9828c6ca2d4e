"""Launch scripts: they parse, and do what their first lines say."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_parses_and_explains_itself(script):
    subprocess.run(["bash", "-n", script], check=True)
    bare = subprocess.run(["bash", script], capture_output=True, text=True)
    assert bare.returncode == 2 and f"launch/{script.name}" in bare.stderr


@pytest.mark.parametrize("codes, calls", [([75, 75, 0], 3), ([3], 1)])
def test_pod_runs_again_while_preempted(tmp_path, codes, calls):
    """`run` repeats after exit code 75 and hands on every other one."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/bash\necho call >> {tmp_path}/calls\ncodes=({" ".join(map(str, codes))})\n'
                      f'exit "${{codes[$(( $(wc -l < {tmp_path}/calls) - 1 ))]}}"\n')
    sleep = tmp_path / "sleep"
    sleep.write_text("#!/bin/bash\n")
    for program in (gcloud, sleep):
        program.chmod(0o755)
    result = subprocess.run(["bash", ROOT / "launch/tpu_pod.sh", "run", "--config", "configs/cifar10_r18.py"],
                            env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert result.returncode == codes[-1], result.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == calls
