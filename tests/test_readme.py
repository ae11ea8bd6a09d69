"""The programs, commands and flags of the README files."""

import re
import shlex

import pytest
from conftest import ROOT, spawn
from PIL import Image

import prepare
import test as upscale
import train

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]


def code(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_python_programs_run_and_upscale(tmp_path):
    for name in ("weights", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    (from_python,) = code("README.md", "python")
    from_onnx = code("weights/README.md", "python")[-1]
    here = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    export = [ROOT / "test.py", "--export", "srcnn_x3.onnx", "--scale", 3]
    for words in (["-c", from_python], export, ["-c", from_onnx]):
        result = spawn(*words, **here)
        assert (result.returncode, result.stderr) == (0, "")
    ours, onnx = (Image.open(tmp_path / f"astronaut_{name}.png") for name in ("x3", "onnx"))
    assert ours.size == onnx.size == (810, 810)


def commands() -> list[tuple[str, list[str]]]:
    """Return (script, arguments) of all command lines of the scripts on the pages."""
    found = []
    for page in PAGES:
        for block in code(str(page.relative_to(ROOT)), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"python (prepare|train|test)\.py (.*)", line.partition("#")[0])
                if match and "..." not in line and "$" not in line:
                    found.append((match[1], shlex.split(match[2])))
    return found


@pytest.mark.parametrize(("script", "argv"), commands())
def test_the_commands_have_valid_flags(script, argv):
    module = {"prepare": prepare, "train": train, "test": upscale}[script]
    module.get_args_parser().parse_args(argv)


def test_the_tables_of_flags_are_those_of_the_scripts():
    text = (ROOT / "tests" / "README.md").read_text()
    for name, module in ("prepare", prepare), ("train", train), ("test", upscale):
        section = text.split(f"### {name}.py")[1].split("###")[0]
        rows = dict(re.findall(r"^\| `(.*?)` \| (.*?) \|", section, re.M))
        actions = [a for a in module.get_args_parser()._actions if a.dest != "help"]
        flags = [", ".join(a.option_strings) or a.metavar for a in actions]
        assert list(rows) == flags, name
        for action, flag in zip(actions, flags):
            default = action.default
            if isinstance(default, list):
                default = " ".join(map(str, default))
            if default not in (None, False, 0, ""):
                assert rows[flag].strip() == str(default), flag


def test_code_lines_of_the_first_page_are_narrow():
    for language in ("bash", "python"):
        for block in code("README.md", language):
            assert all(len(line) <= 80 for line in block.splitlines())
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
