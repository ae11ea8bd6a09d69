"""What README.md shows, run as it stands there."""

import re
import shlex

from conftest import ROOT, spawn
from PIL import Image

README = (ROOT / "README.md").read_text()


def test_the_programs_of_the_page_run_and_enlarge(tmp_path):
    for name in "weights", "assets":
        (tmp_path / name).symlink_to(ROOT / name)
    from_python, from_onnx = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(from_python.splitlines()) <= 6 and len(from_onnx.splitlines()) <= 12
    export = re.search(r"`python test\.py (--export .*?)`", README.replace("\n", " "))[1]
    here = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    for words in (["-c", from_python], [ROOT / "test.py", *shlex.split(export)], ["-c", from_onnx]):
        result = spawn(*words, **here)
        assert (result.returncode, result.stderr) == (0, "")
    ours, onnx = (Image.open(tmp_path / f"chart_{name}.png") for name in ("x3", "onnx"))
    assert ours.size == onnx.size == (576, 576)
